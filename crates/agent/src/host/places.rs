//! Disks that get another place where their VM goes, as its user says: which those are here and there, and the words of the
//! command line that it has there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmferry_qemu::{CommandLine, Inventory};

use crate::error::AgentError;

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// All that it is called.
    pub(crate) names: Vec<String>,
    /// Where it is here, in QEMU's words, and as a path.
    pub(crate) file: String,
    pub(crate) here: PathBuf,
    pub(crate) format: String,
    /// Where it is to be.
    pub(crate) there: PathBuf,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places(Vec<Placed>);

fn bad(message: String, hint: &str) -> AgentError {
    AgentError::BadRequest { message, hint: (!hint.is_empty()).then(|| hint.into()) }
}

/// No disk of a VM is called so.
pub(crate) fn no_such_disk(vm: &str, disk: &str, names: &[String]) -> AgentError {
    AgentError::BadRequest {
        message: format!("{vm} has no disk {disk}"),
        hint: Some(format!("`vmferry disk list {vm}` lists them: {}", names.join(", "))),
    }
}

impl Places {
    /// Of what the user of this VM wants, by the names of its disks; each of `disks` says what of a disk is known.
    pub(crate) fn of(vm: &str, wanted: &BTreeMap<String, PathBuf>, disks: &[Placed]) -> Result<Self, AgentError> {
        let mut places = Self::default();
        for (name, there) in wanted {
            if !there.is_absolute() || there.file_name().is_none() {
                let message = format!("{name} cannot be at {:?} there", there.display().to_string());
                return Err(bad(message, "give a path that begins with / and ends with a name"));
            }
            let Some(disk) = disks.iter().find(|it| it.names.contains(name) || it.file == *name) else {
                let names: Vec<String> = disks.iter().filter_map(|it| it.names.first().cloned()).collect();
                return Err(no_such_disk(vm, name, &names));
            };
            if places.0.iter().any(|it| it.here == disk.here) {
                return Err(bad(format!("two places are named for {}", disk.file), ""));
            }
            places.0.push(Placed { there: there.clone(), ..disk.clone() });
        }
        let mut all: Vec<PathBuf> = disks.iter().map(|it| places.there(&it.here)).collect();
        all.sort();
        match all.windows(2).find(|two| two[0] == two[1] && places.is_named(&two[0])) {
            Some(two) => Err(bad(format!("two disks would be at {}", two[0].display()), "")),
            None => Ok(places),
        }
    }

    /// Where what is here is to be.
    pub(crate) fn there(&self, here: &Path) -> PathBuf {
        self.0.iter().find(|it| it.here == here).map_or(here, |it| it.there.as_path()).into()
    }

    /// Where what is to be there is here.
    pub(crate) fn here(&self, there: &Path) -> PathBuf {
        self.0.iter().find(|it| it.there == there).map_or(there, |it| it.here.as_path()).into()
    }

    /// Its user has named this place there.
    pub(crate) fn is_named(&self, there: &Path) -> bool {
        self.0.iter().any(|it| it.there == there)
    }

    /// The command line that the VM has there, where these are block devices.
    pub(crate) fn words(&self, vm: &str, argv: &[String], devices: &[PathBuf]) -> Result<Vec<String>, AgentError> {
        let mut argv = argv.to_vec();
        for disk in &self.0 {
            let command = CommandLine::parse(&argv)?;
            let is_it = |it: &vmferry_qemu::ImageWords| {
                it.names.iter().any(|name| disk.names.contains(name)) || it.file == disk.file
            };
            let cannot = |why: String| AgentError::Conflict {
                message: format!("the words of {vm} cannot say that {} is elsewhere: {why}", disk.file),
                hint: Some("leave it where it is".into()),
            };
            let words = command.images().into_iter().find(is_it);
            let words = words.ok_or_else(|| cannot("which those of it are cannot be told".into()))?;
            let (there, is_device) = (disk.there.display().to_string(), devices.contains(&disk.there));
            argv = command.with_image_at(&words, &there, &disk.format, is_device).map_err(cannot)?;
        }
        Ok(argv)
    }

    /// What the machine is made of when its disks are there.
    pub(crate) fn in_inventory(&self, mut inventory: Inventory) -> Inventory {
        for disk in &self.0 {
            inventory.disk_is_at(&disk.file, &disk.there.display().to_string());
        }
        inventory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, file: &str) -> Placed {
        Placed {
            names: vec![name.into()],
            file: file.into(),
            here: file.into(),
            format: "raw".into(),
            there: PathBuf::new(),
        }
    }

    fn places(wanted: &[(&str, &str)]) -> Result<Places, String> {
        let wanted = wanted.iter().map(|(name, path)| ((*name).to_owned(), PathBuf::from(path))).collect();
        Places::of("web1", &wanted, &[disk("vda", "/a"), disk("vdb", "/b")]).map_err(|error| error.to_string())
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (wanted, expected) in [
            (&[("vdc", "/x")][..], "no disk vdc"),
            (&[("vda", "x")], "cannot be at"),
            (&[("vda", "/")], "cannot be at"),
            (&[("vda", "/x"), ("vdb", "/x")], "two disks would be at /x"),
            (&[("vda", "/b")], "two disks would be at /b"),
            (&[("vda", "/x"), ("/a", "/y")], "two places are named"),
        ] {
            let refused = places(wanted).unwrap_err();
            assert!(refused.contains(expected), "{wanted:?}: {refused}");
        }
        // They may change places.
        assert!(places(&[("vda", "/b"), ("vdb", "/a")]).is_ok());
    }

    #[test]
    fn words_follow_and_the_way_back_is_known() {
        let places = places(&[("vda", "/x"), ("/b", "/dev/y")]).unwrap();
        let argv = ["qemu", "-drive", "file=/a,if=none,id=vda", "-blockdev", "driver=file,filename=/b,node-name=vdb"];
        let argv: Vec<String> =
            argv.iter().chain(&["-device", "virtio-blk-pci,drive=vdb"]).map(ToString::to_string).collect();
        let words = places.words("web1", &argv, &["/dev/y".into()]).unwrap();
        assert_eq!(words[2], "file=/x,if=none,id=vda,format=raw");
        assert_eq!(words[4], "driver=host_device,filename=/dev/y,node-name=vdb");
        assert_eq!((places.there("/a".as_ref()), places.here("/x".as_ref())), ("/x".into(), "/a".into()));
        assert_eq!(places.there("/c".as_ref()), PathBuf::from("/c"));
        assert!(places.is_named("/x".as_ref()) && !places.is_named("/a".as_ref()));
    }
}
