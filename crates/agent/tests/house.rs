//! The code is a house with floors: a file imports what lies below it, and nothing that imports it, directly or by way
//! of others. The same holds for the folders of a crate.
//!
//! What a file imports is read from its text: the paths of its `use`s, and every path that begins with `crate::` or
//! `super::`. Each leads to the file that has what it names, past those that only re-export it. A `mod x;` imports
//! nothing, and neither does a re-export of what the file does not use itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The crates whose files are such houses. In the others a module takes from its own submodules, which take from it.
const BY_FILES: [&str; 3] = ["agent", "api", "policy"];
/// And those whose folders are.
const BY_FOLDERS: [&str; 5] = ["agent", "api", "policy", "bench", "vmferry"];

/// Of each file, or folder, those that it imports.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// The files of a crate, by the paths of their modules, `a::b`; the root's is empty.
struct House(BTreeMap<String, File>);

struct File {
    /// Without comments, re-exports and tests.
    code: String,
    re_exports: Vec<Vec<String>>,
}

impl House {
    fn read(src: &Path) -> Self {
        let mut house = Self(BTreeMap::new());
        house.walk(src, src);
        assert!(!house.0.is_empty(), "{} has no files", src.display());
        house
    }

    fn walk(&mut self, src: &Path, dir: &Path) {
        for entry in std::fs::read_dir(dir).expect("a folder of the sources") {
            let path = entry.expect("an entry of it").path();
            if path.is_dir() {
                self.walk(src, &path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                let inside = path.strip_prefix(src).expect("below it").with_extension("");
                let mut parts: Vec<_> = inside.iter().map(|it| it.to_string_lossy().into_owned()).collect();
                if parts.last().is_some_and(|it| it == "mod") || parts == ["lib"] || parts == ["main"] {
                    parts.pop();
                }
                // Tests stand below what they test, as a part of it.
                if parts.last().is_none_or(|it| it != "tests") {
                    self.0.insert(parts.join("::"), File::read(&path));
                }
            }
        }
    }

    fn imports(&self) -> Imports {
        let of = |(module, file): (&String, &File)| {
            let mut found = BTreeSet::new();
            let used = file.re_exports.iter().filter(|path| file.uses(path));
            for path in paths(&file.code).iter().chain(used) {
                self.follow(module, path, &mut found, 0);
            }
            found.remove(module);
            (module.clone(), found)
        };
        self.0.iter().map(of).collect()
    }

    /// The files that this path leads to, from this module.
    fn follow(&self, from: &str, path: &[String], found: &mut BTreeSet<String>, depth: usize) {
        let Some(path) = self.absolute(from, path).filter(|_| depth < 10) else { return };
        let is_file = |many: &usize| self.0.contains_key(&path[..*many].join("::"));
        let Some(known) = (0..=path.len()).rev().find(is_file) else { return };
        let (module, rest) = (path[..known].join("::"), &path[known..]);
        let all = rest.first().is_none_or(|name| name == "self" || name == "*");
        let mut is_re_exported = false;
        for exported in &self.0[&module].re_exports {
            if all || exported.last() == rest.first() {
                is_re_exported = true;
                self.follow(&module, exported, found, depth + 1);
            }
        }
        if all || !is_re_exported {
            found.insert(module);
        }
    }

    /// A path in this module, from the crate's root; none when it leads to another crate.
    fn absolute(&self, module: &str, path: &[String]) -> Option<Vec<String>> {
        let mut here: Vec<String> = module.split("::").filter(|it| !it.is_empty()).map(str::to_owned).collect();
        let mut rest = path;
        match rest.first()?.as_str() {
            "crate" => (here, rest) = (Vec::new(), &rest[1..]),
            "super" | "self" => {
                while let Some(first) = rest.first().filter(|it| ["super", "self"].contains(&it.as_str())) {
                    if first == "super" {
                        here.pop();
                    }
                    rest = &rest[1..];
                }
            }
            child => {
                let child = here.iter().map(String::as_str).chain([child]).collect::<Vec<_>>().join("::");
                self.0.get(&child)?;
            }
        }
        here.extend_from_slice(rest);
        Some(here)
    }
}

impl File {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).expect("a source is text");
        let lines = text.lines().take_while(|line| *line != "#[cfg(test)]");
        let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
        let mut code: String = lines.flat_map(|line| ["\n", line]).collect();
        let mut re_exports = Vec::new();
        for begin in ["\npub use ", "\npub(crate) use ", "\npub(super) use "] {
            while let Some(at) = code.find(begin) {
                let end = at + code[at..].find(';').expect("a use ends");
                tree(&code[at + begin.len()..end], &[], &mut re_exports);
                code.replace_range(at..=end, "");
            }
        }
        Self { code, re_exports }
    }

    /// It does not only re-export this.
    fn uses(&self, path: &[String]) -> bool {
        let is_of_word = |it: char| it.is_alphanumeric() || it == '_';
        self.code.split(|it| !is_of_word(it)).any(|word| Some(word) == path.last().map(String::as_str))
    }
}

