//! `tune`: other limits for a migration that is under way.

use vmferry_api::client::{Client, vm_path};
use vmferry_api::{TuneRequest, Tuned};

use crate::cli::TuneOptions;
use crate::failure::Failure;

pub(crate) async fn run(client: &Client, options: TuneOptions) -> Result<(), Failure> {
    let request = TuneRequest {
        downtime_ms: options.downtime.map(|time| time.as_millis() as u64),
        max_time_ms: options.max_time.map(|time| time.as_millis() as u64),
        bandwidth: options.bandwidth,
        post_copy: match (options.post_copy, options.no_post_copy) {
            (false, false) => None,
            (allowed, _) => Some(allowed),
        },
        prefer: options.prefer,
    };
    let tuned: Tuned = client.post(&format!("{}/migration/limits", vm_path(&options.name)), &request).await?;
    match tuned.text.as_str() {
        "" => println!("{} has these limits already", options.name),
        text => println!("{}: {text}", options.name),
    }
    Ok(())
}
