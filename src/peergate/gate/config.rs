//! What a gate is made of, and what can be changed while it runs.

use std::io;
use std::sync::Arc;

use crate::audit::Audit;
use crate::permits::{Limits, Permits};
use crate::policy::Policy;
use crate::systemd::activation::Listener;

/// What is in force: replaced as a whole by [`Gate::set_config`](super::Gate::set_config), or only the policy by
/// [`Gate::set_policy`](super::Gate::set_policy).
#[derive(Debug)]
#[non_exhaustive]
pub struct GateConfig<T> {
    /// Which peers are admitted.
    pub policy: Arc<Policy<T>>,
    /// How many connections.
    pub limits: Limits,
    /// Whether the kernel attaches the sender's credentials to all data (SO_PASSCRED, unix(7)) on connections admitted
    /// from now on.
    pub pass_credentials: bool,
    /// Whether peers may send file descriptors: then the service takes them with
    /// [`Stream::receive_with_descriptors`](crate::Stream::receive_with_descriptors).
    pub take_descriptors: bool,
    /// What a peer gets that is turned away.
    pub replies: Replies,
}

impl<T> GateConfig<T> {
    /// This policy, the default [`Limits`] and [`Replies`], no credentials attached to data, no descriptors taken.
    pub fn new(policy: impl Into<Arc<Policy<T>>>) -> Self {
        Self {
            policy: policy.into(),
            limits: Limits::default(),
            pass_credentials: false,
            take_descriptors: false,
            replies: Replies::default(),
        }
    }
}

impl<T> Clone for GateConfig<T> {
    fn clone(&self) -> Self {
        let Self { policy, limits, pass_credentials, take_descriptors, replies } = self;
        Self {
            policy: Arc::clone(policy),
            limits: *limits,
            pass_credentials: *pass_credentials,
            take_descriptors: *take_descriptors,
            replies: replies.clone(),
        }
    }
}

/// What a peer gets that is turned away. May be empty.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Replies {
    /// Denied by the policy.
    pub denied: Arc<[u8]>,
    /// Admitted by the policy, but over a limit.
    pub busy: Arc<[u8]>,
}

/// [`Replies::text`].
impl Default for Replies {
    fn default() -> Self {
        Self::text()
    }
}

/// What a gate is made of.
#[derive(Debug)]
#[non_exhaustive]
pub struct Setup<T> {
    /// What to accept from.
    pub listeners: Vec<Listener>,
    /// What is in force at first.
    pub config: GateConfig<T>,
    /// Counts the connections that are admitted.
    pub permits: Permits,
    /// Where every verdict is recorded.
    pub audit: Audit,
    /// The first connection's number.
    pub first_connection: u64,
}

impl<T> Setup<T> {
    /// A gate before `listeners` that decides by `policy` and records in `audit`; everything else as most services
    /// want it. Change the fields to have it otherwise.
    ///
    /// # Errors
    /// InvalidInput where there is no listener, so that no connection could ever come.
    pub fn new(listeners: Vec<Listener>, policy: impl Into<Arc<Policy<T>>>, audit: Audit) -> io::Result<Self> {
        if listeners.is_empty() {
            let message =
                "no listening socket: nothing was passed (systemd-socket-activate -l PATH PROGRAM passes one)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self { listeners, ..Self::without_listeners(policy, audit) })
    }

    /// As [`new`](Self::new) where no connection is to come any more: for closing what another process admitted.
    pub fn without_listeners(policy: impl Into<Arc<Policy<T>>>, audit: Audit) -> Self {
        Self {
            listeners: Vec::new(),
            config: GateConfig::new(policy),
            permits: Permits::new(),
            audit,
            first_connection: 1,
        }
    }
}
