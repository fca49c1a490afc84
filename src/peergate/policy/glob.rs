//! Patterns for unit names: `*` stands for any run of characters, `?` for one. Used by [`policy`](super) alone.

/// The characters of a unit's name (systemd.unit(5)).
const IN_UNIT_NAMES: &str = "letters, digits, and any of : - _ . \\ @";

/// A pattern, checked and ready to match.
#[derive(Clone, Debug)]
pub(crate) struct Glob {
    text: Box<str>,
    literal: bool,
}

impl Glob {
    /// The error says what was found and, after a semicolon, what was expected.
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        const EXAMPLE: &str =
            "expected a unit's name such as \"backup.service\", or a pattern such as \"backup@*.service\"";
        if text.is_empty() {
            return Err(format!("an empty unit name; {EXAMPLE}"));
        }
        if let Some(wrong) = text.chars().find(|&c| !c.is_ascii_alphanumeric() && !":-_.\\@*?".contains(c)) {
            return Err(format!("{wrong:?} in {text:?}, where a unit's name has {IN_UNIT_NAMES}; {EXAMPLE}"));
        }
        let literal = !text.contains(['*', '?']);
        if literal && !crate::unit::is_unit(text) {
            return Err(format!("{text:?} is not the name of a unit that can hold processes; {EXAMPLE}"));
        }
        Ok(Self { text: text.into(), literal })
    }

    /// Whether the whole of `name` fits. Takes at most (length of name) × (length of pattern) steps, because only
    /// the latest `*` is tried again: an earlier one can gain nothing by taking more.
    pub(crate) fn matches(&self, name: &str) -> bool {
        if self.literal {
            return *self.text == *name;
        }
        let (pattern, name) = (self.text.as_bytes(), name.as_bytes());
        let (mut p, mut n) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    star = Some((p + 1, n));
                    p += 1;
                }
                Some(b'?') => {
                    p += 1;
                    n = after_character(name, n);
                }
                Some(&byte) if byte == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => {
                    let Some((after_star, taken)) = star else { return false };
                    let taken = after_character(name, taken);
                    star = Some((after_star, taken));
                    (p, n) = (after_star, taken);
                }
            }
        }
        pattern[p..].iter().all(|&byte| byte == b'*')
    }
}

/// Where the next UTF-8 character begins: `?` stands for a character, not for a byte.
fn after_character(text: &[u8], at: usize) -> usize {
    let continuation = text[at + 1..].iter().take_while(|&&byte| byte & 0xC0 == 0x80).count();
    at + 1 + continuation
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Glob::new(pattern).unwrap().matches(name)
    }

    #[test]
    fn a_pattern_must_fit_the_whole_name() {
        assert!(matches("backup.service", "backup.service"));
        assert!(!matches("backup.service", "xbackup.service"));
        assert!(matches("backup@*.service", "backup@a.service"));
        assert!(matches("backup@*.service", "backup@.service"));
        assert!(!matches("backup@*.service", "backup@a.service.slice"));
        assert!(matches("session-?.scope", "session-3.scope"));
        assert!(!matches("session-?.scope", "session-33.scope"));
        assert!(!matches("session-?.scope", "session-.scope"));
        assert!(matches("*", "anything.slice"));
        assert!(matches("*a*b*", "xxaxxbxx") && !matches("*a*b*", "xxbxxaxx"));
        assert!(matches("a*b?", "aabbc") && matches("**", "") && !matches("?", ""));
    }

    #[test]
    fn a_question_mark_stands_for_one_character_however_long() {
        assert!(matches("?.slice", "é.slice") && matches("*?.slice", "éé.slice") && !matches("??.slice", "é.slice"));
    }

    #[test]
    fn it_agrees_with_the_definition_on_every_short_case() {
        fn slow(pattern: &[u8], name: &[u8]) -> bool {
            match pattern.split_first() {
                None => name.is_empty(),
                Some((b'*', rest)) => (0..=name.len()).any(|taken| slow(rest, &name[taken..])),
                Some((&byte, rest)) => {
                    name.split_first().is_some_and(|(&first, tail)| (byte == b'?' || byte == first) && slow(rest, tail))
                }
            }
        }
        fn words(letters: &str, longest: u32) -> Vec<String> {
            let mut all = vec![String::new()];
            let mut last = all.clone();
            for _ in 0..longest {
                last = last.iter().flat_map(|word| letters.chars().map(move |c| format!("{word}{c}"))).collect();
                all.extend_from_slice(&last);
            }
            all
        }
        // Miri takes hundreds of times as long.
        let longest = if cfg!(miri) { 2 } else { 5 };
        let names = words("ab", longest);
        for pattern in words("ab*?", longest).iter().filter(|p| p.contains(['*', '?'])) {
            let glob = Glob::new(pattern).unwrap();
            for name in &names {
                assert_eq!(glob.matches(name), slow(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
            }
        }
    }

    #[test]
    fn many_stars_cost_no_more_than_the_product_of_the_lengths() {
        // With naive backtracking this would not end in the lifetime of the machine.
        let length = if cfg!(miri) { 12 } else { 120 };
        let pattern = "*a".repeat(length) + "b";
        assert!(!matches(&pattern, &"a".repeat(2 * length)));
    }

    #[test]
    fn what_no_unit_can_be_called_is_refused() {
        for wrong in
            ["", "a/b.service", "a\n.service", "backup", "backup.timer", "[ab].service", "a b.service", ".slice"]
        {
            let error = Glob::new(wrong).unwrap_err();
            assert!(error.contains("; expected"), "{error}");
        }
    }
}
