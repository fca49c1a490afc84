# Floods of denied connections: the record stays exact, and admitted clients are served all the while.

# Compares the denials that clients saw with the records in the journal: expect_equation FILE… of `peer flood`.
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

# The peak memory of the running service.
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

no_denial_is_lost_while_the_journal_or_the_service_restarts() {
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
    # A low rate limit for every unit without one of its own. journald raises it up to six times with free disk space.
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

# When journald reads a record, it looks up the unit of the process that sent it. The report believes no record without it.
a_process_that_lives_for_a_moment_is_in_the_report() {
    _policy
    systemctl kill --signal=STOP systemd-journald.service
    _flood bob 20 moment
    systemctl stop --no-block echo.service
    for ((i = 0; i < 10; i++)); do
        [[ $(property echo.service ActiveState) != inactive ]] || break
        sleep 0.1
    done
    systemctl kill --signal=CONT systemd-journald.service
    systemctl stop echo.service
    _expect_equation /tmp/claim/moment
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

descriptors_that_block_in_close_delay_no_client() {
    _policy
    local who until taken bombers=()
    mkfifo /tmp/claim/{until,taken}
    exec {until}<>/tmp/claim/until
    for who in bob alice; do
        # The first connection starts the service, so descriptors can be sent before the service refuses them. The socket
        # is made anew: the old one would still have the option that refuses them.
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
