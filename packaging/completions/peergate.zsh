#compdef peergate

autoload -U is-at-least

_peergate() {
    typeset -A opt_args
    typeset -a _arguments_options
    local ret=1

    if is-at-least 5.2; then
        _arguments_options=(-s -S -C)
    else
        _arguments_options=(-s -C)
    fi

    local context curcontext="$curcontext" state line
    _arguments "${_arguments_options[@]}" : \
'*--listen=[Bind this socket ourselves, where there is no systemd; may be repeated]:PATH:_files' \
'--config=[Read this configuration file and no other]:FILE:_files' \
'--to=[Pass connections on to this socket, whatever the configuration says\: a path, or "@name" in the abstract namespace]:PATH:_files' \
'(--config)--instance=[Read the configuration of this instance\: /etc/peergate/NAME.toml, or a user'\''s own ~/.config/peergate/NAME.toml]:NAME:_default' \
'-h[Print help]' \
'--help[Print help]' \
'-V[Print version]' \
'--version[Print version]' \
":: :_peergate_commands" \
"*::: :->peergate" \
&& ret=0
    case $state in
    (peergate)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:peergate-command-$line[1]:"
        case $line[1] in
            (check)
_arguments "${_arguments_options[@]}" : \
'--config=[Check this file instead of the one that would be served by]:FILE:_files' \
'--to=[Pass connections on to this socket, whatever the configuration says\: a path, or "@name" in the abstract namespace]:PATH:_files' \
'(--config)--instance=[Read the configuration of this instance\: /etc/peergate/NAME.toml, or a user'\''s own ~/.config/peergate/NAME.toml]:NAME:_default' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(explain)
_arguments "${_arguments_options[@]}" : \
'--user=[A user, with group and supplementary groups as the user database has them]:NAME:_users' \
'--uid=[A user id, with only the groups given here]:N:_default' \
'--pid=[A live process, as the kernel sees it]:N:_default' \
'(--user --pid)--gid=[With --uid\: their effective group id (default\: the same number)]:N:_default' \
'(--user --pid)*--group=[With --uid\: a supplementary group of theirs, name or number; may be repeated]:G:_default' \
'(--pid)--unit=[The systemd unit they connect from]:U:_default' \
'(--pid)--login=[The user whose login started the process, name or number; 4294967295 for none]:NAME:_default' \
'--config=[Judge by this file instead of the one that would be served by]:FILE:_files' \
'--to=[Pass connections on to this socket, whatever the configuration says\: a path, or "@name" in the abstract namespace]:PATH:_files' \
'(--config)--instance=[Read the configuration of this instance\: /etc/peergate/NAME.toml, or a user'\''s own ~/.config/peergate/NAME.toml]:NAME:_default' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(report)
_arguments "${_arguments_options[@]}" : \
'--since=[Only records from this time on, as journalctl(1) takes it, such as "yesterday" or "-2h"]:TIME:_default' \
'--until=[Only records up to this time]:TIME:_default' \
'--namespace=[Read the journal of this namespace, for a service with LogNamespace=; "*" is all of them]:N:_default' \
'--directory=[Read the journal files in this directory, such as /var/log/journal/remote]:D:_files -/' \
'*--file=[Read this journal file, or those that a pattern as of a shell matches; may be repeated]:F:_files' \
'--machine=[Read the journal of this running container]:M:_default' \
'--instance=[Only records of this instance, peergate@NAME.service]:NAME:_default' \
'(--system)--user[Records of this user'\''s own service]' \
'--system[Records of the system'\''s service]' \
'--json[Print JSON instead of a table]' \
'--merge[Read the journals of all machines that are kept here]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(reload)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
':pid -- The process to ask:_default' \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
":: :_peergate__subcmd__help_commands" \
"*::: :->help" \
&& ret=0

    case $state in
    (help)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:peergate-help-command-$line[1]:"
        case $line[1] in
            (check)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(explain)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(report)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(reload)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
        esac
    ;;
esac
;;
        esac
    ;;
esac
}

(( $+functions[_peergate_commands] )) ||
_peergate_commands() {
    local commands; commands=(
'check:Check the configuration\: print the effective policy, or every fault' \
'explain:Tell how the policy judges a user or a process, and why' \
'report:Show which peers were denied, refused or cut off, from the journal' \
'reload:Ask a running service to reload its configuration, and wait for its answer (for ExecReload=)' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'peergate commands' commands "$@"
}
(( $+functions[_peergate__subcmd__check_commands] )) ||
_peergate__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'peergate check commands' commands "$@"
}
(( $+functions[_peergate__subcmd__explain_commands] )) ||
_peergate__subcmd__explain_commands() {
    local commands; commands=()
    _describe -t commands 'peergate explain commands' commands "$@"
}
(( $+functions[_peergate__subcmd__help_commands] )) ||
_peergate__subcmd__help_commands() {
    local commands; commands=(
'check:Check the configuration\: print the effective policy, or every fault' \
'explain:Tell how the policy judges a user or a process, and why' \
'report:Show which peers were denied, refused or cut off, from the journal' \
'reload:Ask a running service to reload its configuration, and wait for its answer (for ExecReload=)' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'peergate help commands' commands "$@"
}
(( $+functions[_peergate__subcmd__help__subcmd__check_commands] )) ||
_peergate__subcmd__help__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'peergate help check commands' commands "$@"
}
(( $+functions[_peergate__subcmd__help__subcmd__explain_commands] )) ||
_peergate__subcmd__help__subcmd__explain_commands() {
    local commands; commands=()
    _describe -t commands 'peergate help explain commands' commands "$@"
}
(( $+functions[_peergate__subcmd__help__subcmd__help_commands] )) ||
_peergate__subcmd__help__subcmd__help_commands() {
    local commands; commands=()
    _describe -t commands 'peergate help help commands' commands "$@"
}
(( $+functions[_peergate__subcmd__help__subcmd__reload_commands] )) ||
_peergate__subcmd__help__subcmd__reload_commands() {
    local commands; commands=()
    _describe -t commands 'peergate help reload commands' commands "$@"
}
(( $+functions[_peergate__subcmd__help__subcmd__report_commands] )) ||
_peergate__subcmd__help__subcmd__report_commands() {
    local commands; commands=()
    _describe -t commands 'peergate help report commands' commands "$@"
}
(( $+functions[_peergate__subcmd__reload_commands] )) ||
_peergate__subcmd__reload_commands() {
    local commands; commands=()
    _describe -t commands 'peergate reload commands' commands "$@"
}
(( $+functions[_peergate__subcmd__report_commands] )) ||
_peergate__subcmd__report_commands() {
    local commands; commands=()
    _describe -t commands 'peergate report commands' commands "$@"
}

if [ "$funcstack[1]" = "_peergate" ]; then
    _peergate "$@"
else
    compdef _peergate peergate
fi
