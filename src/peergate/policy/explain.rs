//! Why the policy decides as it does, in words. Used by [`policy`](super), which makes these names public.

use std::fmt;

use super::Policy;
use super::glob::Glob;
use super::matcher::{Answer, Asked, Matcher, any_fits};
use super::rule::{Kind, Place, Rule, RuleName};
use crate::escape::printable;
use crate::subject::Subject;
use crate::unit::Units;

/// A verdict and the way to it. Its [`Display`](fmt::Display) form begins with one of
///
/// ```text
/// admitted by allow.NAME
/// denied by deny.NAME
/// denied by default
/// ```
///
/// and goes on with the rules that were consulted, each key of theirs on a line of its own.
#[derive(Clone, Debug)]
pub struct Explanation {
    rule: Option<RuleName>,
    consulted: Vec<Consulted>,
}

/// A rule that was consulted.
#[derive(Clone, Debug)]
pub(super) struct Consulted {
    /// Its name.
    pub rule: RuleName,
    /// Where it is written.
    pub place: Option<Place>,
    /// Whether it matched, and so decided.
    pub matched: bool,
    /// How its keys came out.
    pub findings: Vec<Finding>,
}

/// How one key of a rule came out.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    /// `users`, `groups`, `units` or `user-units`.
    pub key: &'static str,
    /// Whether it holds. `None` where the other keys had settled the matter, so that nobody asked.
    pub answer: Option<Answer>,
    /// Why, as a phrase: `uid 1001 is not among self (1000)`.
    pub why: String,
}

impl Explanation {
    /// The deciding rule; `None` where none matched, so that the subject is denied.
    pub fn rule(&self) -> Option<&RuleName> {
        self.rule.as_ref()
    }

    /// Whether the subject may in.
    pub fn is_admitted(&self) -> bool {
        self.rule.as_ref().is_some_and(|rule| rule.kind() == Kind::Allow)
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rule {
            Some(rule) if self.is_admitted() => writeln!(f, "admitted by {rule}")?,
            Some(rule) => writeln!(f, "denied by {rule}")?,
            None => writeln!(f, "denied by default")?,
        }
        self.consulted.iter().try_for_each(|consulted| consulted.fmt(f))?;
        if self.rule.is_none() { writeln!(f, "  no rule matches") } else { Ok(()) }
    }
}

impl fmt::Display for Consulted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {}", self.rule)?;
        if let Some(place) = &self.place {
            write!(f, " ({place})")?;
        }
        writeln!(f, "{}", if self.matched { " matches:" } else { " does not match:" })?;
        for Finding { key, answer, why } in &self.findings {
            let answer = match answer {
                Some(Answer::Yes) => "yes",
                Some(Answer::No) => "no",
                Some(Answer::Unknown) => "not known",
                None => "not asked",
            };
            writeln!(f, "    {key}: {answer}, {why}")?;
        }
        Ok(())
    }
}

pub(super) fn explain<T>(policy: &Policy<T>, who: &dyn Subject) -> Explanation {
    let verdict = policy.decide(who);
    let asked = Asked::new(who);
    let mut consulted = Vec::new();
    for (rule, matcher) in policy.rules.iter().zip(&policy.matchers) {
        let decided = verdict.rule().is_some_and(|deciding| deciding.name() == rule.name());
        let findings = findings(policy, rule, matcher, &asked);
        consulted.push(Consulted {
            rule: rule.name().clone(),
            place: rule.place().cloned(),
            matched: decided,
            findings,
        });
        if decided {
            break;
        }
    }
    Explanation { rule: verdict.rule().map(|rule| rule.name().clone()), consulted }
}

fn findings<T>(policy: &Policy<T>, rule: &Rule<T>, matcher: &Matcher, asked: &Asked<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let (Some(users), Some(answer)) = (rule.listed_users(), matcher.user(asked.who)) {
        let listed = list(users.iter().map(|user| match user {
            super::User::Me => format!("self ({})", policy.me),
            other => other.to_string(),
        }));
        let uid = asked.who.uid();
        let why = match answer {
            Answer::Yes => format!("uid {uid} is among {listed}"),
            Answer::No => format!("uid {uid} is not among {listed}"),
            Answer::Unknown => format!("uid {uid} names nobody here"),
        };
        findings.push(Finding { key: "users", answer: Some(answer), why });
    } else if !matcher.deny && !asked.who.uid().is_known() {
        let why = format!("uid {} names nobody here, and nobody is admitted", asked.who.uid());
        findings.push(Finding { key: "users", answer: Some(Answer::Unknown), why });
    }
    if let (Some(groups), Some(answer)) = (rule.listed_groups(), matcher.group(asked.who)) {
        let listed = list(groups.iter().map(ToString::to_string));
        let set = matcher.groups.as_ref();
        let hit = asked.who.gids().iter().find(|gid| set.is_some_and(|set| set.contains(gid.raw())));
        let why = match (answer, hit) {
            (Answer::Yes, Some(gid)) => format!("gid {gid} is among {listed}"),
            (Answer::Unknown, _) if !asked.who.gids_complete() => "the list of groups cannot be told".to_owned(),
            (Answer::Unknown, _) => "one of the gids names no group here".to_owned(),
            _ => format!("no gid of {} is among {listed}", list(asked.who.gids().iter().map(ToString::to_string))),
        };
        findings.push(Finding { key: "groups", answer: Some(answer), why });
    }
    if let Some(patterns) = rule.listed_units() {
        findings.push(units("units", patterns, matcher, asked));
    }
    if let Some(patterns) = rule.listed_user_units() {
        findings.push(units("user-units", patterns, matcher, asked));
    }
    findings
}

/// How the key `units` or `user-units` came out.
fn units(key: &'static str, patterns: &[String], matcher: &Matcher, asked: &Asked<'_>) -> Finding {
    if !matcher.depends_on_unit(matcher.ids(asked.who)) {
        return Finding { key, answer: None, why: "the other keys settle it".to_owned() };
    }
    let is_of_user = key == "user-units";
    let answer = if is_of_user { matcher.user_unit(asked) } else { matcher.unit(asked) };
    let listed = list(patterns.iter().cloned());
    let why = match (answer, asked.units()) {
        (Some(Answer::Yes), Some(units)) => format!("{} is in {listed}", shown(units)),
        (_, Some(units)) => {
            let why = format!("{} is not in {listed}", shown(units));
            let of_user = |globs: &Option<Vec<Glob>>| {
                let names = units.user().map_or(&[][..], |(_, names)| names);
                globs.as_ref().is_some_and(|globs| any_fits(globs, names))
            };
            if is_of_user && of_user(&matcher.user_units) {
                why + " of the process's own user"
            } else if !is_of_user && of_user(&matcher.units) {
                why + " of the system's manager (a name that a user chose counts under `user-units`)"
            } else {
                why
            }
        }
        (_, None) => "the unit cannot be told".to_owned(),
    };
    Finding { key, answer, why }
}

/// A unit's path, harmless on a terminal.
fn shown(units: &Units) -> String {
    printable(&units.to_path())
}

/// At most this many values are spelled out.
const SHOWN: usize = 16;

fn list(values: impl ExactSizeIterator<Item = String>) -> String {
    let rest = values.len().saturating_sub(SHOWN);
    let shown = values.take(SHOWN).collect::<Vec<_>>().join(", ");
    if rest == 0 { shown } else { format!("{shown} and {rest} more") }
}
