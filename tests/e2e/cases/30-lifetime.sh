# From start to stop: reload, restart, crash, watchdog, idle exit. What systemd sees, and what clients don't notice.

_policy() { # RULES-AND-REST…
    configure <<TOML
[allow.staff]
users = ["alice"]
[limits]
connections = 4200
connections-per-user = 4200
[audit]
record = "connections"
$*
TOML
}

# A connection of a user's to talk over line by line: _open alice; _say line; _hear → the next line. One at a time.
_open() {
    mkfifo /tmp/claim/to
    as "$1" nc -N -U "${2:-/run/echo.sock}" </tmp/claim/to >/tmp/claim/from 2>/tmp/claim/nc-errors &
    client=$!
    # In this order: the reader must not hold the writing end, or the client would never hear of its end.
    : >>/tmp/claim/from
    exec {from}< <(exec tail --follow --lines=+1 --sleep-interval=0.05 --pid="$client" /tmp/claim/from)
    answers=$!
    exec {to}>/tmp/claim/to
    trap 'kill "$client" "$answers" 2>/dev/null || true' EXIT
}
_say() { printf '%s\n' "$1" >&"$to"; }
_hear() {
    local line
    read -r -t 30 -u "$from" line || fail "no line from the service within 30 s"
    printf '%s' "$line"
}
_talk_on() {
    _say "$1"
    expect "echo on the same connection" "> $1" "$(_hear)"
}

_pid() { property echo.service MainPID; }

ready_is_said_when_it_serves_and_the_status_tells_how_many() {
    _policy
    systemctl start echo.service
    unit_is echo.service active
    _open alice
    _talk_on one
    await_property echo.service StatusText "1 connected, 1 admitted, 0 denied; policy of 1 rule"
}

a_reload_returns_when_the_new_policy_is_in_force() {
    _policy
    expect "bob before" "Unauthorized access" "$(talk bob 'x\n')"
    pid=$(_pid)
    for _ in 1 2 3 4 5; do
        configure <<<$'[allow.bob]\nusers = ["bob"]'
        systemctl reload echo.service
        expect "bob, let in" "> x" "$(talk bob 'x\n')"
        expect "alice, shut out" "Unauthorized access" "$(talk alice 'x\n')"
        _policy
        systemctl reload echo.service
        expect "bob, shut out" "Unauthorized access" "$(talk bob 'x\n')"
        expect "alice, let in" "> x" "$(talk alice 'x\n')"
    done
    expect "process" "$pid" "$(_pid)"
    unit_is echo.service active
}

a_reload_shuts_out_whom_the_new_policy_denies_and_nobody_else() {
    _policy
    _open alice
    _talk_on one
    _policy $'[deny.alice]\nusers = ["alice"]'
    systemctl reload echo.service
    expect "what alice hears" "Unauthorized access" "$(_hear)"
    # The end of file ends the client as soon as it has nothing to say either.
    exec {to}>&-
    wait "$client"
    record=$(await_records 1 revoked)
    expect "verdict" revoked "$(jq --raw-output .GATE_VERDICT <<<"$record")"
    expect "rule" deny.alice "$(jq --raw-output .GATE_RULE <<<"$record")"
    expect "uid" 1001 "$(jq --raw-output .PEER_UID <<<"$record")"
    expect "priority" 4 "$(jq --raw-output .PRIORITY <<<"$record")"
}

a_reload_of_a_faulty_file_fails_and_changes_nothing() {
    _policy
    _open alice
    _talk_on one
    configure <<<$'[allow.bob]\nusers = ["bob"]\ncolour = "red"'
    if systemctl reload echo.service 2>/dev/null; then fail "systemctl reload succeeded"; fi
    unit_is echo.service active
    _talk_on two
    expect "bob, whom the faulty file would let in" "Unauthorized access" "$(talk bob 'x\n')"
    record=$(await_records 1 faulty)
    expect "priority" 3 "$(jq --raw-output .PRIORITY <<<"$record")"
    _policy
    systemctl reload echo.service
    _talk_on three
}

a_reload_of_a_file_that_others_may_write_fails() {
    _policy
    expect "alice" "> x" "$(talk alice 'x\n')"
    chmod 666 /etc/echod/echod.toml
    if systemctl reload echo.service 2>/dev/null; then fail "systemctl reload succeeded"; fi
    await_records 1 faulty >/dev/null
    expect "alice" "> x" "$(talk alice 'x\n')"
}

a_restart_goes_unnoticed_by_a_live_connection() {
    _policy
    _open alice
    _talk_on one
    printf 'half ' >&"$to"
    pid=$(_pid)
    systemctl restart echo.service
    [[ $(_pid) != "$pid" ]] || fail "it is the same process"
    _say 'and half'
    expect "the line that was cut by the restart" "> half and half" "$(_hear)"
    systemctl restart echo.socket echo.service
    _talk_on two
    # Judged once, and once only: same peer, same connection.
    expect "admissions" 1 "$(records admitted | wc -l)"
    exec {to}>&-
    await_records 1 closed >/tmp/claim/closed
    expect "lines over all processes" 3 "$(jq --raw-output .GATE_LINES /tmp/claim/closed)"
}

