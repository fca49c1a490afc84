# The package's postinst at an upgrade: how it takes the new program's check of the configuration, and that live
# connections continue. The package itself is upgraded in debian/tests/upgrade.

. "$here/cases/30-lifetime.sh"

# A user database that the process itself reads over the network: glibc's hesiod, and a name server with one user.
# The sandbox of echo.service has no network.
_database_over_the_network() {
    cat >/tmp/claim/names <<'PERL'
use strict; use IO::Socket::INET;
my $socket = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 53, Proto => "udp") or die "bind: $!";
$| = 1;
print "ready\n";
while (defined(my $from = recv($socket, my $query, 512, 0))) {
    my ($name, $end) = ("", 12);
    while (my $length = ord substr $query, $end, 1) {
        $name .= substr($query, $end + 1, $length) . ".";
        $end += $length + 1;
    }
    my ($id, $question, $class) = (substr($query, 0, 2), substr($query, 12, $end - 7), substr($query, $end + 3, 2));
    my $text = $name =~ /^(carol\.passwd|4242\.uid)\./i ? "carol:*:4242:4242::/nonexistent:/bin/sh" : "";
    my $answer = $text ? "\xc0\x0c\0\x10" . $class . pack("Nn", 0, 1 + length $text) . pack("C/a", $text) : "";
    send $socket, $id . pack("n5", $text ? 0x8580 : 0x8583, 1, $text ? 1 : 0, 0, 0) . $question . $answer, 0, $from;
}
PERL
    perl /tmp/claim/names >/tmp/claim/names-said 2>&1 &
    name_server=$!
    : >>/tmp/claim/names-said
    expect "the name server" ready "$(_await_line /tmp/claim/names-said "$name_server")"
    cp /etc/nsswitch.conf /etc/nsswitch.conf.before
    [[ ! -e /etc/resolv.conf ]] || mv /etc/resolv.conf /etc/resolv.conf.before
    _restore() {
        kill "$client" "$answers" "$name_server" 2>/dev/null || true
        mv /etc/nsswitch.conf.before /etc/nsswitch.conf
        [[ ! -e /etc/resolv.conf.before ]] || mv /etc/resolv.conf.before /etc/resolv.conf
    }
    trap _restore EXIT
    echo 'nameserver 127.0.0.1' >/etc/resolv.conf
    printf 'lhs=.ns\nrhs=.test\n' >/etc/hesiod.conf
    sed --in-place 's/^passwd:.*/passwd: files hesiod/' /etc/nsswitch.conf
    expect "carol, outside of the sandbox" 4242 "$(id --user carol)"
}

# As dpkg does when the new program and units are installed.
_upgrade() {
    DPKG_MAINTSCRIPT_PACKAGE=echod DPKG_MAINTSCRIPT_NAME=postinst sh /opt/e2e/echod.postinst configure 0.0 \
        >/tmp/claim/said 2>&1 || fail "the postinst failed:" "$(cat /tmp/claim/said)"
}
_says() {
    grep --quiet --fixed-strings -- "$1" /tmp/claim/said || fail "the postinst does not say \"$1\":" "$(cat /tmp/claim/said)"
}

# Replaces the installed program by a script from standard input, until the end of the claim.
_new_program() {
    mv /usr/bin/echod /usr/bin/echod.real
    trap 'mv /usr/bin/echod.real /usr/bin/echod; kill "$client" "$answers" 2>/dev/null || true' EXIT
    install --mode=755 /dev/stdin /usr/bin/echod
}

an_upgrade_restarts_the_service_and_keeps_its_connections() {
    _policy
    _open alice
    _talk_on one
    pid=$(_pid)
    _upgrade
    _talk_on two
    [[ $(_pid) != "$pid" ]] || fail "the service was not restarted:" "$(cat /tmp/claim/said)"
    expect "what the postinst says" "" "$(cat /tmp/claim/said)"
}

an_upgrade_checks_the_configuration_as_the_service_reads_it() {
    _policy
    _open alice
    _talk_on one
    pid=$(_pid)
    _database_over_the_network
    _policy $'[deny.carol]\nusers = ["carol"]'
    # In this sandbox the configuration is valid, and the check says what it could not check.
    echod check >/tmp/claim/check 2>&1 || fail "echod check:" "$(cat /tmp/claim/check)"
    grep --quiet --fixed-strings "outside of the service's sandbox" /tmp/claim/check || fail "check:" "$(cat /tmp/claim/check)"
    echod explain --user carol >/tmp/claim/explain 2>&1 || true
    grep --quiet --fixed-strings "outside of the service's sandbox" /tmp/claim/explain ||
        fail "explain:" "$(cat /tmp/claim/explain)"
    # In the other it is not.
    if systemctl reload echo.service 2>/dev/null; then fail "systemctl reload succeeded"; fi
    _upgrade
    _talk_on two
    expect "the process" "$pid" "$(_pid)"
    _says carol
    _says "keeps serving"
}

an_upgrade_checks_a_users_configuration_as_their_service_reads_it() {
    configure_user alice <<<$'[allow.me]\nusers = ["self"]'
    of alice systemctl --user daemon-reload
    of alice systemctl --user start echo.socket
    _open alice /run/user/1001/echo.sock
    _talk_on one
    pid=$(of alice systemctl --user show --property=MainPID --value echo.service)
    _database_over_the_network
    configure_user alice <<<$'[allow.me]\nusers = ["self"]\n[deny.carol]\nusers = ["carol"]'
    _upgrade
    _talk_on two
    expect "the process" "$pid" "$(of alice systemctl --user show --property=MainPID --value echo.service)"
    _says "user 1001 was not restarted"
    # With a valid configuration the service continues with the new program.
    configure_user alice <<<$'[allow.me]\nusers = ["self"]'
    _upgrade
    _talk_on three
    [[ $(of alice systemctl --user show --property=MainPID --value echo.service) != "$pid" ]] ||
        fail "alice's service was not restarted:" "$(cat /tmp/claim/said)"
}

only_exit_status_78_of_the_check_is_taken_for_a_refusal() {
    _policy
    _open alice
    _talk_on one
    pid=$(_pid)
    _new_program <<'SH'
#!/bin/sh
[ "$1" != check ] || kill -ABRT $$
exec /usr/bin/echod.real "$@"
SH
    _upgrade
    _talk_on two
    [[ $(_pid) != "$pid" ]] || fail "the service was not restarted:" "$(cat /tmp/claim/said)"
    _says "says nothing of the configuration"
}

a_new_program_that_does_not_run_ends_no_connection() {
    _policy
    _open alice
    _talk_on one
    pid=$(_pid)
    _new_program <<<'#!/no/such/loader'
    _upgrade
    _talk_on two
    expect "the process" "$pid" "$(_pid)"
    _says "does not run"
}
