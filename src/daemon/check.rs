//! `check`: the policy and the settings in force, or everything that is wrong with them.

use std::fmt::{self, Write as _};

use peergate::policy::Rule;

use crate::cli::{Choice, Options as _};
use crate::config::Config;
use crate::config::values::show_span;
use crate::protocol::{Protocol, RuleKeys, Settings as _};
use crate::terms::Terms;
use crate::{memory, output, reservations};

/// How many bytes of a list are shown.
const WIDEST_LIST: usize = 60;

/// Prints what a service with this configuration would do, or each fault on standard error. Returns the status to
/// exit with: 0, or as [`LoadError::exit_code`](crate::config::LoadError::exit_code) says.
pub fn run<P: Protocol>(choice: &Choice<P::Options>) -> u8 {
    match Config::<P>::load(choice) {
        Ok(config) => {
            if let Some(unmapped) = peergate::peer::unmapped_ids() {
                output::say(&format!("warning: {unmapped}"));
            }
            for warning in &config.warnings {
                output::say(&format!("warning: {warning}"));
            }
            for reservation in reservations::reservations(&config) {
                output::say(&format!("warning: {reservation}"));
            }
            // Only a check that runs as the service does is in the service's control group.
            let is_service = std::env::var_os("CONFIGURATION_DIRECTORY").is_some();
            let instance = choice.own.served_instance();
            let limit = if is_service { memory::own_limit() } else { memory::limit_of_unit(P::UNIT, instance) };
            if let Some(shortage) = memory::shortage(&config, limit) {
                output::say(&format!("warning: {shortage}"));
            }
            output::answer(Summary(&config).to_string());
            0
        }
        Err(error) => {
            output::say(&error.to_string());
            error.exit_code()
        }
    }
}

/// What is in force, for a person to read.
struct Summary<'c, P: Protocol>(&'c Config<P>);

impl<P: Protocol> fmt::Display for Summary<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config { policy, limits, audit, service, settings, source, .. } = self.0;
        match source {
            Some(path) => writeln!(f, "{}", path.display())?,
            None => writeln!(f, "no configuration file; these are the defaults")?,
        }
        let head = ["RULE", "WHO", "UNITS", "TERMS", "WHERE"].map(str::to_owned);
        let rows = policy.rules().map(|rule| row(rule, policy.me()));
        let rows: Vec<[String; 5]> = std::iter::once(head).chain(rows).collect();
        f.write_char('\n')?;
        write_aligned(f, &rows)?;
        writeln!(f, "A peer that no rule matches is denied.\n")?;

        let span = |span: Option<_>| span.map_or("off".to_owned(), |span| format!("\"{}\"", show_span(span)));
        let or_off = |text: String| if text == "off" { "\"off\"".to_owned() } else { text };
        writeln!(f, "[limits]")?;
        writeln!(f, "connections = {}", limits.connections)?;
        writeln!(f, "connections-per-user = {}", limits.connections_per_user)?;
        writeln!(f, "waiting-per-user = {}", limits.waiting_per_user)?;
        settings.show_limits().iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(f, "idle-timeout = {}", or_off(span(limits.idle_timeout)))?;
        if let Some(need) = memory::need(self.0) {
            writeln!(f, "# up to {} of memory, if nothing is read (MemoryMax=)", memory::mebibytes(need))?;
        }
        f.write_char('\n')?;
        writeln!(f, "[audit]")?;
        writeln!(f, "record = \"{}\"", audit.scope.as_str())?;
        writeln!(f, "burst = {}", audit.burst)?;
        writeln!(f, "interval = \"{}\"\n", show_span(audit.interval))?;
        writeln!(f, "[service]")?;
        match service.workers {
            Some(workers) => writeln!(f, "workers = {workers}")?,
            None => writeln!(f, "workers = \"auto\"")?,
        }
        writeln!(f, "busy-poll = {}", or_off(span(service.busy_poll)))?;
        writeln!(f, "verify = \"{}\"", service.verify.as_str())?;
        writeln!(f, "idle-exit = {}", or_off(span(service.idle_exit)))?;
        f.write_str(&settings.show_tables())
    }
}

/// One rule's line of the table.
fn row<K: RuleKeys>(rule: &Rule<Terms<K>>, me: peergate::ids::Uid) -> [String; 5] {
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    // The column of units needs no word for them.
    let shown = |(key, values): (&str, Vec<String>)| match (key, list(values.into_iter())) {
        ("units", units) => units,
        (key, values) => format!("{key} {values}"),
    };
    let (units, who): (Vec<_>, Vec<_>) = rule.keys(me).partition(|(key, _)| key.ends_with("units"));
    let joined = |keys: Vec<_>, none: &str| {
        if keys.is_empty() { none.to_owned() } else { keys.into_iter().map(shown).collect::<Vec<_>>().join(" and ") }
    };
    let (who, units) = (joined(who, "anyone"), joined(units, "any"));
    let place = rule.place().map_or("built in".to_owned(), ToString::to_string);
    [rule.name().to_string(), who, units, or_dash(terms(rule.terms())), place]
}

