# `echod report` on real journals: a namespace, damaged files, and files that the caller may not read. The journals of several
# machines: ../machines.sh.

_deny() { # USER TIMES
    local n
    for ((n = 0; n < $2; n++)); do
        expect "answer to $1" 'Unauthorized access' "$(talk "$1" 'x\n')"
    done
}

# The report as JSON, into the variable `report`; its exit status into `status`, its standard error into `said`.
_report() { # COMMAND…
    status=0
    report=$("$@" echod report --json "$(since)" "${options[@]}" 2>/tmp/claim/said) || status=$?
    said=$(cat /tmp/claim/said)
}
_in_report() { # FILTER
    jq --raw-output "$1" <<<"$report"
}

a_report_covers_a_namespace_and_names_what_was_read() {
    local options status report said text
    drop_in echo.service <<<'[Service]
LogNamespace=audit'
    _deny bob 3
    # The last records are written when the service ends.
    systemctl stop echo.service
    journalctl --namespace=audit --sync
    options=(--system --namespace=audit)
    _report env
    expect "denials in the namespace" '3 true' "$(_in_report '"\(.denied.total) \(.complete)"')"
    expect "exit status" 0 "$status"
    text=$(echod report --system "$(since)" | tr '\n' ' ')
    [[ $text == "No connection was turned away by the system's echod. "* ]] || fail "without records:" "$text"
    [[ $text == *"Read: "*" journal file"*" in "*"/log/journal/$(cat /etc/machine-id)"* ]] || fail "where it looked:" "$text"
    [[ $text == *"Not read: the journal namespace audit. "* ]] || fail "where else:" "$text"
    options=(--system --namespace=nothing)
    _report env
    expect "a namespace that does not exist" 'false 74' "$(_in_report .complete) $status"
    systemctl stop 'systemd-journald*@audit.*'
    rm --recursive /var/log/journal/*.audit
}

a_user_who_may_not_read_the_systems_journal_is_told_so() {
    local options=(--system) status report said
    _deny bob 2
    systemctl stop echo.service
    journalctl --sync
    _report env
    expect "denials that root sees" '2 true 0' "$(_in_report '"\(.denied.total) \(.complete)"') $status"
    # With a journal of their own, and without one.
    of alice systemd-run --user --quiet --wait true
    for user in alice bob; do
        _report as "$user"
        expect "the report to $user" '0 false 74' "$(_in_report '"\(.denied.total) \(.complete)"') $status"
        [[ $said == *'no permission to read '*'/system.journal'* ]] || fail "said to $user:" "$said"
        [[ $(as "$user" echod report --system 2>&1 || true) != *'No connection was turned away'* ]] || fail "said to $user: nobody"
    done
    options=(--user)
    _report as alice
    expect "alice's report on her own" '0 true 0' "$(_in_report '"\(.denied.total) \(.complete)"') $status" || fail "$said"
}

on_volatile_storage_a_user_learns_that_no_record_is_readable() {
    local options=(--user) status report said
    mkdir -p /run/systemd/journald.conf.d
    printf '[Journal]\nStorage=volatile\n' >/run/systemd/journald.conf.d/claim.conf
    systemctl restart systemd-journald
    _report as alice
    rm /run/systemd/journald.conf.d/claim.conf
    systemctl restart systemd-journald
    journalctl --flush
    expect "complete, exit status" 'false 74' "$(_in_report .complete) $status"
    [[ $said == *'no permission to read '*'/run/log/journal/'* ]] || fail "said to alice:" "$said"
}

a_journal_file_that_was_cut_off_makes_the_report_incomplete() {
    local options=(--system) status report said cut
    _deny bob 2
    systemctl stop echo.service
    cut=/var/log/journal/$(cat /etc/machine-id)/system@cut.journal
    journalctl --sync
    head --bytes=4096 "${cut%@*}.journal" >"$cut"
    _report env
    rm "$cut"
    expect "denials, complete, exit status" '2 false 74' "$(_in_report '"\(.denied.total) \(.complete)"') $status"
    [[ $said == *system@cut.journal* ]] || fail "said:" "$said"
}

what_journald_has_dropped_makes_the_report_incomplete() {
    local options=(--system) status report said
    drop_in echo.service <<<'[Service]
LogRateLimitIntervalSec=3s
LogRateLimitBurst=5'
    configure <<<'[allow.staff]
users = ["alice"]
[audit]
burst = 1000'
    # journald reports dropped messages with the first message that it takes again.
    as bob peer --say 'x\n' flood /run/echo.sock 3000 >/tmp/claim/flood 2>&1
    until _report env; (($(_in_report .suppressed) > 0)) || ((SECONDS > 60)); do
        _deny bob 1
    done
    expect "complete, exit status" 'false 74' "$(_in_report .complete) $status"
    [[ $said == *'journald has dropped '*' messages of the service'* ]] || fail "said:" "$said"
    # It may have dropped more since, and would tell of that with a message of the next claim.
    systemctl restart systemd-journald.service
}
