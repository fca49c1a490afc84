//! A TOML table into the application's own types, with every fault in it.

use std::borrow::Cow;
use std::ops::Range;

use serde::de::{DeserializeOwned, Unexpected, Visitor};
use serde::{Deserializer, forward_to_deserialize_any};
use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue, Error, ValueDeserializer};

/// A fault, and where in the text.
pub(super) type Spot = (usize, String);

/// Beyond this many faults in one table the rest stays unsaid: each costs another pass over it.
const MOST_FAULTS: usize = 100;

/// A table of a configuration file. Each type that is read from it takes the keys that it knows; what is left is unknown.
#[derive(Debug)]
pub struct Table<'a> {
    entries: DeTable<'a>,
    span: Range<usize>,
    /// The keys that were asked for.
    known: Vec<&'static str>,
    faults: Vec<Spot>,
}

/// A type that is read from a table of a configuration file.
///
/// Every type is that implements serde's `Deserialize` and `Default`: it takes the keys that it names as fields. A type that
/// wants a message of its own about each value, or is made of several parts, takes its keys itself.
///
/// ```
/// use peergate::policy_file::{self, FromTable, ValueKind, Source, SystemNames, Table};
/// use peergate::Uid;
///
/// #[derive(Debug, Default)]
/// struct Terms {
///     pages: Option<u64>,
/// }
///
/// impl FromTable for Terms {
///     fn from_table(table: &mut Table<'_>) -> Self {
///         let pages = ValueKind { expected: "a number of pages, such as 5", number: |number| Some(number), text: |_| None };
///         Self { pages: table.take("pages", &pages) }
///     }
/// }
///
/// let text = "[allow.owner]\nusers = ['self']\npages = 'many'\n";
/// let faults = policy_file::parse::<Terms, ()>(&Source::new("x.toml", text), Uid::new(1000), &SystemNames).unwrap_err();
/// assert_eq!(faults.to_string(), "x.toml:3:9: `pages`: string \"many\"; expected a number of pages, such as 5");
/// ```
pub trait FromTable: Default {
    /// Takes its keys out of `table`. A fault is noted there, and a default stands for what is wrong.
    fn from_table(table: &mut Table<'_>) -> Self;
}

impl<T: DeserializeOwned + Default> FromTable for T {
    fn from_table(table: &mut Table<'_>) -> Self {
        table.take_as()
    }
}

/// A kind of value: what it is read from, and what a wrong one is told.
#[derive(Clone, Copy, Debug)]
pub struct ValueKind<V> {
    /// What a wrong value is told was expected.
    pub expected: &'static str,
    /// Of a whole number.
    pub number: fn(u64) -> Option<V>,
    /// Of a string.
    pub text: fn(&str) -> Option<V>,
}

impl<'a> Table<'a> {
    pub(super) fn new(entries: DeTable<'a>, span: Range<usize>) -> Self {
        Self { entries, span, known: Vec::new(), faults: Vec::new() }
    }

    /// The value below `key`; `None` where there is none, or a wrong one.
    pub fn take<V>(&mut self, key: &'static str, kind: &ValueKind<V>) -> Option<V> {
        self.known.push(key);
        let value = self.entries.remove(key)?;
        let read = match value.get_ref() {
            DeValue::String(text) => (kind.text)(text),
            DeValue::Integer(number) => {
                number_of(number).and_then(|number| u64::try_from(number).ok()).and_then(kind.number)
            }
            _ => None,
        };
        if read.is_none() {
            let message = format!("`{key}`: {}; expected {}", unexpected(value.get_ref()), kind.expected);
            self.faults.push((value.span().start, message));
        }
        read
    }

    /// The boolean below `key`; `None` where there is none, or a value of another kind.
    pub fn take_flag(&mut self, key: &'static str) -> Option<bool> {
        self.known.push(key);
        let value = self.entries.remove(key)?;
        if let DeValue::Boolean(flag) = value.get_ref() {
            return Some(*flag);
        }
        let message = format!("`{key}`: {}; expected true or false", unexpected(value.get_ref()));
        self.faults.push((value.span().start, message));
        None
    }

    /// What is in the table below `key`; the default where there is none.
    pub fn take_table<T: FromTable>(&mut self, key: &'static str) -> T {
        self.known.push(key);
        let Some(value) = self.entries.remove(key) else { return T::default() };
        let span = value.span();
        let entries = match value.into_inner() {
            DeValue::Table(entries) => entries,
            other => {
                self.faults.push((span.start, format!("`{key}`: {}; expected a table", unexpected(&other))));
                return T::default();
            }
        };
        let mut inner = Table::new(entries, span);
        let read = T::from_table(&mut inner);
        self.faults.extend(inner.finish(&[], ""));
        read
    }

