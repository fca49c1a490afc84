# shellcheck shell=bash
# Outputs of the service that take no data.

a_failed_start_that_cannot_write_a_reason_also_pauses() {
    mkdir -p /run/full
    mount -t tmpfs -o size=4k tmpfs /run/full
    head -c 64k /dev/zero >/run/full/filler 2>/dev/null || true
    configure <<<'nonsense = 1'
    drop_in echo.service <<'EOF'
[Service]
StandardError=append:/run/full/log
EOF
    # A connection in the backlog starts the service again as soon as systemd allows it.
    as alice timeout 60 nc -U /run/echo.sock >/dev/null &
    await_property echo-pause.service ActiveState activating
    local exits
    journalctl --sync
    exits=$(journalctl --quiet "$(since)" --unit=echo.service --output=cat --grep='Main process exited')
    expect "how it exited" "echo.service: Main process exited, code=exited, status=78/CONFIG" "$exits"
    expect "what could be said of it" 0 "$(stat --format=%s /run/full/log)"
    systemctl stop echo.socket echo.service echo-pause.service
    umount /run/full
}
