# Starts that fail while a client waits: what they cost, and that the service comes back by itself.

_policy() {
    configure <<<$'[allow.staff]\nusers = ["alice"]'
}

_broken_dependency() {
    printf '[Service]\nType=oneshot\nExecStart=/bin/false\n' >/run/systemd/system/peer-broken.service
}

_lines_since() { # TIME [journalctl's options…]
    local since=$1
    shift
    journalctl --sync
    journalctl --quiet "--since=@$since" --output=cat "$@" | wc -l
}

_ticks_of_pid_1() { # as clock ticks, 100 in a second
    awk '{ print $14 + $15 }' /proc/1/stat
}

# A drop-in keeps echo.service from starting. From then on a client waits in the backlog.
_nothing_comes_of_a_start() { # DROP-IN
    local client since ticks lines
    _policy
    drop_in echo.service <<<"$1"
    talk alice 'hello\n' >/tmp/claim/answer &
    client=$!
    await_property echo-pause.service ActiveState activating
    since=$EPOCHREALTIME ticks=$(_ticks_of_pid_1)
    # The claim is about a time span: it covers a pause and the next try.
    sleep 7
    ticks=$(($(_ticks_of_pid_1) - ticks)) lines=$(_lines_since "$since")
    figure "in 7 s: PID 1 $((ticks * 10)) ms, $lines lines of the journal"
    ((lines <= 60)) || fail "lines of the journal in 7 s:" "  expected: at most 60" "  found: $lines"
    unit_is echo.socket active
    rm /run/systemd/system/echo.service.d/claim.conf
    systemctl daemon-reload
    wait "$client"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
    expect "the next" "> x" "$(talk alice 'x\n')"
    # The helper units have the socket too; whatever they do to it, the service must notice the stop.
    systemctl stop echo.service
    expect "result of the stop" success "$(property echo.service Result)"
}

a_start_skipped_by_a_condition_is_tried_seldom() {
    _nothing_comes_of_a_start $'[Unit]\nConditionPathExists=/nonexistent'
}

a_start_refused_by_an_assertion_is_tried_seldom() {
    _nothing_comes_of_a_start $'[Unit]\nAssertPathExists=/nonexistent'
}

a_start_skipped_by_a_command_is_tried_seldom() {
    _nothing_comes_of_a_start $'[Service]\nExecCondition=/bin/false'
}

a_start_with_a_failed_dependency_is_tried_seldom() {
    _broken_dependency
    _nothing_comes_of_a_start $'[Unit]\nRequires=peer-broken.service\nAfter=peer-broken.service'
}

a_start_with_an_inactive_dependency_is_tried_seldom() {
    _broken_dependency
    _nothing_comes_of_a_start $'[Unit]\nRequisite=peer-broken.service\nAfter=peer-broken.service'
}

a_start_job_that_times_out_is_tried_seldom() {
    printf '[Service]\nType=oneshot\nExecStart=/bin/sleep infinity\n' >/run/systemd/system/peer-slow.service
    _nothing_comes_of_a_start $'[Unit]\nWants=peer-slow.service\nAfter=peer-slow.service\nJobTimeoutSec=200ms'
}

a_client_that_is_denied_costs_no_more() {
    local since lines
    _policy
    drop_in echo.service <<<$'[Unit]\nConditionPathExists=/nonexistent'
    talk bob 'hello\n' >/tmp/claim/answer &
    local client=$!
    await_property echo-pause.service ActiveState activating
    since=$EPOCHREALTIME
    sleep 3
    lines=$(_lines_since "$since")
    ((lines <= 30)) || fail "lines of the journal in 3 s:" "  expected: at most 30" "  found: $lines"
    rm /run/systemd/system/echo.service.d/claim.conf
    systemctl daemon-reload
    wait "$client"
    expect_bytes "the client that waited" 'Unauthorized access\n' /tmp/claim/answer
}

# systemd fails the socket where it cannot even queue a start.
_the_socket_fails() { # COMMAND-THAT-MENDS…
    talk alice 'hello\n' >/tmp/claim/answer 2>&1 || true
    await_property echo.socket ActiveState failed
    "$@"
    await_property echo.socket ActiveState active
    expect "a client after that" "> x" "$(talk alice 'x\n')"
}

a_socket_failed_by_a_masked_service_reopens() {
    _policy
    systemctl --quiet mask --runtime echo.service
    _the_socket_fails systemctl --quiet unmask --runtime echo.service
}

a_socket_failed_by_a_faulty_drop_in_reopens() {
    _policy
    drop_in echo.service <<<$'[Service]\nExecStart='
    _mend() { rm /run/systemd/system/echo.service.d/claim.conf; systemctl daemon-reload; }
    _the_socket_fails _mend
}

a_socket_failed_by_a_missing_dependency_reopens() {
    _policy
    drop_in echo.service <<<$'[Unit]\nRequires=peer-missing.service'
    _mend() { rm /run/systemd/system/echo.service.d/claim.conf; systemctl daemon-reload; }
    _the_socket_fails _mend
}

