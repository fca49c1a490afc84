//! The health service as two users see it: curl(1) speaks gRPC, whose request is an HTTP/2 POST with a frame of five bytes.
//! Needs root, for peers of other users.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

/// Users that no user database has.
const WATCHER: u32 = 64001;
const STRANGER: u32 = 64002;

struct Running {
    service: Child,
    place: PathBuf,
}

impl Running {
    /// Under systemd-socket-activate, with this policy.
    fn start(policy: &str) -> Self {
        let place = std::env::temp_dir().join(format!("tonic-health-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("policy.toml"), policy).unwrap();
        // An empty message: not compressed, of length 0.
        fs::write(place.join("request"), [0; 5]).unwrap();
        let socket = place.join("socket");
        let service = Command::new("systemd-socket-activate")
            .arg("-l")
            .arg(&socket)
            .arg(env!("CARGO_BIN_EXE_tonic_health"))
            .arg(place.join("policy.toml"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut running = Self { service, place };
        let mut stderr = BufReader::new(running.service.stderr.take().unwrap()).lines().map_while(Result::ok);
        // The socket's file is there before anyone listens.
        assert!(stderr.any(|line| line.contains("Listening on")), "systemd-socket-activate, of systemd");
        // Read to the end, so that the pipe does not fill.
        thread::spawn(move || stderr.for_each(drop));
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        running
    }

    /// `grpc.health.v1.Health/Check` as this user: the headers and trailers, and the answer.
    fn check(&self, uid: u32) -> (String, Vec<u8>) {
        // curl opens it anew, as that user.
        let headers = fs::File::create(self.place.join("headers")).unwrap();
        headers.set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
        let Output { stdout, .. } = Command::new("setpriv")
            .args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()])
            .args(["curl", "--silent", "--max-time", "60", "--http2-prior-knowledge", "--dump-header", "/dev/stderr"])
            .args(["--header", "content-type: application/grpc", "--header", "te: trailers", "--data-binary"])
            .arg(format!("@{}", self.place.join("request").display()))
            .arg("--unix-socket")
            .arg(self.place.join("socket"))
            .arg("http://localhost/grpc.health.v1.Health/Check")
            .stderr(headers)
            .output()
            .unwrap();
        (fs::read_to_string(self.place.join("headers")).unwrap(), stdout)
    }

    /// Every byte that comes, as this user, of a peer that says nothing.
    fn raw(&self, uid: u32) -> Vec<u8> {
        let mut client = Command::new("setpriv")
            .args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()])
            .args(["nc", "-N", "-U"])
            .arg(self.place.join("socket"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        client.stdin.take().unwrap().write_all(b"").unwrap();
        client.wait_with_output().unwrap().stdout
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.service.kill();
        let _ = self.service.wait();
        let _ = fs::remove_dir_all(Path::new(&self.place));
    }
}

#[test]
fn one_user_may_watch_and_another_is_told_that_it_may_not() {
    let running = Running::start(&format!("[allow.monitoring]\nusers = [{WATCHER}]\n"));
    let (headers, answer) = running.check(WATCHER);
    // HealthCheckResponse: field 1 is SERVING.
    assert_eq!(answer, [0, 0, 0, 0, 2, 8, 1], "{headers}");
    assert!(headers.contains("grpc-status: 0"), "{headers}");
    let (headers, answer) = running.check(STRANGER);
    assert_eq!(answer, b"", "{headers}");
    let told = running.raw(STRANGER);
    // SETTINGS, then GOAWAY with INADEQUATE_SECURITY, which gRPC reads as PERMISSION_DENIED.
    assert_eq!((told[3], told[12], told[25]), (4, 7, 0xc), "{told:?}");
    assert!(told.ends_with(b"Unauthorized access"), "{told:?}");
}
