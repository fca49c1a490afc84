# The services of examples/ under a system's own manager, with a watchdog: two users, a reload, a restart.

. "$here/cases/30-lifetime.sh"

# _service NAME: installs and starts the example with the policy from standard input.
_service() {
    identifier=$1 unit=peer-$1 socket=/run/peer-$1.sock
    mkdir -p /run/behind
    _rules
    cat >"/run/systemd/system/$unit.socket" <<UNIT
[Socket]
ListenStream=$socket
SocketMode=0666
TriggerLimitIntervalSec=0
UNIT
    cat >"/run/systemd/system/$unit.service" <<UNIT
[Unit]
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/opt/e2e/bin/$1 /run/behind/$1.toml
ExecReload=/bin/kill -HUP \$MAINPID
WatchdogSec=1s
KillSignal=SIGINT
RestartKillSignal=SIGTERM
FileDescriptorStoreMax=1
DynamicUser=yes
UNIT
    systemctl daemon-reload
    systemctl start "$unit.socket"
}
# The policy, from standard input.
_rules() {
    cat >"/run/behind/$identifier.toml"
    chmod 644 "/run/behind/$identifier.toml"
}
# _reload N: for the Nth time.
_reload() {
    _rules
    systemctl reload "$unit.service"
    await_records "$1" loaded >/dev/null
}
# Waits for another sign of life. The service manager ends a service that gives none for a second.
_lives_on() {
    local before
    before=$(property "$unit.service" WatchdogTimestampMonotonic)
    [[ $before != 0 ]] || fail "the watchdog is not on"
    until [[ $(property "$unit.service" WatchdogTimestampMonotonic) != "$before" ]]; do unit_is "$unit.service" active; done
    expect "restarts by systemd" 0 "$(property "$unit.service" NRestarts)"
}
_restart() {
    local pid
    pid=$(property "$unit.service" MainPID)
    systemctl restart "$unit.service"
    [[ $(property "$unit.service" MainPID) != "$pid" ]] || fail "it is the same process"
}
# Status and body: _http USER [curl's options]
_http() {
    local user=$1
    shift
    as "$user" curl --silent --max-time 20 --write-out ' %{http_code}' --unix-socket "$socket" "$@" http://localhost/note
}

an_http_service_gives_each_user_its_terms_over_reload_and_restart() {
    _service axum_note <<<$'[allow.editor]\nusers = ["alice"]\nmay-write = true\n[allow.reader]\nusers = ["bob"]'
    local denied=$'{"message":"Unauthorized access"}\n 403'
    expect "alice writes" $'written by uid 1001\n 200' "$(_http alice --data one)"
    expect "bob reads" "one 200" "$(_http bob)"
    expect "bob writes" "$denied" "$(_http bob --data two)"
    expect "rule and uid" "allow.reader 1002" "$(await_records 1 denied | jq --raw-output '[.GATE_RULE, .PEER_UID] | join(" ")')"
    _lives_on
    _reload 1 <<<$'[allow.editor]\nusers = ["bob"]\nmay-write = true'
    expect "bob writes now" $'written by uid 1002\n 200' "$(_http bob --data two)"
    expect "alice now" "$denied" "$(_http alice)"
    _restart
    expect "bob after the restart" " 200" "$(_http bob)"
    expect "alice after the restart" "$denied" "$(_http alice)"
    _lives_on
}

_filter() { # NAME
    _service "$1" <<<$'[allow.staff]\nusers = ["alice"]'
    _open alice "$socket"
    _say one
    expect "alice" ONE "$(_hear)"
    expect "bob" "Unauthorized access" "$(talk bob 'x\n' "$socket")"
    _lives_on
    printf 'half ' >&"$to"
    _restart
    _say 'and half'
    expect "the line that was cut by the restart" "HALF AND HALF" "$(_hear)"
    _reload 1 <<<$'[allow.staff]\nusers = ["bob"]'
    expect "alice, shut out" "Unauthorized access" "$(_hear)"
    expect "bob, let in" X "$(talk bob 'x\n' "$socket")"
    _lives_on
}
a_filter_with_threads_keeps_its_connections_over_a_restart() {
    _filter shout
}
a_filter_on_tokio_keeps_its_connections_over_a_restart() {
    _filter tokio_shout
}