/// The paths in a text that may lead into its own crate.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, begin) in code.match_indices("use ") {
        if code[..at].ends_with(['\n', ' ']) || at == 0 {
            let text = &code[at + begin.len()..];
            tree(&text[..text.find(';').unwrap_or(0)], &[], &mut found);
        }
    }
    for word in code.split(|it: char| !it.is_alphanumeric() && it != '_' && it != ':') {
        // What goes on with a brace is a `use`.
        if (word.starts_with("crate::") || word.starts_with("super::")) && !word.ends_with(':') {
            found.push(word.split("::").map(str::to_owned).collect());
        }
    }
    found.retain(|path| !path.is_empty());
    found
}

/// The paths of one `use`: `a::{b, c::d}` has `a::b` and `a::c::d`.
fn tree(text: &str, before: &[String], found: &mut Vec<Vec<String>>) {
    let (head, group) = match text.split_once('{') {
        Some((head, group)) => (head, group.rsplit_once('}').map(|it| it.0)),
        None => (text.split(" as ").next().unwrap_or_default(), None),
    };
    let parts = head.split("::").map(str::trim).filter(|it| !it.is_empty()).map(str::to_owned);
    let path: Vec<String> = before.iter().cloned().chain(parts).collect();
    let Some(group) = group else {
        found.push(path);
        return;
    };
    let (mut depth, mut begin) = (0, 0);
    for (at, it) in group.char_indices().chain([(group.len(), ',')]) {
        match it {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !group[begin..at].trim().is_empty() {
                    tree(&group[begin..at], &path, found);
                }
                begin = at + 1;
            }
            _ => {}
        }
    }
}

/// The same between the folders and files right below the crate's root.
fn floors(imports: &Imports) -> Imports {
    let floor = |module: &String| module.split("::").next().unwrap_or_default().to_owned();
    let mut floors = Imports::new();
    for (module, imported) in imports {
        let here = floor(module);
        let others: Vec<String> = imported.iter().map(floor).filter(|it| *it != here).collect();
        floors.entry(here).or_default().extend(others);
    }
    floors
}

/// A way from one back to itself, if there is one.
fn circle(imports: &Imports) -> Option<Vec<String>> {
    fn visit(at: &str, imports: &Imports, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> Option<Vec<String>> {
        if let Some(begin) = way.iter().position(|it| it == at) {
            return Some(way[begin..].iter().cloned().chain([at.to_owned()]).collect());
        }
        if done.contains(at) {
            return None;
        }
        way.push(at.into());
        let found = imports[at].iter().find_map(|next| visit(next, imports, way, done));
        way.pop();
        done.insert(at.into());
        found
    }
    let mut done = BTreeSet::new();
    imports.keys().find_map(|at| visit(at, imports, &mut Vec::new(), &mut done))
}

fn imports_of(house: &str) -> Imports {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    House::read(&crates.join(house).join("src")).imports()
}

#[test]
fn no_file_imports_one_that_imports_it() {
    for house in BY_FILES {
        assert_eq!(circle(&imports_of(house)), None, "files of crates/{house}");
    }
}

#[test]
fn no_folder_imports_one_that_imports_it() {
    for house in BY_FOLDERS {
        assert_eq!(circle(&floors(&imports_of(house))), None, "folders of crates/{house}");
    }
}

#[test]
fn imports_of_every_kind_are_seen_and_so_are_the_circles_that_they_make() {
    let dir = tempfile::tempdir().unwrap();
    let put = |path: &str, text: &str| {
        let path: PathBuf = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("lib.rs", "mod a;\nmod low;\nmod top;\n\npub use top::Top;\n");
    put("top.rs", "use std::fmt;\n\nuse crate::a::{self, One as Two};\n\npub struct Top(Two);\n");
    put("a/mod.rs", "//! Only what is in it.\nmod one;\nmod two;\n\npub(crate) use one::{One, Ones};\n");
    put("a/one.rs", "use super::two::Two;\n\npub(crate) struct One(Two, crate::low::Low);\n");
    put("a/two.rs", "// crate::top::Top\nstruct Two;\n\n#[cfg(test)]\nmod tests {\n    use crate::top::Top;\n}\n");
    put("low.rs", "pub(crate) struct Low;\n");
    let imports = House::read(dir.path()).imports();
    let of = |module: &str| imports[module].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(of("top"), ["a", "a::one"]);
    assert_eq!(of("a::one"), ["a::two", "low"]);
    for module in ["", "a", "a::two", "low"] {
        assert!(of(module).is_empty(), "{module}");
    }
    assert_eq!((circle(&imports), circle(&floors(&imports))), (None, None));

    put("low.rs", "use super::a::One;\n");
    let imports = House::read(dir.path()).imports();
    assert_eq!(circle(&imports).unwrap(), ["a::one", "low", "a::one"]);
    assert_eq!(circle(&floors(&imports)).unwrap(), ["a", "low", "a"]);

    put("low.rs", "pub(crate) fn low() {\n    crate::top::top();\n}\n");
    assert_eq!(circle(&House::read(dir.path()).imports()).unwrap(), ["a::one", "low", "top", "a::one"]);

    put("a/mod.rs", "mod one;\nmod two;\n\npub(crate) use one::One;\n\nfn of(one: &One) {}\n");
    put("low.rs", "use super::a::of;\n");
    assert_eq!(circle(&House::read(dir.path()).imports()).unwrap(), ["a", "a::one", "low", "a"]);
}
