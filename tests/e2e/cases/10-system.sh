# The system's service: who gets in, what each client sees byte for byte, and what the journal says about it.

_policy() {
    configure <<'TOML'
[deny.contractors]
users = ["bob"]

[allow.staff]
users = ["alice", "bob"]

[audit]
record = "connections"
TOML
}

the_units_are_clean() {
    # The manual pages come with the package.
    expect "systemd-analyze verify" "" "$(systemd-analyze --man=no verify /usr/lib/systemd/system/echo{.socket,.service,-{pause,started,reopen}.service} 2>&1 || true)"
    expect "systemd-analyze --user verify" "" \
        "$(of alice systemd-analyze --man=no --user verify /usr/lib/systemd/user/echo{.socket,.service,-{pause,started,reopen}.service} 2>&1 || true)"
}

the_first_byte_starts_the_service() {
    _policy
    unit_is echo.socket active
    unit_is echo.service inactive
    expect "echo" "> hello" "$(talk alice 'hello\n')"
    unit_is echo.service active
}

an_admitted_user_gets_every_byte_back() {
    _policy
    talk alice 'hello\n\nNUL \000 CR \r\377\376\nfragment' >/tmp/claim/answer
    expect_bytes "echo" '> hello\n> \n> NUL \000 CR \r\377\376\n> fragment' /tmp/claim/answer
}

a_denied_user_gets_the_message_and_not_one_byte_of_echo() {
    _policy
    talk bob 'hello\n' >/tmp/claim/answer
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
}

root_has_no_privilege() {
    _policy
    talk root 'hello\n' >/tmp/claim/answer
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
}

without_a_file_only_the_services_own_user_is_admitted() {
    for user in alice bob root; do
        talk "$user" 'hello\n' >/tmp/claim/answer
        expect_bytes "answer to $user" 'Unauthorized access\n' /tmp/claim/answer
    done
    await_records 3 denied >/dev/null
}

a_denial_by_default_is_recorded_with_the_peers_identity() {
    configure <<<'[allow.nobody-here]
users = ["alice"]'
    expect "denials before" "" "$(records denied)"
    printf 'x\n' | systemd-run --quiet --pipe --wait --collect --unit=peer-guest.service --uid=bob nc -N -U /run/echo.sock >/tmp/claim/answer
    record=$(await_records 1 denied)
    expect_record "$record" '{
        "MESSAGE": "~Denied bob \\(uid 1002\\) gid 1002 pid [0-9]+ \\(nc\\) in peer-guest\\.service: no rule allows it",
        "MESSAGE_ID": "72261db9963c465c8c6121daadeb1cbc", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "echod",
        "GATE_VERDICT": "denied", "GATE_REASON": "policy", "GATE_RULE": "default", "GATE_SOCKET": "/run/echo.sock",
        "GATE_CONNECTION": "~[0-9]+", "PEER_UID": "1002", "PEER_USER": "bob", "PEER_GID": "1002",
        "PEER_GROUPS": "~(1002,)?2001", "PEER_PID": "~[0-9]+", "PEER_COMM": "nc", "PEER_UNIT": "peer-guest.service"
    }'
    pid=$(jq --raw-output .PEER_PID <<<"$record")
    expect "pid in the message" "1" "$(jq --raw-output .MESSAGE <<<"$record" | grep --count "pid $pid ")"
}

a_denial_by_a_rule_names_the_rule() {
    _policy
    expect "denials before" "" "$(records denied)"
    talk bob 'x\n' >/tmp/claim/answer
    record=$(await_records 1 denied)
    expect "rule" deny.contractors "$(jq --raw-output .GATE_RULE <<<"$record")"
    expect "uid" 1002 "$(jq --raw-output .PEER_UID <<<"$record")"
}

