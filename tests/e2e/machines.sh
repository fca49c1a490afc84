# The journals of several machines: each booted system sends what it has recorded, and one more receives it all. ./run calls
# these two, through ./claims.sh.

# Denials, more on a later release: in the journal's export format, and as this system's own report tells of them.
send() {
    local n version
    version=$(. /etc/os-release && echo "${VERSION_ID:-14}")
    for ((n = 10; n < version; n++)); do
        expect "answer to bob" 'Unauthorized access' "$(talk bob 'x\n')"
    done
    expect "answer to root" 'Unauthorized access' "$(talk root 'x\n')"
    # The last records are written when the service ends.
    systemctl stop echo.service 2>/dev/null
    journalctl --sync
    rm --recursive --force "$here/sent"
    mkdir "$here/sent"
    journalctl --quiet --output=export "$(since)" >"$here/sent/export"
    echod report --system --json "$(since)" >"$here/sent/report"
    cp /etc/machine-id "$here/sent/id"
}

the_report_on_what_is_received_is_the_sum_of_the_senders_own() {
    local machine report expected text remote=/usr/lib/systemd/systemd-journal-remote
    [[ -x $remote ]] || remote=/lib/systemd/systemd-journal-remote
    mkdir /tmp/claim/received
    for machine in "$here"/received/*; do
        "$remote" --output="/tmp/claim/received/remote-${machine##*/}.journal" - <"$machine/export" >/dev/null 2>&1
    done
    report=$(echod report --system --json --directory=/tmp/claim/received)
    expected=$(for machine in "$here"/received/*; do
        jq --raw-output --arg id "$(<"$machine/id")" '.peers[] | "\($id): \(.user) \(.total)"' "$machine/report"
    done | sort)
    # A row names its machine where there is more than one.
    expect "rows" "$expected" "$(jq --raw-output --arg only "$(<"$machine/id")" \
        '.peers[] | "\(.machine.id // $only): \(.user) \(.total)"' <<<"$report" | sort)"
    expect "denials, complete" "$(jq --slurp 'map(.denied.total) | add' "$here"/received/*/report) true" \
        "$(jq --raw-output '"\(.denied.total) \(.complete)"' <<<"$report")"
    # The systems have one host name, so the table tells them apart by their ids.
    if (($(jq '.machines | length' <<<"$report") > 1)); then
        text=$(echod report --system --directory=/tmp/claim/received)
        for machine in "$here"/received/*; do
            [[ $text == *"/$(head --bytes=12 "$machine/id");"* ]] || fail "the table:" "$text"
        done
    fi
    paste --serial --delimiters=',' <<<"$expected"
}
