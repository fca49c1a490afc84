//! axum behind the gate (feature `axum`).
//!
//! ```no_run
//! use axum::Router;
//! use axum::routing::{get, post};
//! use peergate::axum::require;
//! use peergate::gate::Replies;
//! use peergate::{Error, Service, Session, Terms};
//!
//! /// The further keys of a rule: `may-write = true`.
//! #[derive(Debug, Default, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
//! struct Access {
//!     may_write: bool,
//! }
//!
//! impl Terms for Access {}
//!
//! async fn whoami(session: Session<Access>) -> String {
//!     format!("uid {}\n", session.uid())
//! }
//!
//! fn main() -> Result<(), Error> {
//!     let writing = Router::new().route("/note", post(|| async { "taken\n" })).layer(require(|access: &Access| access.may_write));
//!     let app = Router::new().route("/", get(whoami)).merge(writing);
//!     Service::<Access>::from_systemd("note").policy_file("/etc/note.toml").replies(Replies::http()).block_on(|gate| async move {
//!         axum::serve(gate.listener(), app.into_make_service_with_connect_info::<Session<Access>>())
//!             .with_graceful_shutdown(gate.stopping())
//!             .await
//!     })
//! }
//! ```
//!
//! ```toml
//! # /etc/note.toml
//! [allow.writers]
//! users = ["alice"]
//! may-write = true
//!
//! [allow.readers]
//! groups = ["adm"]
//! ```
//!
//! Its Cargo.toml has `axum = "0.8"` and `serde = { version = "1", features = ["derive"] }` beside
//! `peergate = { version = "0.1", features = ["axum"] }`. tokio itself is needed only where the code names it.
//!
//! A layer is around all methods of a route that were added before it. Where only some of them need more, the layer goes
//! around those: `get(read).merge(post(write).layer(require(…)))`.
//!
//! `require` asks the rule in force at each request, so a reload counts for live connections too; its 403 leaves the connection
//! open. A peer that no rule admits gets [`Replies::denied`](crate::gate::Replies::denied) and the end of its connection, which
//! [`Replies::http`](crate::gate::Replies::http) makes a response: without it the peer reads a line of text, which is no HTTP. A
//! revoked connection that is idle gets the same.
//!
//! A response that streams without end holds up a stop, for five seconds. Its stream ends in time if it also waits for
//! [`Handle::stopping`](crate::tokio::Handle::stopping): the handle is cheap to clone, into axum's state too. When the session is
//! revoked, the connection ends in the middle of the response; a stream that waits for [`Session::revoked`] can end before.
//!
//! A tonic service is a tower service too, and rides on the same listener: `Routes::into_axum_router` of tonic.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use tower_layer::Layer;
use tower_service::Service;

use crate::permits::Terms;
use crate::session::Session;
use crate::tokio::{Connection, Listener};

/// For `axum::serve`. The address of a connection is its session.
impl<T: Terms> axum::serve::Listener for Listener<T> {
    type Io = Connection<T>;
    type Addr = Session<T>;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let connection = Listener::accept(self).await;
        let session = connection.session().clone();
        (connection, session)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a listener has no session"))
    }
}

impl<T: Terms> Connected<IncomingStream<'_, Listener<T>>> for Session<T> {
    fn connect_info(stream: IncomingStream<'_, Listener<T>>) -> Self {
        stream.remote_addr().clone()
    }
}

/// The session of the connection on which the request came. 500 where the app is not served with
/// `into_make_service_with_connect_info::<Session<T>>()`.
impl<S: Send + Sync, T: Terms> FromRequestParts<S> for Session<T> {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        let info = parts.extensions.get::<ConnectInfo<Self>>();
        info.map(|ConnectInfo(session)| session.clone()).ok_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// A layer that lets a request through only if the terms of the rule that admits its peer allow it. Otherwise the denial is
/// recorded, and the answer is 403, which names no rule. So it is for every request where the app is not served with
/// `into_make_service_with_connect_info::<Session<T>>()`.
pub fn require<T: Terms, F: Fn(&T) -> bool + Clone>(allows: F) -> Require<T, F> {
    Require { allows, terms: PhantomData }
}

/// Made by [`require`].
pub struct Require<T, F> {
    allows: F,
    terms: PhantomData<fn(&T)>,
}

impl<T, F: Clone> Clone for Require<T, F> {
    fn clone(&self) -> Self {
        Self { allows: self.allows.clone(), terms: PhantomData }
    }
}

impl<T, F> std::fmt::Debug for Require<T, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Require")
    }
}

impl<S, T, F: Clone> Layer<S> for Require<T, F> {
    type Service = Required<S, T, F>;

    fn layer(&self, inner: S) -> Self::Service {
        Required { inner, require: self.clone() }
    }
}

/// A service behind [`require`].
#[derive(Debug)]
pub struct Required<S, T, F> {
    inner: S,
    require: Require<T, F>,
}

impl<S: Clone, T, F: Clone> Clone for Required<S, T, F> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), require: self.require.clone() }
    }
}

impl<S, T, F> Service<Request> for Required<S, T, F>
where
    S: Service<Request, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
    T: Terms,
    F: Fn(&T) -> bool + Clone,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let session = request.extensions().get::<ConnectInfo<Session<T>>>();
        if session.is_some_and(|ConnectInfo(session)| session.require(&self.require.allows)) {
            return Box::pin(self.inner.call(request));
        }
        let body = "{\"message\":\"Unauthorized access\"}\n";
        let denied = (StatusCode::FORBIDDEN, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        Box::pin(std::future::ready(Ok(denied)))
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt;

    use super::*;

    /// The app is not served with its session: nothing is known of the peer.
    #[test]
    fn a_request_without_a_session_passes_no_layer() {
        let app = Router::new().route("/", get(|| async { "inside\n" })).layer(require(|(): &()| true));
        let runtime = ::tokio::runtime::Builder::new_current_thread().build().unwrap();
        let answer = runtime.block_on(app.oneshot(Request::new(Body::empty()))).unwrap();
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    }
}
