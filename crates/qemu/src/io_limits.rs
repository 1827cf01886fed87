//! How much the host lets a guest do with its disks: bytes and operations a second, bursts, who shares a limit. Words of a
//! command line tell that of some disks; QEMU's monitor sets it of all (`block_set_io_throttle`) and tells it, which is why
//! a machine that is made again gets it there.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::inventory::name_of;
use crate::qmp::commands::{BlockSetIoThrottle, Drive, QueryBlock};
use crate::qmp::{Qmp, QmpError};

/// Those of a disk, by QEMU's names: `bps`, `iops_rd`, `bps_wr_max` and their likes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimits {
    /// Disks of one group share their limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(flatten)]
    numbers: BTreeMap<String, u64>,
}

impl IoLimits {
    /// What QEMU says of a drive; none where nothing is limited.
    pub(crate) fn of(drive: &Drive) -> Option<Self> {
        let more = &drive.inserted.as_ref()?.more;
        let is_limit = |key: &str| ["bps", "iops"].iter().any(|of| key == *of || key.starts_with(&format!("{of}_")));
        let numbers = more.iter().filter_map(|(key, value)| Some((key, value.as_u64()?)));
        let numbers: BTreeMap<String, u64> = numbers
            .filter(|(key, value)| is_limit(key) && *value != 0)
            .map(|(key, value)| (key.clone(), value))
            .collect();
        let group = more.get("group").and_then(|it| it.as_str()).map(str::to_owned);
        (!numbers.is_empty()).then_some(Self { group, numbers })
    }

    /// The same, with no more bytes written a second than this.
    #[must_use]
    pub fn with_writes_at_most(mut self, bytes: u64) -> Self {
        // QEMU takes a limit for both ways or one for each, and what is allowed for moments counts for more.
        let key = if self.numbers.contains_key("bps") { "bps" } else { "bps_wr" };
        self.numbers.retain(|it, _| !it.starts_with(&format!("{key}_max")));
        let limit = self.numbers.get(key).copied().unwrap_or(bytes).min(bytes).max(1);
        self.numbers.insert(key.into(), limit);
        self
    }

    /// Those of all disks that have some, by name.
    pub async fn of_all(qmp: &Qmp) -> Result<BTreeMap<String, Self>, QmpError> {
        let drives = qmp.execute(QueryBlock {}).await?;
        Ok(drives.iter().filter_map(|drive| Some((name_of(drive)?, Self::of(drive)?))).collect())
    }

    /// Has these be the limits of all disks, by the names that [`Inventory`](crate::Inventory) has for them.
    pub async fn set(qmp: &Qmp, limits: &BTreeMap<String, Self>) -> Result<(), QmpError> {
        for drive in qmp.execute(QueryBlock {}).await? {
            let wanted = name_of(&drive).and_then(|name| limits.get(&name));
            if Self::of(&drive).as_ref() == wanted {
                continue;
            }
            let none = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"].map(|key| (key.to_owned(), 0));
            let named = !drive.device.is_empty();
            qmp.execute(BlockSetIoThrottle {
                id: drive.qdev.filter(|_| !named),
                device: named.then_some(drive.device),
                group: wanted.and_then(|it| it.group.clone()),
                numbers: none.into_iter().chain(wanted.iter().flat_map(|it| it.numbers.clone())).collect(),
            })
            .await?;
        }
        Ok(())
    }
}

impl fmt::Display for IoLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.numbers.iter().map(|(key, value)| format!("{key} {value}")).collect();
        write!(f, "limited to {}", numbers.join(", "))?;
        self.group.iter().try_for_each(|group| write!(f, " in the group {group}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_are_what_is_not_zero_among_what_qemu_says_of_a_drive() {
        let drive = |more: serde_json::Value| {
            let mut inserted =
                json!({ "image": { "filename": "a", "format": "raw" }, "ro": false, "bps": 0, "iops_rd": 0 });
            inserted.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            serde_json::from_value::<Drive>(json!({ "device": "d", "inserted": inserted })).unwrap()
        };
        assert_eq!(IoLimits::of(&drive(json!({}))), None);
        let some =
            json!({ "iops": 200, "bps_wr_max": 5, "bps_wr_max_length": 2, "group": "g", "detect_zeroes": "off" });
        let limits = IoLimits::of(&drive(some)).unwrap();
        assert_eq!(limits.to_string(), "limited to bps_wr_max 5, bps_wr_max_length 2, iops 200 in the group g");
        let slower = limits.clone().with_writes_at_most(3);
        assert_eq!(slower.to_string(), "limited to bps_wr 3, iops 200 in the group g");
        let both = IoLimits::of(&drive(json!({"bps": 2, "bps_max": 9}))).unwrap().with_writes_at_most(3);
        assert_eq!(both.to_string(), "limited to bps 2");
        let text = serde_json::to_string(&limits).unwrap();
        assert_eq!(serde_json::from_str::<IoLimits>(&text).unwrap(), limits);
    }
}
