//! The proxy in front of a service that is the test's own.

use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Client, Echod, Place, Start};

/// The service behind the gate.
pub struct Behind {
    pub listener: UnixListener,
    pub path: PathBuf,
}

impl Behind {
    pub fn at(place: &Arc<Place>) -> Self {
        let path = place.path("behind");
        Self { listener: UnixListener::bind(&path).unwrap(), path }
    }

    /// The next connection from the proxy.
    pub fn accept(&self) -> Client {
        let (stream, _) = self.listener.accept().unwrap();
        Client::of(stream)
    }

    pub fn is_left_alone(&self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        let nobody = self.listener.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.listener.set_nonblocking(false).unwrap();
        nobody
    }
}

/// What the proxy is started with, and where the service is to be.
pub fn start(config: &str, more: &str) -> (Start, PathBuf) {
    let start = Start::bare();
    let path = start.place().path("behind");
    let listener = start.place().listener("socket");
    let text = format!("{config}\n[forward]\nto = \"{}\"\n{more}", path.display());
    (start.config(&text).socket("peergate@test.socket", listener), path)
}

pub fn serve(config: &str, more: &str) -> (Echod, Behind) {
    let (start, _) = start(config, more);
    let behind = Behind::at(start.place());
    (start.ready(), behind)
}

/// A connection through the proxy: both ends.
pub fn pair(proxy: &Echod, behind: &Behind) -> (Client, Client) {
    let client = proxy.connect();
    (client, behind.accept())
}