_stream_across() { # SOCKET "CONNECTIONS [OPTION…]" TIMES COMMAND…
    local socket=$1 options connections times=$3 begin line carried
    read -r -a options <<<"$2"
    connections=${options[0]}
    shift 3
    mkfifo /tmp/claim/stream-in
    (
        ulimit -n "$((connections * 2 + 100))"
        as alice stream "$socket" "${options[@]}"
    ) </tmp/claim/stream-in >/tmp/claim/stream-out &
    local client=$!
    : >>/tmp/claim/stream-out
    exec {says}< <(exec tail --follow --lines=+1 --sleep-interval=0.05 --pid="$client" /tmp/claim/stream-out)
    exec {hold}>/tmp/claim/stream-in
    read -r -t 120 -u "$says" line
    expect "the client" ready "$line"
    begin=$SECONDS
    for ((i = 0; i < times; i++)); do
        "$@" || fail "time $i: $* failed"
    done
    begin=$((SECONDS - begin))
    exec {hold}>&-
    wait "$client"
    line=$(tail --lines=1 /tmp/claim/stream-out)
    # What the service itself says of it: each connection, each time.
    carried=$(records all | jq --raw-output .MESSAGE |
        awk '/ connections carried over the restart, / { carried += $1; ended += $7 } END { print carried + 0, ended + 0 }')
    figure "$times times in $begin s, ${carried% *} connections carried: $line"
    expect "what the client saw" "connections=$connections cut=0 lost=0 doubled=0 wrong=0" "${line%% lines=*}"
    expect "connections carried, ended instead" "$((connections * times)) 0" "$carried"
}

a_hundred_restarts_lose_double_and_cut_nothing() {
    _policy
    _stream_across /run/echo.sock 64 100 systemctl restart echo.service
    expect "admissions" 64 "$(records admitted | wc -l)"
}

four_thousand_connections_in_every_state_come_through_restarts() {
    # Within what the unit's FileDescriptorStoreMax= holds. About all are in the middle of a line; a hundred don't read,
    # so that there is echo to keep for each; one never pauses.
    _policy
    _stream_across /run/echo.sock "4000 pace=2000 deaf=100 torrents=1" 3 systemctl restart echo.service
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    expect "admissions" 4000 "$(records admitted | wc -l)"
}

a_hundred_restarts_of_a_users_service_lose_double_and_cut_nothing() {
    configure_user alice <<<$'[allow.me]\nusers = ["self"]\n[limits]\nconnections-per-user = 1000'
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
    _stream_across /run/user/1001/echo.sock 32 100 of alice systemctl --user restart echo.service
}

a_restart_under_a_policy_that_denies_shuts_out_whom_it_carried() {
    _policy
    _open alice
    _talk_on one
    configure <<<$'[allow.bob]\nusers = ["bob"]'
    systemctl restart echo.service
    expect "what alice hears" "Unauthorized access" "$(_hear)"
    await_records 1 revoked >/dev/null
}

a_stop_is_final() {
    _policy
    _open alice
    _talk_on one
    systemctl stop echo.socket echo.service
    exec {to}>&-
    wait "$client"
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    systemctl start echo.socket
    expect "a new connection" "> x" "$(talk alice 'x\n')"
}

after_a_crash_who_waits_is_served() {
    _policy
    expect "before" "> x" "$(talk alice 'x\n')"
    pid=$(_pid)
    kill -STOP "$pid"
    talk alice 'waiting\n' >/tmp/claim/answer &
    waiting=$!
    kill -KILL "$pid"
    wait "$waiting"
    expect_bytes "who waited" '> waiting\n' /tmp/claim/answer
    await_property echo.service ActiveState active
    expect "restarts by Restart=" 1 "$(property echo.service NRestarts)"
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
}

a_service_that_makes_no_progress_is_restarted_by_the_watchdog() {
    _policy
    drop_in echo.service <<<$'[Service]\nWatchdogSec=2s'
    expect "before" "> x" "$(talk alice 'x\n')"
    pid=$(_pid)
    kill -STOP "$pid"
    await_property echo.service NRestarts 1
    journalctl --sync
    journalctl --quiet "$(since)" --output=cat UNIT=echo.service | grep --quiet 'Watchdog timeout' ||
        fail "systemd says nothing of the watchdog"
    expect "after" "> x" "$(talk alice 'x\n')"
}

it_exits_when_idle_and_the_next_client_starts_it_again() {
    _policy $'[service]\nidle-exit = "200ms"'
    expect "the first" "> x" "$(talk alice 'x\n')"
    await_property echo.service ActiveState inactive
    expect "result" success "$(property echo.service Result)"
    unit_is echo.socket active
    expect "the next" "> x" "$(talk alice 'x\n')"
}

nobody_is_lost_who_connects_while_it_exits_for_being_idle() {
    # With a span this short about every connection meets an exit under way; far more starts than any of systemd's limits.
    _policy $'[service]\nidle-exit = "1ms"'
    for ((i = 0; i < 50; i++)); do
        answer=$(talk alice "$i\n") || fail "connection $i: no answer"
        expect "connection $i" "> $i" "$answer"
    done
    unit_is echo.socket active
    figure "50 connections, $(journalctl --quiet "$(since)" --output=cat JOB_TYPE=start UNIT=echo.service | grep --count '^Started') starts"
}
