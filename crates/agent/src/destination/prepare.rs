//! A QEMU that waits for a guest.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use vmferry_api::{Security, in_one_line};
use vmferry_qemu::migration::set_capabilities;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{Endpoint, Incoming as IncomingLaunch, protect_streams, tls_priority};

use super::abandon::give_up;
use super::arrival;
use super::check::suitable;
use super::incoming::{Awaited, Incoming};
use super::lease::watch_lease;
use crate::engine::means::check_offered;
use crate::engine::qemu::tcp_uri;
use crate::engine::{Protection, Setup};
use crate::error::AgentError;
use crate::host::{Vm, check_name};
use crate::journal::{InStep, Source};
use crate::measuring::boot_files;
use crate::peers::trust::Caller;
use crate::peers::{Offer, Prepared, relay};

/// Starts a QEMU that waits for the VM.
pub(crate) async fn prepare(here: &Arc<Incoming>, mut offer: Offer, caller: Caller) -> Result<Prepared, AgentError> {
    let name = offer.spec.name.clone();
    check_name(&name)?;
    acceptable(here, &offer.protection, &caller)?;
    check_offered(&offer.setup, offer.spec.measuring)?;
    let _preparing = here.begin_preparing(offer.id);
    let _name = here.host.reserve_name(&name)?;
    boot_files::settle(&here.host, &mut offer.spec);
    let (command, accel, info) = suitable(here, &offer).await?;
    if offer.spec.cwd.metadata().is_err() {
        // Nothing on the command line is relative to it, or it would have been missed above.
        offer.spec.cwd = "/".into();
    }
    let source = Source { name: offer.from.clone(), key: caller.key };
    if !here.host.store.begin_in(offer.id, &name, &source, offer.running)? {
        return Err(AgentError::Conflict { message: "this migration is known here already".into(), hint: None });
    }
    let incoming = IncomingLaunch { machine_type: offer.machine.clone() };
    let launched = here.host.launch(&offer.spec, &command, accel, Some((offer.id, incoming))).await;
    let (vm, _) = match launched {
        Ok(started) => started,
        Err(error) => {
            here.host.store.abandon_in(offer.id, &in_one_line(&error))?;
            return Err(error);
        }
    };
    let incoming = Awaited::new(offer.id, offer.from.clone(), Arc::clone(&vm));
    here.add(Arc::clone(&incoming));
    tokio::spawn(watch_lease(Arc::clone(here), incoming));
    let known = info.features.capabilities();
    let received = match offer.external {
        Some(session) => {
            let plain = offer.protection == Protection::Plain;
            let expected = arrival::Expected { session, source: caller.key, plain };
            let begun = arrival::begin(&here.host, &here.arrivals, &vm, offer.id, known, expected).await;
            begun.map(|post_copy_obstacle| Prepared {
                port: None,
                setup: offer.setup,
                post_copy_obstacle,
                notes: Vec::new(),
            })
        }
        None => receive(&vm, known, offer.setup, &offer.protection, caller.local).await,
    };
    if let Some((InStep::Abandoned, why)) = here.host.store.step_in(offer.id)? {
        // While its QEMU started.
        let why = why.unwrap_or_default();
        give_up(here, offer.id, &why).await?;
        return Err(AgentError::Conflict { message: format!("this migration was abandoned: {why}"), hint: None });
    }
    match received {
        Ok(prepared) => {
            tracing::info!(vm = name, migration = %offer.id, from = offer.from, port = prepared.port, "waits for a guest");
            Ok(prepared)
        }
        Err(error) => {
            give_up(here, offer.id, &format!("its QEMU could not be prepared: {}", in_one_line(&error))).await?;
            Err(error)
        }
    }
}

/// A source that wants less protection than this host's configuration does not get its way.
fn acceptable(here: &Incoming, protection: &Protection, caller: &Caller) -> Result<(), AgentError> {
    match protection {
        Protection::Plain if here.host.config.security_of(caller.remote) != Security::Plain => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "refused a guest that comes unencrypted");
            Err(AgentError::PlainRefused { host: here.host.config.name.clone() })
        }
        Protection::Tls { key, .. } if !key.is_valid() => {
            Err(AgentError::BadRequest { message: "the key of the migration's streams is no key".into(), hint: None })
        }
        _ => Ok(()),
    }
}

/// Sets QEMU up to receive. Post-copy may be refused by the host (userfaultfd); the migration can do without it.
async fn receive(
    vm: &Vm,
    known: &BTreeSet<String>,
    mut setup: Setup,
    protection: &Protection,
    address: IpAddr,
) -> Result<Prepared, AgentError> {
    let mut notes = Vec::new();
    if let Protection::Tls { key, cipher } = protection {
        protect_streams(&vm.qmp, &vm.dir.join("tls"), key, Endpoint::Server, tls_priority(*cipher)).await?;
    }
    if let Err(error) = set_capabilities(&vm.qmp, known, &as_strs(&setup.capabilities)).await {
        if !setup.has("postcopy-ram") {
            return Err(error.into());
        }
        notes.push(format!("Post-copy is not possible: the destination's QEMU says: {error}."));
        setup.capabilities.retain(|name| !name.starts_with("postcopy"));
        set_capabilities(&vm.qmp, known, &as_strs(&setup.capabilities)).await?;
    }
    if setup.channels > 0 {
        let channels = commands::MigrationParameters {
            multifd_channels: Some(setup.channels),
            ..commands::MigrationParameters::default()
        };
        vm.qmp.execute(channels).await?;
    }
    setup.set_parameters(&vm.qmp).await?;
    let port = match protection {
        Protection::Relay => {
            vm.qmp.execute(commands::MigrateIncoming { uri: relay::begin_receiving(vm)? }).await?;
            None
        }
        _ => Some(listen(vm, address).await?),
    };
    Ok(Prepared { port, setup, post_copy_obstacle: None, notes })
}

fn as_strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

async fn listen(vm: &Vm, address: IpAddr) -> Result<u16, AgentError> {
    vm.qmp.execute(commands::MigrateIncoming { uri: tcp_uri(address, 0) }).await?;
    // QEMU chose the port.
    let info = vm.qmp.execute(commands::QueryMigrate {}).await?;
    let port = info.socket_address.iter().flatten().find_map(vmferry_qemu::qmp::commands::SocketAddress::tcp_port);
    port.ok_or_else(|| AgentError::Conflict {
        message: "the destination's QEMU does not tell where it listens".into(),
        hint: None,
    })
}
