# A user's own service, under the user's own systemd: the same units' twins, the same policy, the same records.

_socket=/run/user/1001/echo.sock

_start() {
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
}

_user_unit_is() {
    expect "state of alice's $1" "$2" "$(of alice systemctl --user is-active "$1" || true)"
}

the_first_byte_starts_the_users_service() {
    _start
    _user_unit_is echo.socket active
    _user_unit_is echo.service inactive
    talk alice 'hello\nfragment' "$_socket" >/tmp/claim/answer
    expect_bytes "echo" '> hello\n> fragment' /tmp/claim/answer
    _user_unit_is echo.service active
    unit_is echo.service inactive
}

root_is_denied_by_a_users_service_and_the_user_finds_it_in_their_journal() {
    _start
    _mine() { of alice journalctl --user --quiet "$(since)" --unit=echo --output=json "MESSAGE_ID=$(id_of denied)"; }
    expect "denials before" "" "$(_mine)"
    talk root 'hello\n' "$_socket" >/tmp/claim/answer
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
    record=$(await_records 1 denied _UID=1001)
    expect "uid" 0 "$(jq --raw-output .PEER_UID <<<"$record")"
    expect "user" root "$(jq --raw-output .PEER_USER <<<"$record")"
    expect "group" 0 "$(jq --raw-output .PEER_GID <<<"$record")"
    expect "records that alice finds" 1 "$(_mine | wc -l)"
}

a_users_service_reads_the_users_own_configuration() {
    configure_user alice <<<'[allow.admin]
users = ["root"]'
    _start
    talk root 'hello\n' "$_socket" >/tmp/claim/answer
    expect_bytes "root, named by a rule" '> hello\n' /tmp/claim/answer
    talk alice 'hello\n' "$_socket" >/tmp/claim/answer
    expect_bytes "alice, named by none" 'Unauthorized access\n' /tmp/claim/answer
}

a_users_service_sees_true_ids() {
    # In a user namespace of its own, root would read as 65534.
    _start
    talk alice 'hello\n' "$_socket" >/tmp/claim/answer
    pid=$(of alice systemctl --user show --property=MainPID --value echo.service)
    expect "user namespace of the service" "$(readlink /proc/1/ns/user)" "$(readlink "/proc/$pid/ns/user")"
}

a_users_service_that_cannot_be_started_is_tried_seldom_and_ends_nothing() {
    local client starts
    _start
    mkdir -p /run/systemd/user/echo.service.d
    printf '[Service]\nExecStart=\nExecStart=/usr/bin/no-such-echod\n' >/run/systemd/user/echo.service.d/claim.conf
    of alice systemctl --user daemon-reload
    talk alice 'hello\n' "$_socket" >/tmp/claim/answer &
    client=$!
    for ((i = 0; i < 600; i++)); do
        [[ $(of alice systemctl --user show --property=ExecMainStatus --value echo.service) != 203 ]] || break
        sleep 0.05
    done
    # A span of time is what is asked about here.
    sleep 3
    journalctl --sync
    starts=$(journalctl --quiet "$(since)" --output=cat _UID=1001 USER_UNIT=echo.service MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5 | wc -l)
    ((starts >= 1 && starts <= 2)) || fail "starts in 3 s:" "  expected: one or two" "  found: $starts"
    _user_unit_is echo.socket active
    rm /run/systemd/user/echo.service.d/claim.conf
    of alice systemctl --user daemon-reload
    wait "$client"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
}

_user_property() {
    of alice systemctl --user show --property="$1" --value echo.service
}

a_reload_of_a_users_service_is_in_force_when_it_returns_or_changes_nothing() {
    configure_user alice <<<$'[allow.me]\nusers = ["self"]'
    _start
    expect "root before" "Unauthorized access" "$(talk root 'x\n' "$_socket")"
    pid=$(_user_property MainPID)
    configure_user alice <<<$'[allow.me]\nusers = ["self", "root"]'
    of alice systemctl --user reload echo.service
    expect "root, let in" "> x" "$(talk root 'x\n' "$_socket")"
    configure_user alice <<<$'[allow.me]\nusers = ["self"]\ncolour = "red"'
    if of alice systemctl --user reload echo.service 2>/dev/null; then fail "systemctl reload succeeded"; fi
    expect "root, by the old policy" "> x" "$(talk root 'x\n' "$_socket")"
    # Gone is not the same as none: what is in force came from the file.
    rm /home/alice/.config/echod/echod.toml
    if of alice systemctl --user reload echo.service 2>/dev/null; then fail "systemctl reload succeeded"; fi
    expect "root, by the old policy" "> x" "$(talk root 'x\n' "$_socket")"
    expect "process" "$pid" "$(_user_property MainPID)"
    _user_unit_is echo.service active
}

after_a_crash_of_a_users_service_who_waits_is_served() {
    _start
    expect "before" "> x" "$(talk alice 'x\n' "$_socket")"
    pid=$(_user_property MainPID)
    kill -STOP "$pid"
    talk alice 'waiting\n' "$_socket" >/tmp/claim/answer &
    waiting=$!
    kill -KILL "$pid"
    wait "$waiting"
    expect_bytes "who waited" '> waiting\n' /tmp/claim/answer
    expect "restarts by Restart=" 1 "$(_user_property NRestarts)"
    expect "descriptors that alice's systemd keeps" 0 "$(_user_property NFileDescriptorStore)"
}
