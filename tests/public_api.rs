//! The library's public items are the ones listed in tests/public-api.txt. None is added, changed or removed without
//! the list. After an intended change, write the list again and read the difference:
//!
//! ```console
//! $ UPDATE_PUBLIC_API=1 cargo test --test public_api
//! ```
//!
//! The list is made from rustdoc's JSON. The installed stable toolchain writes it when called through
//! tools/rustdoc-unstable.
//!
//! Reading the list: each item is listed once, below the module that is its home; a line `pub use` is another name of
//! it. Every type is Debug, Send and Sync as far as its parameters are, unless the list says otherwise. The line `is`
//! lists the other traits that it implements and that have no items to name (Clone, Eq, Display and the like).

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn the_public_items_are_the_listed_ones() {
    let root = &Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let listed = root.join("tests/public-api.txt");
    let found = Surface::of(&rustdoc_json(root)).text();
    if std::env::var_os("UPDATE_PUBLIC_API").is_some() {
        fs::write(&listed, &found).unwrap();
        return;
    }
    let wanted = fs::read_to_string(&listed).unwrap();
    let difference = difference(&wanted, &found);
    assert!(
        difference.is_empty() && wanted == found,
        "the public surface has changed:\n{difference}if it was meant to: UPDATE_PUBLIC_API=1 cargo test --test public_api"
    );
}

fn rustdoc_json(root: &Path) -> Value {
    // TARGET/PROFILE/deps/public_api-HASH
    let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_path_buf();
    let run = Command::new(env!("CARGO"))
        .args([
            "rustdoc",
            "--quiet",
            "--locked",
            "--offline",
            "--package",
            "peergate",
            "--lib",
            "--all-features",
            "--target-dir",
        ])
        .arg(&target)
        .args(["--", "-Z", "unstable-options", "--output-format", "json"])
        .env("RUSTDOC", root.join("tools/rustdoc-unstable"))
        .current_dir(root)
        .output()
        .unwrap();
    assert!(run.status.success(), "cargo rustdoc: {}", String::from_utf8_lossy(&run.stderr));
    let json = fs::read(target.join("doc/peergate.json")).unwrap();
    serde_json::from_slice(&json).unwrap()
}

/// The lines that are in only one of the texts.
fn difference(wanted: &str, found: &str) -> String {
    let (old, new): (BTreeSet<&str>, BTreeSet<&str>) = (wanted.lines().collect(), found.lines().collect());
    let lost = old.difference(&new).map(|line| format!("- {line}\n"));
    lost.chain(new.difference(&old).map(|line| format!("+ {line}\n"))).collect()
}

/// The versions of rustdoc's JSON that can be read: from Rust 1.85's to the newest that was tried.
const FORMATS: RangeInclusive<u64> = 37..=57;

/// Traits that every type has, unless it says otherwise.
const USUAL: [&str; 3] = ["Debug", "Send", "Sync"];

/// A crate as rustdoc describes it.
struct Surface<'j> {
    index: &'j Value,
    root: &'j Value,
    /// The items with a home, by id: the public module that holds them or, for an item of a private module, the first
    /// that re-exports it.
    at_home: RefCell<BTreeSet<String>>,
}

impl<'j> Surface<'j> {
    fn of(json: &'j Value) -> Self {
        let format = json["format_version"].as_u64().unwrap_or_default();
        assert!(FORMATS.contains(&format), "rustdoc's JSON is of format {format}, this test reads {FORMATS:?}");
        let modules = json["index"].as_object().into_iter().flatten().map(|(_, item)| &item["inner"]["module"]);
        let named = modules.flat_map(|module| module["items"].as_array().into_iter().flatten()).map(Value::to_string);
        Self { index: &json["index"], root: &json["root"], at_home: RefCell::new(named.collect()) }
    }

    fn text(&self) -> String {
        let mut items = BTreeSet::new();
        self.module(self.item(self.root), "peergate", &mut items);
        items.into_iter().fold(String::new(), |text, item| text + &item + "\n")
    }

