//! What is asked of an agent that is to migrate a VM, or to say what that would do.

use std::time::Duration;

use vmferry_api::MigrateRequest;
use vmferry_api::client::Client;

use crate::cli::{How, MigrateOptions};
use crate::failure::Failure;
use crate::pair::over_ssh;
use crate::vms::places;

/// What would be done, after the guest was watched for so long.
pub(crate) async fn prediction(client: &Client, how: How, watch: Duration) -> Result<MigrateRequest, Failure> {
    Ok(MigrateRequest {
        to: over_ssh(client, how.to).await?,
        dry_run: true,
        watch_ms: watch.as_millis() as u64,
        downtime_ms: how.downtime.as_millis() as u64,
        max_time_ms: how.max_time.map(|time| time.as_millis() as u64),
        bandwidth: how.bandwidth,
        post_copy: !how.no_post_copy,
        prefer: how.prefer,
        script: None,
        engine: how.engine,
        policy: None,
        disks_are_shared: how.disks_are_shared,
        copy_disks: true,
        disks: places(how.disks)?,
    })
}

/// A migration, or a dry run of it.
pub(crate) async fn migration(client: &Client, options: MigrateOptions) -> Result<MigrateRequest, Failure> {
    let (dry_run, policy, copy_disks) = (options.dry_run, options.policy, !options.no_copy_disks);
    let request = prediction(client, options.how, options.watch).await?;
    Ok(MigrateRequest { dry_run, policy, copy_disks, ..request })
}
