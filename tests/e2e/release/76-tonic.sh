# The tonic service of examples/ under a system's own manager, with a watchdog: tests/e2e/run --release. It needs a newer Rust
# than the rest, and many crates.

. "$here/cases/75-services.sh"

# grpc.health.v1.Health/Check as this user: the answer's bytes and the status of gRPC, or of HTTP where there is none. The
# request is one frame with an empty message.
_check() {
    as "$1" curl --silent --max-time 20 --http2-prior-knowledge --unix-socket "$socket" --dump-header /tmp/claim/"$1" \
        --header 'content-type: application/grpc' --header 'te: trailers' --data-binary @/opt/e2e/empty-frame \
        http://localhost/grpc.health.v1.Health/Check | od -An -tx1 | tr -d '\n'
    sed -n 's/\r$//; s/^grpc-status: /status /p' /tmp/claim/"$1"
}

a_tonic_service_gives_each_user_its_answer_over_reload_and_restart() {
    _service tonic_health <<<$'[allow.monitoring]\nusers = ["alice"]'
    printf '\0\0\0\0\0' >/opt/e2e/empty-frame
    # Field 1 is SERVING.
    local serving=' 00 00 00 00 02 08 01status 0'
    expect "alice" "$serving" "$(_check alice)"
    expect "bob" "" "$(_check bob)"
    expect "who was denied" 1002 "$(await_records 1 denied | jq --raw-output .PEER_UID)"
    _lives_on
    _reload 1 <<<$'[allow.monitoring]\nusers = ["bob"]'
    expect "bob now" "$serving" "$(_check bob)"
    expect "alice now" "" "$(_check alice)"
    _restart
    expect "bob after the restart" "$serving" "$(_check bob)"
    expect "alice after the restart" "" "$(_check alice)"
    _lives_on
}