    /// A type that implements serde's `Deserialize`, from the keys that it names. What serde says of a value is told as it
    /// says it.
    fn take_as<T: DeserializeOwned + Default>(&mut self) -> T {
        let mut taken = None;
        // serde stops at the first fault. So the entry that holds it is taken out, and the rest read again.
        for _ in 0..MOST_FAULTS {
            let error = match T::deserialize(TakeFrom { table: self, taken: &mut taken }) {
                Ok(value) => return value,
                Err(error) => error,
            };
            let place = error.span().map_or(self.span.start, |span| span.start);
            self.faults.push((place, error.message().to_owned()));
            let entries = taken.get_or_insert_default();
            let Some(key) = entries.iter().find(|(key, value)| is_at(key, value, place)).map(|(key, _)| key.clone())
            else {
                return T::default();
            };
            entries.remove(key.get_ref().as_ref());
        }
        self.faults.push((self.span.start, "too many faults here to list them all; expected fewer".to_owned()));
        T::default()
    }

    /// All faults, one for each key that no type has asked for included. `others` are keys that belong here besides;
    /// `aside` ends the message about an unknown one.
    pub(super) fn finish(mut self, others: &[&'static str], aside: &str) -> Vec<Spot> {
        let known: Vec<String> = others.iter().chain(&self.known).map(|key| format!("`{key}`")).collect();
        for (key, _) in &self.entries {
            let message = format!("unknown key `{}`; expected one of {}{aside}", key.get_ref(), known.join(", "));
            self.faults.push((key.span().start, message));
        }
        self.faults
    }
}

/// What a wrong value is.
fn unexpected<'v>(value: &'v DeValue<'_>) -> Unexpected<'v> {
    match value {
        DeValue::String(text) => Unexpected::Str(text),
        DeValue::Integer(number) => number_of(number).map_or(Unexpected::Other("integer"), Unexpected::Signed),
        DeValue::Float(number) => number.as_str().parse().map_or(Unexpected::Other("float"), Unexpected::Float),
        DeValue::Boolean(value) => Unexpected::Bool(*value),
        DeValue::Datetime(_) => Unexpected::Other("datetime"),
        DeValue::Array(_) => Unexpected::Seq,
        DeValue::Table(_) => Unexpected::Map,
    }
}

fn number_of(number: &DeInteger<'_>) -> Option<i64> {
    i64::from_str_radix(number.as_str(), number.radix()).ok()
}

/// Whether an entry holds what stands there. The span of a table under a [header] is only that of the header.
fn is_at(key: &Spanned<Cow<'_, str>>, value: &Spanned<DeValue<'_>>, place: usize) -> bool {
    key.span().contains(&place)
        || value.span().contains(&place)
        || match value.get_ref() {
            DeValue::Table(table) => table.iter().any(|(key, value)| is_at(key, value, place)),
            _ => false,
        }
}

/// Gives a type the entries of a table that it asks for.
struct TakeFrom<'t, 'a> {
    table: &'t mut Table<'a>,
    /// What it was given the first time, less what turned out to be wrong.
    taken: &'t mut Option<DeTable<'a>>,
}

impl<'a> TakeFrom<'_, 'a> {
    fn take(self, keys: &'static [&'static str]) -> ValueDeserializer<'a> {
        let Self { table, taken } = self;
        let entries = taken.get_or_insert_with(|| {
            table.known.extend(keys);
            let mut taken = DeTable::new();
            for key in keys {
                taken.extend(table.entries.remove_entry(*key));
            }
            taken
        });
        ValueDeserializer::from(Spanned::new(table.span.clone(), DeValue::Table(entries.clone())))
    }
}

impl<'a: 'de, 'de> Deserializer<'de> for TakeFrom<'_, 'a> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.take(fields).deserialize_struct(name, fields, visitor)
    }

    /// A type that decides as it reads gets everything.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let entries = self.taken.get_or_insert_with(|| std::mem::take(&mut self.table.entries)).clone();
        let span = self.table.span.clone();
        ValueDeserializer::from(Spanned::new(span, DeValue::Table(entries))).deserialize_any(visitor)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf seq tuple tuple_struct map
        enum identifier ignored_any
    }
}
