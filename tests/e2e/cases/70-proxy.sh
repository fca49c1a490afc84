# The proxy in front of services that know nothing of it: its instances under systemd, and the recipes of peergate(8), each
# carried out as it is printed there.

. "$here/cases/30-lifetime.sh"
identifier=peergate
man_page=$here/peergate.8

# Configuration of an instance, from standard input.
_instance() { # NAME
    mkdir -p /etc/peergate
    cat >"/etc/peergate/$1.toml"
    chmod 644 "/etc/peergate/$1.toml"
}

# An instance in front of an echo that admits every user, and how many connections it has had.
_gated_echo() { # NAME [more of its configuration]
    mkdir -p /run/behind
    printf '[allow.all]\nusers = ["any"]\n[limits]\nconnections = 2000\nconnections-per-user = 2000\n[audit]\nrecord = "connections"' \
        >/run/behind/echo.toml
    cat >/run/systemd/system/peer-behind.service <<'UNIT'
[Service]
Type=notify
ExecStart=/usr/bin/echod --config /run/behind/echo.toml --listen /run/behind/echo.sock
UNIT
    _instance "$1" <<TOML
[forward]
to = "/run/behind/echo.sock"
replies = "text"
[limits]
connections = 2000
connections-per-user = 2000
[allow.staff]
users = ["alice"]
${2:-}
TOML
    systemctl daemon-reload
    systemctl start peer-behind.service "peergate@$1.socket"
}
_seen_behind() { identifier=echod records admitted _SYSTEMD_UNIT=peer-behind.service | wc -l; }

the_proxys_units_are_clean_and_as_closed_as_SECURITY_md_says() {
    local units='peergate@.socket peergate@.service peergate-pause@.service peergate-started@.service peergate-reopen@.service'
    expect "systemd-analyze verify" "" "$(cd /usr/lib/systemd/system && systemd-analyze --man=no verify $units 2>&1 || true)"
    expect "systemd-analyze --user verify" "" \
        "$(cd /usr/lib/systemd/user && of alice systemd-analyze --man=no --user verify $units 2>&1 || true)"
    _gated_echo one
    systemctl start peergate@one.service
    systemd-analyze security --no-pager --threshold=5 peergate@one.service >/tmp/claim/security ||
        fail "systemd-analyze security:" "$(cat /tmp/claim/security)"
    figure "$(tail --lines=1 /tmp/claim/security)"
}

the_first_byte_starts_an_instance_which_passes_every_byte_and_each_end() {
    _gated_echo one
    unit_is peergate@one.service inactive
    talk alice 'hello\n\nNUL \000 CR \r\377\376\nfragment' /run/peergate/one.sock >/tmp/claim/answer
    expect_bytes "what came back after the client's end" '> hello\n> \n> NUL \000 CR \r\377\376\n> fragment' /tmp/claim/answer
    unit_is peergate@one.service active
    expect "the user it runs as" peergate_one \
        "$(ps --no-headers --format=user:32 "$(property peergate@one.service MainPID)" | xargs)"
}

a_denied_peer_is_recorded_and_the_service_sees_no_connection() {
    local record
    _gated_echo one
    talk bob 'hello\n' /run/peergate/one.sock >/tmp/claim/answer
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
    record=$(await_records 1 denied _SYSTEMD_UNIT=peergate@one.service)
    expect "user, rule, socket" "bob default /run/peergate/one.sock" \
        "$(jq --raw-output '[.PEER_USER, .GATE_RULE, .GATE_SOCKET] | join(" ")' <<<"$record")"
    expect "connections that the service saw" 0 "$(_seen_behind)"
    expect "the same of alice" "> x" "$(talk alice 'x\n' /run/peergate/one.sock)"
    expect "connections that the service saw then" 1 "$(_seen_behind)"
}

no_denial_of_a_flood_through_the_proxy_escapes_the_record() {
    local seen written counted
    _gated_echo one
    as bob peer --say 'let me in\n' flood /run/peergate/one.sock 4000 >/tmp/claim/flood-bob 2>&1 &
    as root peer --say 'let me in\n' flood /run/peergate/one.sock 2000 >/tmp/claim/flood-root 2>&1 &
    wait
    systemctl stop peergate@one.service
    seen=$(awk '/^[0-9]+ Unauthorized access\\n$/ { sum += $1 } END { print sum + 0 }' /tmp/claim/flood-*)
    written=$(records denied | wc -l)
    counted=$(records summary | jq --slurp 'map(select(.GATE_REASON == "policy" or .GATE_REASON == "no-credentials") | .GATE_COUNT | tonumber) | add // 0')
    figure "denials seen $seen; records $written, counted in summaries $counted"
    expect "denials that clients saw" 6000 "$seen"
    expect "denials in the journal" "$seen" "$((written + counted))"
    expect "denials in the report" "$seen" "$(peergate report --system --instance one --json "$(since)" | jq .denied.total)"
    expect "connections that the service saw" 0 "$(_seen_behind)"
}

