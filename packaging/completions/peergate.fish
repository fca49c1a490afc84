# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_peergate_global_optspecs
    string join \n listen= config= to= instance= h/help V/version
end

function __fish_peergate_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_peergate_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_peergate_using_subcommand
    set -l cmd (__fish_peergate_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c peergate -n "__fish_peergate_needs_command" -l listen -d 'Bind this socket ourselves, where there is no systemd; may be repeated' -r -F
complete -c peergate -n "__fish_peergate_needs_command" -l config -d 'Read this configuration file and no other' -r -F
complete -c peergate -n "__fish_peergate_needs_command" -l to -d 'Pass connections on to this socket, whatever the configuration says: a path, or "@name" in the abstract namespace' -r -F
complete -c peergate -n "__fish_peergate_needs_command" -l instance -d 'Read the configuration of this instance: /etc/peergate/NAME.toml, or a user\'s own ~/.config/peergate/NAME.toml' -r
complete -c peergate -n "__fish_peergate_needs_command" -s h -l help -d 'Print help'
complete -c peergate -n "__fish_peergate_needs_command" -s V -l version -d 'Print version'
complete -c peergate -n "__fish_peergate_needs_command" -f -a "check" -d 'Check the configuration: print the effective policy, or every fault'
complete -c peergate -n "__fish_peergate_needs_command" -f -a "explain" -d 'Tell how the policy judges a user or a process, and why'
complete -c peergate -n "__fish_peergate_needs_command" -f -a "report" -d 'Show which peers were denied, refused or cut off, from the journal'
complete -c peergate -n "__fish_peergate_needs_command" -f -a "reload" -d 'Ask a running service to reload its configuration, and wait for its answer (for ExecReload=)'
complete -c peergate -n "__fish_peergate_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c peergate -n "__fish_peergate_using_subcommand check" -l config -d 'Check this file instead of the one that would be served by' -r -F
complete -c peergate -n "__fish_peergate_using_subcommand check" -l to -d 'Pass connections on to this socket, whatever the configuration says: a path, or "@name" in the abstract namespace' -r -F
complete -c peergate -n "__fish_peergate_using_subcommand check" -l instance -d 'Read the configuration of this instance: /etc/peergate/NAME.toml, or a user\'s own ~/.config/peergate/NAME.toml' -r
complete -c peergate -n "__fish_peergate_using_subcommand check" -s h -l help -d 'Print help'
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l user -d 'A user, with group and supplementary groups as the user database has them' -r -f -a "(__fish_complete_users)"
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l uid -d 'A user id, with only the groups given here' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l pid -d 'A live process, as the kernel sees it' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l gid -d 'With --uid: their effective group id (default: the same number)' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l group -d 'With --uid: a supplementary group of theirs, name or number; may be repeated' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l unit -d 'The systemd unit they connect from' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l login -d 'The user whose login started the process, name or number; 4294967295 for none' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l config -d 'Judge by this file instead of the one that would be served by' -r -F
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l to -d 'Pass connections on to this socket, whatever the configuration says: a path, or "@name" in the abstract namespace' -r -F
complete -c peergate -n "__fish_peergate_using_subcommand explain" -l instance -d 'Read the configuration of this instance: /etc/peergate/NAME.toml, or a user\'s own ~/.config/peergate/NAME.toml' -r
complete -c peergate -n "__fish_peergate_using_subcommand explain" -s h -l help -d 'Print help'
complete -c peergate -n "__fish_peergate_using_subcommand report" -l since -d 'Only records from this time on, as journalctl(1) takes it, such as "yesterday" or "-2h"' -r
complete -c peergate -n "__fish_peergate_using_subcommand report" -l until -d 'Only records up to this time' -r
complete -c peergate -n "__fish_peergate_using_subcommand report" -l namespace -d 'Read the journal of this namespace, for a service with LogNamespace=; "*" is all of them' -r
complete -c peergate -n "__fish_peergate_using_subcommand report" -l directory -d 'Read the journal files in this directory, such as /var/log/journal/remote' -r -f -a "(__fish_complete_directories)"
complete -c peergate -n "__fish_peergate_using_subcommand report" -l file -d 'Read this journal file, or those that a pattern as of a shell matches; may be repeated' -r -F
complete -c peergate -n "__fish_peergate_using_subcommand report" -l machine -d 'Read the journal of this running container' -r
complete -c peergate -n "__fish_peergate_using_subcommand report" -l instance -d 'Only records of this instance, peergate@NAME.service' -r
complete -c peergate -n "__fish_peergate_using_subcommand report" -l user -d 'Records of this user\'s own service'
complete -c peergate -n "__fish_peergate_using_subcommand report" -l system -d 'Records of the system\'s service'
complete -c peergate -n "__fish_peergate_using_subcommand report" -l json -d 'Print JSON instead of a table'
complete -c peergate -n "__fish_peergate_using_subcommand report" -l merge -d 'Read the journals of all machines that are kept here'
complete -c peergate -n "__fish_peergate_using_subcommand report" -s h -l help -d 'Print help'
complete -c peergate -n "__fish_peergate_using_subcommand reload" -s h -l help -d 'Print help'
complete -c peergate -n "__fish_peergate_using_subcommand help; and not __fish_seen_subcommand_from check explain report reload help" -f -a "check" -d 'Check the configuration: print the effective policy, or every fault'
complete -c peergate -n "__fish_peergate_using_subcommand help; and not __fish_seen_subcommand_from check explain report reload help" -f -a "explain" -d 'Tell how the policy judges a user or a process, and why'
complete -c peergate -n "__fish_peergate_using_subcommand help; and not __fish_seen_subcommand_from check explain report reload help" -f -a "report" -d 'Show which peers were denied, refused or cut off, from the journal'
complete -c peergate -n "__fish_peergate_using_subcommand help; and not __fish_seen_subcommand_from check explain report reload help" -f -a "reload" -d 'Ask a running service to reload its configuration, and wait for its answer (for ExecReload=)'
complete -c peergate -n "__fish_peergate_using_subcommand help; and not __fish_seen_subcommand_from check explain report reload help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
