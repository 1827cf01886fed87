//! Who decides about a migration: vmferry's own policy, or what another manager would do, asked for by its name.
//!
//! Those watch QEMU's migration and pull its levers. What one of them needs and cannot have here is refused, before
//! anything is touched.

use vmferry_api::{EngineName, MigrateRequest, Script};
use vmferry_policy::Policy;
use vmferry_policy::baselines::{ALL, Baseline, Spoken, by_name};

use crate::engine::means::Uses;
use crate::error::AgentError;
use crate::measuring::scripts::policy_of;

/// vmferry's own.
pub(super) const OURS: &str = "vmferry";

/// The baseline that is to decide, if one is. `usual` is this host's engine.
pub(super) fn baseline_of(
    request: &MigrateRequest,
    usual: EngineName,
) -> Result<Option<&'static Baseline>, AgentError> {
    let Some(name) = request.policy.as_deref().filter(|name| *name != OURS) else { return Ok(None) };
    let bad = |message: String, hint: Option<String>| Err(AgentError::BadRequest { message, hint });
    let Some(baseline) = by_name(name) else {
        let known: Vec<&str> = [OURS].into_iter().chain(ALL.iter().map(|it| it.name)).collect();
        return bad(format!("there is no policy {name:?}: there are {}", known.join(", ")), None);
    };
    if request.engine.unwrap_or(usual) != EngineName::Qemu {
        let message = format!("{name} steers QEMU's own migration, and here the agents move the RAM");
        return bad(message, Some(format!("add --engine qemu; with the agents only {OURS} decides")));
    }
    if request.script.is_some() {
        return bad(format!("a measurement says what is done, so that {name} has nothing to decide"), None);
    }
    if request.max_time_ms.is_some() {
        let message = format!("a maximum time contradicts the policy {name}, which has an end of its own, or none");
        return Err(AgentError::BadLimit { message });
    }
    Ok(Some(baseline))
}

/// What it makes use of, where post-copy is allowed or not.
pub(super) fn uses(baseline: Option<&Baseline>, post_copy: bool) -> Uses {
    match baseline {
        Some(it) => Uses { post_copy: it.post_copy && post_copy, throttle: it.throttle, multifd: false },
        None => Uses { post_copy, throttle: true, multifd: true },
    }
}

/// What it needs and does not get, in words; these are the means there are.
pub(super) fn lacks(baseline: &Baseline, post_copy: bool, means: &[String]) -> Option<String> {
    let needs = [("postcopy-ram", baseline.post_copy && post_copy), ("auto-converge", baseline.throttle)];
    let missing = needs.iter().find(|(name, needed)| *needed && !means.iter().any(|it| it == name));
    missing.map(|(name, _)| format!("the policy {} needs {name}, which one of the QEMUs lacks", baseline.name))
}

/// One for one migration.
pub(super) fn policy(baseline: Option<&Baseline>, script: Option<&Script>) -> Box<dyn Policy> {
    match baseline {
        Some(baseline) => Box::new(Spoken::new(baseline)),
        None => policy_of(script),
    }
}

/// The most that is sent, in bytes a second: what its user says, or holds for this network, and what the policy's manager
/// would let QEMU send.
pub(super) fn cap(baseline: Option<&Baseline>, allowed: Option<u64>) -> Option<u64> {
    let theirs = baseline.and_then(|it| it.bandwidth).map(|it| it.0);
    [allowed, theirs].into_iter().flatten().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(policy: &str, engine: Option<EngineName>) -> MigrateRequest {
        let asked = serde_json::json!({
            "to": "beta", "downtime_ms": 300, "max_time_ms": null, "bandwidth": null, "post_copy": true,
            "policy": policy, "engine": engine
        });
        serde_json::from_value(asked).unwrap()
    }

    #[test]
    fn a_baseline_decides_only_with_qemu_and_is_told_so() {
        let qemu = Some(EngineName::Qemu);
        assert!(baseline_of(&request(OURS, None), EngineName::External).unwrap().is_none());
        for all in ALL {
            let found = baseline_of(&request(all.name, qemu), EngineName::External).unwrap();
            assert_eq!(found.map(|it| it.name), Some(all.name));
        }
        let refused = |request: &MigrateRequest| baseline_of(request, EngineName::External).err().unwrap().to_string();
        assert!(refused(&request("nova", None)).contains("the agents move the RAM"));
        assert!(refused(&request("nobody", qemu)).contains("there are vmferry, qemu, libvirt,"));
        let timed = MigrateRequest { max_time_ms: Some(5000), ..request("proxmox", qemu) };
        assert!(refused(&timed).contains("a maximum time contradicts the policy proxmox"));
    }

    #[test]
    fn what_a_baseline_needs_and_the_qemus_lack_is_named() {
        let means = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let forces = by_name("nova-force").unwrap();
        assert_eq!(lacks(forces, true, &means(&["auto-converge", "postcopy-ram"])), None);
        assert_eq!(lacks(forces, false, &means(&["auto-converge"])), None, "its user forbids post-copy");
        assert!(lacks(forces, true, &means(&["auto-converge"])).unwrap().contains("nova-force needs postcopy-ram"));
        assert_eq!(lacks(by_name("qemu").unwrap(), true, &[]), None);
        assert_eq!(cap(by_name("qemu"), Some(1 << 40)), Some(128 << 20));
        assert_eq!(cap(None, None), None);
    }
}
