//! Words for what was plugged in, and for the back ends that it uses.

use serde_json::Value;

use super::Words;
use super::parts::{Device, Given};
use crate::command_line::{CommandOption, Properties};

/// Objects whose properties tell all of them.
const TOLD_OBJECTS: [&str; 6] =
    ["iothread", "memory-backend-ram", "memory-backend-memfd", "memory-backend-file", "rng-random", "rng-builtin"];

impl Words<'_> {
    /// Gives words to a device that no words ask for.
    pub(super) fn plug(&mut self, device: &Device, given: Option<&Given>) {
        let what = match &device.id {
            Some(id) => format!("{} {id}", device.driver),
            None => device.driver.clone(),
        };
        match self.words_for(device, given) {
            Ok(words) => {
                self.add("device", &words);
                self.carried.push(format!("{what} was plugged in"));
            }
            Err(why) => self.obstacles.push(format!("{what} was plugged in, and {why}")),
        }
    }

    fn words_for(&mut self, device: &Device, given: Option<&Given>) -> Result<Properties, String> {
        let mut words = Properties::default();
        words.push("driver", &device.driver);
        if let Some(id) = &device.id {
            words.push("id", id);
        }
        let parts = self.parts;
        if let Some(cpu) = parts.cpu(device) {
            for (key, value) in cpu.props.as_object().into_iter().flatten() {
                words.push(key, &plain(value));
            }
            return Ok(words);
        }
        if let Some(memory) = parts.memory(device) {
            let backend = plain(&memory.data["memdev"]);
            let backend = backend.trim_start_matches("/objects/");
            self.object(backend)?;
            words.push("memdev", backend);
            for key in ["addr", "slot", "node"].into_iter().filter(|key| !memory.data[*key].is_null()) {
                words.push(key, &plain(&memory.data[key]));
            }
            return Ok(words);
        }
        let given = given.ok_or("QEMU does not tell how")?;
        if let Some(property) = given.unspeakable.first() {
            return Err(format!("its {property} cannot be said on a command line"));
        }
        for (key, value) in &given.properties {
            let mut value = value.clone();
            match key.as_str() {
                "drive" => {
                    value = self.drive(&value, device.id.as_deref())?;
                    let disk = device.id.as_deref().unwrap_or(&value);
                    self.untold.push(format!("aio and discard of {disk}, which become what they are by default"));
                }
                "netdev" => self.network(&value)?,
                "chardev" => self.chardev(&value)?,
                _ if parts.objects.contains_key(&value) => self.object(&value)?,
                _ => {}
            }
            words.push(key, &value);
        }
        Ok(words)
    }

    /// Has an object be there.
    fn object(&mut self, id: &str) -> Result<(), String> {
        if self.has("object", "id", id) {
            return Ok(());
        }
        let kind = self.parts.objects.get(id).ok_or_else(|| format!("{id}, which it uses, is not told"))?;
        let given = self.objects.get(id).ok_or_else(|| format!("{id}, which it uses, is not told"))?;
        if !TOLD_OBJECTS.contains(&kind.as_str()) || !given.unspeakable.is_empty() {
            return Err(format!("not all of the {kind} {id}, which it uses, can be told from outside"));
        }
        let mut words = Properties::default();
        words.push("qom-type", kind);
        words.push("id", id);
        given.properties.iter().for_each(|(key, value)| words.push(key, value));
        self.add("object", &words);
        Ok(())
    }

    /// Has a network back end be there.
    pub(super) fn network(&mut self, id: &str) -> Result<(), String> {
        if ["netdev", "nic", "net"].iter().any(|name| self.has(name, "id", id)) {
            return Ok(());
        }
        let network = self.parts.networks.get(id).ok_or_else(|| format!("its network {id} is not told"))?;
        let told = Properties::parse(&network.about, None);
        let kind = network.kind.as_str();
        let mut words = Properties::default();
        words.push("type", kind);
        words.push("id", id);
        let cannot = |what: &str| Err(format!("{what} of its network {id} cannot be told from outside"));
        match kind {
            "user" => {
                if told.get("net").is_some_and(|net| net != "10.0.2.0") {
                    return cannot("the addresses");
                }
                if told.is_on("restrict") {
                    words.push("restrict", "on");
                }
                for forward in self.parts.forwards.get(id).into_iter().flatten() {
                    words.push("hostfwd", forward);
                }
            }
            "tap" => match told.get("ifname") {
                Some(name) => {
                    words.push("ifname", name);
                    for key in ["script", "downscript"] {
                        words.push(key, told.get(key).unwrap_or("no"));
                    }
                }
                None => return cannot("the device"),
            },
            other => return cannot(&format!("what {other} says")),
        }
        self.add("netdev", &words);
        Ok(())
    }

    /// Has a character device be there.
    fn chardev(&mut self, id: &str) -> Result<(), String> {
        if self.has("chardev", "id", id) {
            return Ok(());
        }
        let about = self.parts.chardevs.get(id).ok_or_else(|| format!("its character device {id} is not told"))?;
        let about = about.strip_prefix("disconnected:").unwrap_or(about);
        let mut words = Properties::default();
        if about == "null" {
            words.push("backend", "null");
            words.push("id", id);
        } else if let Some(path) = about.strip_prefix("unix:").and_then(|it| it.strip_suffix(",server=on")) {
            words.push("backend", "socket");
            words.push("id", id);
            words.push("path", path);
            words.push("server", "on");
            words.push("wait", "off");
        } else {
            return Err(format!("its character device {id} ({about}) cannot be made again from what QEMU tells"));
        }
        self.more.push(CommandOption::new("chardev", &without_key(&words, "backend")));
        Ok(())
    }
}

/// As QEMU takes an option whose first part has no key in every version.
fn without_key(words: &Properties, key: &str) -> String {
    let text = words.to_string();
    text.strip_prefix(&format!("{key}=")).unwrap_or(&text).to_owned()
}

/// A value as a word.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
