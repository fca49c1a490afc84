# shellcheck shell=bash
# What the service writes to, where that takes nothing.

a_start_that_cannot_say_why_it_fails_is_followed_by_the_pause_all_the_same() {
    mkdir -p /run/full
    mount -t tmpfs -o size=4k tmpfs /run/full
    head -c 64k /dev/zero >/run/full/filler 2>/dev/null || true
    configure <<<'nonsense = 1'
    drop_in echo.service <<'EOF'
[Service]
StandardError=append:/run/full/log
EOF
    # A peer that waits to be accepted starts the service again as soon as systemd lets it.
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
