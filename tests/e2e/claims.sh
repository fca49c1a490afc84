# Runs inside a booted test system, as root: puts claims about the product to it, one after another.
#
#   bash claims.sh all [WORD]       every claim of cases/*.sh, or each with WORD in its file or name
#   bash claims.sh one FILE CLAIM   one claim; what `all` starts for each, with a time limit
#
# A file of cases defines functions. Each is a claim, and its name says it, unless it begins with an underscore.
# A claim starts with the service as just installed (see `reset`), may change the system's echo units and the
# units of alice and bob, and fails with the first command that fails. The commands for it are below "Vocabulary".
set -Eeuo pipefail
here=$(dirname "$(realpath "$0")")
export PATH=$PATH:$here/bin
# The time limit: far more than any claim takes, on a slow machine too.
time_limit=600

put_all() {
    local word=${1:-} file claim begin held=0 broke=0 rc
    useradd --create-home --shell /bin/bash --uid 1001 alice
    useradd --create-home --shell /bin/bash --uid 1002 bob
    groupadd --gid 2001 readers
    usermod --append --groups readers bob
    echo 0 0 >"$here/results"
    : >"$here/failed"
    for file in "$here"/cases/*.sh; do
        for claim in $(sed -n 's/^\([a-z][a-zA-Z0-9_]*\)() {$/\1/p' "$file"); do
            [[ ${file##*/}/$claim == *"$word"* ]] || continue
            begin=${EPOCHREALTIME/./}
            begin_records
            rc=0
            timeout --kill-after=10 "$time_limit" bash "$here/claims.sh" one "$file" "$claim" >"$here/output" 2>&1 ||
                rc=$?
            begin=$(((${EPOCHREALTIME/./} - begin) / 1000))
            if ((rc == 0)); then
                held=$((held + 1))
                echo "ok      $claim ($begin ms)"
                sed -n 's/^figure: /        /p' "$here/output"
            else
                broke=$((broke + 1))
                {
                    echo "FAILED  $claim ($begin ms, exit status $rc)"
                    sed 's/^/        | /' "$here/output"
                } | tee --append "$here/failed"
                echo "        the journal meanwhile:"
                journalctl --sync
                journalctl --no-pager "$(since)" --output=short-precise | sed 's/^/        > /'
            fi
            echo "$held $broke" >"$here/results"
        done
    done
    ((held > 0 && broke == 0))
}

put_one() {
    trap 'echo "failed in ${FUNCNAME[0]:-}, ${BASH_SOURCE[0]##*/} line $LINENO: $BASH_COMMAND" >&2' ERR
    . "$1"
    reset
    begin_records
    "$2"
}

# --- Vocabulary ---------------------------------------------------------------------------------------------------

# The system as the packages leave it: echo's socket listening, service not started, no configuration but the built-in one.
reset() {
    systemctl unmask --quiet --runtime echo.service
    systemctl stop echo.socket echo.service echo-{pause,reopen}.service 2>/dev/null || true
    systemctl stop 'peer-*' 'peergate@*' 'peergate-*@*' 2>/dev/null || true
    local user
    for user in alice bob; do
        if systemctl --quiet is-active "user@$(id -u "$user").service"; then
            of "$user" systemctl --user stop echo.socket echo.service echo-{pause,reopen}.service 'peer-*' 'peergate@*' \
                2>/dev/null || true
        fi
        rm --recursive --force "/home/$user/.config"
    done
    rm --recursive --force /etc/peergate /run/systemd/system/peergate@*.d /run/behind
    rm --recursive --force /etc/echod /run/systemd/system/echo.{socket,service}.d /run/systemd/user/echo.{socket,service}.d
    rm --recursive --force /tmp/claim
    mkdir --mode=777 /tmp/claim
    systemctl daemon-reload
    systemctl reset-failed
    systemctl start echo.socket
}

fail() {
    printf '%s\n' "$@" >&2
    return 1
}

# expect WHAT EXPECTED FOUND
expect() {
    [[ $3 == "$2" ]] || fail "$1:" "  expected: $(printf %q "$2")" "  found:    $(printf %q "$3")"
}

# The same for bytes: expect_bytes WHAT 'printf format of what is expected' FILE
expect_bytes() {
    # shellcheck disable=SC2059
    cmp --silent <(printf "$2") "$3" || fail "$1:" "  expected: $(printf %q "$(printf "$2" | od -c)")" "  found: $(od -c "$3")"
}

# Configuration of the system's service, from standard input; `configure_user alice` for alice's own.
configure() {
    mkdir -p /etc/echod
    cat >/etc/echod/echod.toml
    chmod 644 /etc/echod/echod.toml
}
configure_user() {
    local home=/home/$1
    of "$1" mkdir -p "$home/.config/echod"
    of "$1" sh -c "umask 022; cat >$home/.config/echod/echod.toml"
}

# drop_in echo.service <<EOF: more lines for a system unit, until the next claim.
drop_in() {
    mkdir -p "/run/systemd/system/$1.d"
    cat >"/run/systemd/system/$1.d/claim.conf"
    systemctl daemon-reload
}

# As USER COMMAND…: with the user's ids and groups, and an environment without anything else of that user.
as() {
    local user=$1
    shift
    setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups "$@"
}

