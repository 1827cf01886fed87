//! Can QEMU open what a node's options name? Many of its drivers wait for a server with all of QEMU held, its guest, too; so
//! it is tried by one without a guest first.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Accel, ProbeError, probe_once};
use crate::qmp::QmpError;
use crate::qmp::commands::QueryNamedBlockNodes;

/// How long the server may take, and QEMU to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Opens it, only to read, and closes it again; the answer is its size in bytes, where QEMU tells it.
pub async fn try_node(binary: &Path, within: &Path, options: &Value) -> Result<Option<u64>, ProbeError> {
    let accel = Accel::Tcg { why: "no guest runs".into() };
    let mut options = options.clone();
    (options["node-name"], options["read-only"]) = (json!("tried"), json!(true));
    let ask = async |qmp: crate::Qmp, _: &Path| {
        qmp.execute_raw("blockdev-add", options).await?;
        let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
        let tried = nodes.into_iter().find(|it| it.node_name == "tried");
        Ok::<_, QmpError>(tried.and_then(|it| Some(it.image?.virtual_size)))
    };
    probe_once(binary, &accel, within, ask, PATIENCE).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_can_be_opened_tells_its_size_and_what_cannot_why() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        for qemu in crate::host::kvm_trial::tests::qemus() {
            let tried = async |name: &Path| {
                try_node(&qemu, &std::env::temp_dir(), &json!({ "driver": "file", "filename": name })).await
            };
            assert_eq!(tried(file.path()).await.unwrap(), Some(1 << 20), "{}", qemu.display());
            let Err(ProbeError::Qmp { source: QmpError::Command { desc, .. }, .. }) =
                tried(Path::new("/no/such/file")).await
            else {
                panic!("it is not there");
            };
            assert!(desc.contains("No such file"), "{desc}");
        }
    }
}
