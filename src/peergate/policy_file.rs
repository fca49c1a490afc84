//! A policy and the application's own settings from one TOML file.
//!
//! ```toml
//! [deny.contractors]
//! users = ["2000-2999"]
//!
//! [allow.owner]
//! users = ["self"]
//!
//! [allow.operators]
//! groups = ["adm"]
//! units = ["backup@*.service"]
//! anything-else = "belongs to the rule's terms"
//!
//! [anything-else]
//! belongs-to = "the application"
//! ```
//!
//! Tables under `deny` and `allow` are rules. The keys `users`, `groups`, `logins`, `units` and `user-units` say which peers
//! a rule is for. All other keys of an allow rule are its terms, of the type that the application chooses. A deny rule has no terms.
//! Every other table is the application's.
//!
//! A value of `users` is a name, an id (`1000`), a range of ids (`"1000-1999"`), `"self"` or `"any"`; one of `logins` the same
//! but for `"self"`; one of `groups` a name, an id, a range or `"any"`. Deny rules come first, then allow rules in the order of
//! the file. The first that matches decides, and its terms alone hold: the rule that allows more goes first.
//!
//! A file is taken as a whole or not at all, and all its faults are listed at once.
//!
//! A name in an allow rule that the user database does not know matches no peer: [`Loaded::unknown`]. When the database
//! has learned it, [`look_up`] finds it and [`Policy::with_ids`] makes the policy with it. The application calls both.
//!
//! ```
//! # use peergate::ids::Uid;
//! # use peergate::policy_file::{self, Source, SystemNames};
//! # let source = Source::new("x.toml", "[allow.late]\nusers = ['no such user']\n");
//! let mut policy = policy_file::parse::<(), ()>(&source, Uid::new(1000), &SystemNames)?.policy;
//! // Now and then, on a thread that may wait:
//! let found = policy_file::look_up(&policy.unknown_names(), &SystemNames);
//! if !found.is_empty() {
//!     policy = policy.with_ids(&found)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```
//! use peergate::ids::Uid;
//! use peergate::policy_file::{self, Loaded, Source, SystemNames};
//!
//! #[derive(Debug, Default, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
//! struct Terms {
//!     may_update: bool,
//! }
//!
//! let text = "[allow.owner]\nusers = ['self']\nmay-update = true\n";
//! let Loaded { policy, .. } = policy_file::parse::<Terms, ()>(&Source::new("x.toml", text), Uid::new(1000), &SystemNames)?;
//! assert!(policy.rules().all(|rule| rule.terms().may_update));
//!
//! let wrong = Source::new("x.toml", "[allow.owner]\nusers = ['2999-2000']\nmay-updat = true\n");
//! let faults = policy_file::parse::<Terms, ()>(&wrong, Uid::new(1000), &SystemNames).unwrap_err();
//! assert_eq!(faults.0.len(), 2);
//! assert!(faults.to_string().starts_with("x.toml:2:10: "));
//! # Ok::<(), peergate::policy_file::Faults>(())
//! ```

mod accounts;
mod names;
mod nsswitch;
mod source;
mod table;
mod trust;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::ids::{Gid, Uid};
use crate::policy::{
    Condition, Given, HIGHEST, Hidden, KEYS, Key, Kind, Name, Place, Policy, Rule, RuleName, sufficient_keys,
};
use table::Spot;

pub use accounts::with_accounts;
pub use names::{Account, Names, SystemNames, look_up};
pub use source::{Fault, Faults, ReadError, Source};
pub use table::{FromTable, Table, ValueKind};

/// What a file holds.
#[derive(Debug)]
#[non_exhaustive]
pub struct Loaded<T, A> {
    /// The rules.
    pub policy: Policy<T>,
    /// The application's tables.
    pub application: A,
    /// What does not stop the file from being used, but is hardly meant.
    pub warnings: Vec<Fault>,
    /// The names in allow rules that the user database did not know. They match no peer until they are looked up again:
    /// [`look_up`], then [`Policy::with_ids`].
    pub unknown: Vec<Name>,
    /// The unknown names for which the database gave no answer: they may exist.
    pub unanswered: Vec<Name>,
}

