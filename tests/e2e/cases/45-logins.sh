# Which user logged in, by a real login (pam_loginuid) and sudo; and what unshare does to a denial.

_log_in_as() { # USER COMMAND…: a session that PAM opens as login(1) has it
    local user=$1
    shift
    systemd-run --quiet --pipe --wait --collect --property=PAMName=login --uid="$user" "$@"
}

_allow_sudo() { # USER
    echo "$1 ALL=(ALL) NOPASSWD: ALL" >"/etc/sudoers.d/$1"
}

the_record_of_a_denied_root_names_the_user_behind_sudo() {
    _allow_sudo alice
    configure <<<$'[allow.bob]\nusers = ["bob"]'
    _log_in_as alice sudo sh -c 'echo x | nc -N -U /run/echo.sock' >/tmp/claim/answer
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
    record=$(await_records 1 denied)
    expect "login" "1001 alice" "$(jq --raw-output '.PEER_LOGINUID + " " + .PEER_LOGIN' <<<"$record")"
    expect "session" "number" "$(jq --raw-output '.PEER_SESSION | tonumber | type' <<<"$record")"
    expect "message" "Denied root (uid 0, logged in as alice) gid 0" \
        "$(jq --raw-output .MESSAGE <<<"$record" | grep --only-matching '^Denied .* gid 0')"
    expect "report" "root (0), logged in as alice" "$(echod report --system "$(since)" | grep --only-matching 'root (0), logged in as alice')"
}

a_rule_by_login_admits_one_users_sudo_and_no_service() {
    _allow_sudo alice
    _allow_sudo bob
    configure <<<$'[allow.alice]\nusers = ["root"]\nlogins = ["alice"]'
    _log_in_as alice sudo sh -c 'echo x | nc -N -U /run/echo.sock' >/tmp/claim/answer
    expect_bytes "alice's sudo" '> x\n' /tmp/claim/answer
    _log_in_as bob sudo sh -c 'echo x | nc -N -U /run/echo.sock' >/tmp/claim/answer
    expect_bytes "bob's sudo" 'Unauthorized access\n' /tmp/claim/answer
    expect "a service" "Unauthorized access" "$(echo x | systemd-run --quiet --pipe --wait --collect nc -N -U /run/echo.sock)"
}

a_denied_member_or_user_stays_denied_by_unshare() {
    # The group readers has bob as a member; useradd gave both users subordinate ids.
    configure <<<$'[deny.readers]\ngroups = ["readers"]\n[deny.alice]\nusers = ["alice"]\n[allow.any]\nusers = ["any"]'
    local send='echo x | nc -N -U /run/echo.sock' escape=(unshare --map-root-user --map-auto setpriv --clear-groups)
    expect "bob without the group" "Unauthorized access" \
        "$(setpriv --reuid=bob --regid=bob --init-groups "${escape[@]}" sh -c "$send")"
    expect "alice under another uid" "Unauthorized access" \
        "$(setpriv --reuid=alice --regid=alice --init-groups "${escape[@]}" --reuid=7 --regid=7 sh -c "$send")"
    expect "root" "> x" "$(sh -c "$send")"
}
