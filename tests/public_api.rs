//! The library's public surface is what tests/public-api.txt lists, item by item: nothing is added to it, changed or
//! lost unseen. After a change that is meant, write the list anew and look at the difference:
//!
//! ```console
//! $ UPDATE_PUBLIC_API=1 cargo test --test public_api
//! ```
//!
//! The list is made from rustdoc's JSON, which the installed stable toolchain gives where it is asked through
//! tools/rustdoc-unstable.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn the_public_surface_is_the_listed_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
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
        .args(["rustdoc", "--quiet", "--locked", "--offline", "--lib", "--target-dir"])
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

/// The lines that are in one text only.
fn difference(wanted: &str, found: &str) -> String {
    let (old, new): (BTreeSet<&str>, BTreeSet<&str>) = (wanted.lines().collect(), found.lines().collect());
    let lost = old.difference(&new).map(|line| format!("- {line}\n"));
    lost.chain(new.difference(&old).map(|line| format!("+ {line}\n"))).collect()
}

/// What rustdoc tells of a crate.
struct Surface<'j> {
    index: &'j Value,
    root: &'j Value,
    /// The items that a public module holds, by id.
    named: BTreeSet<String>,
}

impl<'j> Surface<'j> {
    fn of(json: &'j Value) -> Self {
        let modules = json["index"].as_object().into_iter().flatten().map(|(_, item)| &item["inner"]["module"]);
        let named = modules.flat_map(|module| module["items"].as_array().into_iter().flatten()).map(Value::to_string);
        Self { index: &json["index"], root: &json["root"], named: named.collect() }
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

    /// Each item of a module is one entry; what belongs to it is indented below it.
    fn module(&self, module: &'j Value, path: &str, entries: &mut BTreeSet<String>) {
        for item in self.items(&module["inner"]["module"]["items"]) {
            let (kind, inner) = only(&item["inner"]);
            let name = item["name"].as_str().unwrap_or_default();
            if kind == "use" {
                let glob = if inner["is_glob"] == true { "::*" } else { "" };
                let name = format!("{path}::{}", text(&inner["name"]));
                entries.insert(format!("pub use {}{glob} as {name}", text(&inner["source"])));
                // What lives in a private module has no other public name than this one.
                let target = self.item(&inner["id"]);
                if !target.is_null() && !self.named.contains(&target["id"].to_string()) {
                    entries.insert(self.entry(target, &name));
                }
                continue;
            }
            let path = format!("{path}::{name}");
            if kind == "module" {
                entries.insert(format!("pub mod {path}"));
                self.module(item, &path, entries);
                continue;
            }
            entries.insert(self.entry(item, &path));
        }
    }

    fn entry(&self, item: &'j Value, path: &str) -> String {
        let (kind, inner) = only(&item["inner"]);
        let mut parts = self.parts(kind, inner);
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
    fn parts(&self, kind: &str, inner: &'j Value) -> Vec<String> {
        let declare = |item: &Value| self.declaration(item, item["name"].as_str().unwrap_or_default());
        match kind {
            "struct" => {
                let (_, shape) = match &inner["kind"] {
                    Value::Object(_) => only(&inner["kind"]),
                    _ => ("unit", &Value::Null),
                };
                let fields = if shape.is_array() { shape } else { &shape["fields"] };
                let hidden = shape["has_stripped_fields"] == true || shape.to_string().contains("null");
                let hidden = hidden.then(|| "and fields that are not public".to_owned());
                self.items(fields).map(declare).chain(hidden).chain(self.impls(inner)).collect()
            }
            "enum" => self.items(&inner["variants"]).map(declare).chain(self.impls(inner)).collect(),
            "trait" => {
                let provided = |item: &Value| item["inner"]["function"]["has_body"] == true;
                let of_trait =
                    |item| if provided(item) { declare(item) + ", provided" } else { declare(item) + ", required" };
                let implementors = self.items(&inner["implementations"]).filter_map(|item| self.implementation(item));
                self.items(&inner["items"]).map(of_trait).chain(implementors).collect()
            }
            _ => Vec::new(),
        }
    }

    fn impls(&self, inner: &'j Value) -> impl Iterator<Item = String> {
        self.items(&inner["impls"]).filter_map(|item| self.implementation(item))
    }

    /// An impl block; those that every type has are left out.
    fn implementation(&self, item: &'j Value) -> Option<String> {
        let inner = &item["inner"]["impl"];
        let of_trait = text(&inner["trait"]["path"]);
        // Of the auto traits these are the ones that users depend on.
        let auto = inner["is_synthetic"] == true;
        let unseen = of_trait == "StructuralPartialEq" || auto && !["Send", "Sync"].contains(&of_trait);
        if !inner["blanket_impl"].is_null() || unseen {
            return None;
        }
        let (parameters, bounds) = generics(&inner["generics"]);
        let not = if inner["is_negative"] == true { "!" } else { "" };
        let of_trait =
            if inner["trait"].is_null() { String::new() } else { format!("{not}{} for ", path(&inner["trait"])) };
        let head = format!("impl{parameters} {of_trait}{}{bounds}", ty(&inner["for"]));
        // A trait's items are known from the trait; what a type adds is its types.
        let types_only = !inner["trait"].is_null();
        let mut parts: Vec<_> = self
            .items(&inner["items"])
            .filter(|item| !types_only || item["inner"].get("assoc_type").is_some())
            .map(|item| self.declaration(item, text(&item["name"])))
            .collect();
        parts.sort();
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

/// Of the attributes those that bind users.
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

/// A path as the source has it, with its arguments.
fn path(path: &Value) -> String {
    let name = path["path"].as_str().unwrap_or(text(&path["name"]));
    format!("{name}{}", arguments(&path["args"]))
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
        // Whatever else there is: told as it came, so that a change of it is seen.
        _ => value.to_string(),
    }
}
