//! The keys `units` and `user-units`: the systemd units around the process, by the names that the system's manager gave
//! and by the names that the user's own manager gave.

use super::super::Rule;
use super::super::glob::Glob;
use super::super::matcher::{Answer, Asked};
use super::{Given, Key, Test, Value};

pub(crate) static SYSTEM: Key = Key {
    name: "units",
    one: "unit",
    expected: "expected a unit's name such as \"backup.service\"",
    example: "[\"backup.service\", \"session-*.scope\"]",
    companion: None,
    alone: None,
    read: |given, _| read(&SYSTEM, given),
    test: |values, _| Ok(Box::new(InSystemUnit(globs(values)?))),
};

pub(crate) static USER: Key = Key {
    name: "user-units",
    companion: Some((
        "users",
        "`user-units` without `users`, where any user can call a unit of their own by that name; \
         expected `users` beside it, to say whose units are meant",
    )),
    read: |given, _| read(&USER, given),
    test: |values, _| Ok(Box::new(InOwnUnit(globs(values)?))),
    ..SYSTEM
};

impl<T> Rule<T> {
    /// Only for processes in a unit of the system's manager with a name that fits one of these
    /// [patterns](super::super#names-of-units). Called again, it adds.
    #[must_use]
    pub fn units<P: Into<String>>(self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.with(&SYSTEM, patterns.into_iter().map(|pattern| Value::Pattern(pattern.into())))
    }

    /// Only for processes in a unit of the user's own manager with a name that fits one of these
    /// [patterns](super::super#names-of-units). Called again, it adds. Any user can give any name to a unit of their own,
    /// so [`Policy::new`](super::super::Policy::new) refuses a rule that does not also say which [users](Self::users).
    #[must_use]
    pub fn user_units<P: Into<String>>(self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.with(&USER, patterns.into_iter().map(|pattern| Value::Pattern(pattern.into())))
    }
}

fn read(key: &Key, given: &Given<'_>) -> Result<Value, String> {
    let kind = match given {
        Given::Text(text) => return Glob::new(text).map(|_| Value::Pattern((*text).to_owned())),
        Given::Integer(..) => "an integer",
        Given::Other(kind) => kind,
    };
    Err(format!("{kind} in `{}`; {}", key.name, key.expected))
}

fn globs(values: &[Value]) -> Result<Vec<Glob>, String> {
    let patterns = values.iter().filter_map(|value| if let Value::Pattern(text) = value { Some(text) } else { None });
    patterns.map(|pattern| Glob::new(pattern)).collect()
}

/// Whether a unit of the system's manager fits one of these.
#[derive(Debug)]
struct InSystemUnit(Vec<Glob>);

impl Test for InSystemUnit {
    fn answer(&self, asked: &Asked<'_>) -> Answer {
        asked.units().map_or(Answer::Unknown, |units| Answer::from(any_fits(&self.0, units.system())))
    }

    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String {
        let note = " of the system's manager (a name that a user chose counts under `user-units`)";
        why(&self.0, answer, asked, listed, note)
    }

    fn needs_process(&self) -> bool {
        true
    }
}

/// Whether a unit of the user's own manager fits one of these. Users choose the names of their own units, so a name says
/// something about that user's own processes only.
#[derive(Debug)]
struct InOwnUnit(Vec<Glob>);

impl Test for InOwnUnit {
    fn answer(&self, asked: &Asked<'_>) -> Answer {
        let Some(units) = asked.units() else { return Answer::Unknown };
        let uid = asked.subject.uid();
        match units.user() {
            Some((_, names)) if !any_fits(&self.0, names) => Answer::No,
            Some(_) if !uid.is_known() => Answer::Unknown,
            Some((owner, _)) => Answer::from(owner == uid),
            None => Answer::No,
        }
    }

    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String {
        why(&self.0, answer, asked, listed, " of the process's own user")
    }

    fn needs_process(&self) -> bool {
        true
    }
}

/// Why a key about units came out as it did. `note` follows where a name fits that a user's manager gave, and does not
/// count.
fn why(patterns: &[Glob], answer: Answer, asked: &Asked<'_>, listed: &str, note: &str) -> String {
    let Some(units) = asked.units() else { return "the unit cannot be told".to_owned() };
    // Users choose the names of their units: they must be harmless on a terminal.
    let shown = units.to_path().escape_debug().to_string();
    let names_of_user = units.user().map_or(&[][..], |(_, names)| names);
    match answer {
        Answer::Yes => format!("{shown} is in {listed}"),
        _ if any_fits(patterns, names_of_user) => format!("{shown} is not in {listed}{note}"),
        _ => format!("{shown} is not in {listed}"),
    }
}

/// Whether one of the patterns fits one of the names.
fn any_fits(patterns: &[Glob], names: &[String]) -> bool {
    names.iter().any(|name| patterns.iter().any(|pattern| pattern.matches(name)))
}
