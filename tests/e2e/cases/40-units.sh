# Rules by unit: the same user from different units.

_from() { # UNIT USER 'what to say'
    printf "$3" | systemd-run --quiet --pipe --wait --collect --unit="$1" --uid="$2" nc -N -U /run/echo.sock
}

of_two_units_of_the_same_user_only_the_named_one_is_admitted() {
    configure <<<$'[allow.backup]\nusers = ["alice"]\nunits = ["peer-backup.service"]'
    expect "the named one" "> x" "$(_from peer-backup.service alice 'x\n')"
    expect "another" "Unauthorized access" "$(_from peer-other.service alice 'x\n')"
    expect "the named one, another user" "Unauthorized access" "$(_from peer-backup.service bob 'x\n')"
    await_records 2 denied >/tmp/claim/records
    expect "units in the records" "peer-other.service peer-backup.service" "$(jq --raw-output .PEER_UNIT /tmp/claim/records | xargs)"
}

a_descendant_is_in_its_ancestors_unit() {
    configure <<<$'[allow.backup]\nunits = ["peer-b?ck*.service"]'
    printf 'x\n' | systemd-run --quiet --pipe --wait --collect --unit=peer-backup.service --uid=alice \
        sh -c 'setsid sh -c "nc -N -U /run/echo.sock; true"; true' >/tmp/claim/answer
    expect_bytes "the grandchild" '> x\n' /tmp/claim/answer
}

a_slice_names_all_that_runs_in_it() {
    configure <<<$'[allow.all-of-them]\nunits = ["peer-trusted.slice"]'
    printf 'x\n' | systemd-run --quiet --pipe --wait --collect --unit=peer-one.service --slice=peer-trusted.slice --uid=alice \
        nc -N -U /run/echo.sock >/tmp/claim/answer
    expect_bytes "inside" '> x\n' /tmp/claim/answer
    expect "outside" "Unauthorized access" "$(_from peer-one.service alice 'x\n')"
}

a_unit_of_the_users_own_is_recorded_as_the_users() {
    configure <<<$'[allow.nobody-here]\nusers = ["root"]'
    of alice systemd-run --user --quiet --wait --collect --unit=peer-mine.service \
        sh -c 'echo x | nc -N -U /run/echo.sock >/tmp/claim/answer'
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
    record=$(await_records 1 denied)
    expect "unit" peer-mine.service "$(jq --raw-output .PEER_UNIT <<<"$record")"
}

a_user_cannot_pass_a_unit_of_their_own_for_one_of_the_systems() {
    # A user may give any name to a unit of their own.
    configure <<<$'[allow.backup]\nunits = ["peer-backup.service"]'
    of alice systemd-run --user --quiet --wait --collect --unit=peer-backup.service \
        sh -c 'echo x | nc -N -U /run/echo.sock >/tmp/claim/answer'
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
    expect "the system's unit of that name" "> x" "$(_from peer-backup.service alice 'x\n')"
}

users_beside_units_do_not_make_a_users_own_unit_count() {
    configure <<<$'[allow.backup]\nusers = ["alice"]\nunits = ["peer-backup.service"]'
    of alice systemd-run --user --quiet --wait --collect --unit=peer-backup.service \
        sh -c 'echo x | nc -N -U /run/echo.sock >/tmp/claim/answer'
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
    expect "the system's unit of that name" "> x" "$(_from peer-backup.service alice 'x\n')"
}

a_users_own_unit_counts_under_user_units_for_that_user() {
    configure <<<$'[allow.mail]\nusers = ["alice", "bob"]\nuser-units = ["peer-ma?l.service"]'
    of alice systemd-run --user --quiet --wait --collect --unit=peer-mail.service \
        sh -c 'echo x | nc -N -U /run/echo.sock >/tmp/claim/answer'
    expect_bytes "answer" '> x\n' /tmp/claim/answer
    of alice systemd-run --user --quiet --wait --collect --unit=peer-other.service \
        sh -c 'echo x | nc -N -U /run/echo.sock >/tmp/claim/answer'
    expect_bytes "another unit" 'Unauthorized access\n' /tmp/claim/answer
    expect "the system's unit of that name" "Unauthorized access" "$(_from peer-mail.service alice 'x\n')"
}

a_slice_of_the_users_own_counts_like_its_units() {
    configure <<<$'[allow.apps]\nusers = ["alice"]\nuser-units = ["peer-trusted.slice"]'
    of alice systemd-run --user --quiet --wait --collect --slice=peer-trusted.slice \
        sh -c 'echo x | nc -N -U /run/echo.sock >/tmp/claim/answer'
    expect_bytes "answer" '> x\n' /tmp/claim/answer
}

units_in_a_delegated_control_group_are_not_the_systems() {
    # As a container manager beside systemd does: a control group of its own, named like a slice.
    configure <<<$'[allow.backup]\nunits = ["peer-backup.service"]'
    local root group
    root=/sys/fs/cgroup
    [[ ! -d $root/systemd ]] || root=$root/systemd
    group=$root/peerweb.slice/system.slice/peer-backup.service
    mkdir --parents "$group"
    sh -c "echo \$\$ >$group/cgroup.procs; echo x | nc -N -U /run/echo.sock" >/tmp/claim/answer
    rmdir --parents --ignore-fail-on-non-empty "$group" 2>/dev/null || true
    expect_bytes "answer" 'Unauthorized access\n' /tmp/claim/answer
}
