# Sourced by the maintainer scripts of echod and peergate, by sh, at an upgrade: restarts the services that run, with the new
# program. systemd's descriptor store keeps their live connections. As dh_installsystemd --restart-after-upgrade, except that
# a service that the new program cannot serve is not restarted.
#
#   restart_services PROGRAM UNIT    of the system and of each user; UNIT may be a pattern: peergate@*.service

# A command of systemctl to one user's own manager, over the user's bus. A manager that has no bus, or does not answer in
# time, is left as it is, and the old program runs on there. No user can delay an upgrade for longer.
of_user() {
	uid=$1
	shift
	timeout 30 systemctl --quiet --user --machine="$uid@" "$@" </dev/null 2>/dev/null
}

# The users whose managers run.
users() {
	systemctl list-units --no-legend --plain --state=active 'user@*.service' | while read -r manager _; do
		user=${manager#user@}
		echo "${user%.service}"
	done
}

# Reads the output of `systemctl list-units`.
names_of_units() {
	while read -r unit _; do echo "$unit"; done
}

# deb-systemd-invoke checks this by itself, but it cannot restart only the units that run for users.
users_may_be_restarted() { # unit
	[ -x /usr/sbin/policy-rc.d ] || return 0
	answer=0
	/usr/sbin/policy-rc.d "$1" try-restart </dev/null || answer=$?
	[ "$answer" -ne 101 ]
}

# The instance that a unit is, or nothing.
instance_of() { # unit
	printf '%s\n' "$1" | sed -n 's/^[^@]*@\(.*\)\.service$/\1/p'
}

# The settings of the unit and its drop-ins that make the environment of the service, a line each: everything in [Service]
# except how the program is started, watched and ended, and what is removed with the unit. Reads the output of
# `systemctl cat`.
environment() { # unit
	head -c 65536 | awk -v instance="$(instance_of "$1" | sed 's/\\/\\\\/g')" '
		/^[#;]/ { next }
		{ text = text $0 }
		sub(/\\$/, " ", text) { next }
		text ~ /^\[/ { service = text ~ /^\[Service\]/ }
		service && text ~ /^[A-Za-z]+[ \t]*=/ &&
			text !~ /^(Type|Exec|Restart|Timeout|Watchdog|RuntimeMax|FileDescriptorStore|Notify|PIDFile|BusName|Sockets)/ &&
			text !~ /^(NonBlocking|RemainAfterExit|Kill|FinalKill|SendSIG|SuccessExit|OOMPolicy|Standard|RemoveIPC)/ &&
			text !~ /^RuntimeDirectory/ {
				# The unit that the check is run in is no instance.
				out = ""
				while (at = index(text, "%i")) {
					out = out substr(text, 1, at - 1) instance
					text = substr(text, at + 2)
				}
				print out text
			}
		{ text = "" }'
}

# Runs the new program as that service runs it: as its user, in its sandbox, with its environment. A check made outside
# could differ: a user database that is asked over a network is not there in the sandbox.
as_service() { # options of systemd-run, the environment, arguments for the program…
	options=$1 properties=$2
	shift 2
	set -- "/usr/bin/$program" "$@"
	while IFS= read -r property; do
		[ -z "$property" ] || set -- "--property=$property" "$@"
	done <<-END
		$(printf '%s\n' "$properties" | tac)
	END
	timeout 60 systemd-run $options --quiet --pipe --wait --collect "$@" </dev/null
}

# What to do with a running service: "restart"; "refused" if the new program refuses the configuration (exit status 78);
# "broken" if it does not run there at all. Any other status is a fault of the check itself, and the service may be sound:
# "unchecked". Call this after the manager has read the new units.
verdict() { # unit, options of systemd-run, the environment; the program's messages go to standard error
	status=0
	instance=$(instance_of "$1")
	as_service "$2" "$3" check ${instance:+--instance "$instance"} >/dev/null || status=$?
	case $status in
	0) echo restart ;;
	78) echo refused ;;
	*) if as_service "$2" "$3" --version >/dev/null 2>&1; then echo "unchecked $status"; else echo "broken $status"; fi ;;
	esac
}

restart_system() { # unit
	deb-systemd-invoke try-restart "$1" >/dev/null || true
}

# A restart with a configuration that the new program refuses would end every live connection. The old process serves on
# with the configuration it has read.
upgrade_system() { # unit
	if ! systemctl --quiet is-active "$1"; then
		restart_system "$1"
		return
	fi
	instance=$(instance_of "$1")
	said=$(mktemp)
	found=$(verdict "$1" "" "$(systemctl cat "$1" 2>/dev/null | environment "$1")" 2>"$said")
	case $found in
	restart)
		cat "$said" >&2
		restart_system "$1"
		;;
	unchecked*)
		cat "$said" >&2
		echo "$program: the check of the configuration could not be made (exit status ${found#* }), which says nothing of" \
			"the configuration: $1 is restarted with the new version" >&2
		restart_system "$1"
		;;
	refused)
		cat "$said" >&2
		cat >&2 <<-END
			$program: $1 was not restarted: the new version refuses the configuration. The old process
			keeps serving with the configuration it has. Correct the faults above ($program check${instance:+ --instance $instance}
			lists them), then start the new version:  systemctl restart ${1%.service}
		END
		;;
	broken*)
		cat "$said" >&2
		cat >&2 <<-END
			$program: $1 was not restarted: the new version does not run there (exit status ${found#* }).
			The old process keeps serving. When the cause is gone, start the new version:  systemctl restart ${1%.service}
		END
		;;
	esac
	rm -f "$said"
}

# The same for one user's own service. Its messages are the user's and are not shown.
upgrade_user() { # user, unit
	users_may_be_restarted "$2" || return 0
	manager="--user --machine=$1@"
	# Read as the user: the user's manager decides which files these are.
	units=$(timeout 30 systemd-run $manager --quiet --pipe --wait --collect systemctl --user cat "$2" \
		</dev/null 2>/dev/null | environment "$2")
	found=$(verdict "$2" "$manager" "$units" 2>/dev/null)
	case $found in
	restart | unchecked*) of_user "$1" try-restart "$2" >/dev/null || true ;;
	refused)
		echo "$program: the $2 of user $1 was not restarted: the new version does not accept their configuration" >&2
		;;
	broken*)
		echo "$program: the $2 of user $1 was not restarted: the new version does not run there (exit status" \
			"${found#* })" >&2
		;;
	esac
}

restart_services() { # program, unit or pattern
	program=$1
	systemctl --system daemon-reload >/dev/null || true
	running=$(systemctl list-units --no-legend --plain --state=active,reloading,activating "$2" | names_of_units)
	if [ -n "$running" ] && ! timeout 60 systemd-run --quiet --wait --collect true </dev/null >/dev/null 2>&1; then
		# No bus: the program can't be run as the service runs it. A configuration that is sound here may be refused there.
		as_service() {
			shift 2
			"$program" "$@"
		}
	fi
	for unit in $running; do
		upgrade_system "$unit"
	done
	for user in $(users); do
		of_user "$user" daemon-reload >/dev/null || true
		for unit in $(of_user "$user" list-units --no-legend --plain --state=active,reloading "$2" | names_of_units); do
			upgrade_user "$user" "$unit"
		done
	done
}
