//! What a running QEMU can do, from its own schema. Versions tell little: distributions leave parts out and bring
//! others back.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::commands::{QueryMigrateCapabilities, QueryQmpSchema, SchemaEntry};
use super::{Qmp, QmpError};

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Every command with its arguments.
    commands: BTreeMap<String, BTreeSet<String>>,
    capabilities: BTreeSet<String>,
}

impl Features {
    /// Asks a QEMU.
    pub async fn probe(qmp: &Qmp) -> Result<Self, QmpError> {
        let schema = qmp.execute(QueryQmpSchema {}).await?;
        let capabilities = qmp.execute(QueryMigrateCapabilities {}).await?;
        Ok(Self {
            commands: commands_of(&schema),
            capabilities: capabilities.into_iter().map(|known| known.capability).collect(),
        })
    }

    /// It has this QMP command.
    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// It knows this migration capability; the host may still refuse it.
    pub fn has_capability(&self, capability: &str) -> bool {
        self.capabilities.contains(capability)
    }

    /// It knows this migration parameter.
    pub fn has_parameter(&self, parameter: &str) -> bool {
        self.has_argument("migrate-set-parameters", parameter)
    }

    /// The command takes this argument.
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        self.commands.get(command).is_some_and(|arguments| arguments.contains(argument))
    }

    /// All migration capabilities that it knows.
    pub fn capabilities(&self) -> &BTreeSet<String> {
        &self.capabilities
    }
}

fn commands_of(schema: &[SchemaEntry]) -> BTreeMap<String, BTreeSet<String>> {
    let by_name: BTreeMap<&str, &SchemaEntry> = schema.iter().map(|entry| (entry.name.as_str(), entry)).collect();
    let arguments = |command: &SchemaEntry| {
        let mut names = BTreeSet::new();
        let Some(all) = command.arg_type.as_deref().and_then(|name| by_name.get(name)) else { return names };
        // Some arguments exist only for some values of another one; those are in types of their own.
        let variants = all.variants.iter().filter_map(|variant| by_name.get(variant.kind.as_str()));
        for object in std::iter::once(all).chain(variants) {
            names.extend(object.members.iter().filter_map(|member| member.name.clone()));
        }
        names
    };
    let commands = schema.iter().filter(|entry| entry.meta_type == "command");
    commands.map(|command| (command.name.clone(), arguments(command))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_those_of_the_command_and_of_its_variants() {
        let schema: Vec<SchemaEntry> = serde_json::from_value(serde_json::json!([
            { "name": "migrate", "meta-type": "command", "arg-type": "7", "ret-type": "0" },
            { "name": "7", "meta-type": "object", "members": [{ "name": "uri", "type": "str" }],
              "tag": "uri", "variants": [{ "case": "x", "type": "8" }] },
            { "name": "8", "meta-type": "object", "members": [{ "name": "extra", "type": "str" }] },
            { "name": "stop", "meta-type": "command", "arg-type": "none" },
            { "name": "9", "meta-type": "alternate", "members": [{ "type": "str" }] },
        ]))
        .unwrap();
        let features = Features { commands: commands_of(&schema), capabilities: BTreeSet::new() };
        assert!(features.has_command("stop") && features.has_command("migrate"));
        assert!(features.has_argument("migrate", "uri") && features.has_argument("migrate", "extra"));
        assert!(!features.has_argument("migrate", "channels") && !features.has_argument("stop", "uri"));
        assert!(!features.has_command("7"), "types are no commands");
    }
}
