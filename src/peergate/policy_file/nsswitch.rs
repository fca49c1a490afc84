//! Which sources nsswitch.conf(5) names. Used by [`policy_file`](super).

use std::fs;

/// The sources of these databases, sorted, each once.
pub(super) fn read(databases: &[&str]) -> Vec<String> {
    sources(&fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default(), databases)
}

fn sources(text: &str, databases: &[&str]) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.split('#').next()?.split_once(':'));
    let sources = lines.filter(|(database, _)| databases.contains(&database.trim()));
    // In brackets: what to do after the source before them.
    let words = sources.flat_map(|(_, sources)| {
        sources.split('[').flat_map(|part| part.rsplit(']').next().unwrap_or_default().split_whitespace())
    });
    let mut named: Vec<String> = words.map(str::to_owned).collect();
    named.sort_unstable();
    named.dedup();
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_is_named_once_and_no_action() {
        let text = "passwd: files hesiod # nis\n#group: ldap\ngroup: files[NOTFOUND=return]nis hesiod\nsubid: x\n";
        assert_eq!(sources(text, &["passwd", "group"]), ["files", "hesiod", "nis"]);
        assert_eq!(sources(text, &["subid"]), ["x"]);
        assert_eq!(sources(text, &["initgroups"]), [""; 0]);
    }
}
