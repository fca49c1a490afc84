//! What a policy may ask of a subject.

use crate::ids::{Gid, Uid};
use crate::unit::Units;

/// What a policy may ask. Implemented by [`Peer`](crate::Peer) for a live connection, and by any type that describes a
/// process that is not connected (`echod explain`).
pub trait Subject {
    /// The effective user id, which may be unmapped ([`Uid::is_known`]).
    fn uid(&self) -> Uid;

    /// The effective group id and all supplementary groups, in no particular order; some may be unmapped.
    fn gids(&self) -> &[Gid];

    /// Whether [`gids`](Subject::gids) holds all of them. `false` where the kernel gave no list.
    fn gids_complete(&self) -> bool;

    /// The systemd units around the very process that connected, or `None` where they cannot be
    /// tied to it. May cost system calls; a policy asks only when a rule depends on the answer.
    fn units(&self) -> Option<&Units>;
}