/// Reads the file at `path`, with the system's own users and groups. `me` is the user that `self` means. For the type
/// parameters see [`parse`]; an application without tables of its own takes `()` for `A`.
///
/// # Errors
/// Everything that is wrong with the file; that includes a file that is missing, unreadable, or writable by a user
/// other than root and `me` (see [`Source::read`]).
///
/// ```no_run
/// use peergate::Uid;
/// use peergate::policy_file;
///
/// let policy = policy_file::load::<(), ()>("/etc/hello.toml", Uid::effective())?.policy;
/// # Ok::<(), policy_file::Faults>(())
/// ```
pub fn load<T, A>(path: impl AsRef<Path>, me: Uid) -> Result<Loaded<T, A>, Faults>
where
    T: FromTable,
    A: FromTable,
{
    let path = path.as_ref();
    let source = Source::read(path, me).map_err(|error| match error {
        ReadError::Refused(fault) => Faults(vec![fault]),
        error => Faults(vec![Fault::of_file(path, error.to_string())]),
    })?;
    parse(&source, me, &SystemNames)
}

/// Reads a policy. `me` is the user that `self` means; `names` is asked for each name that the file mentions.
///
/// `T` is read from an allow rule's further keys, `A` from the further tables ([`FromTable`]). Both are refused keys that they
/// do not know; in deeper tables that is for their types to say (`#[serde(deny_unknown_fields)]`).
///
/// # Errors
/// Everything that is wrong with the file.
pub fn parse<T, A>(source: &Source, me: Uid, names: &dyn Names) -> Result<Loaded<T, A>, Faults>
where
    T: FromTable,
    A: FromTable,
{
    let (root, syntax) = DeTable::parse_recoverable(source.text());
    let mut reader = Reader::new(source, names);
    reader.syntax(&syntax);

    let span = root.span();
    let mut root = root.into_inner();
    let deny = root.remove("deny");
    let allow = root.remove("allow");
    let rules: Vec<Rule<T>> =
        [(Kind::Deny, deny), (Kind::Allow, allow)].into_iter().flat_map(|(kind, t)| reader.rules(kind, t)).collect();
    let application = reader.typed(root, span, &["deny", "allow"], "");
    let some_allow = rules.iter().any(|rule| rule.name().kind() == Kind::Allow);

    let policy = match Policy::new(rules, me) {
        Ok(policy) if reader.faults.is_empty() => policy,
        Ok(_) => return Err(reader.faults()),
        // Each value was checked as it was read. This is for a fault that these checks miss.
        Err(error) if reader.faults.is_empty() => {
            reader.fault(reader.headers.get(error.rule()).copied().unwrap_or(0), error.to_string());
            return Err(reader.faults());
        }
        Err(_) => return Err(reader.faults()),
    };
    if !some_allow {
        reader
            .warnings
            .push((0, "no allow rule, so every peer is denied; expected one such as [allow.owner]".to_owned()));
    }
    reader.warn_of_useless_rules(&policy);
    let (policy, warnings) = with_accounts(policy, names)?;
    let unanswered = reader.unanswered();
    let warnings = reader.warnings().into_iter().chain(warnings).collect();
    Ok(Loaded { unknown: policy.unknown_names(), unanswered, policy, application, warnings })
}

/// What toml says of a text that is no TOML, as "what was found; what was expected". toml's parser has the two apart, and which
/// fault it is, but `toml::de::Error` has only a sentence and a span. If a later toml words it otherwise, that sentence is the
/// message.
fn syntax(message: &str) -> String {
    match message.rsplit_once(", expected ") {
        Some((found, expected)) => format!("{found}; expected {expected}"),
        None => message.to_owned(),
    }
}

/// Goes through a file and notes what is wrong.
struct Reader<'s> {
    source: &'s Source,
    names: &'s dyn Names,
    known: HashMap<Name, Result<Option<u32>, String>>,
    /// Where each rule's name is written.
    headers: HashMap<String, usize>,
    faults: Vec<Spot>,
    warnings: Vec<Spot>,
    /// Where the text is no TOML, so that what was read there is a guess. Ascending and disjoint.
    garbled: Vec<Range<usize>>,
}

impl<'s> Reader<'s> {
    fn new(source: &'s Source, names: &'s dyn Names) -> Self {
        Self {
            source,
            names,
            known: HashMap::new(),
            headers: HashMap::new(),
            faults: Vec::new(),
            warnings: Vec::new(),
            garbled: Vec::new(),
        }
    }

    fn fault(&mut self, at: usize, message: impl Into<String>) {
        // What follows a syntax fault may be misread, so no further fault is reported there.
        let before = self.garbled.partition_point(|range| range.start <= at);
        if before == 0 || !self.garbled[before - 1].contains(&at) {
            self.faults.push((at, message.into()));
        }
    }

    fn warn(&mut self, at: usize, message: impl Into<String>) {
        self.warnings.push((at, message.into()));
    }