restarts_of_the_proxy_lose_double_and_cut_nothing() {
    _gated_echo one
    _stream_across /run/peergate/one.sock 64 5 systemctl restart peergate@one.service
    expect "connections that the service saw" 64 "$(_seen_behind)"
}

_upgrade_of_the_proxy() {
    DPKG_MAINTSCRIPT_PACKAGE=peergate DPKG_MAINTSCRIPT_NAME=postinst sh /opt/e2e/peergate.postinst configure 0.0 \
        >/tmp/claim/said 2>&1 || fail "the postinst failed:" "$(cat /tmp/claim/said)"
}

an_upgrade_restarts_each_instance_that_can_be_and_keeps_its_connections() {
    local faulty sound own
    _gated_echo one
    _gated_echo two
    systemctl start peergate@one.service peergate@two.service
    of alice sh -c 'umask 022; mkdir -p ~/.config/peergate; cat >~/.config/peergate/mine.toml' \
        <<<$'[forward]\nto = "/run/behind/echo.sock"\n[allow.me]\nusers = ["self"]'
    of alice systemctl --user daemon-reload
    of alice systemctl --user start peergate@mine.service
    sound=$(property peergate@one.service MainPID) faulty=$(property peergate@two.service MainPID)
    own=$(of alice systemctl --user show --property=MainPID --value peergate@mine.service)
    echo 'nonsense = 1' >>/etc/peergate/two.toml
    _stream_across /run/peergate/one.sock 32 1 _upgrade_of_the_proxy
    [[ $(property peergate@one.service MainPID) != "$sound" ]] || fail "one was not restarted:" "$(cat /tmp/claim/said)"
    [[ $(of alice systemctl --user show --property=MainPID --value peergate@mine.service) != "$own" ]] ||
        fail "alice's was not restarted:" "$(cat /tmp/claim/said)"
    expect "the process with the faulty configuration" "$faulty" "$(property peergate@two.service MainPID)"
    for word in nonsense 'peergate@two.service was not restarted' 'peergate check --instance two'; do
        grep --quiet --fixed-strings -- "$word" /tmp/claim/said || fail "the postinst does not say \"$word\":" "$(cat /tmp/claim/said)"
    done
}

a_start_of_one_instance_that_comes_to_nothing_pauses_that_one_alone() {
    local client since ticks lines
    _gated_echo one
    _gated_echo two
    drop_in peergate@one.service <<<$'[Unit]\nConditionPathExists=/nonexistent'
    talk alice 'hello\n' /run/peergate/one.sock >/tmp/claim/answer &
    client=$!
    await_property peergate-pause@one.service ActiveState activating
    since=$EPOCHREALTIME ticks=$(awk '{ print $14 + $15 }' /proc/1/stat)
    expect "the other instance" "> x" "$(talk alice 'x\n' /run/peergate/two.sock)"
    expect "its pause" inactive "$(property peergate-pause@two.service ActiveState)"
    # The claim is about a time span.
    sleep 3
    ticks=$(($(awk '{ print $14 + $15 }' /proc/1/stat) - ticks))
    journalctl --sync
    lines=$(journalctl --quiet "--since=@$since" --output=cat | wc -l)
    figure "in 3 s: PID 1 $((ticks * 10)) ms, $lines lines of the journal"
    ((lines <= 40)) || fail "lines of the journal in 3 s:" "  expected: at most 40" "  found: $lines"
    rm -r /run/systemd/system/peergate@one.service.d
    systemctl daemon-reload
    wait "$client"
    expect_bytes "the client that waited" '> hello\n' /tmp/claim/answer
    systemctl stop peergate@one.service
    expect "result of the stop" success "$(property peergate@one.service Result)"
}

a_failed_socket_of_an_instance_opens_again() {
    _gated_echo one
    systemctl --quiet mask --runtime peergate@one.service
    talk alice 'hello\n' /run/peergate/one.sock >/tmp/claim/answer 2>&1 || true
    await_property peergate@one.socket ActiveState failed
    systemctl --quiet unmask --runtime peergate@one.service
    await_property peergate@one.socket ActiveState active
    expect "a client after that" "> x" "$(talk alice 'x\n' /run/peergate/one.sock)"
}

