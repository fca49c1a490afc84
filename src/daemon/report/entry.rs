//! One line of `journalctl -o json` becomes an [`Entry`], whatever the line holds; and which entries to believe.
//! Used by [`tally`](super::tally).
//!
//! Every process that reaches the journal's socket may write any field. Only journald itself adds the fields that begin with
//! an underscore (systemd.journal-fields(7), "trusted fields"). So an entry is believed by its sender:
//!
//! - the system's echod: `_SYSTEMD_UNIT=echo.service`, from a control group where systemd would put it; or `_UID=0`
//!   with an executable called echod, for root's `echod --listen` outside systemd;
//! - a user's own: this user's `_UID`, not the system's unit, and `_SYSTEMD_USER_UNIT=echo.service` or an executable or
//!   a process called echod. What runs as this user already is the user; this only keeps other programs out.
//!
//! The name of an executable alone proves nothing: any user may call a program echod, or load a library of their own
//! into /usr/bin/echod.

use std::path::Path;

use peergate::unit::Units;
use serde::Deserialize;
use serde_json::Value;

use super::Program;

/// The fields that [`Entry`] is made of, for journalctl's --output-fields. It adds those with two underscores unasked.
pub const FIELDS: &str = "GATE_VERDICT,GATE_REASON,GATE_RULE,GATE_COUNT,GATE_DURATION_USEC,PEER_UID,PEER_USER,\
                          PEER_COMM,PEER_UNIT,PEER_LOGINUID,PEER_LOGIN,_UID,_SYSTEMD_UNIT,_SYSTEMD_CGROUP,_SYSTEMD_USER_UNIT,_EXE,_COMM,\
                          _MACHINE_ID,_HOSTNAME,_TRANSPORT,N_DROPPED,MESSAGE";
/// MESSAGE_ID of journald's own note that it has dropped messages of a unit, for its rate limit (journald.conf(5)).
pub const SUPPRESSED: &str = "a596d6fe7bfa4994828e72309e95d61e";

/// A field that its sender chose. journalctl writes text as a string, bytes that are no UTF-8 as an array of numbers,
/// a field that occurs several times as an array of these, and null for what is too long.
#[derive(Debug, Default, Deserialize)]
#[serde(from = "Value")]
pub struct Field(Option<String>);

impl Field {
    /// The text; the first of several; what is no UTF-8 replaced. `None` where there is none.
    pub fn text(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// The number, where that is all there is.
    pub fn number<N: std::str::FromStr>(&self) -> Option<N> {
        let text = self.text()?;
        // "+1" is not how the service writes one.
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
    }
}

impl From<Value> for Field {
    fn from(value: Value) -> Self {
        match value {
            Value::String(text) => Self(Some(text)),
            Value::Number(number) => Self(Some(number.to_string())),
            Value::Array(values) => match values.first() {
                Some(Value::Number(_)) => {
                    let byte = |value: &Value| value.as_u64().and_then(|number| u8::try_from(number).ok());
                    let bytes: Option<Vec<u8>> = values.iter().map(byte).collect();
                    Self(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
                }
                Some(_) => {
                    // One level only: journalctl nests no deeper.
                    let flat =
                        |value: &Value| !matches!(value, Value::Array(inner) if inner.iter().any(Value::is_array));
                    values.into_iter().filter(flat).map(Self::from).find(|field| field.0.is_some()).unwrap_or_default()
                }
                None => Self(None),
            },
            _ => Self(None),
        }
    }
}

/// A field that journald added. It occurs once or is not to be believed.
#[derive(Debug, Default, Deserialize)]
#[serde(from = "Value")]
struct Trusted(Option<String>);

impl From<Value> for Trusted {
    fn from(value: Value) -> Self {
        Self(if let Value::String(text) = value { Some(text) } else { None })
    }
}

impl Trusted {
    fn is(&self, text: &str) -> bool {
        self.0.as_deref() == Some(text)
    }
}

/// What the report wants of an entry. Any field may be missing.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Entry {
    #[serde(rename = "__REALTIME_TIMESTAMP")]
    time: Field,
    #[serde(rename = "_UID")]
    sender: Trusted,
    #[serde(rename = "_SYSTEMD_UNIT")]
    system_unit: Trusted,
    #[serde(rename = "_SYSTEMD_CGROUP")]
    control_group: Trusted,
    #[serde(rename = "_SYSTEMD_USER_UNIT")]
    user_unit: Trusted,
    #[serde(rename = "_EXE")]
    executable: Trusted,
    #[serde(rename = "_COMM")]
    process: Trusted,
    #[serde(rename = "_MACHINE_ID")]
    machine: Trusted,
    #[serde(rename = "_HOSTNAME")]
    host: Trusted,
    #[serde(rename = "_TRANSPORT")]
    transport: Trusted,
    #[serde(rename = "N_DROPPED")]
    dropped: Field,
    #[serde(rename = "MESSAGE")]
    message: Field,
    /// GATE_VERDICT.
    #[serde(rename = "GATE_VERDICT")]
    pub verdict: Field,
    /// GATE_REASON.
    #[serde(rename = "GATE_REASON")]
    pub reason: Field,
    /// GATE_RULE.
    #[serde(rename = "GATE_RULE")]
    pub rule: Field,
    /// GATE_COUNT.
    #[serde(rename = "GATE_COUNT")]
    pub count: Field,
    /// GATE_DURATION_USEC.
    #[serde(rename = "GATE_DURATION_USEC")]
    pub duration: Field,
    /// PEER_UID.
    #[serde(rename = "PEER_UID")]
    pub uid: Field,
    /// PEER_USER.
    #[serde(rename = "PEER_USER")]
    pub user: Field,
    /// PEER_COMM.
    #[serde(rename = "PEER_COMM")]
    pub program: Field,
    /// PEER_UNIT.
    #[serde(rename = "PEER_UNIT")]
    pub unit: Field,
    /// PEER_LOGINUID.
    #[serde(rename = "PEER_LOGINUID")]
    login_uid: Field,
    /// PEER_LOGIN.
    #[serde(rename = "PEER_LOGIN")]
    login: Field,
}

impl Entry {
    /// Reads a line. `None` where it is not a JSON object.
    pub fn parse(line: &[u8]) -> Option<Self> {
        // A derived struct may also be written as an array; journalctl never does.
        let object = line.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        object.then(|| serde_json::from_slice(line).ok())?
    }