    fn syntax(&mut self, errors: &[toml::de::Error]) {
        let text = self.source.text();
        let mut lines: Vec<usize> = Vec::new();
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            lines.push(self.source.line(at));
            let message = match error.span().and_then(|span| text.get(span)) {
                Some(key) if error.message() == "duplicate key" => {
                    format!("duplicate key `{}`; expected each key once", key.trim())
                }
                _ => syntax(error.message()),
            };
            self.faults.push((at, message));
        }
        lines.sort_unstable();
        for line in lines {
            let mut garbled = self.source.span_of_line(line);
            if self.garbled.last().is_some_and(|last| last.end >= garbled.end) {
                continue;
            }
            let line = text.get(garbled.clone()).unwrap_or_default();
            if line.trim_start().starts_with('[') {
                // Below a broken [header] the keys seem to belong to the table before it.
                let below = text.get(garbled.end - 1..).unwrap_or_default();
                garbled.end = below.find("\n[").map_or(text.len() + 1, |next| garbled.end + next);
            }
            self.garbled.push(garbled);
        }
    }

    fn rules<T: FromTable>(&mut self, kind: Kind, table: Option<Spanned<DeValue<'_>>>) -> Vec<Rule<T>> {
        let Some(table) = table else { return Vec::new() };
        let at = table.span().start;
        let DeValue::Table(table) = table.into_inner() else {
            let kind = kind.as_str();
            self.fault(
                at,
                format!("`{kind}` is not a table; expected rules, each under a header such as [{kind}.NAME]"),
            );
            return Vec::new();
        };
        in_file_order(table).into_iter().filter_map(|(name, value)| self.rule(kind, &name, value)).collect()
    }

    fn rule<T: FromTable>(
        &mut self,
        kind: Kind,
        name: &Spanned<std::borrow::Cow<'_, str>>,
        value: Spanned<DeValue<'_>>,
    ) -> Option<Rule<T>> {
        let at = name.span().start;
        let full = RuleName::new(kind, name.get_ref());
        if let Err(problem) = full.check() {
            self.fault(at, problem);
        }
        let span = value.span();
        let DeValue::Table(mut table) = value.into_inner() else {
            let kind = kind.as_str();
            self.fault(at, format!("`{full}` is not a table; expected a rule under a header such as [{kind}.NAME]"));
            return None;
        };
        self.headers.insert(full.to_string(), at);

        let mut given = Vec::new();
        for key in KEYS {
            if let Some((name, value)) = table.remove_entry(key.name) {
                given.push((key, name.span().start, value));
            }
        }
        // What is missing may be there, on a line that could not be read.
        if self.garbled.is_empty() {
            self.check_keys(&full, at, &given);
        }
        let terms = self.terms(kind, table, span);
        let mut rule = match kind {
            Kind::Allow => Rule::allow(name.get_ref(), terms),
            Kind::Deny => Rule::deny(name.get_ref()),
        };
        for (key, _, value) in given {
            rule.add(self.condition(kind, key, &value));
        }
        Some(rule.at(Place { file: self.source.path().clone(), line: self.source.line(at) }))
    }

    /// Whether these keys say which peers a rule is for.
    fn check_keys(&mut self, rule: &RuleName, at: usize, given: &[(&Key, usize, Spanned<DeValue<'_>>)]) {
        if given.is_empty() {
            let expected = sufficient_keys();
            self.fault(at, format!("`{rule}` does not say which peers it is for; expected {expected} in it"));
        }
        if let ([(key, at, _)], Kind::Allow) = (given, rule.kind()) {
            key.alone.into_iter().for_each(|problem| self.warn(*at, problem));
        }
        for (key, at, _) in given {
            let Some((companion, problem)) = key.companion else { continue };
            if given.iter().all(|(other, ..)| other.name != companion) {
                self.fault(*at, problem);
            }
        }
    }

    /// An allow rule's further keys.
    fn terms<T: FromTable>(&mut self, kind: Kind, table: DeTable<'_>, span: Range<usize>) -> T {
        let keys = KEYS.map(|key| key.name);
        match kind {
            Kind::Allow => self.typed(table, span, &keys, ""),
            Kind::Deny => {
                let () = self.typed(table, span, &keys, " (a deny rule has no terms)");
                T::default()
            }
        }
    }

    fn typed<R: FromTable>(
        &mut self,
        table: DeTable<'_>,
        span: Range<usize>,
        others: &[&'static str],
        aside: &str,
    ) -> R {
        let mut table = Table::new(table, span);
        let value = R::from_table(&mut table);
        for (at, message) in table.finish(others, aside) {
            self.fault(at, message);
        }
        value
    }

    /// Reads the values of a key; each one that is wrong becomes a fault.
    fn condition(&mut self, kind: Kind, key: &'static Key, value: &Spanned<DeValue<'_>>) -> Condition {
        let mut condition = Condition::new(key);
        let (at, expected) = (value.span().start, format!("expected an array such as {}", key.example));
        let DeValue::Array(elements) = value.get_ref() else {
            self.fault(at, format!("`{}` is {}; {expected}", key.name, a(value.get_ref())));
            return condition;
        };
        if elements.is_empty() {
            self.fault(at, format!("`{}` is empty; {expected}", key.name));
        }
        for element in elements {
            let at = element.span().start;
            match condition.read(&given(element.get_ref()), &mut |name| self.id_of(kind, name, at)) {
                Ok(None) => {}
                Ok(Some(warning)) => self.warn(at, warning),
                Err(problem) => self.fault(at, problem),
            }
        }
        condition
    }

    /// The id that goes with a name. In an allow rule an unknown name is a warning, in a deny rule a fault.
    fn id_of(&mut self, kind: Kind, name: &Name, at: usize) -> Result<Option<u32>, String> {
        let (problem, expected) = match self.look_up(name) {
            Ok(Some(id)) => return Ok(Some(id)),
            Ok(None) => ("does not exist".to_owned(), format!("expected a {} the system knows", name.kind())),
            Err(error) => {
                (format!("could not be looked up ({error})"), "expected the user database to answer".to_owned())
            }
        };
        if kind == Kind::Deny {
            return Err(format!("the {name} {problem}, and a denial must not be lost; {expected}"));
        }
        self.warn(at, format!("the {name} {problem}, so this value matches no peer until it is found; {expected}"));
        Ok(None)
    }

    fn look_up(&mut self, name: &Name) -> Result<Option<u32>, String> {
        let look_up = || {
            let id = match name {
                Name::User(user) => self.names.uid(user).map(|uid| uid.map(Uid::raw)),
                Name::Group(group) => self.names.gid(group).map(|gid| gid.map(Gid::raw)),
            };
            match id {
                Ok(Some(id)) if id > HIGHEST => Err(format!("its id {id} is none that a process can have")),
                id => id.map_err(|error| error.to_string()),
            }
        };
        self.known.entry(name.clone()).or_insert_with(look_up).clone()
    }

    /// The names for which the database gave no answer.
    fn unanswered(&self) -> Vec<Name> {
        let failed = self.known.iter().filter(|(_, answer)| answer.is_err());
        let mut names: Vec<Name> = failed.map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    fn warn_of_useless_rules<T>(&mut self, policy: &Policy<T>) {
        let at = |reader: &Self, name: &RuleName| reader.headers.get(name.as_str()).copied().unwrap_or(0);
        for rule in policy.without_ids() {
            let name = rule.name();
            let message = format!("{name} can match no peer as it stands; expected a user or group that exists here");
            self.warn(at(self, name), message);
        }
        for Hidden { rule, by } in policy.hidden() {
            let (name, by_name) = (rule.name(), by.name());
            let line = by.place().map_or(String::new(), |place| format!(" (line {})", place.line));
            let message = format!(
                "{name} never decides: {by_name}{line} comes first for every peer it is for; \
                 expected it before {by_name}, or not at all"
            );
            self.warn(at(self, name), message);
        }
    }

    fn faults(&mut self) -> Faults {
        Faults(self.placed(|reader| std::mem::take(&mut reader.faults)))
    }

    fn warnings(&mut self) -> Vec<Fault> {
        self.placed(|reader| std::mem::take(&mut reader.warnings))
    }

    fn placed(&mut self, which: impl Fn(&mut Self) -> Vec<Spot>) -> Vec<Fault> {
        let mut spots = which(self);
        spots.sort_by_key(|(at, _)| *at);
        spots.dedup();
        self.source.faults(spots)
    }
}

/// A table keeps its entries by name; for rules it is the order in the file that counts.
fn in_file_order<'t>(table: DeTable<'t>) -> Vec<(Spanned<std::borrow::Cow<'t, str>>, Spanned<DeValue<'t>>)> {
    let mut entries: Vec<_> = table.into_iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// "an array".
fn a(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i']) { "an" } else { "a" };
    format!("{article} {kind}")
}

/// A value as conditions read it.
fn given<'v>(value: &'v DeValue<'_>) -> Given<'v> {
    match value {
        DeValue::String(text) => Given::Text(text),
        DeValue::Integer(number) => {
            Given::Integer(number.to_string(), u32::from_str_radix(number.as_str(), number.radix()).ok())
        }
        other => Given::Other(a(other)),
    }
}