/// The values of a key: as many as fit, at least the first. If not all fit, their number follows.
fn list(values: impl ExactSizeIterator<Item = String>) -> String {
    let count = values.len();
    let mut shown = String::new();
    for (number, value) in values.enumerate() {
        if number > 0 && shown.len() + value.len() > WIDEST_LIST {
            return format!("{shown}, ... ({count} in all)");
        }
        let separator = if number == 0 { "" } else { ", " };
        shown = shown + separator + &value;
    }
    shown
}

/// A rule's own limits, as the file has them.
fn terms<K: RuleKeys>(terms: &Terms<K>) -> String {
    let idle = |span: Option<_>| span.map_or("off".to_owned(), show_span);
    let connections = terms.connections_per_user.map(|number| format!("connections-per-user {number}"));
    let timeout = terms.idle_timeout.map(|span| format!("idle-timeout {}", idle(span)));
    connections.into_iter().chain(terms.own.show()).chain(timeout).collect::<Vec<_>>().join(", ")
}

/// Columns as wide as their widest cell; the last one as it comes.
fn write_aligned<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Not by `{cell:width$}`: std's formatting panics at a width above 65,535.
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()) + 2);
            line += cell;
            line += &padding;
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use peergate::ids::Uid;
    use peergate::policy::{Group, Policy, User};
    use std::sync::Arc;

    use super::*;
    use crate::testing::{LineTerms, Lines};

    type Config = super::Config<Lines>;
    type Terms = super::Terms<LineTerms>;

    #[test]
    fn the_summary_shows_every_rule_and_every_setting() {
        let mut config = Config::without_file(Uid::new(1000));
        let terms = Terms {
            connections_per_user: Some(200),
            own: LineTerms { line_length: Some(1 << 20) },
            idle_timeout: Some(None),
        };
        let rules = [
            Rule::allow("owner", Terms::default()).users([User::Me]),
            Rule::allow("backup", terms)
                .users([User::Named("backup".into(), Some(Uid::new(34))), User::Named("gone".into(), None)])
                .groups([Group::Range(peergate::ids::Gid::new(4), peergate::ids::Gid::new(6))])
                .units(["backup.service"]),
            Rule::deny("scopes").units(["session-*.scope"]),
            Rule::allow("mail", Terms::default())
                .users([Uid::new(5)])
                .units(["user.slice"])
                .user_units(["a.*", "b.scope"]),
        ];
        config.policy = Arc::new(Policy::new(rules, Uid::new(1000)).unwrap());
        config.service.busy_poll = None;
        let need = memory::mebibytes(memory::need(&config).unwrap());
        let expected = "\
no configuration file; these are the defaults

RULE          WHO                                               UNITS                                  TERMS                                                         WHERE
deny.scopes   anyone                                            session-*.scope                        -                                                             built in
allow.owner   users self (1000)                                 any                                    -                                                             built in
allow.backup  users backup (34), gone (unknown) and groups 4-6  backup.service                         connections-per-user 200, line-length 1M, idle-timeout off  built in
allow.mail    users 5                                           user.slice and user-units a.*, b.scope  -                                                             built in
A peer that no rule matches is denied.

[limits]
connections = 1024
connections-per-user = 64
waiting-per-user = 1024
line-length = \"64K\"
idle-timeout = \"off\"
# up to NEED of memory, if nothing is read (MemoryMax=)

[audit]
record = \"denials\"
burst = 10
interval = \"10s\"

[service]
workers = \"auto\"
busy-poll = \"off\"
verify = \"connection\"
idle-exit = \"off\"
";
        let expected = &expected.replace("NEED", &need);
        let shown = Summary(&config).to_string();
        let squeeze = |text: &str| {
            text.lines()
                .map(|l| l.split("  ").filter(|c| !c.is_empty()).map(str::trim).collect::<Vec<_>>().join("|"))
                .collect::<Vec<_>>()
        };
        assert_eq!(squeeze(&shown), squeeze(expected));
        let starts: Vec<_> = shown.lines().skip(2).take(5).map(|line| line.rfind("  ")).collect();
        assert!(starts.windows(2).all(|pair| pair[0] == pair[1]), "the columns are not aligned:\n{shown}");
    }
}