admitted_and_closed_are_recorded_when_the_policy_asks_for_it() {
    _policy
    expect "admissions before" "" "$(records admitted)"
    expect "closings before" "" "$(records closed)"
    printf 'one\ntwo\nend' | systemd-run --quiet --pipe --wait --collect --unit=peer-alice.service --uid=alice nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "echo" '> one\n> two\n> end' /tmp/claim/answer
    admitted=$(await_records 1 admitted)
    # Whether the effective gid is repeated among the groups depends on who set them: systemd 252 does it, 257 does not.
    expect_record "$(jq --compact-output 'del(.PEER_GROUPS)' <<<"$admitted")" '{
        "MESSAGE": "~Admitted alice .*", "MESSAGE_ID": "fb07ecd99a40415abb029457009dd51a", "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "echod", "GATE_VERDICT": "admitted", "GATE_RULE": "allow.staff", "GATE_SOCKET": "/run/echo.sock",
        "GATE_CONNECTION": "~[0-9]+", "PEER_UID": "1001", "PEER_USER": "alice", "PEER_GID": "1001",
        "PEER_PID": "~[0-9]+", "PEER_COMM": "nc", "PEER_UNIT": "peer-alice.service"
    }'
    closed=$(await_records 1 closed)
    expect "verdict" closed "$(jq --raw-output .GATE_VERDICT <<<"$closed")"
    expect "priority" 6 "$(jq --raw-output .PRIORITY <<<"$closed")"
    expect "lines" 3 "$(jq --raw-output .GATE_LINES <<<"$closed")"
    expect "bytes" 11 "$(jq --raw-output .GATE_BYTES <<<"$closed")"
    expect "a duration" true "$(jq '.GATE_DURATION_USEC | test("^[0-9]+$")' <<<"$closed")"
    expect "connection" "$(jq .GATE_CONNECTION <<<"$admitted")" "$(jq .GATE_CONNECTION <<<"$closed")"
}

admissions_are_not_recorded_unless_asked_for() {
    configure <<<'[allow.staff]
users = ["alice"]'
    talk alice 'one\n' >/tmp/claim/answer
    talk bob 'one\n' >/tmp/claim/answer
    await_records 1 denied >/dev/null
    expect "admissions" "" "$(records admitted)"
    expect "closings" "" "$(records closed)"
}

the_configuration_in_force_is_recorded() {
    _policy
    expect "before" "" "$(records loaded)"
    talk alice 'one\n' >/tmp/claim/answer
    record=$(await_records 1 loaded)
    expect "priority" 5 "$(jq --raw-output .PRIORITY <<<"$record")"
    expect "names the file" 1 "$(jq --raw-output .MESSAGE <<<"$record" | grep --count /etc/echod/echod.toml)"
}

a_faulty_configuration_is_exit_78_and_every_fault_and_no_loop() {
    configure <<'TOML'
[allow.staff]
users = ["alice", "9-3"]
colour = "red"
TOML
    talk alice 'hello\n' >/tmp/claim/answer &
    client=$!
    await_property echo.service ExecMainStatus 78
    expect "result" exit-code "$(property echo.service Result)"
    expect "restarts by Restart=" 0 "$(property echo.service NRestarts)"
    unit_is echo.socket active
    journalctl --sync
    for word in 'echod.toml:2' 'echod.toml:3' '9-3' 'colour'; do
        journalctl --quiet "$(since)" --unit=echo.service --priority=err --output=cat | grep --quiet --fixed-strings "$word" ||
            fail "the journal doesn't say $word"
    done
    # The client still waits. Mend the fault, and it is served: nothing was lost, nothing has to be restarted by hand.
    configure <<<'[allow.staff]
users = ["alice"]'
    wait "$client"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
    starts=$(_starts)
    ((starts <= 3)) || fail "starts while the fault lasted:" "  expected: at most 3, one each 5 s" "  found: $starts"
}

_starts() {
    journalctl --sync
    # "Starting …": a job of the unit began.
    journalctl --quiet "$(since)" --output=cat UNIT=echo.service MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5 | wc -l
}

# No start comes as far as the program; somebody waits all the while. What systemd then does by itself is to try again at
# once, without end.
_cannot_start() { # DROP-IN EXIT-STATUS
    local client starts
    _policy
    drop_in echo.service <<<"$1"
    talk alice 'hello\n' >/tmp/claim/answer &
    client=$!
    await_property echo.service ExecMainStatus "$2"
    # A span of time is what is asked about here. On a slow machine there are only fewer.
    sleep 3
    starts=$(_starts)
    ((starts <= 2)) || fail "starts in 3 s:" "  expected: at most 2" "  found: $starts"
    unit_is echo.socket active
    rm /run/systemd/system/echo.service.d/claim.conf
    systemctl daemon-reload
    wait "$client"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
    expect "the next" "> x" "$(talk alice 'x\n')"
}

