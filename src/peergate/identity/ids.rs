//! The identifiers that the kernel, the policy and the record share.
//!
//! Pure data: this module imports no other.

use std::fmt;

/// The id that stands for "not mapped in this user namespace": the kernel's default for
/// `/proc/sys/kernel/overflowuid` and `overflowgid` (user_namespaces(7)).
pub const OVERFLOW_ID: u32 = 65_534;

/// `(uid_t) -1`: no process can have it (setreuid(2) reads it as "leave unchanged").
const INVALID_ID: u32 = u32::MAX;

/// A numeric user id, as this process's user namespace shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uid(u32);

/// A numeric group id, as this process's user namespace shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gid(u32);

macro_rules! id {
    ($id:ident) => {
        impl $id {
            /// The id with this number.
            pub const fn new(raw: u32) -> Self {
                Self(raw)
            }

            /// The bare number.
            pub const fn raw(self) -> u32 {
                self.0
            }

            /// Whether the number is an id of its own. The overflow id is not: it stands for every id that this user
            /// namespace does not map. Nor is `-1`.
            pub const fn is_known(self) -> bool {
                self.0 != OVERFLOW_ID && self.0 != INVALID_ID
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(Uid);
id!(Gid);