    fn item(&self, id: &Value) -> &'j Value {
        &self.index[id.to_string()]
    }

    fn items(&self, ids: &'j Value) -> impl Iterator<Item = &'j Value> {
        ids.as_array().into_iter().flatten().map(|id| self.item(id)).filter(|item| !item.is_null())
    }

    /// Each item of a module is one entry, with what belongs to it indented below.
    fn module(&self, module: &'j Value, path: &str, entries: &mut BTreeSet<String>) {
        let ids = &module["inner"]["module"]["items"];
        let kind = |item: &Value| only(&item["inner"]).0.to_owned();
        // Modules first, so that the innermost one is the home of an item of a private module.
        for item in self.items(ids).filter(|item| kind(item) == "module") {
            let path = format!("{path}::{}", text(&item["name"]));
            entries.insert(format!("pub mod {path}"));
            self.module(item, &path, entries);
        }
        for item in self.items(ids).filter(|item| !["module", "use"].contains(&kind(item).as_str())) {
            entries.insert(self.entry(item, &format!("{path}::{}", text(&item["name"]))));
        }
        for item in self.items(ids).filter(|item| kind(item) == "use") {
            let inner = &item["inner"]["use"];
            let name = format!("{path}::{}", text(&inner["name"]));
            let target = self.item(&inner["id"]);
            if !target.is_null() && self.at_home.borrow_mut().insert(target["id"].to_string()) {
                entries.insert(self.entry(target, &name));
            } else {
                let glob = if inner["is_glob"] == true { "::*" } else { "" };
                entries.insert(format!("pub use {}{glob} as {name}", text(&inner["source"])));
            }
        }
    }

    fn entry(&self, item: &'j Value, path: &str) -> String {
        let (kind, inner) = only(&item["inner"]);
        let mut parts = self.parts(kind, inner, &item["id"]);
        parts.sort();
        let declaration = self.declaration(item, path);
        parts.iter().fold(declaration, |entry, part| entry + "\n    " + &part.replace('\n', "\n    "))
    }

    /// The item itself, in one line.
    fn declaration(&self, item: &Value, name: &str) -> String {
        let (kind, inner) = only(&item["inner"]);
        let public = if item["visibility"] == "public" { "pub " } else { "" };
        let attributes: String = item["attrs"].as_array().into_iter().flatten().filter_map(attribute).collect();
        let declared = match kind {
            "function" => function(inner, name),
            "struct" | "enum" | "trait" => {
                let (parameters, bounds) = generics(&inner["generics"]);
                let above = list(&inner["bounds"], bound, " + ");
                let above = if above.is_empty() { above } else { format!(": {above}") };
                format!("{kind} {name}{parameters}{above}{bounds}")
            }
            "constant" => format!("const {name}: {} = {}", ty(&inner["type"]), text(&inner["const"]["expr"])),
            "assoc_const" => format!("const {name}: {}", ty(&inner["type"])),
            "assoc_type" if inner["type"].is_null() => format!("type {name}"),
            "assoc_type" => format!("type {name} = {}", ty(&inner["type"])),
            "struct_field" => format!("{name}: {}", ty(inner)),
            "variant" => {
                let (shape, fields) = match &inner["kind"] {
                    Value::Object(_) => only(&inner["kind"]),
                    _ => ("plain", &Value::Null),
                };
                match shape {
                    "tuple" => format!("{name}({})", self.fields(fields)),
                    "struct" => format!("{name} {{ {} }}", self.fields(&fields["fields"])),
                    _ => name.to_owned(),
                }
            }
            _ => format!("{kind} {name} {inner}"),
        };
        format!("{attributes}{public}{declared}")
    }

    fn fields(&self, ids: &'j Value) -> String {
        let field = |field: &Value| {
            let name = text(&field["name"]);
            let ty = ty(&field["inner"]["struct_field"]);
            if name.starts_with(|c: char| c.is_ascii_digit()) { ty } else { format!("{name}: {ty}") }
        };
        self.items(ids).map(field).collect::<Vec<_>>().join(", ")
    }

    /// What belongs to a type or a trait: public fields, variants, methods, implemented traits.
    fn parts(&self, kind: &str, inner: &'j Value, id: &Value) -> Vec<String> {
        let declare = |item: &Value| self.declaration(item, text(&item["name"]));
        match kind {
            "struct" => {
                let (_, shape) = match &inner["kind"] {
                    Value::Object(_) => only(&inner["kind"]),
                    _ => ("unit", &Value::Null),
                };
                let fields = if shape.is_array() { shape } else { &shape["fields"] };
                let hidden = shape["has_stripped_fields"] == true || shape.to_string().contains("null");
                let hidden = hidden.then(|| "and fields that are not public".to_owned());
                self.items(fields).map(declare).chain(hidden).chain(self.impls(inner, id)).collect()
            }
            "enum" => {
                let (plain, others): (Vec<_>, Vec<_>) =
                    self.items(&inner["variants"]).partition(|variant| variant["inner"]["variant"]["kind"] == "plain");
                let plain = plain.into_iter().map(declare).collect::<Vec<_>>().join(" | ");
                let plain = (!plain.is_empty()).then_some(plain);
                others.into_iter().map(declare).chain(plain).chain(self.impls(inner, id)).collect()
            }
            "trait" => {
                let provided = |item: &Value| item["inner"]["function"]["has_body"] == true;
                let of_trait =
                    |item| if provided(item) { declare(item) + ", provided" } else { declare(item) + ", required" };
                // Types of this crate list it themselves.
                let is_foreign = |item: &&Value| {
                    let id = &item["inner"]["impl"]["for"]["resolved_path"]["id"];
                    id.is_null() || self.item(id).is_null()
                };
                let implementors = self.items(&inner["implementations"]).filter(is_foreign);
                let implementors = implementors.filter_map(|item| self.implementation(item));
                self.items(&inner["items"]).map(of_trait).chain(implementors).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The impl blocks of the type with this id. Impls of traits without items become one line.
    fn impls(&self, inner: &'j Value, id: &Value) -> Vec<String> {
        let (mut is, mut blocks) = (BTreeSet::new(), Vec::new());
        for item in self.items(&inner["impls"]) {
            let block = &item["inner"]["impl"];
            // A conversion into another type of this crate is listed with that type. Of the auto traits only Send and
            // Sync matter to users.
            let other = &block["for"]["resolved_path"]["id"];
            let is_auto = block["is_synthetic"] == true && !["Send", "Sync"].contains(&trait_name(&block["trait"]));
            if is_auto || other != id && !other.is_null() && !self.item(other).is_null() {
                continue;
            }
            match self.bare(block) {
                Some(name) if other == id => _ = is.insert(name),
                _ => blocks.extend(self.implementation(item)),
            }
        }
        for usual in USUAL {
            // Conditions are listed.
            if !is.remove(usual) && !is.iter().any(|one: &String| one.trim_start_matches('!').starts_with(usual)) {
                is.insert(format!("!{usual}"));
            }
        }
        is.remove("StructuralPartialEq");
        let is = is.into_iter().collect::<Vec<_>>().join(", ");
        blocks.extend((!is.is_empty()).then(|| format!("is {is}")));
        blocks
    }

    /// The name of the trait, if the impl has nothing else to list; and its conditions, unless they are only that each
    /// parameter implements the trait too.
    fn bare(&self, block: &Value) -> Option<String> {
        let of_trait = &block["trait"];
        let names_types = self.items_of(&block["items"]).any(|item| item["inner"].get("assoc_type").is_some());
        if of_trait.is_null()
            || !block["blanket_impl"].is_null()
            || names_types
            || !arguments(&of_trait["args"]).is_empty()
        {
            return None;
        }
        let name = trait_name(of_trait).rsplit("::").next().unwrap_or_default().to_owned();
        if block["is_negative"] == true {
            return Some(format!("!{name}"));
        }
        let bounds =
            |bounds: &Value| list(bounds, |one| bound(one).rsplit("::").next().unwrap_or_default().to_owned(), " + ");
        let parameters = block["generics"]["params"].as_array().into_iter().flatten().filter_map(|parameter| {
            let bounds = bounds(&parameter["kind"]["type"]["bounds"]);
            (!bounds.is_empty()).then(|| (text(&parameter["name"]).to_owned(), bounds))
        });
        let predicates = block["generics"]["where_predicates"].as_array().into_iter().flatten().map(|predicate| {
            let (_, inner) = only(predicate);
            (ty(&inner["type"]), bounds(&inner["bounds"]))
        });
        let conditions = parameters.chain(predicates).filter(|(_, bounds)| *bounds != name);
        let conditions: Vec<_> = conditions.map(|(what, bounds)| format!("{what}: {bounds}")).collect();
        Some(if conditions.is_empty() { name } else { format!("{name} where {}", conditions.join(" and ")) })
    }

    fn items_of<'a>(&self, ids: &'a Value) -> impl Iterator<Item = &'j Value> + use<'a, 'j> {
        let index = self.index;
        ids.as_array().into_iter().flatten().map(|id| &index[id.to_string()])
    }

    /// An impl block, unless every type has it.
    fn implementation(&self, item: &'j Value) -> Option<String> {
        let inner = &item["inner"]["impl"];
        if !inner["blanket_impl"].is_null() || inner["is_synthetic"] == true {
            return None;
        }
        let (parameters, bounds) = generics(&inner["generics"]);
        let of_trait = if inner["trait"].is_null() { String::new() } else { format!("{} for ", path(&inner["trait"])) };
        let head = format!("impl{parameters} {of_trait}{}{bounds}", ty(&inner["for"]));
        // The items of a trait are listed with the trait. A type adds only its associated types.
        let types_only = !inner["trait"].is_null();
        let mut parts: Vec<_> = self
            .items(&inner["items"])
            .filter(|item| !types_only || item["inner"].get("assoc_type").is_some())
            .map(|item| self.declaration(item, text(&item["name"])))
            .collect();
        parts.sort();
        // The functions of a type need no heading, unless they have conditions.
        let plain = !types_only && ["", "<T>", "<'p, T>", "<T, A>"].contains(&parameters.as_str()) && bounds.is_empty();
        if plain {
            return (!parts.is_empty()).then(|| parts.join("\n"));
        }
        (types_only || !parts.is_empty()).then(|| parts.iter().fold(head, |all, part| all + "\n    " + part))
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The one key of an object, and its value.
fn only(value: &Value) -> (&str, &Value) {
    value.as_object().and_then(|object| object.iter().next()).map_or(("", value), |(key, value)| (key, value))
}

fn list(values: &Value, each: impl Fn(&Value) -> String, separator: &str) -> String {
    values.as_array().into_iter().flatten().map(each).collect::<Vec<_>>().join(separator)
}

/// The attributes that matter to users.
fn attribute(attribute: &Value) -> Option<String> {
    let told = attribute.to_string();
    ["must_use", "non_exhaustive"].into_iter().find(|name| told.contains(name)).map(|name| format!("#[{name}] "))
}

fn function(inner: &Value, name: &str) -> String {
    let (parameters, bounds) = generics(&inner["generics"]);
    let header = &inner["header"];
    let words = [("is_const", "const "), ("is_async", "async "), ("is_unsafe", "unsafe ")];
    let words: String = words.into_iter().filter(|(key, _)| header[key] == true).map(|(_, word)| word).collect();
    let input = |pair: &Value| match (text(&pair[0]), ty(&pair[1])) {
        ("self", ty) if ty == "Self" => "self".to_owned(),
        ("self", ty) if ty == "&Self" => "&self".to_owned(),
        ("self", ty) if ty == "&mut Self" => "&mut self".to_owned(),
        (name, ty) => format!("{name}: {ty}"),
    };
    let inputs = list(&inner["sig"]["inputs"], input, ", ");
    let output = &inner["sig"]["output"];
    let output = if output.is_null() { String::new() } else { format!(" -> {}", ty(output)) };
    format!("{words}fn {name}{parameters}({inputs}){output}{bounds}")
}

/// `<T: Bound>`, and what follows `where`.
fn generics(generics: &Value) -> (String, String) {
    let parameter = |parameter: &Value| {
        let (kind, inner) = only(&parameter["kind"]);
        let bounds = list(&inner["bounds"], bound, " + ");
        let bounds = if bounds.is_empty() { bounds } else { format!(": {bounds}") };
        (inner["is_synthetic"] != true).then(|| match kind {
            "const" => format!("const {}: {}", text(&parameter["name"]), ty(&inner["type"])),
            _ => format!("{}{bounds}", text(&parameter["name"])),
        })
    };
    let parameters: Vec<_> = generics["params"].as_array().into_iter().flatten().filter_map(parameter).collect();
    let parameters = if parameters.is_empty() { String::new() } else { format!("<{}>", parameters.join(", ")) };
    let predicate = |predicate: &Value| {
        let (_, inner) = only(predicate);
        format!("{}: {}", ty(&inner["type"]), list(&inner["bounds"], bound, " + "))
    };
    let predicates = list(&generics["where_predicates"], predicate, ", ");
    (parameters, if predicates.is_empty() { predicates } else { format!(" where {predicates}") })
}

fn bound(bound: &Value) -> String {
    match only(bound) {
        ("trait_bound", inner) => {
            let maybe = if inner["modifier"] == "maybe" { "?" } else { "" };
            format!("{maybe}{}", path(&inner["trait"]))
        }
        ("outlives", lifetime) => text(lifetime).to_owned(),
        _ => bound.to_string(),
    }
}

/// A path as in the source, with its arguments.
fn path(path: &Value) -> String {
    format!("{}{}", trait_name(path), arguments(&path["args"]))
}

/// Until Rust 1.86 it had another name.
fn trait_name(path: &Value) -> &str {
    path["path"].as_str().unwrap_or(text(&path["name"]))
}

fn arguments(args: &Value) -> String {
    match only(args) {
        ("angle_bracketed", inner) => {
            let argument = |argument: &Value| match only(argument) {
                ("type", inner) => ty(inner),
                ("lifetime", name) => text(name).to_owned(),
                (_, other) => other.to_string(),
            };
            let constraint = |constraint: &Value| {
                let (kind, inner) = only(&constraint["binding"]);
                let name = text(&constraint["name"]);
                match kind {
                    "equality" => format!("{name} = {}", ty(&inner["type"])),
                    _ => format!("{name}: {}", list(inner, bound, " + ")),
                }
            };
            let all = [list(&inner["args"], argument, ", "), list(&inner["constraints"], constraint, ", ")];
            let all = all.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ");
            if all.is_empty() { all } else { format!("<{all}>") }
        }
        ("parenthesized", inner) => {
            let output = &inner["output"];
            let output = if output.is_null() { String::new() } else { format!(" -> {}", ty(output)) };
            format!("({}){output}", list(&inner["inputs"], ty, ", "))
        }
        _ => String::new(),
    }
}

fn ty(value: &Value) -> String {
    match only(value) {
        ("primitive" | "generic", name) => text(name).to_owned(),
        ("resolved_path", inner) => path(inner),
        ("borrowed_ref", inner) => {
            let lifetime = inner["lifetime"].as_str().map(|lifetime| format!("{lifetime} ")).unwrap_or_default();
            let mutable = if inner["is_mutable"] == true { "mut " } else { "" };
            format!("&{lifetime}{mutable}{}", ty(&inner["type"]))
        }
        ("tuple", inner) => format!("({})", list(inner, ty, ", ")),
        ("slice", inner) => format!("[{}]", ty(inner)),
        ("array", inner) => format!("[{}; {}]", ty(&inner["type"]), text(&inner["len"])),
        ("impl_trait", inner) => format!("impl {}", list(inner, bound, " + ")),
        ("dyn_trait", inner) => {
            let lifetime = inner["lifetime"].as_str().map(|lifetime| format!(" + {lifetime}")).unwrap_or_default();
            format!("dyn {}{lifetime}", list(&inner["traits"], |bound| path(&bound["trait"]), " + "))
        }
        ("qualified_path", inner) => format!("<{}>::{}", ty(&inner["self_type"]), text(&inner["name"])),
        // Any other form is printed as it is, so that a change of it is noticed.
        _ => value.to_string(),
    }
}
