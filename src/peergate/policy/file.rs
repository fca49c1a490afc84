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
//! Tables under `deny` and `allow` are rules. The keys `users`, `groups`, `units` and `user-units` say whom a rule
//! is for; what else an allow rule holds are its terms, of the type that the application chooses. A deny rule has no terms.
//! Every other table is the application's.
//!
//! A file is taken as a whole or not at all, and all that is wrong with it is told at once.
//!
//! A name in an allow rule that the user database does not know matches nobody: [`Loaded::unknown`]. It may come to be
//! known: then [`look_up`] finds it, and [`Policy::with_ids`] makes the policy that it is part of. No thread does that
//! unasked.
//!
//! ```
//! # use peergate::ids::Uid;
//! # use peergate::policy::file::{self, Source, SystemNames};
//! # let source = Source::new("x.toml", "[allow.late]\nusers = ['no such user']\n");
//! let mut policy = file::parse::<(), ()>(&source, Uid::new(1000), &SystemNames)?.policy;
//! // Now and then, where nobody waits:
//! let found = file::look_up(&policy.unknown_names(), &SystemNames);
//! if !found.is_empty() {
//!     policy = policy.with_ids(&found)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Imports [`policy`](super) and [`ids`](crate::ids); for whoever configures a gate from a file.
//!
//! ```
//! use peergate::ids::Uid;
//! use peergate::policy::file::{self, Loaded, Source, SystemNames};
//!
//! #[derive(Debug, Default, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
//! struct Terms {
//!     may_update: bool,
//! }
//!
//! let text = "[allow.owner]\nusers = ['self']\nmay-update = true\n";
//! let Loaded { policy, .. } = file::parse::<Terms, ()>(&Source::new("x.toml", text), Uid::new(1000), &SystemNames)?;
//! assert!(policy.rules().all(|rule| rule.terms().may_update));
//!
//! let wrong = Source::new("x.toml", "[allow.owner]\nusers = ['2999-2000']\nmay-updat = true\n");
//! let faults = file::parse::<Terms, ()>(&wrong, Uid::new(1000), &SystemNames).unwrap_err();
//! assert_eq!(faults.0.len(), 2);
//! assert!(faults.to_string().starts_with("x.toml:2:10: "));
//! # Ok::<(), peergate::policy::file::Faults>(())
//! ```

mod names;
mod source;
mod table;
mod trust;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::set::HIGHEST;
use super::{Glob, Group, Kind, Name, Place, Policy, Rule, RuleName, USER_UNITS_ALONE, User};
use crate::ids::{Gid, Uid};
use table::Spot;

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
    /// The names in allow rules that the user database did not know. They match nobody until they are looked up again:
    /// [`look_up`], and then [`Policy::with_ids`].
    pub unknown: Vec<Name>,
    /// Those of them for which the database gave no answer, so that they may well exist.
    pub unanswered: Vec<Name>,
}

/// The keys that say whom a rule is for.
const WHO: [&str; 4] = ["users", "groups", "units", "user-units"];

/// Reads the file at `path`, with the system's own users and groups. `me` is whom `self` stands for. For the type
/// parameters see [`parse`]; an application without tables of its own takes `()` for `A`.
///
/// # Errors
/// Everything that is wrong with the file; that includes a file that is missing, unreadable, or writable by others
/// than root and `me` (see [`Source::read`]).
///
/// ```no_run
/// use peergate::Uid;
/// use peergate::policy::file;
///
/// let policy = file::load::<(), ()>("/etc/hello.toml", Uid::effective())?.policy;
/// # Ok::<(), file::Faults>(())
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

