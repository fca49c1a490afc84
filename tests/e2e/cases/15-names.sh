# Names in the policy that the user database doesn't know when the service starts, as at boot, before a directory
# service is up: they are looked up again, and take effect without a reload.

# _as_uid UID COMMAND…: as a user that may have no name.
_as_uid() {
    setpriv --reuid "$1" --regid "$1" --clear-groups "${@:2}"
}

# _denied_so_far UID: connects once.
_denied_so_far() {
    printf 'hello\n' | _as_uid "$1" timeout 20 nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "before the name is known" 'Unauthorized access\n' /tmp/claim/answer
}

# _found NAMES RULES: waits for the record that names were found, the second about the configuration: no reload wrote one.
_found() {
    local record
    record=$(await_records 2 loaded | tail --lines=1)
    expect "the record" "5 Names found and in force: $1; configuration: /etc/echod/echod.toml, $2" \
        "$(jq --raw-output '"\(.PRIORITY) \(.MESSAGE)"' <<<"$record")"
}

a_user_added_later_is_admitted_without_a_reload() {
    configure <<<'[allow.late]
users = ["carol"]'
    _denied_so_far 1010
    trap 'userdel carol' EXIT
    useradd --uid 1010 --no-create-home carol
    _found 'user "carol" (1010)' '1 rule'
    printf 'hello\n' | _as_uid 1010 timeout 20 nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "afterwards" '> hello\n' /tmp/claim/answer
    expect "denials" 1 "$(records denied | wc -l)"
}

names_added_later_to_another_database_take_effect() {
    configure <<<'[allow.late]
users = ["dave"]
groups = ["divers"]'
    _denied_so_far 1011
    trap 'rm --recursive --force /run/userdb' EXIT
    mkdir /run/userdb
    echo '{"groupName": "divers", "gid": 1011, "disposition": "regular"}' >/run/userdb/divers.group
    ln --symbolic divers.group /run/userdb/1011.group
    echo '{"userName": "dave", "uid": 1011, "gid": 1011, "disposition": "regular"}' >/run/userdb/dave.user
    ln --symbolic dave.user /run/userdb/1011.user
    expect "getent" "1011" "$(getent passwd dave | cut --delimiter=: --fields=3)"
    _found 'user "dave" (1011), group "divers" (1011)' '1 rule'
    printf 'hello\n' | _as_uid 1011 timeout 20 nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "afterwards" '> hello\n' /tmp/claim/answer
}

a_name_found_later_holds_for_live_connections() {
    configure <<<'[allow.late]
users = ["carol"]
line-length = 10

[allow.everybody]
users = ["any"]'
    coproc live { exec setpriv --reuid 1010 --regid 1010 --clear-groups nc -U /run/echo.sock; }
    local from=${live[0]} to=${live[1]} line
    client=$live_PID
    echo 'more than ten bytes' >&"$to"
    read -r -t 20 -u "$from" line
    expect "before the name is known" '> more than ten bytes' "$line"
    # userdel refuses while a process has that uid.
    trap 'kill "$client" 2>/dev/null || true; wait; userdel carol' EXIT
    useradd --uid 1010 --no-create-home carol
    _found 'user "carol" (1010)' '2 rules'
    echo 'more than ten bytes' >&"$to"
    read -r -t 20 -u "$from" line
    expect "afterwards" 'Line too long' "$line"
}
