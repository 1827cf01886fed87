//! QEMU's means for one migration.
//!
//! Which of QEMU's means are used is decided before the start, because QEMU fixes them then:
//! - post-copy (and its preempt channel) whenever it is allowed and both sides have it, since it is what makes every
//!   migration end;
//! - multifd otherwise. Between 8.0 and 10.0 QEMU refuses to do both together; 7.2 accepts, mixes its connections up and
//!   waits for ever. 10.1 and newer are made for it, but where QEMU encrypts, which is where it would pay, 11.1.3 sent
//!   nothing in most tries (docs/FIGURES.md). So trying tells nothing, and they are never combined;
//! - auto-converge, held at one percent until the policy asks for more.

use vmferry_qemu::migration::{OURS, PAUSE_BEFORE_SWITCHOVER, set_capabilities};
use vmferry_qemu::{Features, Qmp, QmpError};

use super::Setup;
use crate::error::AgentError;

/// What whoever decides makes use of.
#[derive(Clone, Copy)]
pub(crate) struct Uses {
    pub(crate) post_copy: bool,
    /// The guest can be slowed down.
    pub(crate) throttle: bool,
    /// Several connections, where it is not post-copy's.
    pub(crate) multifd: bool,
}

/// Chooses QEMU's means for one migration; `there` tells which capabilities the destination's QEMU has. Leaves the
/// source's QEMU set to them.
pub(crate) async fn choose(
    qmp: &Qmp,
    here: &Features,
    there: impl Fn(&str) -> bool,
    uses: Uses,
    has_disks: bool,
) -> Result<Setup, QmpError> {
    let wanted = means(here, there, uses, has_disks);
    set_capabilities(qmp, here.capabilities(), &wanted).await?;
    Ok(setup(&wanted))
}

/// What both QEMUs have and that goes together. A guest that takes disks along is paused before its devices' state goes, so
/// that these can go first.
pub(crate) fn means(here: &Features, there: impl Fn(&str) -> bool, uses: Uses, has_disks: bool) -> Vec<&'static str> {
    let both = |name: &&str| here.has_capability(name) && there(name);
    let copy: &[&str] = match uses.post_copy && both(&"postcopy-ram") {
        true => &["postcopy-ram", "postcopy-preempt"],
        false if uses.multifd => &["multifd"],
        false => &[],
    };
    let throttle: &[&str] = if uses.throttle { &["auto-converge"] } else { &[] };
    let pause: &[&str] = if has_disks { &[PAUSE_BEFORE_SWITCHOVER] } else { &[] };
    ["events", "return-path"].iter().chain(throttle).chain(copy).chain(pause).copied().filter(both).collect()
}

fn setup(wanted: &[&str]) -> Setup {
    let channels = match wanted.contains(&"multifd") {
        true => std::thread::available_parallelism().map_or(2, |cores| (cores.get() / 2).clamp(2, 8) as u8),
        false => 0,
    };
    Setup { capabilities: wanted.iter().map(ToString::to_string).collect(), channels, ..Setup::default() }
}

/// Refuses what a source may not have the destination's QEMU set to: only a measuring guest's is set to more than ours,
/// and nobody's to other protection.
pub(crate) fn check_offered(setup: &Setup, measuring: bool) -> Result<(), AgentError> {
    let refuse = |what: String| {
        Err(AgentError::BadRequest { message: format!("{what} is not for a source to set"), hint: None })
    };
    let protection = setup.parameters.keys().find(|name| name.starts_with("tls"));
    if let Some(name) = protection.or(setup.parameters.keys().next().filter(|_| !measuring)) {
        return refuse(format!("QEMU's migration parameter {name}"));
    }
    match setup.capabilities.iter().find(|name| !OURS.contains(&name.as_str())) {
        Some(name) if !measuring => refuse(format!("QEMU's migration capability {name}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_sets_nothing_but_what_is_ours_unless_it_measures_and_never_the_protection() {
        let with = |capability: &str, parameter: Option<&str>| Setup {
            capabilities: vec!["multifd".into(), capability.into()],
            channels: 2,
            parameters: parameter.into_iter().map(|name| (name.to_owned(), "".into())).collect(),
        };
        assert!(check_offered(&with("postcopy-ram", None), false).is_ok());
        assert!(check_offered(&with("mapped-ram", None), false).is_err());
        assert!(check_offered(&with("events", Some("xbzrle-cache-size")), false).is_err());
        assert!(check_offered(&with("xbzrle", Some("xbzrle-cache-size")), true).is_ok());
        assert!(check_offered(&with("events", Some("tls-creds")), true).is_err());
    }

    #[test]
    fn channels_are_only_for_multifd() {
        assert_eq!(setup(&["postcopy-ram"]).channels, 0);
        assert!((2..=8).contains(&setup(&["multifd"]).channels));
    }
}