/// Reads a policy. `me` is whom `self` stands for; `names` is asked for each name that the file mentions.
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
        // Each value was checked as it was read; this is for what we failed to see.
        Err(error) if reader.faults.is_empty() => {
            reader.fault(reader.headers.get(error.rule()).copied().unwrap_or(0), error.to_string());
            return Err(reader.faults());
        }
        Err(_) => return Err(reader.faults()),
    };
    if !some_allow {
        reader
            .warnings
            .push((0, "no allow rule, so everyone is denied; expected one such as [allow.owner]".to_owned()));
    }
    reader.warn_of_useless_rules(&policy);
    let unanswered = reader.unanswered();
    Ok(Loaded { unknown: policy.unknown_names(), unanswered, policy, application, warnings: reader.warnings() })
}

/// What toml says of a text that is no TOML, as "what was found; what was expected".
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
    known: HashMap<(Key, String), Result<Option<u32>, String>>,
    /// Where each rule's name is written.
    headers: HashMap<String, usize>,
    faults: Vec<Spot>,
    warnings: Vec<Spot>,
    /// Where the text is no TOML, so that what was made of it is guesswork. Ascending and disjoint.
    garbled: Vec<Range<usize>>,
}

/// Which kind of name a value is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Users,
    Groups,
}

impl Key {
    fn name(self) -> &'static str {
        if self == Self::Users { "users" } else { "groups" }
    }

    fn one(self) -> &'static str {
        if self == Self::Users { "user" } else { "group" }
    }

    fn of(self, name: String) -> Name {
        if self == Self::Users { Name::User(name) } else { Name::Group(name) }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Users => "expected a user's name, an id, a range such as \"2000-2999\", \"self\" or \"any\"",
            Self::Groups => "expected a group's name, an id, a range such as \"2000-2999\", or \"any\"",
        }
    }

    fn array(self) -> &'static str {
        match self {
            Self::Users => "expected an array such as [\"self\", \"alice\", 1001, \"2000-2999\"]",
            Self::Groups => "expected an array such as [\"adm\", 1001, \"2000-2999\"]",
        }
    }
}

/// A value of `users` or `groups`, before it is known which.
enum Value {
    Me,
    Any,
    Id(u32),
    Range(u32, u32),
    Name(String, Option<u32>),
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
        // A syntax fault garbles what follows it; the fault itself says enough.
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

