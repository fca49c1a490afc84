# From start to stop: reload, restart, crash, watchdog, idle exit. What systemd sees, and what clients don't notice.

_policy() { # RULES-AND-REST…
    configure <<TOML
[allow.staff]
users = ["alice"]
[limits]
connections = 10100
connections-per-user = 10100
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

# A process in front of the next start waits until it is told to go on: _hold_start, and _go_on.
_hold_start() {
    mkfifo /run/claim-start
    drop_in echo.service <<<$'[Service]\nExecStartPre=+/bin/sh -c "read go </run/claim-start"'
    trap 'rm --force /run/claim-start; kill "$client" "$answers" 2>/dev/null || true' EXIT
}
_go_on() { echo >/run/claim-start; }

what_systemd_does_between_two_processes_loses_no_live_connection() {
    _policy
    _open alice
    _talk_on one
    printf 'half ' >&"$to"
    _hold_start
    systemctl restart --no-block echo.service
    await_property echo.service SubState start-pre
    expect "descriptors that systemd keeps" 1 "$(property echo.service NFileDescriptorStore)"
    systemctl daemon-reload
    systemctl daemon-reexec
    printf 'and ' >&"$to"
    # A restart while a restart is under way.
    holder=$(property echo.service ControlPID)
    systemctl restart --no-block echo.service
    timeout 30 tail --pid="$holder" --follow /dev/null
    await_property echo.service SubState start-pre
    expect "descriptors that systemd keeps" 1 "$(property echo.service NFileDescriptorStore)"
    _go_on
    await_property echo.service SubState running
    _say 'half'
    expect "the line that was cut by the restarts" "> half and half" "$(_hear)"
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    expect "admissions" 1 "$(records admitted | wc -l)"
}

# Does COMMAND so many times while clients stream, and compares every byte. Sets, in milliseconds: `pause`, the longest
# pause of a client; `longest` and `median`, how long COMMAND took.
_stream_across() { # SOCKET "CONNECTIONS [OPTION…]" TIMES COMMAND…
    local socket=$1 options connections times=$3 begin line carried
    read -r -a options <<<"$2"
    connections=${options[0]}
    shift 3
    mkfifo /tmp/claim/stream-in
    (
        ulimit -n "$((connections + 500))"
        as alice stream "$socket" "${options[@]}"
    ) </tmp/claim/stream-in >/tmp/claim/stream-out &
    local client=$!
    : >>/tmp/claim/stream-out
    exec {says}< <(exec tail --follow --lines=+1 --sleep-interval=0.05 --pid="$client" /tmp/claim/stream-out)
    exec {hold}>/tmp/claim/stream-in
    read -r -t 120 -u "$says" line
    expect "the client" ready "$line"
    local took=()
    for ((i = 0; i < times; i++)); do
        begin=${EPOCHREALTIME/./}
        "$@" || fail "time $i: $* failed"
        took+=("$(((${EPOCHREALTIME/./} - begin) / 1000))")
    done
    mapfile -t took < <(printf '%s\n' "${took[@]}" | sort --numeric-sort)
    median=${took[times / 2]} longest=${took[-1]}
    exec {hold}>&-
    wait "$client"
    line=$(tail --lines=1 /tmp/claim/stream-out)
    pause=${line##*=}
    # What the service itself says of it: each connection, each time. A record may come a moment after the service is ready.
    for ((i = 0; i < 100; i++)); do
        carried=$(records all | jq --raw-output .MESSAGE |
            awk '/ connections carried over the restart, / { carried += $1; ended += $7 } END { print carried + 0, ended + 0 }')
        ((${carried% *} + ${carried#* } < connections * times)) || break
        sleep 0.1
    done
    figure "$times times, at most $longest ms each, median $median ms, ${carried% *} connections carried: $line"
    expect "what the client saw" "connections=$connections cut=0 lost=0 doubled=0 wrong=0" "${line%% lines=*}"
    expect "connections carried, ended instead" "$((connections * times)) 0" "$carried"
}

a_hundred_restarts_lose_double_and_cut_nothing() {
    _policy
    _stream_across /run/echo.sock 64 100 systemctl restart echo.service
    expect "admissions" 64 "$(records admitted | wc -l)"
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

# The first line of a file with this text that a process writes: _await_line FILE PID [TEXT]
_await_line() {
    local line lines
    exec {lines}< <(exec tail --follow --lines=+1 --sleep-interval=0.05 --pid="$2" "$1")
    while read -r -t 60 -u "$lines" line; do
        [[ $line != *"${3:-}"* ]] || break
        line=
    done
    exec {lines}<&-
    printf '%s' "$line"
}

# A client in the middle of a line; one that has sent what fits, half-closed, and reads only once it is told to; one that
# streams and reads meanwhile. Each says in the end what it got, and how it ended.
_one_kind() { # KIND SOCKET
    cat >/tmp/claim/kinds <<'PERL'
use strict; use IO::Socket::UNIX; use Errno qw(ECONNRESET);
my ($kind, $path) = @ARGV;
$| = 1;
$SIG{PIPE} = "IGNORE";
my $socket = IO::Socket::UNIX->new(Peer => $path) or die "connect: $!";
my $line = "x" x 99 . "\n";
my ($sent, $got, $all) = (0, 0, "");
sub hear {
    while (1) {
        my $count = sysread($socket, my $piece, 65536);
        return $! == ECONNRESET ? "reset" : "error $!" unless defined $count;
        return "eof" if $count == 0;
        $got += $count;
        $all = substr($all . $piece, -100);
    }
}
if ($kind eq "midline") {
    syswrite($socket, "whole\nhalf");
    sysread($socket, my $echo, 8) == 8 or die "no echo";
    print "ready\n";
    my $end = hear();
    print "$all $end\n";
} elsif ($kind eq "deaf") {
    $socket->blocking(0);
    # Until it takes no more for a while.
    for (my $full = 0; $full < 50;) {
        my $count = syswrite($socket, substr($line, $sent % 100));
        if (defined $count) { $sent += $count; $full = 0 } else { $full++; select(undef, undef, undef, 0.01) }
    }
    $socket->blocking(1);
    shutdown($socket, 1);
    print "ready\n";
    sysread(STDIN, my $go, 1);
    my $end = hear();
    # Two bytes more for each line, the last one perhaps cut short.
    print $got - $sent - 2 * int(($sent + 99) / 100), " bytes amiss, $end\n";
} else {
    my $writer = fork() // die;
    if (!$writer) { 1 while syswrite($socket, $line); exit }
    sysread($socket, my $echo, 1) == 1 or die "no echo";
    print "ready\n";
    my $end = hear();
    waitpid($writer, 0);
    print $all =~ /x\n$/ ? "whole lines" : "a cut line", ", $end\n";
}
PERL
    local line
    as alice perl /tmp/claim/kinds "$1" "$2" <>/tmp/claim/go >"/tmp/claim/$1" 2>&1 &
    kinds+=("$!")
    : >>"/tmp/claim/$1"
    line=$(_await_line "/tmp/claim/$1" "$!")
    expect "the client $1" ready "$line"
}
_three_kinds() { # SOCKET
    local kind
    mkfifo /tmp/claim/go
    for kind in midline deaf stream; do
        _one_kind "$kind" "$1"
    done
    trap 'kill "${kinds[@]}" 2>/dev/null || true' EXIT
}
_expect_three_clean_ends() {
    wait "${kinds[@]}"
    expect "the one in the middle of a line" "> half eof" "$(tail --lines=1 /tmp/claim/midline)"
    expect "the one that had half-closed" "0 bytes amiss, eof" "$(tail --lines=1 /tmp/claim/deaf)"
    expect "the one that streamed" "whole lines, eof" "$(tail --lines=1 /tmp/claim/stream)"
}

a_stop_gives_everybody_what_they_are_owed_and_a_clean_end() {
    _policy
    kinds=()
    _three_kinds /run/echo.sock
    systemctl stop echo.socket echo.service &
    stop=$!
    # Until it is told, the service goes on serving. The end of the one that streams is the first thing to be seen.
    expect "the one that streams" "whole lines, eof" "$(_await_line /tmp/claim/stream "${kinds[2]}" ,)"
    echo >/tmp/claim/go
    wait "$stop"
    _expect_three_clean_ends
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    expect "result" success "$(property echo.service Result)"
    records all | jq --raw-output .MESSAGE | grep '^0 connections left to the next process, 3 ended' >/dev/null ||
        fail "the record doesn't say that all three ended" "$(records all)"
}

a_stop_of_a_users_service_does_so_too() {
    configure_user alice <<<$'[allow.me]\nusers = ["self"]'
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
    kinds=()
    _three_kinds /run/user/1001/echo.sock
    of alice systemctl --user stop echo.socket echo.service &
    stop=$!
    expect "the one that streams" "whole lines, eof" "$(_await_line /tmp/claim/stream "${kinds[2]}" ,)"
    echo >/tmp/claim/go
    wait "$stop"
    _expect_three_clean_ends
    expect "descriptors that alice's systemd keeps" 0 \
        "$(of alice systemctl --user show --property=NFileDescriptorStore --value echo.service)"
}

# What a stop is, the service has to be told in whatever state it meets the unit: each claim below puts the unit into one
# of them with three live connections, and stops it there.
_stopped_in_order() { # COMMAND…
    local stop
    "$@" &
    stop=$!
    expect "the client that streams" "whole lines, eof" "$(_await_line /tmp/claim/stream "${kinds[2]}" ,)"
    echo >/tmp/claim/go
    wait "$stop"
    _expect_three_clean_ends
    records all | jq --raw-output .MESSAGE | grep '^0 connections left to the next process, 3 ended' >/dev/null ||
        fail "the record doesn't say that all three ended" "$(records all)"
}

# The unit stays in the state "reload" until it is ended there.
_reload_without_end() {
    drop_in echo.service <<<$'[Service]\nExecReload=/bin/sleep infinity'
    systemctl reload --no-block echo.service
    await_property echo.service ActiveState reloading
}

a_stop_during_a_reload_gives_every_client_its_bytes() {
    _policy
    kinds=()
    _three_kinds /run/echo.sock
    _reload_without_end
    _stopped_in_order systemctl stop echo.socket echo.service
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
}

a_stop_at_any_moment_of_a_reload_gives_every_client_its_bytes() {
    # A plain reload, and a stop 0 to 19 ms after it.
    local round whole
    _policy
    for ((round = 0; round < 20; round++)); do
        rm --force /tmp/claim/{to,from,midline,go}
        systemctl start echo.socket
        kinds=()
        mkfifo /tmp/claim/go
        begin_records
        _one_kind midline /run/echo.sock
        trap 'kill "${kinds[@]}" 2>/dev/null || true' EXIT
        if ((round % 4 == 3)); then
            systemctl kill --kill-whom=main --signal=HUP echo.service
        else
            systemctl reload --no-block echo.service
        fi
        sleep "0.0$(printf %02d "$round")"
        systemctl stop echo.socket echo.service
        wait "${kinds[@]}"
        expect "round $round, in the middle of a line" "> half eof" "$(tail --lines=1 /tmp/claim/midline)"
        records all | jq --raw-output .MESSAGE | grep '^0 connections left to the next process, 1 ended' >/dev/null ||
            fail "round $round: the record doesn't say that it ended" "$(records all)"
    done
}

a_restart_during_a_reload_loses_no_live_connection() {
    _policy
    _open alice
    _talk_on one
    printf 'half ' >&"$to"
    _reload_without_end
    systemctl restart echo.service
    _say 'and half'
    expect "the line that was cut by the restart" "> half and half" "$(_hear)"
    # And of the socket, which takes the service with it.
    systemctl reload --no-block echo.service
    await_property echo.service ActiveState reloading
    systemctl restart echo.socket
    _talk_on two
    expect "admissions" 1 "$(records admitted | wc -l)"
}

restarts_at_any_moment_of_a_reload_lose_double_and_cut_nothing() {
    _reload_and_restart() {
        systemctl reload --no-block echo.service
        sleep "0.0$(printf %02d "$((RANDOM % 20))")"
        systemctl restart echo.service
    }
    _policy
    _stream_across /run/echo.sock 16 30 _reload_and_restart
}

a_stop_after_the_start_that_is_not_over_yet_gives_every_client_its_bytes() {
    _policy
    drop_in echo.service <<<$'[Service]\nExecStartPost=/bin/sleep infinity'
    kinds=()
    _three_kinds /run/echo.sock
    expect "state" start-post "$(property echo.service SubState)"
    _stopped_in_order systemctl stop echo.socket echo.service
}

a_restart_after_the_start_that_is_not_over_yet_loses_no_live_connection() {
    _policy
    drop_in echo.service <<<$'[Service]\nExecStartPost=/bin/sleep infinity'
    _open alice
    _talk_on one
    expect "state" start-post "$(property echo.service SubState)"
    rm /run/systemd/system/echo.service.d/claim.conf
    systemctl daemon-reload
    systemctl restart echo.service
    _talk_on two
}

a_start_that_takes_too_long_gives_every_client_its_bytes() {
    _policy
    drop_in echo.service <<<$'[Service]\nExecStartPost=/bin/sleep infinity\nTimeoutStartSec=5s'
    kinds=()
    _three_kinds /run/echo.sock
    # It is not stopped by anybody: systemd does it by itself.
    _stopped_in_order true
}

a_sigterm_that_no_job_of_systemds_sent_gives_every_client_its_bytes() {
    local how
    for how in "systemctl kill echo.service" 'kill "$(_pid)"'; do
        rm --recursive --force /tmp/claim/*
        begin_records
        _policy
        kinds=()
        _three_kinds /run/echo.sock
        _stopped_in_order eval "$how"
        await_property echo.service ActiveState inactive
    done
}

a_stop_of_a_users_service_during_a_reload_does_so_too() {
    configure_user alice <<<$'[allow.me]\nusers = ["self"]'
    mkdir -p /run/systemd/user/echo.service.d
    printf '[Service]\nExecReload=/bin/sleep infinity\n' >/run/systemd/user/echo.service.d/claim.conf
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
    kinds=()
    _three_kinds /run/user/1001/echo.sock
    of alice systemctl --user reload --no-block echo.service
    expect "state" reload "$(of alice systemctl --user show --property=SubState --value echo.service)"
    _stopped_in_order of alice systemctl --user stop echo.socket echo.service
}

a_restart_of_a_users_service_during_a_reload_loses_no_live_connection() {
    configure_user alice <<<$'[allow.me]\nusers = ["self"]'
    mkdir -p /run/systemd/user/echo.service.d
    printf '[Service]\nExecReload=/bin/sleep infinity\n' >/run/systemd/user/echo.service.d/claim.conf
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
    _open alice /run/user/1001/echo.sock
    _talk_on one
    of alice systemctl --user reload --no-block echo.service
    expect "state" reload "$(of alice systemctl --user show --property=SubState --value echo.service)"
    of alice systemctl --user restart echo.service
    _talk_on two
}

a_restart_where_systemd_keeps_nothing_ends_everybody_in_order() {
    _policy
    drop_in echo.service <<<$'[Service]\nFileDescriptorStoreMax=0'
    systemctl restart echo.socket echo.service
    kinds=()
    _three_kinds /run/echo.sock
    systemctl restart echo.service &
    restart=$!
    expect "the one that streams" "whole lines, eof" "$(_await_line /tmp/claim/stream "${kinds[2]}" ,)"
    echo >/tmp/claim/go
    wait "$restart"
    _expect_three_clean_ends
    records all | jq --raw-output .MESSAGE | grep '^0 connections left to the next process, 3 ended' >/dev/null ||
        fail "the record doesn't say that all three ended" "$(records all)"
    expect "a new connection" "> x" "$(talk alice 'x\n')"
}

a_restart_onto_a_faulty_configuration_ends_everybody_in_order() {
    _policy
    kinds=()
    _three_kinds /run/echo.sock
    configure <<<'colour = "red"'
    systemctl restart echo.service 2>/dev/null &
    restart=$!
    expect "the one that streams" "whole lines, eof" "$(_await_line /tmp/claim/stream "${kinds[2]}" ,)"
    echo >/tmp/claim/go
    if wait "$restart"; then fail "systemctl restart succeeded"; fi
    _expect_three_clean_ends
    records all | jq --raw-output .MESSAGE | grep '^3 connections of an earlier process ended' >/dev/null ||
        fail "the record doesn't say that all three ended" "$(records all)"
    _policy
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
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    expect "after" "> x" "$(talk alice 'x\n')"
}

# Stops one thread of a process, and only that one, for as long as this shell's child lives: ptrace(2).
_hold_thread() { # PID NAME
    local task
    for task in /proc/"$1"/task/*; do
        [[ $(cat "$task/comm") != "$2" ]] || break
    done
    expect "the thread's name" "$2" "$(cat "$task/comm")"
    perl -e '
        my %number = (x86_64 => 101, aarch64 => 117, riscv64 => 117);
        my $ptrace = $number{$ARGV[1]} // die "ptrace(2) on $ARGV[1]?";
        my ($seize, $interrupt) = (0x4206, 0x4207);
        syscall($ptrace, $_, int $ARGV[0], 0, 0) == 0 or die "ptrace: $!" for $seize, $interrupt;
        # Once when it stops, and once when it has died: until its tracer has looked, its process would not be gone.
        $| = 1; waitpid($ARGV[0], 0x40000000) and print "held\n" for 1, 2;
    ' "${task##*/}" "$(uname -m)" >/tmp/claim/held &
    holder=$!
    trap 'kill "$holder" 2>/dev/null || true' EXIT
    : >>/tmp/claim/held
    expect "the thread" held "$(_await_line /tmp/claim/held "$holder")"
}

a_single_worker_that_hangs_is_restarted_by_the_watchdog() {
    _policy $'[service]\nworkers = 3'
    drop_in echo.service <<<$'[Service]\nWatchdogSec=2s'
    expect "before" "> x" "$(talk alice 'x\n')"
    _hold_thread "$(_pid)" worker-1
    await_property echo.service NRestarts 1
    journalctl --sync
    journalctl --quiet "$(since)" --output=cat UNIT=echo.service | grep 'Watchdog timeout' >/dev/null ||
        fail "systemd says nothing of the watchdog"
    records all | jq --raw-output .MESSAGE | grep 'no sign of life from: worker 1' >/dev/null ||
        fail "the service doesn't say who hangs" "$(records all)"
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

restarts_of_the_socket_may_follow_one_another_at_any_pace() {
    _policy
    _open alice
    _talk_on one
    # Above the five in ten seconds that systemd allows unless told otherwise.
    for ((i = 0; i < 8; i++)); do systemctl restart echo.socket; done
    unit_is echo.socket active
    _talk_on two
    expect "a new connection" "> x" "$(talk alice 'x\n')"
}

where_the_socket_fails_at_a_restart_its_connections_end() {
    _policy
    _open alice
    _talk_on one
    printf 'half' >&"$to"
    drop_in echo.socket <<<$'[Socket]\nExecStartPre=/bin/false'
    if systemctl restart echo.socket 2>/dev/null; then fail "systemctl restart succeeded"; fi
    exec {to}>&-
    wait "$client" || true
    expect_bytes "what the client has got" "> one\n> half" /tmp/claim/from
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    rm /run/systemd/system/echo.socket.d/claim.conf
    systemctl daemon-reload
    await_property echo.socket ActiveState active
    expect "a new connection" "> x" "$(talk alice 'x\n')"
}

a_change_of_the_services_user_goes_unnoticed_by_a_live_connection() {
    # As an upgrade from a version whose unit said User=echod.
    _policy
    drop_in echo.service <<<$'[Service]\nUser=echod'
    _open alice
    _talk_on one
    printf 'half ' >&"$to"
    rm /run/systemd/system/echo.service.d/claim.conf
    systemctl daemon-reload
    systemctl restart echo.service
    _say 'and half'
    expect "the line that was cut by the restart" "> half and half" "$(_hear)"
}