    /// Whether it comes from the unit of the system's manager. journald passes over whatever ends in `.slice` on its way
    /// to a unit's name, wherever it is: in a control group `web.slice` that a container manager gave away, its owner
    /// may make `system.slice/echo.service`. So the control group must be where systemd would put the unit.
    fn is_of_system_unit(&self, program: Program) -> bool {
        let is_in_place = |path: &str| {
            Units::from_path(path)
                .is_some_and(|units| units.system().last().is_some_and(|name| program.is_service(name)))
        };
        is_of(&self.system_unit, program) && self.control_group.0.as_deref().is_none_or(is_in_place)
    }

    /// When journald took it in, in microseconds since 1970.
    pub fn time(&self) -> Option<i64> {
        self.time.number()
    }

    /// Where journald itself has written the entry: how many messages of the service, or of all that shares its budget,
    /// it says it has dropped. A user's services are counted as one unit, their manager's.
    pub fn suppressed(&self, scope: Scope) -> Option<u64> {
        // Only journald's own messages have this transport.
        if !self.transport.is("driver") {
            return None;
        }
        let unit = match scope {
            Scope::System(program) => format!("{}.service", program.unit),
            Scope::User(_, uid) => format!("user@{uid}.service"),
        };
        // "Suppressed 12 messages from echo.service"
        let of = self.message.text().and_then(|text| text.rsplit_once(" from ")).map(|(_, of)| of);
        Some(if of == Some(unit.as_str()) { self.dropped.number().unwrap_or(1) } else { 0 })
    }

    /// The id of the machine whose journald took it in: 32 hexadecimal digits (machine-id(5)).
    pub fn machine(&self) -> Option<u128> {
        let id = self.machine.0.as_deref().filter(|id| id.len() == 32)?;
        id.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u128::from_str_radix(id, 16).ok())?
    }

    /// The user who logged in, by name if there is one, where that is not the peer's own user.
    pub fn login_of_another(&self) -> Option<&str> {
        let uid = self.login_uid.number::<u32>().filter(|uid| self.uid.number() != Some(*uid));
        uid.and_then(|_| self.login.text().or_else(|| self.login_uid.text()))
    }

    /// The host name of that machine.
    pub fn host(&self) -> Option<&str> {
        self.host.0.as_deref()
    }
}

/// The service to report on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The system's.
    System(Program),
    /// The own one of the user with this id.
    User(Program, u32),
}

impl Scope {
    /// Whether the entry was sent by the service in question; see the top of this file.
    pub fn believes(self, entry: &Entry) -> bool {
        let executable = entry.executable.0.as_deref().map(Path::new).and_then(Path::file_name);
        let (Self::System(program) | Self::User(program, _)) = self;
        let executable = executable.is_some_and(|name| name == program.name);
        match self {
            Self::System(_) => entry.is_of_system_unit(program) || (entry.sender.is("0") && executable),
            Self::User(_, uid) => {
                let named = is_of(&entry.user_unit, program) || executable || entry.process.is(program.name);
                entry.sender.is(&uid.to_string()) && !is_of(&entry.system_unit, program) && named
            }
        }
    }
}

