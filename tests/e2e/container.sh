# Sourced, by bash, as root: boots a Debian root made by ./root with its own systemd as PID 1, and takes it down again.
# One container for each process that sources this.
#
#   container_make RELEASE PACKAGES   unpack a root; then $container_dir is its file system, ready for more files
#   container_boot                    returns when systemd says how the boot went; fails unless it says "running"
#   container_run COMMAND…            runs it inside as a service named container-run.service, and passes its exit status on
#   container_stop                    shuts down and removes everything; for a trap on EXIT, any number of times
#
# Needs neither a systemd on this machine nor a terminal.

container_dir= container_name= container_nspawn= container_leader= container_base=
container_here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

container_make() {
    local release=$1 packages=$2 tarball
    "$container_here/../../tools/require" systemd-container nsenter:util-linux
    tarball=$("$container_here/root" "$release" "$packages")
    container_base=$(mktemp --directory "${TMPDIR:-/var/tmp}/peergate-e2e.XXXXXX")
    # nspawn derives the host name from it: letters, digits and dashes.
    container_name=$release-${container_base##*.}
    container_dir=$container_base/$container_name
    mkdir "$container_dir"
    tar --extract --file "$tarball" --directory "$container_dir" --numeric-owner --xattrs --xattrs-include='*'
    # A journal on disk: with a volatile one, users can't read their own.
    mkdir -p "$container_dir/var/log/journal"
    # Each container is a machine of its own.
    : >"$container_dir/etc/machine-id"
    mkfifo "$container_dir/booted"
    cat >"$container_dir/etc/systemd/system/tell-booted.service" <<'UNIT'
[Unit]
Description=Tell the outside how the boot went
[Service]
ExecStart=/bin/sh -c 'systemctl is-system-running --wait >/booted'
UNIT
    mkdir -p "$container_dir/etc/systemd/system/multi-user.target.wants"
    ln -s ../tell-booted.service "$container_dir/etc/systemd/system/multi-user.target.wants/"
}

# The cgroup hierarchies that systemd uses here: one, or two on a machine with a hybrid layout.
container_hierarchies() {
    local path
    for path in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
        [[ ! -e $path/cgroup.procs ]] || echo "$path"
    done
}

container_boot() {
    local state=
    (
        # With --keep-unit, nspawn makes /payload and /supervisor below the cgroup it is started in, and two containers
        # in one cgroup break each other: each gets its own.
        for hierarchy in $(container_hierarchies); do
            mkdir "$hierarchy/peergate-$container_name"
            echo "$BASHPID" >"$hierarchy/peergate-$container_name/cgroup.procs"
        done
        # The unified hierarchy is what Debian runs on, and all that systemd knows from 258 on; nspawn would follow this
        # machine's. Debian 12 does follow it, so that on a hybrid machine that layout is tested too.
        [[ $container_name == bookworm-* ]] || export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
        exec systemd-nspawn --quiet --directory="$container_dir" --boot --register=no --keep-unit --private-network \
            --console=passive --settings=no --link-journal=no </dev/null >"$container_base/console" 2>&1
    ) &
    container_nspawn=$!
    timeout 120 cat "$container_dir/booted" >"$container_base/state" &
    wait -n "$container_nspawn" "$!" || true
    state=$(cat "$container_base/state")
    container_leader=$(pgrep --parent "$container_nspawn" || true)
    [[ $state != running ]] || return 0
    echo "booting $container_name: expected systemd to say running, it said: ${state:-nothing within 120 s}" >&2
    cat "$container_base/console" >&2
    if [[ -n $container_leader ]]; then
        container_enter systemctl --failed --no-pager >&2 || true
        container_enter journalctl --no-pager --boot --priority=warning >&2 || true
    fi
    return 1
}

container_enter() {
    nsenter --target "$container_leader" --all env --ignore-environment \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 "$@" </dev/null
}

container_run() {
    # A service, not just a process that entered: the commands' processes are in a unit, as on any system.
    container_enter systemd-run --quiet --pipe --wait --collect --unit=container-run.service \
        --setenv=LC_ALL=C.UTF-8 --setenv=HOME=/root "$@"
}

container_stop() {
    local hierarchy
    # Neither another signal nor a closed output pipe stops the cleaning up halfway.
    trap '' INT TERM HUP PIPE
    if [[ -n $container_nspawn ]]; then
        # To systemd as PID 1: halt. Processes that are left after that are killed.
        [[ -z $container_leader ]] || kill -s RTMIN+4 "$container_leader" 2>/dev/null || true
        timeout 30 tail --pid="$container_nspawn" --follow /dev/null || kill -s KILL "$container_nspawn" || true
        wait "$container_nspawn" 2>/dev/null || true
        for hierarchy in $(container_hierarchies); do
            [[ ! -d $hierarchy/peergate-$container_name ]] ||
                find "$hierarchy/peergate-$container_name" -depth -type d -exec rmdir {} + || true
        done
    fi
    container_nspawn=
    [[ -z $container_base ]] || rm --recursive --force --one-file-system "$container_base"
    container_base=
}
