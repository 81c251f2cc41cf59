# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_litefs_global_optspecs
    string join \n c/cluster= config= set= socket= h/help V/version
end

function __fish_litefs_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_litefs_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_litefs_using_subcommand
    set -l cmd (__fish_litefs_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c litefs -n "__fish_litefs_needs_command" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_needs_command" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_needs_command" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_needs_command" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_needs_command" -s V -l version -d 'Print version'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "agent" -d 'Run the agent in the foreground'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "status" -d 'Show role, databases, lag and followers of this host'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "reload" -d 'Read the configuration of the running agent again, and wait until it is taken over'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "promote" -d 'Make this host the primary'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "demote" -d 'Make another host the primary in place of this one'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "handoff" -d 'Hand the lease of this host over to another one'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "release-lease" -d 'Let go of the lease of an agent that died, so that another host takes over at once'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "watch" -d 'Print the role and positions of this host, and each change of them, one per line'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "wait" -d 'Wait until this host is what is asked for, also for its agent to start'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "list" -d 'List the databases with their positions and sizes'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "export" -d 'Copy a database to a file, as of one transaction, and check the copy'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "import" -d 'Make a file the content of a database, as one transaction (primary only)'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "exec" -d 'Run a program so that the agent sees its commits'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "run" -d 'Run a program once this host may write'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "doctor" -d 'Say whether a program, a process or this host fits, and what to do'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "ltx" -d 'Look at files of transactions'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "diverged" -d 'Look at what this host had alone when another one led, and get it back'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "config" -d 'Check or show the configuration'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "version" -d 'Print the version'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "completions" -d 'Print a completion script for a shell'
complete -c litefs -n "__fish_litefs_needs_command" -f -a "man" -d 'Print the manual page of litefs, or write all pages to a directory'
complete -c litefs -n "__fish_litefs_using_subcommand agent" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand agent" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand agent" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand agent" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand agent" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand status" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand status" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand status" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand status" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand status" -l json -d 'Print JSON instead of tables'
complete -c litefs -n "__fish_litefs_using_subcommand status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand reload" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand reload" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand reload" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand reload" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand reload" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand promote" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand promote" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand promote" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand promote" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand promote" -l force -d 'Also without a primary to take over from, and although transactions may be missing here'
complete -c litefs -n "__fish_litefs_using_subcommand promote" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand demote" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand demote" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand demote" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand demote" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand demote" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand handoff" -l to -d 'Name of the host [default: the one that is farthest]' -r
complete -c litefs -n "__fish_litefs_using_subcommand handoff" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand handoff" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand handoff" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand handoff" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand handoff" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand release-lease" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand release-lease" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand release-lease" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand release-lease" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand release-lease" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand watch" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand watch" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand watch" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand watch" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand watch" -l json -d 'Print JSON instead, one object per line, in the form of /events'
complete -c litefs -n "__fish_litefs_using_subcommand watch" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l role -d 'Role of this host' -r -f -a "primary\t''
replica\t''"
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l position -d 'Position of a database on this host, or a later one, such as app.db=000000000000002a; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l timeout -d 'Longest time to wait, such as 30s [default: for ever]' -r
complete -c litefs -n "__fish_litefs_using_subcommand wait" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand wait" -l caught-up -d 'Applications on this host see all that the primary had when it was last heard'
complete -c litefs -n "__fish_litefs_using_subcommand wait" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand list" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand list" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand list" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand list" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand list" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand export" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand export" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand export" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand export" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand export" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand import" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand import" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand import" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand import" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand import" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand exec" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand exec" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand exec" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand exec" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand exec" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand run" -l with-halt-lock-on -d 'Get the halt lock of a database first (its path, or its name in `litefs list`): writers on the primary wait, the program may write it here, and each of its commits is on the primary before it returns. Programs that get it themselves open the file DATABASE-lock for writing' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand run" -l timeout -d 'Longest time to wait before the program is run, such as 30s [default: for ever]' -r
complete -c litefs -n "__fish_litefs_using_subcommand run" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand run" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand run" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand run" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand run" -l promote -d 'Make this host the primary first'
complete -c litefs -n "__fish_litefs_using_subcommand run" -l on-primary -d 'Wait until this host is the primary'
complete -c litefs -n "__fish_litefs_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand doctor" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand doctor" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand doctor" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand doctor" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand doctor" -l json -d 'Print JSON instead of tables'
complete -c litefs -n "__fish_litefs_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -f -a "list" -d 'List files with their transactions, pages and checksums'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -f -a "dump" -d 'Show header, pages and trailer of a file, or the content of one page'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and not __fish_seen_subcommand_from list dump verify" -f -a "verify" -d 'Check files: structure, order of pages, checksums, and that nothing follows'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from list" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from list" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from list" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from list" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from list" -l json -d 'Print JSON instead of a table'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from dump" -l page -d 'Show the content of this page as hex' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from dump" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from dump" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from dump" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from dump" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from dump" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from verify" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from verify" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from verify" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from verify" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from verify" -l json -d 'Print JSON instead of text'
complete -c litefs -n "__fish_litefs_using_subcommand ltx; and __fish_seen_subcommand_from verify" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -f -a "list" -d 'List what is kept, with position, epoch, transactions and pages'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -f -a "show" -d 'Show what is kept of a database, transaction by transaction'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and not __fish_seen_subcommand_from list show export" -f -a "export" -d 'Write the database as it was on this host, or the transactions that only this host had'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from list" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from list" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from list" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from list" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from list" -l json -d 'Print JSON instead of a table'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -l at -d 'Position, or its beginning without leading zeros [default: all that are kept]' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -l json -d 'Print JSON instead of text'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -l at -d 'Position, or its beginning without leading zeros [default: the only one that is kept]' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -l ltx -d 'Write the transactions, as LTX files, instead of the database'
complete -c litefs -n "__fish_litefs_using_subcommand diverged; and __fish_seen_subcommand_from export" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -f -a "check" -d 'Report everything that is wrong with the configuration'
complete -c litefs -n "__fish_litefs_using_subcommand config; and not __fish_seen_subcommand_from check show" -f -a "show" -d 'Print the effective configuration and where its values come from'
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from check" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from check" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from check" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from check" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from show" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from show" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from show" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from show" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand config; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand version" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand version" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand version" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand version" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand version" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand completions" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand completions" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand completions" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand completions" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand completions" -s h -l help -d 'Print help'
complete -c litefs -n "__fish_litefs_using_subcommand man" -l dir -d 'Directory to write to' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand man" -s c -l cluster -d 'Name of the cluster [default: db]' -r
complete -c litefs -n "__fish_litefs_using_subcommand man" -l config -d 'Configuration file [default: /etc/litefs/<cluster>.toml, if there]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand man" -l set -d 'Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated' -r
complete -c litefs -n "__fish_litefs_using_subcommand man" -l socket -d 'Control socket of the agent [default: socket.path of the configuration]' -r -F
complete -c litefs -n "__fish_litefs_using_subcommand man" -s h -l help -d 'Print help'
