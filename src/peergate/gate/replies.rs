//! What a peer gets that is turned away, in the words of its protocol. No reply names a rule.

use std::sync::Arc;

use super::Replies;

/// The policy denies the peer, in HTTP/2: SETTINGS, as the first frame must be, and GOAWAY with the code that gRPC reads as
/// PERMISSION_DENIED.
const INADEQUATE_SECURITY: u8 = 0xc;
/// A limit is reached: gRPC reads it as RESOURCE_EXHAUSTED.
const ENHANCE_YOUR_CALM: u8 = 0xb;

impl Replies {
    /// These bytes, each followed by an end of file. Empty bytes: the end of file alone.
    pub fn new(denied: impl AsRef<[u8]>, busy: impl AsRef<[u8]>) -> Self {
        Self { denied: Arc::from(denied.as_ref()), busy: Arc::from(busy.as_ref()) }
    }

    /// A line of text. The default.
    pub fn text() -> Self {
        Self::new("Unauthorized access\n", "Too many connections\n")
    }

    /// An HTTP/1.1 response: 403 or 503, with a JSON body `{"message": …}`.
    pub fn http() -> Self {
        Self::new(http("403 Forbidden", "Unauthorized access"), http("503 Service Unavailable", "Too many connections"))
    }

    /// Two HTTP/2 frames that a gRPC client reads as PERMISSION_DENIED or RESOURCE_EXHAUSTED.
    pub fn grpc() -> Self {
        Self::new(http2(INADEQUATE_SECURITY, "Unauthorized access"), http2(ENHANCE_YOUR_CALM, "Too many connections"))
    }

    /// Only the end of file.
    pub fn silent() -> Self {
        Self::new("", "")
    }
}

fn http(status: &str, message: &str) -> String {
    let body = format!("{{\"message\":\"{message}\"}}\n");
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn http2(code: u8, message: &str) -> Vec<u8> {
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    // The last stream that was processed (none), the code, then text for a person.
    let length = 8 + message.len() as u8;
    let goaway = [0, 0, length, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, code];
    [&settings[..], &goaway, message.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_http_reply_says_how_long_its_body_is() {
        let replies = Replies::http();
        for (reply, status) in [(&replies.denied, "403"), (&replies.busy, "503")] {
            let text = std::str::from_utf8(reply).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
            assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        }
    }

    #[test]
    fn a_grpc_reply_consists_of_whole_frames() {
        let replies = Replies::grpc();
        for (reply, code) in [(&replies.denied, INADEQUATE_SECURITY), (&replies.busy, ENHANCE_YOUR_CALM)] {
            let (settings, goaway) = reply.split_at(9);
            assert_eq!(settings[..4], [0, 0, 0, 4]);
            assert_eq!((usize::from(goaway[2]), goaway[3], goaway[16]), (goaway.len() - 9, 7, code));
        }
    }
}
