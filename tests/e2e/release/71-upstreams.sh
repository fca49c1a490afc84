# The recipes of peergate(8) whose services are too large for each run: tests/e2e/run --release.

. "$here/cases/70-proxy.sh"

the_recipes_for_postgresql_hold_as_printed() {
    trap '_take_back postgresql.service; rm -rf /etc/systemd/system/peergate@postgresql.service.d' EXIT
    _recipe "MOVING A SERVICE BEHIND THE GATE"
    _recipe POSTGRESQL
    _recipe "PostgreSQL sees the gate"
    _recipe "PostgreSQL sees the client"
    # Root only by a rule that says so; and after root the gate still has what it needs for the next client.
    local psql="psql -h /run/postgresql -Atc 'SELECT session_user' postgres"
    su postgres -c 'createuser root'
    printf '\n[allow.administrators]\nusers = ["root"]\n' >>/etc/peergate/postgresql.toml
    systemctl reload peergate@postgresql.service
    if sh -c "$psql" >/tmp/claim/root 2>&1; then fail "root got through without root = true:" "$(cat /tmp/claim/root)"; fi
    echo 'root = true' >>/etc/peergate/postgresql.toml
    systemctl reload peergate@postgresql.service
    expect "what PostgreSQL sees of root" root "$(sh -c "$psql")"
    expect "and of alice after that" alice "$(as alice sh -c "$psql")"
    systemctl restart peergate@postgresql.service
    expect "and after a restart" alice "$(as alice sh -c "$psql")"
}

the_recipe_for_podman_holds_with_dockers_client_as_printed() {
    trap '_take_back podman.socket podman.service' EXIT
    _recipe "MOVING A SERVICE BEHIND THE GATE"
    _recipe "PODMAN AND DOCKER"
    # The client tries more than once.
    [[ -n $(records denied PEER_UID=0 _SYSTEMD_UNIT=peergate@podman.service) ]] || fail "no record of root's denial:" "$(records all)"
}