# Of USER COMMAND…: the same, with the user's own systemd within reach; started where it isn't running.
of() {
    local user=$1 uid
    shift
    uid=$(id -u "$user")
    systemctl start "user@$uid.service"
    as "$user" env "HOME=/home/$user" "USER=$user" "XDG_RUNTIME_DIR=/run/user/$uid" \
        "DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/$uid/bus" "$@"
}

# talk USER 'printf format' [SOCKET]: sends it and the end, prints what comes back until the end.
talk() {
    # shellcheck disable=SC2059
    printf "$2" | as "$1" timeout 20 nc -N -U "${3:-/run/echo.sock}"
}

# unit_is echo.service active
unit_is() {
    expect "state of $1" "$2" "$(systemctl is-active "$1" || true)"
}

property() { # echo.service MainPID
    systemctl show --property="$2" --value "$1"
}

# Waits until a property has a value: await_property echo.service ActiveState inactive. Looks again at every change that
# systemd signals on the bus, and each second, since a change may have come before the subscription.
await_property() {
    local changes pid value deadline=$((SECONDS + 30))
    exec {changes}< <(exec busctl --system --json=short monitor org.freedesktop.systemd1 2>&1)
    pid=$!
    while value=$(property "$1" "$2"); [[ $value != "$3" ]] && ((SECONDS < deadline)); do
        read -r -t 1 -u "$changes" _ || true
    done
    kill "$pid"
    exec {changes}<&-
    expect "$2 of $1 after waiting for it" "$3" "$value"
}

# Journal entries from here on count as the claim's own. A time, not a cursor: with matches, --after-cursor of
# systemd 252 leaves out the first entry too many.
begin_records() {
    journalctl --sync
    records_since=${EPOCHREALTIME/./}
}
since() {
    echo "--since=@$((records_since / 1000000)).$(printf %06d $((records_since % 1000000)))"
}

ids='{
    "denied": "72261db9963c465c8c6121daadeb1cbc", "refused": "a45920b1da8c42cb8c4acbd02e5140bf",
    "summary": "e00fb3280d1140dca1192a4f029b14b6", "admitted": "fb07ecd99a40415abb029457009dd51a",
    "closed": "9aa9a5f08d08409e9e656c48f20bf4f8", "loaded": "b07bc66e288e48eba96896e38dfe1144",
    "faulty": "00e1479225c6488a9e2fed748c43c786", "revoked": "765ab08f733d46e1a5b6850cc41b9003"
}'
id_of() {
    jq --exit-status --raw-output --arg kind "$1" '.[$kind]' <<<"$ids"
}

# The program whose records they are; a file of cases may set it.
identifier=echod
# records KIND [MATCH…]: the claim's records so far, as JSON, one a line, only the program's own fields; KIND as in `ids`,
# or all. MATCH and options are journalctl's. Records that the service has not written yet are not waited for.
records() {
    local kind=$1
    shift
    [[ $kind == all ]] || set -- "MESSAGE_ID=$(id_of "$kind")" "$@"
    journalctl --sync
    journalctl --quiet --no-pager "$(since)" --output=json "SYSLOG_IDENTIFIER=$identifier" "$@" | _own_fields
}
_own_fields() {
    jq --compact-output --sort-keys --unbuffered \
        'with_entries(select(.key | test("^(_|SYSLOG_(PID|TIMESTAMP|FACILITY|RAW)|CODE_|TID$|TARGET$|THREAD|UNIT$|INVOCATION_ID$)") | not))'
}

# await_records N KIND [MATCH…]: waits for N such records, then prints them all; more than N is a failure.
await_records() {
    local count=$1 kind=$2 line pid lines=()
    shift 2
    local match=("SYSLOG_IDENTIFIER=$identifier" "$@")
    [[ $kind == all ]] || match+=("MESSAGE_ID=$(id_of "$kind")")
    exec {follow}< <(exec journalctl --quiet --no-pager "$(since)" --lines=all --follow --output=json "${match[@]}")
    pid=$!
    while ((${#lines[@]} < count)); do
        read -r -t 30 -u "$follow" line || break
        lines+=("$line")
    done
    kill "$pid"
    exec {follow}<&-
    ((${#lines[@]} == count)) || fail "records of kind $kind $*:" "  expected: $count" "  found:    ${#lines[@]}" "all:" "$(records all)"
    expect "records of kind $kind $*" "$count" "$(records "$kind" "$@" | wc -l)"
    printf '%s\n' "${lines[@]}" | _own_fields
}

# expect_record RECORD JSON: RECORD is exactly JSON. In JSON a value of null matches any value, and "~RE" a value that
# matches the regular expression.
expect_record() {
    jq --null-input --exit-status --argjson found "$1" --argjson expected "$2" '
        ($found | keys) == ($expected | keys) and
        all($expected | to_entries[]; . as $e | $found[$e.key] |
            if $e.value == null then true
            elif ($e.value | startswith("~")) then test("^(" + $e.value[1:] + ")$")
            else . == $e.value end)' >/dev/null ||
        fail "record:" "  expected: $(jq --sort-keys --compact-output . <<<"$2")" "  found:    $1"
}

# A line that is printed with the claim even when it holds.
figure() {
    echo "figure: $*"
}

case $1 in
    all) put_all "${2:-}" ;;
    one) put_one "$2" "$3" ;;
esac
