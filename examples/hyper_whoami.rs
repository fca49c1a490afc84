//! HTTP on hyper itself, with a service of tower: each peer is told its uid and the rule that admits it. Both take the
//! gate's connection as they take any other; the session goes along in the request's extensions.
//!
//! ```console
//! $ cargo build --example hyper_whoami --features tokio
//! $ printf '[allow.owner]\nusers = ["self"]\n' > /tmp/whoami.toml
//! $ systemd-socket-activate -l /tmp/whoami.sock target/debug/examples/hyper_whoami /tmp/whoami.toml &
//! $ curl --unix-socket /tmp/whoami.sock http://localhost/
//! uid 1000, by allow.owner
//! ```

use std::convert::Infallible;
use std::io;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use peergate::gate::Replies;
use peergate::tokio::Handle;
use peergate::{Error, Service, Session};
use tower::{ServiceExt, service_fn};

async fn whoami(request: Request<Incoming>) -> Result<Response<String>, Infallible> {
    let session = request.extensions().get::<Session<()>>();
    let told = session.map(|session| format!("uid {}, by {}\n", session.uid(), session.rule().name()));
    Ok(Response::new(told.unwrap_or_default()))
}

async fn serve(gate: Handle<()>) -> io::Result<()> {
    let running = GracefulShutdown::new();
    loop {
        let connection = tokio::select! {
            connection = gate.accept() => connection,
            () = gate.stopping() => break,
        };
        let session = connection.session().clone();
        let service = service_fn(whoami).map_request(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(session.clone());
            request
        });
        let http = http1::Builder::new().serve_connection(TokioIo::new(connection), TowerToHyperService::new(service));
        tokio::spawn(running.watch(http));
    }
    // A request that is under way gets its answer.
    running.shutdown().await;
    Ok(())
}

fn main() -> Result<(), Error> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "/etc/hyper_whoami.toml".into());
    Service::from_systemd("hyper_whoami").policy_file(file).replies(Replies::http()).block_on(serve)
}