        let (users, groups, units) = (table.remove("users"), table.remove("groups"), table.remove("units"));
        let user_units = table.remove_entry("user-units");
        if !self.garbled.is_empty() {
            // What is missing may be there, on a line that could not be read.
        } else if let (Some((key, _)), None) = (&user_units, &users) {
            self.fault(key.span().start, format!("{}; expected {}", USER_UNITS_ALONE.0, USER_UNITS_ALONE.1));
        } else if users.is_none() && groups.is_none() && units.is_none() {
            self.fault(
                at,
                format!("`{full}` does not say whom it is for; expected `users`, `groups` or `units` in it"),
            );
        }
        let terms = self.terms(kind, table, span);
        let mut rule = match kind {
            Kind::Allow => Rule::allow(name.get_ref(), terms),
            Kind::Deny => Rule::deny(name.get_ref()),
        };
        if let Some(users) = users {
            rule = rule.users(self.values(kind, Key::Users, &users).into_iter().map(|value| match value {
                Value::Me => User::Me,
                Value::Any => User::Any,
                Value::Id(id) => User::Id(Uid::new(id)),
                Value::Range(low, high) => User::Range(Uid::new(low), Uid::new(high)),
                Value::Name(name, id) => User::Named(name, id.map(Uid::new)),
            }));
        }
        if let Some(groups) = groups {
            rule = rule.groups(self.values(kind, Key::Groups, &groups).into_iter().filter_map(|value| match value {
                Value::Me => None,
                Value::Any => Some(Group::Any),
                Value::Id(id) => Some(Group::Id(Gid::new(id))),
                Value::Range(low, high) => Some(Group::Range(Gid::new(low), Gid::new(high))),
                Value::Name(name, id) => Some(Group::Named(name, id.map(Gid::new))),
            }));
        }
        if let Some(units) = units {
            rule = rule.units(self.patterns("units", &units));
        }
        if let Some((_, user_units)) = user_units {
            rule = rule.user_units(self.patterns("user-units", &user_units));
        }
        Some(rule.at(Place { file: self.source.path().clone(), line: self.source.line(at) }))
    }

    /// An allow rule's further keys.
    fn terms<T: FromTable>(&mut self, kind: Kind, table: DeTable<'_>, span: Range<usize>) -> T {
        match kind {
            Kind::Allow => self.typed(table, span, &WHO, ""),
            Kind::Deny => {
                let () = self.typed(table, span, &WHO, " (a deny rule has no terms)");
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

    /// The values of `users` or `groups`.
    fn values(&mut self, kind: Kind, key: Key, value: &Spanned<DeValue<'_>>) -> Vec<Value> {
        self.elements(key.name(), key.array(), value, |reader, element| {
            let found = match element.get_ref() {
                DeValue::String(text) => reader.value(kind, key, text, element.span().start),
                DeValue::Integer(number) => id(number).map(Value::Id).ok_or_else(|| {
                    format!("`{number}` is no id; expected a whole number from 0 to {HIGHEST}, without leading zeros")
                }),
                other => Err(format!("{} in `{}`; {}", a(other), key.name(), key.expected())),
            };
            if matches!(found, Ok(Value::Id(crate::ids::OVERFLOW_ID))) {
                reader.warn(element.span().start, overflow(key));
            }
            found
        })
    }

    /// One value of `users` or `groups`.
    fn value(&mut self, kind: Kind, key: Key, text: &str, at: usize) -> Result<Value, String> {
        let numeric = text.contains(|c: char| c.is_ascii_digit())
            && text.chars().all(|c| c.is_ascii_digit() || "+-.,:_ ".contains(c));
        match text {
            "any" => Ok(Value::Any),
            "self" if key == Key::Users => Ok(Value::Me),
            "self" => Err(format!("\"self\" in `groups`, where it means nothing; {}", key.expected())),
            _ if numeric => number_or_range(text).map_err(|problem| format!("{problem}; {}", key.expected())),
            _ if !could_be_a_name(text) => {
                Err(format!("{text:?}, which is no {}'s name; {}", key.one(), key.expected()))
            }
            name => self.name(kind, key, name, at),
        }
    }

    fn name(&mut self, kind: Kind, key: Key, name: &str, at: usize) -> Result<Value, String> {
        let one = key.one();
        let (problem, expected) = match self.look_up(key, name) {
            Ok(Some(id)) => {
                if id == crate::ids::OVERFLOW_ID {
                    self.warn(at, overflow(key));
                }
                return Ok(Value::Name(name.to_owned(), Some(id)));
            }
            Ok(None) => ("does not exist".to_owned(), format!("expected a {one} the system knows")),
            Err(error) => {
                (format!("could not be looked up ({error})"), "expected the user database to answer".to_owned())
            }
        };
        if kind == Kind::Deny {
            return Err(format!("the {one} {name:?} {problem}, and a denial must not be lost; {expected}"));
        }
        self.warn(
            at,
            format!("the {one} {name:?} {problem}, so this value matches nobody until it is found; {expected}"),
        );
        Ok(Value::Name(name.to_owned(), None))
    }

    fn look_up(&mut self, key: Key, name: &str) -> Result<Option<u32>, String> {
        let look_up = || {
            let id = match key {
                Key::Users => self.names.uid(name).map(|uid| uid.map(Uid::raw)),
                Key::Groups => self.names.gid(name).map(|gid| gid.map(Gid::raw)),
            };
            match id {
                Ok(Some(id)) if id > HIGHEST => Err(format!("its id {id} names nobody")),
                id => id.map_err(|error| error.to_string()),
            }
        };
        self.known.entry((key, name.to_owned())).or_insert_with(look_up).clone()
    }

    /// The names for which the database gave no answer.
    fn unanswered(&self) -> Vec<Name> {
        let failed = self.known.iter().filter(|(_, answer)| answer.is_err());
        let mut names: Vec<Name> = failed.map(|((key, name), _)| key.of(name.clone())).collect();
        names.sort_unstable();
        names
    }

    /// The values of `units` or `user-units`.
    fn patterns(&mut self, key: &str, value: &Spanned<DeValue<'_>>) -> Vec<String> {
        const ARRAY: &str = "expected an array such as [\"backup.service\", \"session-*.scope\"]";
        self.elements(key, ARRAY, value, |_, element| match element.get_ref() {
            DeValue::String(text) => Glob::new(text).map(|_| text.clone().into_owned()),
            other => Err(format!("{} in `{key}`; expected a unit's name such as \"backup.service\"", a(other))),
        })
    }

    /// The elements of an array that are right; those that are not become faults.
    fn elements<R>(
        &mut self,
        key: &str,
        expected: &str,
        value: &Spanned<DeValue<'_>>,
        mut read: impl FnMut(&mut Self, &Spanned<DeValue<'_>>) -> Result<R, String>,
    ) -> Vec<R> {
        let at = value.span().start;
        let DeValue::Array(elements) = value.get_ref() else {
            self.fault(at, format!("`{key}` is {}; {expected}", a(value.get_ref())));
            return Vec::new();
        };
        if elements.is_empty() {
            self.fault(at, format!("`{key}` is empty; {expected}"));
        }
        let mut good = Vec::with_capacity(elements.len());
        for element in elements {
            match read(self, element) {
                Ok(value) => good.push(value),
                Err(problem) => self.fault(element.span().start, problem),
            }
        }
        good
    }

    fn warn_of_useless_rules<T>(&mut self, policy: &Policy<T>) {
        let at = |reader: &Self, name: &RuleName| reader.headers.get(name.as_str()).copied().unwrap_or(0);
        for rule in policy.for_nobody() {
            let name = rule.name();
            let message = format!("{name} can match nobody as it stands; expected a user or group that exists here");
            self.warn(at(self, name), message);
        }
        for super::Hidden { rule, by } in policy.hidden() {
            let (name, by_name) = (rule.name(), by.name());
            let line = by.place().map_or(String::new(), |place| format!(" (line {})", place.line));
            let message = format!(
                "{name} never decides: {by_name}{line} comes first for everyone it is for; \
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

fn overflow(key: Key) -> String {
    format!(
        "the id 65534 stands for every {} that cannot be told apart here, so it is taken for nobody; \
         expected another id",
        key.one()
    )
}

/// "an array".
fn a(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i']) { "an" } else { "a" };
    format!("{article} {kind}")
}

fn id(number: &DeInteger<'_>) -> Option<u32> {
    u32::from_str_radix(number.as_str(), number.radix()).ok().filter(|&id| id <= HIGHEST)
}

fn number_or_range(text: &str) -> Result<Value, String> {
    let number = |digits: &str| {
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        if plain && digits.len() > 1 && digits.starts_with('0') {
            return Err(format!("{digits:?} in {text:?}, which has leading zeros"));
        }
        let id = digits.parse::<u32>().ok().filter(|&id| plain && id <= HIGHEST);
        id.ok_or_else(|| format!("{digits:?} in {text:?}, which is no id from 0 to {HIGHEST}"))
    };
    let Some((low, high)) = text.split_once('-') else { return number(text).map(Value::Id) };
    let (low, high) = (number(low)?, number(high)?);
    if low > high { Err(format!("the range {text:?}, which runs backwards")) } else { Ok(Value::Range(low, high)) }
}

/// Whether a database of users may hold this name. Names of directory services may have spaces inside, and more.
fn could_be_a_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 1024
        && text.trim() == text
        && !text.starts_with('-')
        && !text.contains(|c: char| c.is_control() || ":/,".contains(c))
}
