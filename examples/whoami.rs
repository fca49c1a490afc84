//! Tells each client the credentials that the kernel has of it. Admits every user that the kernel can name.
//!
//! ```console
//! $ cargo build --example whoami
//! $ systemd-socket-activate -l /tmp/whoami.sock target/debug/examples/whoami &
//! $ nc -U /tmp/whoami.sock </dev/null
//! uid 1000, gid 1000, groups 4 27
//! pid 4242, command nc, unit session-3.scope, label unconfined
//! ```

use std::io::Write;

use peergate::{Admission, Gid, Policy, Rule, Service, Uid, User};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let policy = Policy::new([Rule::allow("everyone", ()).users([User::Any])], Uid::effective())?;
    Service::from_systemd("whoami").policy(policy).serve_inline(answer)?;
    Ok(())
}

/// Runs on the gate's thread and never blocks: the socket is non-blocking, and these few bytes fit into it.
fn answer(mut client: Admission<()>) {
    let (known, peer) = (client.peer.details(&client.socket), &client.peer);
    let groups: Vec<_> = peer.gids().iter().skip(1).map(Gid::to_string).collect();
    let or_unknown = |fact: Option<String>| fact.unwrap_or_else(|| "unknown".to_owned());
    let ids = format!("uid {}, gid {}, groups {}", peer.uid(), peer.gid(), groups.join(" "));
    let pid = or_unknown(peer.pid().map(|pid| pid.to_string()));
    let [command, unit, label] = [known.comm, known.unit, known.label].map(or_unknown);
    let answer = format!("{ids}\npid {pid}, command {command}, unit {unit}, label {label}\n");
    let _ = client.socket.write_all(answer.as_bytes());
}
