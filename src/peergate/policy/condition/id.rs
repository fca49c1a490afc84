//! Ids, ranges of ids and names: what the keys `users` and `groups` have in common.

use super::super::set::{HIGHEST, IdSet};
use super::{Given, Key, LookUp, Name, Value};
use crate::ids::Uid;

/// Reads `any`, an id, a range or a name.
pub(super) fn read(
    key: &Key,
    given: &Given<'_>,
    name: fn(String) -> Name,
    look_up: &mut LookUp<'_>,
) -> Result<Value, String> {
    let expected = key.expected;
    match given {
        Given::Text("any") => Ok(Value::Any),
        Given::Text(text) if is_numeric(text) => {
            number_or_range(text).map_err(|problem| format!("{problem}; {expected}"))
        }
        Given::Text(text) if could_be_a_name(text) => {
            let name = name((*text).to_owned());
            let id = look_up(&name)?;
            Ok(Value::Named(name, id))
        }
        Given::Text(text) => Err(format!("{text:?}, which is no {}'s name; {expected}", key.one)),
        Given::Integer(written, number) => number.filter(|&id| id <= HIGHEST).map(Value::Id).ok_or_else(|| {
            format!("`{written}` is no id; expected a whole number from 0 to {HIGHEST}, without leading zeros")
        }),
        Given::Other(kind) => Err(format!("{kind} in `{}`; {expected}", key.name)),
    }
}

/// The ids that these values list. Their ranges are checked here for rules that were not read from a file.
pub(super) fn set(values: &[Value], me: Uid) -> Result<IdSet, String> {
    let mut ranges = Vec::with_capacity(values.len());
    for value in values {
        let (low, high) = match *value {
            // Of a user without a known id: an empty set, and no fault of the rule.
            Value::Me => (me.raw(), me.raw().min(HIGHEST)),
            Value::Any => (0, HIGHEST),
            Value::Id(id) | Value::Named(_, Some(id)) => (id, id),
            Value::Range(low, high) if low > high => {
                return Err(format!("the range {low}-{high}; expected the lower id first, as in \"{high}-{low}\""));
            }
            Value::Range(low, high) => (low, high),
            Value::Refused(_, ref problem) => return Err(problem.clone()),
            Value::Named(_, None) | Value::Pattern(_) => continue,
        };
        if high > HIGHEST {
            return Err(format!("the id {high}; expected at most {HIGHEST}"));
        }
        ranges.push((low, high));
    }
    Ok(IdSet::new(ranges))
}

fn is_numeric(text: &str) -> bool {
    text.contains(|c: char| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_digit() || "+-.,:_ ".contains(c))
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

/// Whether a user database may hold this name. Names of directory services may have spaces inside, and more.
fn could_be_a_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 1024
        && text.trim() == text
        && !text.starts_with('-')
        && !text.contains(|c: char| c.is_control() || ":/,".contains(c))
}
