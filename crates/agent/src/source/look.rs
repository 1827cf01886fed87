//! What a VM's QEMU does, in the words of the protocol.

use std::time::Duration;

use vmferry_custody::source::Qemu;
use vmferry_qemu::qmp::commands::{QueryMigrate, QueryStatus};
use vmferry_qemu::{MigrationStatus, QmpError, RunState};

use crate::host::Vm;

/// How long QEMU may take to say what it does.
pub(super) const GLANCE: Duration = Duration::from_secs(3);

/// What this VM's QEMU does.
pub(super) async fn look(vm: &Vm) -> Qemu {
    let asked = async {
        let status = vm.qmp.execute_within(QueryStatus {}, GLANCE).await?.status;
        let migration = vm.qmp.execute_within(QueryMigrate {}, GLANCE).await?.status;
        Ok::<_, QmpError>((status, migration.unwrap_or(MigrationStatus::None)))
    };
    match asked.await {
        // It set its guest running by itself.
        Ok((RunState::Running, migration)) if migration.is_post_copy() => Qemu::Runs,
        Ok((_, migration)) if migration.is_post_copy() => Qemu::LetGo,
        Ok((status, migration)) => match migration {
            MigrationStatus::None
            | MigrationStatus::Completed
            | MigrationStatus::Failed
            | MigrationStatus::Cancelled => match status {
                // Whatever wakes it has it run.
                RunState::Running | RunState::Suspended => Qemu::Runs,
                RunState::Paused
                | RunState::PostMigrate
                | RunState::FinishMigrate
                | RunState::Prelaunch
                | RunState::InMigrate => Qemu::Stands,
                _ => Qemu::Rests,
            },
            _ => Qemu::Copying,
        },
        Err(_) if !vm.is_alive() => Qemu::Ended,
        Err(error) => {
            tracing::debug!(vm = vm.name(), %error, "its QEMU does not answer");
            Qemu::Silent
        }
    }
}