a_users_instance_admits_only_that_user() {
    _gated_echo one
    of alice sh -c 'umask 022; mkdir -p ~/.config/peergate; cat >~/.config/peergate/mine.toml' \
        <<<$'[forward]\nto = "/run/behind/echo.sock"\nreplies = "text"\n[allow.me]\nusers = ["self"]'
    of alice systemctl --user daemon-reload
    of alice systemctl --user start peergate@mine.socket
    expect "alice" "> x" "$(talk alice 'x\n' /run/user/1001/peergate/mine.sock)"
    expect "root" "Unauthorized access" "$(talk root 'x\n' /run/user/1001/peergate/mine.sock)"
    await_records 1 denied _SYSTEMD_USER_UNIT=peergate@mine.service PEER_UID=0 >/dev/null
    of alice systemctl --user stop peergate@mine.socket peergate@mine.service
}

# --- The recipes of the manual page -------------------------------------------------------------------------------

# The blocks of a section, or of a subsection, of the page: each a file in /tmp/claim/recipe.
_blocks() { # SECTION
    rm -rf /tmp/claim/recipe
    mkdir -p /tmp/claim/recipe
    awk -v section="$1" '
        /^\.S[hs] / { within = substr($0, 5) == section; block = "" }
        within && /^\.Bd -literal -offset indent/ { block = sprintf("/tmp/claim/recipe/%02d", ++count); next }
        /^\.Ed/ { block = "" }
        block { gsub(/\\-/, "-"); gsub(/\\\(dq/, "\""); gsub(/\\&/, ""); gsub(/\\e/, "\\"); print > block }' "$man_page"
    [[ -e /tmp/claim/recipe/01 ]] || fail "the manual page has no recipe \"$1\""
}

# Does what a section says: writes its files, runs its commands, compares what they print.
_recipe() { # SECTION
    local block line
    _blocks "$1"
    for block in /tmp/claim/recipe/*; do
        line=$(head --lines=1 "$block")
        if [[ $line =~ ^\#\ (/[^ ]+)$ ]]; then
            _write "${BASH_REMATCH[1]}" "$block"
        else
            _commands "$block"
        fi
    done
}

# A file of a recipe, which is taken back at the end of the claim.
_write() { # PATH BLOCK
    [[ ! -e $1 || -e $1.before ]] || cp --preserve "$1" "$1.before"
    mkdir -p "$(dirname "$1")"
    tail --lines=+2 "$2" >"$1"
    chmod 644 "$1"
    written+=("$1")
}
written=()

_commands() { # BLOCK
    local line command='' prompt='' output='' setting=''
    while IFS= read -r line || [[ -n $line ]]; do
        if [[ $command == *\\ ]]; then
            command=${command%\\}$line
        elif [[ $line == [#\$]\ * ]]; then
            _command
            prompt=${line:0:1} command=${line:2} output=''
        else
            output+=$line$'\n'
        fi
    done <"$1"
    _command
}
_command() {
    local who=root found
    [[ -n $command ]] || return 0
    [[ $prompt == '#' ]] || who=alice
    case $command in
        export\ * | cd\ *) setting+="$command; " ;;
        *)
            if [[ -n $output ]]; then
                found=$(as "$who" env "HOME=/home/$who" bash -c "$setting$command" 2>&1 </dev/null || true)
                expect "$prompt $command" "${output%$'\n'}" "$found"
            else
                as "$who" env "HOME=/home/$who" bash -c "$setting$command" </dev/null
            fi
            ;;
    esac
}

_take_back() { # UNIT…
    local path
    systemctl stop 'peergate@*' "$@" 2>/dev/null || true
    rm -f /etc/systemd/system/sockets.target.wants/peergate@*
    for path in "${written[@]}"; do
        if [[ -e $path.before ]]; then mv "$path.before" "$path"; else rm -f "$path"; fi
    done
    systemctl daemon-reload
}

the_recipe_for_redis_holds_as_printed() {
    trap '_take_back redis-server.service' EXIT
    _recipe REDIS
    await_records 1 denied PEER_UID=0 _SYSTEMD_UNIT=peergate@redis.service >/dev/null
}

the_recipe_for_nginx_holds_as_printed() {
    trap '_take_back nginx.service' EXIT
    _recipe "MOVING A SERVICE BEHIND THE GATE"
    _recipe NGINX
    await_records 1 denied PEER_UID=0 _SYSTEMD_UNIT=peergate@nginx.service >/dev/null
}

the_recipe_for_a_program_of_ones_own_holds_as_printed() {
    trap '_take_back shout.service; userdel shout' EXIT
    _recipe "A PROGRAM OF ONE'S OWN"
    await_records 1 denied PEER_UID=0 _SYSTEMD_UNIT=peergate@shout.service >/dev/null
}
