//! The key `logins`: the user who logged in, which stays the same over su(1) and sudo(8).

use super::super::Rule;
use super::super::matcher::{Answer, Asked};
use super::super::set::IdSet;
use super::{Given, Key, Name, Test, User, id};

pub(crate) static KEY: Key = Key {
    name: "logins",
    one: "user",
    expected: "expected a user's name, an id, a range such as \"2000-2999\", or \"any\"",
    example: "[\"alice\", 1001, \"2000-2999\"]",
    companion: None,
    alone: Some(
        "`logins` alone, although a process that no login started may name any user as its login; expected `users` or \
         another key beside it",
    ),
    read: |given, look_up| match given {
        Given::Text("self") => Err(format!("\"self\" in `logins`, where it means nothing; {}", KEY.expected)),
        given => id::read(&KEY, given, Name::User, look_up),
    },
    test: |values, known| Ok(Box::new(LoggedInAs(id::set(values, known.me)?))),
};

impl<T> Rule<T> {
    /// Only for processes that a login of one of these users started ([`Subject::login`](crate::Subject::login)). Called
    /// again, it adds.
    ///
    /// A process that no login started may name any user as its login (pam_loginuid(8)), so an allow rule needs another key
    /// beside this one to keep services out.
    #[must_use]
    pub fn logins<U: Into<User>>(self, users: impl IntoIterator<Item = U>) -> Self {
        self.with(&KEY, users.into_iter().map(|user| user.into().into()))
    }
}

/// Whether the login is one of these.
#[derive(Debug)]
struct LoggedInAs(IdSet);

impl Test for LoggedInAs {
    fn answer(&self, asked: &Asked<'_>) -> Answer {
        let login = asked.subject.login();
        match login.user() {
            Some(uid) => Answer::from(self.0.contains(uid.raw())),
            None if login.is_known() => Answer::No,
            None => Answer::Unknown,
        }
    }

    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String {
        let is_among = if answer == Answer::Yes { "is" } else { "is not" };
        match (answer, asked.subject.login().user()) {
            (Answer::Unknown, _) => "the login cannot be told".to_owned(),
            (_, Some(uid)) => format!("the login, uid {uid}, {is_among} among {listed}"),
            (_, None) => "no login started the process".to_owned(),
        }
    }

    fn needs_process(&self) -> bool {
        true
    }
}
