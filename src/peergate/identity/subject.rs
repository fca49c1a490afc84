//! What a policy may ask of a subject.

use crate::ids::{Gid, Uid};
use crate::unit::Units;

/// The user who logged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Login {
    /// It cannot be tied to the very process that connected.
    #[default]
    Unknown,
    /// No login started the process.
    None,
    /// This user's login started it.
    User(Uid),
}

impl Login {
    /// Whether it is known, if only that there is none.
    pub fn is_known(self) -> bool {
        self != Self::Unknown
    }

    /// The user, where there is one.
    pub fn user(self) -> Option<Uid> {
        if let Self::User(uid) = self { Some(uid) } else { None }
    }

    /// As the kernel writes it in /proc/PID/loginuid: 4294967295 stands for none.
    pub(crate) fn of_loginuid(raw: u32) -> Self {
        match Uid::new(raw) {
            _ if raw == u32::MAX => Self::None,
            uid if uid.is_known() => Self::User(uid),
            _ => Self::Unknown,
        }
    }
}

/// What a policy may ask. Implemented by [`Peer`](crate::Peer) for a live connection, and by any type that describes a
/// process that is not connected (`echod explain`).
pub trait Subject {
    /// The effective user id, which may be unmapped ([`Uid::is_known`]).
    fn uid(&self) -> Uid;

    /// The effective group id and all supplementary groups, in no particular order; some may be unmapped.
    fn gids(&self) -> &[Gid];

    /// Whether [`gids`](Subject::gids) holds all of them. `false` where the kernel gave no list.
    fn gids_complete(&self) -> bool;

    /// The user who logged in: the one whose login started the process, by the kernel's audit records (pam_loginuid(8)). It
    /// stays the same over su(1) and sudo(8). May cost system calls, as [`units`](Subject::units). By default not known.
    fn login(&self) -> Login {
        Login::Unknown
    }

    /// The systemd units around the very process that connected, or `None` where they cannot be
    /// tied to it. May cost system calls; a policy asks only when a rule depends on the answer.
    fn units(&self) -> Option<&Units>;
}
