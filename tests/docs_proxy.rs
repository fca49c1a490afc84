//! What is written about the proxy matches it: its manual pages, its annotated configuration, the recipes' configurations.
//! What it shares with echod (completions, catalog, debian/copyright) is compared in docs.rs.

mod documents;

use std::collections::BTreeSet;

use documents::*;
use peergate::audit::Event;

const PAGE: &str = "packaging/man/peergate.8";
const PAGE_OF_FILE: &str = "packaging/man/peergate.toml.5";
const SHIPPED: &str = "packaging/peergate.toml";

#[test]
fn the_manual_page_lists_each_message_id_that_the_proxy_writes() {
    let of_lines = [Event::Line, Event::LineSummary];
    let written: BTreeSet<String> =
        WITH_ID.into_iter().filter(|event| !of_lines.contains(event)).filter_map(id_of).collect();
    assert_eq!(listed_ids(&read(PAGE)), written);
}

#[test]
fn the_manual_page_names_exactly_the_fields_that_the_proxy_writes() {
    let mut written = written_fields();
    assert!(written.remove("GATE_LINES"), "which the proxy does not count");
    assert_eq!(fields(&read(PAGE)), written);
}

#[test]
fn the_annotated_configurations_comments_are_the_defaults() {
    let text = read(SHIPPED);
    let spelled_out = uncommented(&text);
    assert_ne!(spelled_out, text);
    assert_eq!(check("shipped", &text), check("spelled-out", &spelled_out));
    assert!(check("shipped-alone", &text).unwrap().contains("allow.operators"));
}

#[test]
fn manual_page_and_annotated_configuration_list_the_same_settings() {
    assert_eq!(documented(&read(PAGE_OF_FILE)), settings(&uncommented(&read(SHIPPED))));
}

#[test]
fn manual_page_and_annotated_configuration_show_every_key_of_a_rule() {
    let (page, shipped) = (read(PAGE_OF_FILE), read(SHIPPED));
    assert_every_key_of_a_rule(&page, &shipped);
    for key in ["to", "root"] {
        assert!(page.split(".Sh RULES OF THE PROXY\n").nth(1).unwrap().contains(&format!("\n.It Ic {key}\n")), "{key}");
        assert!(shipped.lines().any(|line| line.starts_with(&format!("# {key} = "))), "{key}");
    }
}

#[test]
fn manual_page_and_annotated_configuration_state_the_same_defaults() {
    assert_same_defaults(&read(PAGE_OF_FILE), &read(SHIPPED), "[forward]");
}

#[test]
fn the_units_memory_is_enough_for_the_default_limits() {
    let service = "[forward]\nto = \"/run/behind/service.sock\"\n";
    assert_units_have_the_memory_for_the_default_limits("peergate@.service", service);
    assert!(read(PAGE_OF_FILE).contains("A connection takes up to 768 KiB then"), "the unit's comment has the sum");
}

#[test]
fn the_examples_and_the_recipes_of_the_manual_pages_are_accepted() {
    let service = "\n[forward]\nto = \"/run/behind/service.sock\"\n";
    assert_examples_are_accepted(&read(PAGE_OF_FILE), service);
    assert_examples_are_accepted(&read(PAGE), service);
}
