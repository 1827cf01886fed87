//! An option's value as properties: `key=value,key=value` with QEMU's `,,` for a comma, or JSON.
//!
//! Both become the same flat list, JSON's nested objects with dotted keys and its booleans as `on` and `off`, which is
//! how QEMU itself takes them.

use serde_json::Value;

/// See the module's text. A key may occur twice; QEMU takes the last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Properties(Vec<(String, String)>);

impl Properties {
    /// Parses a value; `implied` is the key of a first part that has none (`q35` in `-machine q35,smm=off`).
    pub(crate) fn parse(text: &str, implied: Option<&str>) -> Self {
        match text.starts_with('{').then(|| serde_json::from_str(text)) {
            Some(Ok(json)) => Self::from_json(&json),
            _ => Self::from_keyval(text, implied),
        }
    }

    fn from_keyval(text: &str, implied: Option<&str>) -> Self {
        let mut list = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (key, after) = match rest.find(['=', ',']) {
                Some(at) if rest[at..].starts_with('=') => (Some(&rest[..at]), &rest[at + 1..]),
                _ => (None, rest),
            };
            let (value, after) = value_up_to_comma(after);
            match (key, implied) {
                (Some(key), _) => list.push((key.into(), value)),
                (None, Some(implied)) if list.is_empty() => list.push((implied.into(), value)),
                // A switch: "readonly" is readonly=on and "nowait" is wait=off.
                (None, _) => match value.strip_prefix("no").filter(|key| !key.is_empty()) {
                    Some(key) => list.push((key.into(), "off".into())),
                    None => list.push((value, "on".into())),
                },
            }
            rest = after;
        }
        Self(list)
    }

    pub(crate) fn from_json(json: &Value) -> Self {
        let mut list = Vec::new();
        flatten(json, String::new(), &mut list);
        Self(list)
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// The value of a key if it is not empty.
    pub(crate) fn get_some(&self, key: &str) -> Option<&str> {
        self.get(key).filter(|value| !value.is_empty())
    }

    /// The key is given and says yes, in any of QEMU's words for it.
    pub(crate) fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key), Some("on" | "yes" | "true" | "y"))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Puts a property last.
    pub(crate) fn push(&mut self, key: &str, value: &str) {
        self.0.push((key.into(), value.into()));
    }

    /// Keeps what this says yes to, by key.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|(key, _)| keep(key));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.0.retain(|(known, _)| known != key);
    }

    /// Puts a property first, in place of all of that key.
    pub(crate) fn put_first(&mut self, key: &str, value: &str) {
        self.remove(key);
        self.0.insert(0, (key.into(), value.into()));
    }
}

/// As QEMU takes it, with every key named.
impl std::fmt::Display for Properties {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (key, value)) in self.0.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            write!(f, "{comma}{key}={}", escape_commas(value))?;
        }
        Ok(())
    }
}

/// A text as it must stand in `key=value,...`.
pub(crate) fn escape_commas(text: &str) -> String {
    text.replace(',', ",,")
}

/// Splits at the first comma that is not doubled; doubled ones before it become one.
fn value_up_to_comma(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(',') {
        value.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix(',') {
            Some(more) => {
                value.push(',');
                rest = more;
            }
            None => return (value, rest),
        }
    }
    value.push_str(rest);
    (value, "")
}

fn flatten(json: &Value, key: String, list: &mut Vec<(String, String)>) {
    let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match json {
        Value::Object(members) => members.iter().for_each(|(name, value)| flatten(value, below(name), list)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(number, value)| flatten(value, below(&number.to_string()), list));
        }
        Value::String(text) => list.push((key, text.clone())),
        Value::Bool(yes) => list.push((key, if *yes { "on" } else { "off" }.into())),
        Value::Number(number) => list.push((key, number.to_string())),
        Value::Null => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
        Properties::parse(text, implied).0
    }

    fn of(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn a_doubled_comma_is_a_comma() {
        assert_eq!(pairs("file=a,,b.img,if=virtio", None), of(&[("file", "a,b.img"), ("if", "virtio")]));
        assert_eq!(pairs("file=a,,,if=x", None), of(&[("file", "a,"), ("if", "x")]));
        assert_eq!(pairs("file=,,,,", None), of(&[("file", ",,")]));
        assert_eq!(pairs("file=a,", None), of(&[("file", "a")]));
        assert_eq!(pairs("", None), of(&[]));
    }

    #[test]
    fn only_the_first_part_may_lack_its_key() {
        assert_eq!(pairs("q35,smm=off", Some("type")), of(&[("type", "q35"), ("smm", "off")]));
        assert_eq!(pairs("smm=off,q35", Some("type")), of(&[("smm", "off"), ("q35", "on")]));
        assert_eq!(
            pairs("socket,server,nowait", Some("backend")),
            of(&[("backend", "socket"), ("server", "on"), ("wait", "off")])
        );
    }

    #[test]
    fn values_keep_their_equal_signs() {
        assert_eq!(pairs("file=a=b,x=1", None), of(&[("file", "a=b"), ("x", "1")]));
    }

    #[test]
    fn json_becomes_dotted_keys() {
        let json = r#"{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"a,b"},"n":[1,{"x":"y"}]}"#;
        let parsed = Properties::parse(json, Some("driver"));
        assert_eq!(parsed.get("file.filename"), Some("a,b"));
        assert!(parsed.is_on("read-only"));
        assert_eq!((parsed.get("n.0"), parsed.get("n.1.x")), (Some("1"), Some("y")));
    }

    #[test]
    fn properties_are_written_as_qemu_reads_them() {
        let mut properties = Properties::parse("q35,path=a,,b,type=pc", Some("type"));
        assert_eq!(properties.get("type"), Some("pc"));
        properties.put_first("type", "pc-q35-7.2");
        assert_eq!(properties.to_string(), "type=pc-q35-7.2,path=a,,b");
        assert_eq!(Properties::parse(&properties.to_string(), None), properties);
    }
}
