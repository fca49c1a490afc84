//! What the proxy's command line says besides a daemon's.

use clap::{Args, ValueHint};
use peergate_daemon::cli;
use peergate_daemon::config::FileName;

use crate::upstream::Upstream;

/// How to serve, and by which configuration.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Pass connections on to this socket, whatever the configuration says: a path, or "@name" in the abstract namespace
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, value_parser = upstream)]
    pub to: Option<Upstream>,

    /// Read the configuration of this instance: /etc/peergate/NAME.toml, or a user's own ~/.config/peergate/NAME.toml
    #[arg(long, value_name = "NAME", conflicts_with = "config", value_parser = instance)]
    pub instance: Option<String>,
}

/// Whose records to report.
#[derive(Args, Clone, Debug, Default)]
pub struct ReportOptions {
    /// Only records of this instance, peergate@NAME.service
    #[arg(long, value_name = "NAME", value_parser = instance)]
    pub instance: Option<String>,
}

impl cli::Options for Options {
    type Report = ReportOptions;

    fn file(&self, _program: &str) -> FileName {
        match &self.instance {
            Some(name) => FileName::Required(format!("{name}.toml")),
            None => FileName::None,
        }
    }

    fn served_instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    fn instance(report: &ReportOptions) -> Option<&str> {
        report.instance.as_deref()
    }
}

/// A name that is one file's and one unit's.
fn instance(name: &str) -> Result<String, String> {
    let is_one = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    is_one.then(|| name.to_owned()).ok_or_else(|| "expected the name of an instance, such as docker".to_owned())
}

fn upstream(text: &str) -> Result<Upstream, String> {
    let is_relative = !text.starts_with(['/', '@']);
    let absolute = is_relative.then(|| std::path::absolute(text).ok()?.into_os_string().into_string().ok()).flatten();
    Upstream::parse(absolute.as_deref().unwrap_or(text))
        .ok_or_else(|| "expected the path of a socket, of 107 bytes at most, or \"@name\"".to_owned())
}
