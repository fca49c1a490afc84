//! The health service of gRPC, on tonic: a tonic service rides on the listener for axum. Who may watch is for the rules.
//!
//! ```console
//! $ cargo build --manifest-path examples/tonic_health/Cargo.toml
//! $ printf '[allow.monitoring]\nusers = ["self"]\n' > /tmp/health.toml
//! $ systemd-socket-activate -l /tmp/health.sock examples/tonic_health/target/debug/tonic_health /tmp/health.toml &
//! $ grpcurl -plaintext -unix /tmp/health.sock grpc.health.v1.Health/Check
//! ```

use axum::extract::ConnectInfo;
use peergate::gate::Replies;
use peergate::{Error, Service, Session};
use tonic::service::{InterceptorLayer, Routes};
use tonic::{Request, Status};
use tonic_health::ServingStatus;

/// An interceptor sees the session among the request's extensions.
fn is_live(request: Request<()>) -> Result<Request<()>, Status> {
    let session = request.extensions().get::<ConnectInfo<Session<()>>>();
    match session {
        Some(ConnectInfo(session)) if !session.is_revoked() => Ok(request),
        _ => Err(Status::permission_denied("Unauthorized access")),
    }
}

fn main() -> Result<(), Error> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "/etc/tonic_health.toml".into());
    let service = Service::<()>::from_systemd("tonic_health").policy_file(file).replies(Replies::grpc());
    service.block_on(|gate| async move {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", ServingStatus::Serving).await;
        let app = Routes::new(health).into_axum_router().layer(InterceptorLayer::new(is_live));
        axum::serve(gate.listener(), app.into_make_service_with_connect_info::<Session<()>>())
            .with_graceful_shutdown(gate.stopping())
            .await
    })
}
