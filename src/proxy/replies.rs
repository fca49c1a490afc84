//! What a peer gets that is turned away, in the language of the service that it meant to reach. No reply names a rule.

use std::sync::Arc;

use peergate::gate;
use peergate::policy_file::ValueKind;

/// The language.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replies {
    /// Nothing, only the end of file.
    #[default]
    None,
    /// A line of text.
    Text,
    /// A response of HTTP/1.1 with a body as of docker's API.
    Http,
    /// An ErrorResponse of PostgreSQL's protocol, version 3.
    Postgresql,
    /// An error of the Redis protocol.
    Redis,
}

/// The key `replies`.
pub const REPLIES: ValueKind<Replies> = ValueKind {
    expected: "\"none\", \"text\", \"http\", \"postgresql\" or \"redis\"",
    number: |_| None,
    text: |text| Replies::ALL.into_iter().find(|replies| replies.as_str() == text),
};

impl Replies {
    const ALL: [Self; 5] = [Self::None, Self::Text, Self::Http, Self::Postgresql, Self::Redis];

    /// As the file has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Text => "text",
            Self::Http => "http",
            Self::Postgresql => "postgresql",
            Self::Redis => "redis",
        }
    }

    /// For a peer that the policy denies.
    pub fn denied(self) -> &'static [u8] {
        match self {
            Self::None => b"",
            Self::Text => b"Unauthorized access\n",
            Self::Http => {
                b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: 34\r\n\
                  Connection: close\r\n\r\n{\"message\":\"Unauthorized access\"}\n"
            }
            Self::Postgresql => b"E\0\0\0\x35SFATAL\0VFATAL\0C28000\0Mconnection not authorized\0\0",
            Self::Redis => b"-NOPERM Unauthorized access\r\n",
        }
    }

    /// For a peer over a limit.
    pub fn busy(self) -> &'static [u8] {
        match self {
            Self::None => b"",
            Self::Text => b"Too many connections\n",
            Self::Http => {
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 35\r\n\
                  Connection: close\r\n\r\n{\"message\":\"Too many connections\"}\n"
            }
            Self::Postgresql => b"E\0\0\0\x30SFATAL\0VFATAL\0C53300\0Mtoo many connections\0\0",
            Self::Redis => b"-ERR Too many connections\r\n",
        }
    }

    /// For a peer whose service cannot be reached.
    pub fn unreachable(self) -> &'static [u8] {
        match self {
            Self::None => b"",
            Self::Text => b"Service unavailable\n",
            Self::Http => {
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 34\r\n\
                  Connection: close\r\n\r\n{\"message\":\"Service unavailable\"}\n"
            }
            Self::Postgresql => b"E\0\0\0\x2fSFATAL\0VFATAL\0C57P03\0Mservice unavailable\0\0",
            Self::Redis => b"-ERR Service unavailable\r\n",
        }
    }

    /// For the gate.
    pub fn of_gate(self) -> gate::Replies {
        let mut replies = gate::Replies::default();
        replies.denied = Arc::from(self.denied());
        replies.busy = Arc::from(self.busy());
        replies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(replies: Replies) -> [&'static [u8]; 3] {
        [replies.denied(), replies.busy(), replies.unreachable()]
    }

    #[test]
    fn an_http_reply_says_how_long_its_body_is() {
        for reply in all(Replies::Http) {
            let text = std::str::from_utf8(reply).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
            assert_eq!(length.parse(), Ok(body.len()), "{text}");
            assert!(body.starts_with("{\"message\":\"") && body.ends_with("\"}\n"), "{body}");
        }
    }

    #[test]
    fn each_reply_has_the_code_that_clients_go_by() {
        let begins = |reply: &[u8], with: &str| assert!(reply.starts_with(with.as_bytes()), "{}", reply.escape_ascii());
        let http = ["403 Forbidden", "503 Service Unavailable", "503 Service Unavailable"];
        for (reply, status) in all(Replies::Http).into_iter().zip(http) {
            begins(reply, &format!("HTTP/1.1 {status}\r\n"));
        }
        for (reply, code) in all(Replies::Postgresql).into_iter().zip(["28000", "53300", "57P03"]) {
            begins(&reply[5..], &format!("SFATAL\0VFATAL\0C{code}\0M"));
        }
        for (reply, word) in all(Replies::Redis).into_iter().zip(["-NOPERM ", "-ERR ", "-ERR "]) {
            begins(reply, word);
        }
        assert_eq!(all(Replies::None), [b"", b"", b""]);
    }

    #[test]
    fn a_postgresql_reply_says_how_long_it_is() {
        for reply in all(Replies::Postgresql) {
            let [b'E', length @ ..] = reply else { panic!("{reply:?}") };
            let (length, fields) = length.split_first_chunk().unwrap();
            assert_eq!(u32::from_be_bytes(*length) as usize, 4 + fields.len(), "{}", reply.escape_ascii());
            assert!(fields.ends_with(b"\0\0"));
        }
    }
}
