//! A migration that is measured: its script says what is done, and nothing is decided.

use vmferry_api::{Means, Script};
use vmferry_policy::{Action, AfterRounds, LeastHarm, Policy};
use vmferry_qemu::Features;

use crate::engine::Setup;
use crate::error::AgentError;
use crate::host::Vm;

/// What a measurement has QEMU set to.
pub(crate) fn setup_for(
    vm: &Vm,
    features: &Features,
    there: impl Fn(&str) -> bool,
    script: &Script,
) -> Result<Setup, AgentError> {
    let refuse =
        |reason: String, hint: Option<String>| AgentError::NotMigratable { name: vm.name().into(), reason, hint };
    // What they leave set in QEMU is nothing for a guest that is to live on.
    if !vm.spec.measuring {
        return Err(refuse(
            "only a measuring guest is moved as a script says".into(),
            Some("`vmferry bench run`".into()),
        ));
    }
    scripted(features, there, &script.means).map_err(|lacks| refuse(lacks, None))
}

/// The first of a measurement's means that both QEMUs have; or what the last of them lacks.
fn scripted(here: &Features, there: impl Fn(&str) -> bool, means: &[Means]) -> Result<Setup, String> {
    let mut lacks = "the measurement names no means".to_owned();
    for wanted in means {
        let Means { capabilities, parameters } = wanted;
        let missing = capabilities.iter().find(|it| !here.has_capability(it) || !there(it));
        if let Some(missing) = missing {
            lacks = format!("one of the QEMUs has no migration capability {missing}");
        } else if let Some(missing) = parameters.keys().find(|it| !here.has_parameter(it)) {
            lacks = format!("the source's QEMU has no migration parameter {missing}");
        } else {
            let always = ["events", "return-path"].map(str::to_owned);
            let always = always.into_iter().filter(|it| here.has_capability(it) && there(it));
            let capabilities = always.chain(capabilities.clone()).collect();
            return Ok(Setup { capabilities, channels: 0, parameters: parameters.clone() });
        }
    }
    Err(lacks)
}

/// Does what a script says; decides, where there is none.
pub(crate) fn policy_of(script: Option<&Script>) -> Box<dyn Policy> {
    match script {
        Some(Script { post_copy_after: Some(rounds), .. }) => Box::new(AfterRounds::new(*rounds, Action::PostCopy)),
        Some(Script { pause_after: Some(rounds), .. }) => Box::new(AfterRounds::new(*rounds, Action::Pause)),
        Some(_) => Box::new(AfterRounds::never()),
        None => Box::<LeastHarm>::default(),
    }
}
