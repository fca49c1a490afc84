# How long a restart makes the clients wait, by the number of live connections. `tests/e2e/run --full --only 31-pauses`
# restarts 20 times in each row and prints the table of benches/README.md; otherwise it is 3 times. Every byte is compared. No
# time is asserted: the pauses depend on the machine, and their ratios are read by hand.

. "$here/cases/30-lifetime.sh"

_times=3
[[ ! -e $here/full ]] || _times=20

# How long so many restarts of a unit take, in milliseconds: the longest, and the median.
_restarts() { # UNIT
    local begin took=()
    systemctl start "$1"
    for ((i = 0; i < _times; i++)); do
        begin=${EPOCHREALTIME/./}
        systemctl restart "$1"
        took+=("$(((${EPOCHREALTIME/./} - begin) / 1000))")
    done
    systemctl stop "$1"
    mapfile -t took < <(printf '%s\n' "${took[@]}" | sort --numeric-sort)
    echo "${took[-1]} | ${took[_times / 2]}"
}

# A service of Type=notify that does nothing: as a unit of its own, and in the sandbox of echo.service.
_empty_services() {
    local program='ExecStart=/usr/bin/perl -MIO::Socket::UNIX -e '\''IO::Socket::UNIX->new(Type => SOCK_DGRAM, Peer => $$ENV{NOTIFY_SOCKET})->send("READY=1"); sleep'\'
    printf '[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\n%s\n' "$program" |
        tee /run/systemd/system/peer-{empty,sandboxed}.service >/dev/null
    sed -n '1i User=peer-empty
        /^DynamicUser=/p; /^NoNewPrivileges=/,$p' /usr/lib/systemd/system/echo.service >>/run/systemd/system/peer-sandboxed.service
    systemctl daemon-reload
}

# One row: the restarts with so many connections. Most are in the middle of a line, one in ten (at most 100) does not read,
# one streams. With 40 connections and more, all together send 2,000 pieces a second.
_pause_with() { # CONNECTIONS
    local deaf=$(($1 / 10)) pace=$(($1 / 2))
    rm --force /tmp/claim/stream-{in,out}
    begin_records
    _stream_across /run/echo.sock \
        "$1 pace=$((pace < 20 ? 20 : pace)) deaf=$((deaf > 100 ? 100 : deaf)) torrents=1" "$_times" systemctl restart echo.service
    figure "| $1 | $pause | $longest | $median |"
    expect "descriptors that systemd keeps" 0 "$(property echo.service NFileDescriptorStore)"
    # No client had to connect again, and each admission is on record: one by one, or, where the journal is slower than 10,000
    # clients, in the number of records that were left out, which may count ends of connections too.
    local admitted left_out
    admitted=$(records admitted | wc -l)
    left_out=$(records all PRIORITY=4 |
        jq --slurp 'map(.MESSAGE | capture("^(?<count>[0-9]+) records were not written") | .count | tonumber) | add // 0')
    ((admitted <= $1 && admitted + left_out >= $1)) || fail "$admitted admissions and $left_out records left out, of $1 clients"
}

restarts_with_ten_to_ten_thousand_connections_lose_double_and_cut_nothing() {
    local connections
    _empty_services
    _policy
    # The releases run side by side on one kernel, which counts descriptors in flight by user (unix(7), ETOOMANYREFS).
    # systemd makes a dynamic user's id from its name: two names, so that neither release takes the other's room.
    drop_in echo.service <<<$'[Service]\nUser=peer-'"$(. /etc/os-release && echo "$VERSION_CODENAME")"
    figure "| connections | longest pause of a client, ms | longest restart, ms | median restart, ms |"
    figure "| an empty service | | $(_restarts peer-empty.service) |"
    figure "| an empty service in the same sandbox | | $(_restarts peer-sandboxed.service) |"
    for connections in 10 100 4000 10000; do
        _pause_with "$connections"
    done
}
