//! The command line: what clap parses, the man page lists and the shells complete. No behaviour.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueHint};

use crate::config::FileName;
use crate::protocol::Protocol;

/// The command line of a daemon, with its name and what it is.
pub fn command<P: Protocol>() -> clap::Command {
    Cli::<P::Options>::command().name(P::NAME).bin_name(P::NAME).about(P::ABOUT)
}

/// What the command line of a daemon may say besides: how to serve, and by which configuration.
pub trait Options: Args + Clone + fmt::Debug + Default + Send + 'static {
    /// The same for `report`, which reads no configuration.
    type Report: Args + fmt::Debug;

    /// The name of the configuration file, where --config does not name one.
    fn file(&self, program: &str) -> FileName {
        FileName::Optional(format!("{program}.toml"))
    }

    /// The instance of a template unit that serves by this.
    fn served_instance(&self) -> Option<&str> {
        None
    }

    /// The instance of a template unit whose records `report` is to show.
    fn instance(_report: &Self::Report) -> Option<&str> {
        None
    }
}

impl Options for () {
    type Report = ();
}

/// Which configuration the command line asks for.
#[derive(Clone, Debug, Default)]
pub struct Choice<O> {
    /// The file that --config names.
    pub config: Option<PathBuf>,
    /// The daemon's own options.
    pub own: O,
}

/// Command line.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, max_term_width = 100)]
#[command(after_help = "Without a subcommand: serve the sockets that systemd passed, or those of --listen.")]
pub struct Cli<O: Options> {
    /// How to serve, where no subcommand is given.
    #[command(flatten)]
    pub serve: Serve<O>,

    /// What else to do.
    #[command(subcommand)]
    pub command: Option<Command<O>>,
}

/// How to serve.
#[derive(Debug, Args)]
pub struct Serve<O: Options> {
    /// Bind this socket ourselves, where there is no systemd; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub listen: Vec<PathBuf>,

    /// Read this configuration file and no other
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// The daemon's own.
    #[command(flatten)]
    pub own: O,
}

/// What else the program can do.
#[derive(Debug, Subcommand)]
pub enum Command<O: Options> {
    /// Check the configuration: print the effective policy, or every fault
    Check {
        /// Check this file instead of the one that would be served by
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        config: Option<PathBuf>,

        /// The daemon's own.
        #[command(flatten)]
        own: O,
    },

    /// Tell how the policy judges a user or a process, and why
    Explain {
        /// The user or process to judge.
        #[command(flatten)]
        asked: Explain,

        /// The daemon's own.
        #[command(flatten)]
        own: O,
    },

    /// Show which peers were denied, refused or cut off, from the journal
    Report {
        /// Which part of the journal to look at.
        #[command(flatten)]
        asked: Report,

        /// The daemon's own.
        #[command(flatten)]
        own: O::Report,
    },

    /// Ask a running service to reload its configuration, and wait for its answer (for ExecReload=)
    Reload {
        /// The process to ask
        #[arg(value_name = "PID")]
        pid: i32,
    },
}

/// The user or process to judge, and the file to judge by.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Explain {
    /// The user or process to judge.
    #[command(flatten)]
    pub who: Who,

    /// With --uid: their effective group id (default: the same number)
    #[arg(long, value_name = "N", conflicts_with_all = ["user", "pid"])]
    pub gid: Option<u32>,

    /// With --uid: a supplementary group of theirs, name or number; may be repeated
    #[arg(long, value_name = "G", conflicts_with_all = ["user", "pid"])]
    pub group: Vec<String>,

    /// The systemd unit they connect from
    #[arg(long, value_name = "U", conflicts_with = "pid")]
    pub unit: Option<String>,

    /// The user whose login started the process, name or number; 4294967295 for none
    #[arg(long, value_name = "NAME", conflicts_with = "pid")]
    pub login: Option<String>,

    /// Judge by this file instead of the one that would be served by
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
}

/// One of three ways to name a user or a process.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Who {
    /// A user, with group and supplementary groups as the user database has them
    #[arg(long, value_name = "NAME", value_hint = ValueHint::Username)]
    pub user: Option<String>,

    /// A user id, with only the groups given here
    #[arg(long, value_name = "N")]
    pub uid: Option<u32>,

    /// A live process, as the kernel sees it
    #[arg(long, value_name = "N")]
    pub pid: Option<i32>,
}

/// Which part of the journal to look at.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Report {
    /// Only records from this time on, as journalctl(1) takes it, such as "yesterday" or "-2h"
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub since: Option<String>,

    /// Only records up to this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub until: Option<String>,

    /// Records of this user's own service
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// Records of the system's service
    #[arg(long)]
    pub system: bool,

    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,

    /// Read the journal of this namespace, for a service with LogNamespace=; "*" is all of them
    #[arg(long, value_name = "N")]
    pub namespace: Option<String>,

    /// Read the journal files in this directory, such as /var/log/journal/remote
    #[arg(long, value_name = "D", value_hint = ValueHint::DirPath, group = "source")]
    pub directory: Option<PathBuf>,

    /// Read this journal file, or those that a pattern as of a shell matches; may be repeated
    #[arg(long, value_name = "F", value_hint = ValueHint::FilePath, group = "source")]
    pub file: Vec<PathBuf>,

    /// Read the journals of all machines that are kept here
    #[arg(long, group = "source")]
    pub merge: bool,

    /// Read the journal of this running container
    #[arg(long, value_name = "M", group = "source")]
    pub machine: Option<String>,
}
