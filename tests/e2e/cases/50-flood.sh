# Floods of strangers: the record stays exact, and those who are admitted are served all the while.

# What denied clients saw against what the journal holds: expect_equation FILE… of `peer flood`.
_expect_equation() {
    local seen written counted
    seen=$(awk '/^[0-9]+ Unauthorized access\\n$/ { sum += $1 } END { print sum + 0 }' "$@")
    expect "answers other than the message" "" "$(grep --no-filename --invert-match --extended-regexp '^[0-9]+ Unauthorized access\\n$' "$@" || true)"
    written=$(records denied | wc -l)
    counted=$(records summary | jq --slurp 'map(select(.GATE_REASON == "policy" or .GATE_REASON == "no-credentials") | .GATE_COUNT | tonumber) | add // 0')
    figure "denials seen $seen; records $written, counted in $(records summary | wc -l) summaries $counted; difference $((seen - written - counted))"
    ((seen > 0)) || fail "nobody was denied"
    expect "denials in the journal" "$seen" "$((written + counted))"
    expect "denials in the report" "$seen" "$(echod report --system --json "$(since)" | jq .denied.total)"
}

# What the running service has needed at the most.
_peak() {
    figure "peak memory of the service: $(awk '/^VmHWM:/ { print $2, $3 }' "/proc/$(property echo.service MainPID)/status")"
}

_policy() {
    configure <<'TOML'
[allow.staff]
users = ["alice"]
[audit]
burst = 10
interval = "1s"
TOML
}

_flood() { # USER TIMES FILE
    as "$1" peer --say 'let me in\n' flood /run/echo.sock "$2" >"/tmp/claim/$3" 2>&1
}

no_denial_of_a_flood_escapes_the_record() {
    _policy
    _flood bob 5000 one &
    _flood bob 5000 two &
    _flood root 5000 three &
    wait
    _peak
    systemctl stop echo.service
    _expect_equation /tmp/claim/{one,two,three}
}

no_denial_escapes_while_the_journal_stands_still_or_is_restarted_nor_when_the_service_is() {
    _policy
    expect "an admitted user" "> x" "$(talk alice 'x\n')"
    systemctl kill --signal=STOP systemd-journald.service
    _flood bob 3000 stopped
    expect "an admitted user while the journal stands still" "> x" "$(talk alice 'x\n')"
    _flood root 3000 more
    systemctl kill --signal=CONT systemd-journald.service
    _flood bob 6000 continued &
    flood=$!
    systemctl restart systemd-journald.service
    expect "an admitted user in the flood" "> x" "$(talk alice 'x\n')"
    systemctl restart echo.service
    wait "$flood"
    _peak
    systemctl stop echo.service
    _expect_equation /tmp/claim/{stopped,more,continued}
    unit_is echo.socket active
}

the_journals_own_limit_drops_no_denial() {
    configure <<'TOML'
[allow.staff]
users = ["alice"]
[audit]
burst = 1000000
TOML
    # So low a limit for whoever has none of their own, however much room the disk has: it is raised up to six times.
    mkdir -p /run/systemd/journald.conf.d
    printf '[Journal]\nRateLimitIntervalSec=30s\nRateLimitBurst=50\n' >/run/systemd/journald.conf.d/claim.conf
    systemctl restart systemd-journald.service
    _flood bob 2000 in-full
    systemctl stop echo.service
    rm /run/systemd/journald.conf.d/claim.conf
    systemctl restart systemd-journald.service
    _expect_equation /tmp/claim/in-full
    (($(records denied | wc -l) > 300)) || fail "too few records to reach the limit"
}

a_flood_leaves_the_socket_alive() {
    _policy
    # Each round starts the service anew: far above the limits at which systemd would give the socket up.
    for ((i = 0; i < 30; i++)); do
        _flood bob 20 "round-$i"
        systemctl stop echo.service
    done
    unit_is echo.socket active
    expect "an admitted user" "> x" "$(talk alice 'x\n')"
    systemctl stop echo.service
    _expect_equation /tmp/claim/round-*
}

descriptors_that_take_hours_to_close_wedge_nothing() {
    _policy
    local who until taken bombers=()
    mkfifo /tmp/claim/{until,taken}
    exec {until}<>/tmp/claim/until
    for who in bob alice; do
        # The first of them starts the service: it is not there yet to have the kernel refuse what they send. On a new
        # socket: the old one would remember.
        systemctl stop echo.service
        systemctl restart echo.socket
        as "$who" peer bomb /run/echo.sock 30 </tmp/claim/until {until}>&- >/tmp/claim/taken &
        bombers+=($!)
        read -r taken </tmp/claim/taken
        figure "sent by $who: 30, of which the kernel took $taken"
        expect "an admitted user" "> x" "$(talk alice 'x\n')"
        systemctl reload echo.service
        expect "an admitted user after a reload" "> x" "$(talk alice 'x\n')"
        expect "restarts" 0 "$(property echo.service NRestarts)"
    done
    systemctl stop echo.service
    unit_is echo.socket active
    exec {until}>&-
    wait "${bombers[@]}"
}