fn is_of(unit: &Trusted, program: Program) -> bool {
    unit.0.as_deref().is_some_and(|name| program.is_service(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ECHOD;

    fn entry(json: &str) -> Entry {
        Entry::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_field_is_read_in_every_form_that_journalctl_writes() {
        let user = |value: &str| entry(&format!(r#"{{"PEER_USER":{value}}}"#)).user.text().map(str::to_owned);
        assert_eq!(user(r#""köln""#).as_deref(), Some("köln"));
        assert_eq!(user("[107,246,108,110]").as_deref(), Some("k\u{fffd}ln"), "bytes that are no UTF-8");
        assert_eq!(user(r#"["a","b"]"#).as_deref(), Some("a"), "a field that occurs twice");
        assert_eq!(user(r#"[null,[98,255],"c"]"#).as_deref(), Some("b\u{fffd}"), "a mixture");
        for nothing in ["null", "[]", "[null]", "[256]", "[1,\"a\"]", "{}", "true", "[[[97]]]"] {
            assert_eq!(user(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_number_is_digits_and_nothing_else() {
        let uid = |value: &str| entry(&format!(r#"{{"PEER_UID":{value}}}"#)).uid.number::<u32>();
        assert_eq!(uid(r#""1001""#), Some(1001));
        assert_eq!(uid("1001"), Some(1001));
        for nothing in [r#""""#, r#""+1""#, r#""-1""#, r#"" 1""#, r#""4294967296""#, "1.0", r#""1e3""#] {
            assert_eq!(uid(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn what_is_no_json_object_is_no_entry() {
        for line in ["", "null", "[]", "1", "{", r#"{"a":1"#, "-- No entries --", r#"{"PEER_USER":"\ud800"}"#] {
            assert!(Entry::parse(line.as_bytes()).is_none(), "{line}");
        }
        assert!(Entry::parse(b"{\"PEER_USER\":\"\xff\"}").is_none());
    }

    #[test]
    fn only_the_units_own_process_and_roots_echod_speak_for_the_system() {
        let believed = |json: &str| Scope::System(ECHOD).believes(&entry(json));
        assert!(believed(r#"{"_SYSTEMD_UNIT":"echo.service","_UID":"61234","_EXE":"/usr/bin/echod"}"#));
        assert!(believed(r#"{"_SYSTEMD_UNIT":"session-1.scope","_UID":"0","_EXE":"/usr/bin/echod"}"#));
        let of_group =
            |path: &str| format!(r#"{{"_SYSTEMD_UNIT":"echo.service","_SYSTEMD_CGROUP":"{path}","_UID":"61234"}}"#);
        assert!(believed(&of_group("/system.slice/echo.service")) && believed(&of_group("/a.slice/echo.service")));
        assert!(!believed(&of_group("/web.slice/system.slice/echo.service")));
        assert!(!believed(&of_group("/_web.slice/echo.service")) && !believed(&of_group("/a-b.slice/echo.service")));
        for forged in [
            r#"{"_UID":"1000","_EXE":"/usr/bin/echod","_COMM":"echod","SYSLOG_IDENTIFIER":"echod"}"#,
            r#"{"_SYSTEMD_UNIT":"user@1000.service","_SYSTEMD_USER_UNIT":"echo.service","_UID":"1000","_COMM":"echod"}"#,
            r#"{"_UID":"0","_EXE":"/usr/bin/logger","_COMM":"echod"}"#,
            r#"{"_SYSTEMD_UNIT":["echo.service","x.service"],"_UID":"1000"}"#,
            r#"{"SYSTEMD_UNIT":"echo.service","UNIT":"echo.service","_UID":"1000"}"#,
            "{}",
        ] {
            assert!(!believed(forged), "{forged}");
        }
    }

    #[test]
    fn only_journald_tells_what_it_has_dropped() {
        let note = |transport, unit| {
            entry(&format!(
                r#"{{"_TRANSPORT":"{transport}","N_DROPPED":"12","MESSAGE":"Suppressed 12 messages from {unit}"}}"#
            ))
        };
        assert_eq!(note("driver", "echo.service").suppressed(Scope::System(ECHOD)), Some(12));
        assert_eq!(note("driver", "other-echo.service").suppressed(Scope::System(ECHOD)), Some(0));
        assert_eq!(note("driver", "user@1000.service").suppressed(Scope::User(ECHOD, 1000)), Some(12));
        assert_eq!(note("journal", "echo.service").suppressed(Scope::System(ECHOD)), None, "anyone can say that");
    }

    #[test]
    fn a_users_own_echod_is_neither_anothers_nor_the_systems() {
        let believed = |json| Scope::User(ECHOD, 1000).believes(&entry(json));
        assert!(believed(r#"{"_SYSTEMD_UNIT":"user@1000.service","_SYSTEMD_USER_UNIT":"echo.service","_UID":"1000"}"#));
        assert!(believed(r#"{"_UID":"1000","_EXE":"/home/a/target/debug/echod"}"#));
        for other in [
            r#"{"_SYSTEMD_USER_UNIT":"echo.service","_UID":"1001"}"#,
            r#"{"_SYSTEMD_UNIT":"echo.service","_UID":"1000","_EXE":"/usr/bin/echod"}"#,
            r#"{"_UID":"1000","_EXE":"/usr/bin/logger","_COMM":"logger"}"#,
        ] {
            assert!(!believed(other), "{other}");
        }
    }
}
