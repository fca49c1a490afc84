//! A TOML table into the application's own type, with every fault in it. Used by [`policy_file`](super) alone.

use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserializer, forward_to_deserialize_any};
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

/// A fault, and where in the text.
pub(super) type Spot = (usize, String);

/// Beyond this many faults in one table the rest stays unsaid: each costs another pass over it.
const MOST_FAULTS: usize = 100;

/// The keys that a type reads from a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// These and no others.
    Fixed(&'static [&'static str]),
    /// The type decides as it reads.
    Open,
}

impl Keys {
    /// The keys of `T`: what its implementation of `Deserialize` asks for.
    pub(super) fn of<T: DeserializeOwned>() -> Self {
        T::deserialize(Ask).err().map_or(Self::Open, |Asked(keys)| keys)
    }

    pub(super) fn contains(self, key: &str) -> bool {
        match self {
            Self::Fixed(keys) => keys.contains(&key),
            Self::Open => true,
        }
    }

    /// Appends the names to a list of others.
    pub(super) fn listed_after(self, others: &[&'static str]) -> String {
        let own = if let Self::Fixed(keys) = self { keys } else { &[] };
        let keys: Vec<String> = others.iter().chain(own).map(|key| format!("`{key}`")).collect();
        keys.join(", ")
    }
}

/// Reads `T` from a table's entries, all of whose keys `T` knows.
///
/// serde stops at the first fault. So the entry that holds it is taken out, and the rest read again.
pub(super) fn read<T: DeserializeOwned + Default>(table: DeTable<'_>, span: Range<usize>) -> (T, Vec<Spot>) {
    if Keys::of::<T>() == Keys::Fixed(&[]) {
        // Perhaps `()`, which reads from no table.
        return (T::default(), Vec::new());
    }
    let mut rest = DeValue::Table(table);
    let mut faults = Vec::new();
    loop {
        let error = match T::deserialize(ValueDeserializer::from(Spanned::new(span.clone(), rest.clone()))) {
            Ok(value) => return (value, faults),
            Err(error) => error,
        };
        // What is missing now, we may have taken out ourselves.
        if !faults.is_empty() && error.message().starts_with("missing field") {
            break;
        }
        let place = error.span().unwrap_or_else(|| span.clone());
        let key = take_out(&mut rest, &place);
        faults.push((place.start, sentence(key.as_deref(), error.message())));
        if key.is_none() {
            break;
        }
        if faults.len() == MOST_FAULTS {
            faults.push((span.start, "too many faults here to list them all; expected fewer".to_owned()));
            break;
        }
    }
    (T::default(), faults)
}

/// Takes out the innermost entry whose key or value contains the place, and tells its key.
fn take_out(value: &mut DeValue<'_>, place: &Range<usize>) -> Option<String> {
    let contains = |span: Range<usize>| span.start <= place.start && place.end <= span.end;
    match value {
        DeValue::Array(values) => values.iter_mut().find_map(|value| take_out(value.get_mut(), place)),
        DeValue::Table(table) => {
            // All of them: the span of a table under a [header] is that of the header.
            let deeper = table.iter_mut().find_map(|(_, value)| take_out(value.get_mut(), place));
            deeper.or_else(|| {
                let holds = |(key, value): &(&Spanned<_>, &Spanned<_>)| contains(key.span()) || contains(value.span());
                let key = table.iter().find(holds)?.0.get_ref().to_string();
                table.remove(key.as_str()).map(|_| key)
            })
        }
        _ => None,
    }
}

/// serde's or toml's message as "what was found; what was expected".
pub(super) fn sentence(key: Option<&str>, message: &str) -> String {
    let (found, expected) = match message.rsplit_once(", expected ") {
        Some((found, expected)) => (found, Some(expected)),
        None => (message, None),
    };
    let found = match (found.split_once(' '), key) {
        (Some(("unknown", rest)), _) => match rest.split_once(' ') {
            Some(("field", name)) => format!("unknown key {name}"),
            Some(("variant", name)) => format!("unknown value {name}"),
            _ => found.to_owned(),
        },
        (Some(("missing", rest)), _) => rest.strip_prefix("field ").map_or(found.to_owned(), |f| format!("no key {f}")),
        (_, Some(key)) => {
            let found = found.strip_prefix("invalid type: ").or(found.strip_prefix("invalid value: ")).unwrap_or(found);
            format!("`{key}`: {found}")
        }
        _ => found.to_owned(),
    };
    match expected {
        Some(expected) if expected.starts_with("struct ") || expected == "a map" => {
            format!("{found}; expected a table")
        }
        Some("u8" | "u16" | "u32" | "u64" | "usize") => format!("{found}; expected a whole number from 0"),
        Some("i8" | "i16" | "i32" | "i64" | "isize") => format!("{found}; expected a whole number"),
        Some(expected) => format!("{found}; expected {expected}"),
        None => found,
    }
}

/// A deserializer that holds nothing: it notes what it is asked for.
struct Ask;

#[derive(Debug)]
struct Asked(Keys);

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("asked for its keys")
    }
}

impl std::error::Error for Asked {}

impl serde::de::Error for Asked {
    fn custom<M: fmt::Display>(_: M) -> Self {
        Self(Keys::Open)
    }
}

impl<'de> Deserializer<'de> for Ask {
    type Error = Asked;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Asked> {
        Err(Asked(Keys::Open))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Asked> {
        Err(Asked(Keys::Fixed(fields)))
    }

    fn deserialize_unit<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Asked> {
        Err(Asked(Keys::Fixed(&[])))
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, _: V) -> Result<V::Value, Asked> {
        Err(Asked(Keys::Fixed(&[])))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Asked> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Asked> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf seq tuple tuple_struct map
        enum identifier ignored_any
    }
}
