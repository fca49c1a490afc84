//! Why the policy decides as it does, in words. Used by [`policy`](super), which makes these names public.

use std::fmt;

use super::Policy;
use super::matcher::{Answer, Asked, Matcher};
use super::rule::{Kind, Place, Rule, RuleName};
use crate::Subject;

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
    pub key: &'static str,
    /// Whether it holds. `None` where it was not asked, because the other keys settle it.
    pub answer: Option<Answer>,
    /// Why, as a phrase: `uid 1001 is not among self (1000)`.
    pub why: String,
}

impl Explanation {
    /// The deciding rule; `None` where none matched, so that the subject is denied.
    pub fn rule(&self) -> Option<&RuleName> {
        self.rule.as_ref()
    }

    /// Whether the subject is admitted.
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
    if matcher.ids().all(|ids| ids.uids().is_none()) && matcher.of_any(asked) == Answer::Unknown {
        let why = format!("uid {} names no user here, and no such uid is admitted", asked.subject.uid());
        findings.push(Finding { key: "users", answer: Some(Answer::Unknown), why });
    }
    let is_settled = !matcher.asks_process(asked);
    for (condition, test) in rule.conditions().iter().zip(matcher.tests()) {
        let key = condition.key.name;
        findings.push(if is_settled && test.needs_process() {
            Finding { key, answer: None, why: "the other keys settle it".to_owned() }
        } else {
            let answer = test.answer(asked);
            let why = test.why(answer, asked, &list(&condition.shown(policy.me)));
            Finding { key, answer: Some(answer), why }
        });
    }
    findings
}

/// At most this many values are spelled out.
const SHOWN: usize = 16;

pub(super) fn list(values: &[String]) -> String {
    let shown = values.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    let rest = values.len().saturating_sub(SHOWN);
    if rest == 0 { shown } else { format!("{shown} and {rest} more") }
}
