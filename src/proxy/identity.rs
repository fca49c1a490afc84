//! `identity = "peer"`: the service is connected to with the ids of the peer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use peergate::connect_as::{ConnectAs, Ids};
use peergate::peer::Peer;

use crate::forward::{Seen, Why};
use crate::upstream::Upstream;

/// The drop-in that gives the service what it needs, and where it goes.
const DROP_IN: &str = "peergate@NAME.service.d/identity.conf";

/// One for the whole process, from when a configuration first asks for it.
static THREAD: OnceLock<ConnectAs> = OnceLock::new();

/// Starts the thread that takes other ids. What keeps it from that, as a sentence.
pub fn start() -> Result<(), String> {
    if THREAD.get().is_some() {
        return Ok(());
    }
    match ConnectAs::start() {
        Ok(thread) => {
            let _ = THREAD.set(thread);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(format!(
            "`identity` = \"peer\" needs the capabilities CAP_SETUID and CAP_SETGID; expected the drop-in {DROP_IN} (an example is \
             in /usr/share/doc/peergate/examples), or `identity` = \"own\""
        )),
        Err(error) => Err(format!("`identity` = \"peer\": starting its thread: {error}")),
    }
}

/// Connects this socket to the service with the ids of the peer of the other one. Whose these are.
pub fn connect(socket: OwnedFd, to: &Upstream, peer: &impl AsFd, may_be_root: bool) -> Result<(OwnedFd, Seen), Why> {
    let Some(thread) = THREAD.get() else { return Err(Why::Error(Errno::EPERM as i32)) };
    let ids = Peer::ids_of(peer).map_err(why)?;
    let seen = if ids.uid().raw() == 0 { Seen::Root } else { Seen::Peer };
    if seen == Seen::Root && !may_be_root {
        return Err(Why::Root);
    }
    let Some(groups) = Peer::supplementary_of(peer).map_err(why)? else { return Err(Why::Groups) };
    let address = to.to_std().map_err(why)?;
    let connected = thread.connect(socket, &address, Ids { uid: ids.uid(), gid: ids.gid(), groups }).map_err(why)?;
    Ok((connected, seen))
}

fn why(error: io::Error) -> Why {
    match error.raw_os_error() {
        Some(number) => Why::Error(number),
        None if error.kind() == io::ErrorKind::InvalidInput => Why::Unmapped,
        None => Why::Error(Errno::EIO as i32),
    }
}