a_program_that_cannot_be_executed_is_tried_seldom_and_ends_nothing() {
    _cannot_start $'[Service]\nExecStart=\nExecStart=/usr/bin/no-such-echod' 203
}

a_sandbox_that_cannot_be_set_up_is_tried_seldom_and_ends_nothing() {
    _cannot_start $'[Service]\nReadWritePaths=/no-such-directory' 226
}

an_exit_status_that_is_none_of_ours_is_tried_seldom_and_ends_nothing() {
    _cannot_start $'[Service]\nExecStart=\nExecStart=/bin/sh -c "exit 127"' 127
}

the_exposure_of_the_service_is_what_SECURITY_md_says() {
    # In tenths times ten: 5 is the 0.5 that systemd-analyze prints.
    systemd-analyze security --no-pager --threshold=5 echo.service >/tmp/claim/security ||
        fail "systemd-analyze security:" "$(cat /tmp/claim/security)"
    figure "$(tail --lines=1 /tmp/claim/security)"
}

_wrong_socket() { # DROP-IN CLIENT-COMMAND…
    _policy
    systemctl stop echo.socket
    drop_in echo.socket <<<"$1"
    systemctl start echo.socket
    shift
    "$@" >/tmp/claim/answer 2>&1 || true
    await_property echo.service ExecMainStatus 76
    expect "restarts by Restart=" 0 "$(property echo.service NRestarts)"
    systemctl stop echo.socket
    journalctl --sync
    journalctl --quiet "$(since)" --output=cat SYSLOG_IDENTIFIER=echod >/tmp/claim/said
}

a_datagram_socket_is_refused_by_name() {
    _wrong_socket $'[Socket]\nListenStream=\nListenDatagram=/run/echo.sock' \
        sh -c 'echo hello | socat -u - UNIX-SENDTO:/run/echo.sock'
    grep --quiet --ignore-case datagram /tmp/claim/said || fail "doesn't say what it is:" "$(cat /tmp/claim/said)"
    grep --quiet 'echo\.socket' /tmp/claim/said || fail "doesn't name the descriptor:" "$(cat /tmp/claim/said)"
}

a_tcp_socket_is_refused_by_name() {
    # Reached through the machine's loopback: the service's own network namespace doesn't concern what it is handed.
    _wrong_socket $'[Socket]\nListenStream=\nListenStream=127.0.0.1:7007' sh -c 'echo hello | socat - TCP:127.0.0.1:7007'
    grep --quiet --ignore-case --extended-regexp 'inet|tcp' /tmp/claim/said || fail "doesn't say what it is:" "$(cat /tmp/claim/said)"
}

a_connected_socket_is_refused_by_name() {
    _policy
    systemctl stop echo.socket
    drop_in echo.socket <<<$'[Socket]\nAccept=yes'
    sed '/^\(Wants\|PartOf\)=echo.socket$/d; /^After=/d' /usr/lib/systemd/system/echo.service >/run/systemd/system/echo@.service
    systemctl daemon-reload
    systemctl start echo.socket
    talk alice 'hello\n' >/tmp/claim/answer || true
    systemctl stop echo.socket
    rm /run/systemd/system/echo@.service
    journalctl --sync
    journalctl --quiet "$(since)" --output=cat SYSLOG_IDENTIFIER=echod >/tmp/claim/said
    grep --quiet 'does not listen (Accept=yes' /tmp/claim/said || fail "doesn't say what it is:" "$(cat /tmp/claim/said)"
    journalctl --quiet "$(since)" --output=cat _PID=1 | grep --quiet 'status=76' ||
        fail "systemd saw no exit status 76"
}

a_group_is_the_kernels_answer_not_the_databases() {
    configure <<<'[allow.readers]
groups = ["readers"]'
    expect "bob, who is in the group" "> hello" "$(talk bob 'hello\n')"
    printf 'hello\n' | setpriv --reuid bob --regid 1002 --clear-groups nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "bob without the group" 'Unauthorized access\n' /tmp/claim/answer
    printf 'hello\n' | setpriv --reuid alice --regid 2001 --clear-groups nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "alice with it as her effective group" '> hello\n' /tmp/claim/answer
}
