//! A QEMU that waits for a guest.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use vmferry_api::{Security, in_one_line};
use vmferry_custody::InStep;
use vmferry_custody::destination::{Event, Qemu};
use vmferry_qemu::command_line::SPICE_PORTS;
use vmferry_qemu::migration::set_capabilities;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{CommandLine, Endpoint, Incoming as IncomingLaunch, protect_streams, tls_priority};

use super::arrival::{self, Expected};
use super::awaited::Awaited;
use super::check::{Suitable, suitable};
use super::disks;
use super::incoming::Incoming;
use super::suitability::no_memory;
use crate::engine::means::check_offered;
use crate::engine::qemu::tcp_uri;
use crate::engine::{Protection, Setup};
use crate::error::AgentError;
use crate::host::{Vm, check_name, describe};
use crate::journal::Source;
use crate::measuring::boot_files;
use crate::peers::trust::Caller;
use crate::peers::{InWord, Offer, Prepared, relay};

/// Starts a QEMU that waits for the VM.
pub(crate) async fn prepare(here: &Arc<Incoming>, mut offer: Offer, caller: Caller) -> Result<Prepared, AgentError> {
    let name = offer.spec.name.clone();
    check_name(&name)?;
    acceptable(here, &offer.protection, &caller)?;
    check_offered(&offer.setup, offer.spec.measuring)?;
    let _name = here.host.reserve_name(&name)?;
    boot_files::settle(&here.host, &mut offer.spec);
    let Suitable { command, accel, info, need, unproven, own_disks, .. } = suitable(here, &offer).await?;
    if let Some(file) = unproven.first() {
        let message = format!("nothing tells that {} is the same on both hosts", file.display());
        return Err(AgentError::Conflict { message, hint: Some("plan the migration again".into()) });
    }
    if own_disks != offer.own_disks || own_disks.is_empty() != offer.disks_session.is_none() {
        let message = "its disks are not where they were when it was planned".into();
        return Err(AgentError::Conflict { message, hint: Some("plan the migration again".into()) });
    }
    if offer.spec.cwd.metadata().is_err() {
        // Nothing on the command line is relative to it, or it would have been missed above.
        offer.spec.cwd = "/".into();
    }
    let promise = here
        .host
        .admission
        .admit(need, here.host.config.reserved_memory.as_u64())
        .map_err(|short| no_memory(&here.host.config.name, &name, short))?;
    // That it can be committed or abandoned must not depend on what happens to the disk meanwhile.
    here.host.journal.reserve().await?;
    let source = Source { name: offer.from.clone(), key: caller.key };
    let awaited = Awaited::new((&here.host, &here.arrivals), offer.id, source, &name, promise);
    let known_already = || AgentError::Conflict { message: "this migration is known here already".into(), hint: None };
    if here.host.journal.row_in(offer.id).await?.is_some() || here.add(Arc::clone(&awaited)).is_err() {
        return Err(known_already());
    }
    awaited.set_preparing(true);
    awaited.apply(Event::Prepare);
    awaited.act().await;
    if awaited.machine().row() != Some(InStep::Prepared) {
        here.remove(offer.id);
        awaited.set_preparing(false);
        let message = "its journal cannot be written, so that nobody could tell who owns the guest".into();
        return Err(AgentError::Conflict { message, hint: Some("is its disk full?".into()) });
    }
    let incoming = IncomingLaunch { machine_type: offer.machine.clone() };
    let plain = offer.protection == Protection::Plain;
    let launched = async {
        if let Some(session) = offer.disks_session.clone() {
            take_disks(here, &offer, &command, Expected { session, source: caller.key, plain }).await?;
        }
        here.host.launch(&offer.spec, &command, accel, false, Some((offer.id, incoming))).await
    };
    let (vm, _) = match launched.await {
        Ok(started) => started,
        Err(error) => {
            awaited.give_up(Event::GiveUp, &in_one_line(&error));
            awaited.apply(Event::Told(Qemu::Ended));
            awaited.act().await;
            awaited.set_preparing(false);
            tokio::spawn(awaited.watch());
            return Err(error);
        }
    };
    awaited.is_served_by(&vm);
    awaited.heard();
    awaited.apply(Event::Told(Qemu::Waits));
    tokio::spawn(Arc::clone(&awaited).watch());
    let known = info.features.capabilities();
    // Before it waits for the guest: from then on its main loop may wait, too.
    let inventory = describe(&vm).await;
    let received = match offer.external {
        Some(session) => {
            let expected = Expected { session, source: caller.key, plain };
            let begun = arrival::begin(&here.host, &here.arrivals, &vm, offer.id, known, expected).await;
            begun.map(|post_copy_obstacle| Prepared {
                port: None,
                setup: offer.setup,
                post_copy_obstacle,
                notes: Vec::new(),
                inventory: None,
            })
        }
        None => receive(&vm, known, offer.setup, &offer.protection, caller.local).await,
    };
    let received = match received {
        Ok(prepared) => {
            let notes = prepared.notes.into_iter().chain(display_notes(&vm, &command).await).collect();
            Ok(Prepared { notes, ..prepared })
        }
        error => error,
    };
    if let Err(error) = &received {
        awaited.give_up(Event::GiveUp, &format!("its QEMU could not be prepared: {}", in_one_line(error)));
    }
    awaited.act().await;
    awaited.set_preparing(false);
    let state = awaited.view().await;
    if state.step == InWord::Abandoned && received.is_ok() {
        // While its QEMU started.
        let message = format!("this migration was abandoned: {}", state.detail.unwrap_or_default());
        return Err(AgentError::Conflict { message, hint: None });
    }
    let prepared = Prepared { inventory, ..received? };
    tracing::info!(vm = name, migration = %offer.id, from = offer.from, port = prepared.port, "waits for a guest");
    Ok(prepared)
}

/// Makes the disks that come with the guest, and takes what its source sends of them.
async fn take_disks(
    here: &Incoming,
    offer: &Offer,
    command: &CommandLine,
    expected: Expected,
) -> Result<(), AgentError> {
    let images: Vec<_> = offer.own_disks.iter().filter_map(|disk| offer.image(disk)).cloned().collect();
    let qemu = here.host.qemus.find_qemu(command)?;
    let targets = disks::make(&here.host, offer.id, &offer.spec.name, images, &qemu).await?;
    disks::begin(&here.host, &here.arrivals, offer.id, targets, expected)
}

/// What its user should know of its display.
async fn display_notes(vm: &Vm, command: &CommandLine) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(number) = command.vnc_display()
        && let Ok(Some(port)) = vm.qmp.execute(commands::QueryVnc {}).await.map(|vnc| vnc.service)
        && port != (5900 + number).to_string()
    {
        notes.push(format!("Its VNC display is at port {port} there: {} is taken.", 5900 + number));
    }
    for key in SPICE_PORTS {
        if let Some(asked) = command.spice_port(key)
            && let Ok(Some(port)) = vm.qmp.execute(commands::QuerySpice {}).await.map(|it| it[key].as_u64())
            && port != u64::from(asked)
        {
            notes.push(format!("The {key} of its SPICE display is {port} there: {asked} is taken."));
        }
    }
    notes.extend(command.passwords_set_later().into_iter().map(|display| {
        format!("Its {display} password cannot be asked for: set it again there (`set_password` in its monitor).")
    }));
    notes
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
    Ok(Prepared { port, setup, post_copy_obstacle: None, notes, inventory: None })
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