a_failed_socket_that_was_stopped_stays_closed() {
    _policy
    systemctl --quiet mask --runtime echo.service
    talk alice 'hello\n' >/tmp/claim/answer 2>&1 || true
    await_property echo-reopen.service ActiveState active
    systemctl stop echo.socket
    unit_is echo-reopen.service inactive
}

a_pause_does_not_open_a_socket_that_was_stopped() {
    _policy
    drop_in echo.service <<<$'[Unit]\nConditionPathExists=/nonexistent'
    talk alice 'hello\n' >/tmp/claim/answer 2>&1 &
    local client=$!
    await_property echo-pause.service ActiveState activating
    systemctl stop echo.socket
    await_property echo-pause.service ActiveState inactive
    unit_is echo.socket inactive
    wait "$client" || true
}

a_crash_at_the_start_pauses_and_one_while_serving_does_not() {
    local since starts pid restarts
    _policy
    drop_in echo.service <<<$'[Service]\nSystemCallFilter=~epoll_create1'
    since=$EPOCHREALTIME
    # The client has closed before the first start has failed: only Restart= tries again.
    socat -u OPEN:/dev/null UNIX-CONNECT:/run/echo.sock
    await_property echo.service Result signal
    # The claim is about a time span.
    sleep 4
    starts=$(_lines_since "$since" UNIT=echo.service MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5)
    ((starts <= 2)) || fail "starts in 4 s:" "  expected: at most 2" "  found: $starts"
    rm /run/systemd/system/echo.service.d/claim.conf
    systemctl daemon-reload
    expect "with the cause gone" "> x" "$(talk alice 'x\n')"
    pid=$(property echo.service MainPID) restarts=$(property echo.service NRestarts)
    kill -STOP "$pid"
    talk alice 'waiting\n' >/tmp/claim/answer &
    kill -KILL "$pid"
    wait "$!"
    expect_bytes "a client that waited while it crashed" '> waiting\n' /tmp/claim/answer
    expect "restarts by Restart=" $((restarts + 1)) "$(property echo.service NRestarts)"
}

the_service_waits_for_the_user_database() {
    _policy
    [[ " $(property echo.service After) " == *" nss-user-lookup.target "* ]] || fail "After= lacks nss-user-lookup.target"
    systemctl stop nss-user-lookup.target
    mkfifo /tmp/claim/ready
    cat >/run/systemd/system/peer-database.service <<'UNIT'
[Unit]
Wants=nss-user-lookup.target
Before=nss-user-lookup.target
[Service]
Type=oneshot
ExecStart=/bin/cat /tmp/claim/ready
UNIT
    systemctl daemon-reload
    systemctl start --no-block peer-database.service
    await_property peer-database.service ActiveState activating
    talk alice 'hello\n' >/tmp/claim/answer &
    until systemctl list-jobs --plain --no-legend echo.service | grep --quiet ' start '; do sleep 0.05; done
    expect "the service's job" waiting "$(systemctl list-jobs --plain --no-legend echo.service | awk '{ print $4 }')"
    unit_is echo.service inactive
    echo ready >/tmp/claim/ready
    wait "$!"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
}

groups_and_users_named_like_the_program_do_no_harm() {
    _policy
    groupadd echod
    expect "with a group echod" "> x" "$(talk alice 'x\n')"
    systemctl stop echo.service
    groupdel echod
    useradd --no-user-group --gid nogroup echod
    expect "with a user echod" "> x" "$(talk alice 'x\n')"
    expect "the user that the service runs as" peergate-echod \
        "$(ps --no-headers --format=user:32 "$(property echo.service MainPID)" | xargs)"
    userdel echod
}

# --- The same for a user's own service ----------------------------------------------------------------------------

_user_drop_in() {
    mkdir -p /run/systemd/user/echo.service.d
    cat >/run/systemd/user/echo.service.d/claim.conf
    of alice systemctl --user daemon-reload
}

_nothing_comes_of_a_users_start() { # DROP-IN
    local client since lines socket=/run/user/1001/echo.sock
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
    _user_drop_in <<<"$1"
    talk alice 'hello\n' "$socket" >/tmp/claim/answer &
    client=$!
    for ((i = 0; i < 600; i++)); do
        [[ $(of alice systemctl --user is-active echo-pause.service) != activating ]] || break
        sleep 0.05
    done
    since=$EPOCHREALTIME
    sleep 7
    lines=$(_lines_since "$since" _UID=1001)
    figure "in 7 s: $lines lines of the user's journal"
    ((lines <= 60)) || fail "lines of the journal in 7 s:" "  expected: at most 60" "  found: $lines"
    rm /run/systemd/user/echo.service.d/claim.conf
    of alice systemctl --user daemon-reload
    wait "$client"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
}

a_users_start_skipped_by_a_condition_is_tried_seldom() {
    _nothing_comes_of_a_users_start $'[Unit]\nConditionPathExists=/nonexistent'
}

a_users_start_with_a_failed_dependency_is_tried_seldom() {
    printf '[Service]\nType=oneshot\nExecStart=/bin/false\n' >/run/systemd/user/peer-broken.service
    _nothing_comes_of_a_users_start $'[Unit]\nRequires=peer-broken.service\nAfter=peer-broken.service'
}
