//! The words that say what is in a disk: found, and changed where the disk has moved while no QEMU ran.

use super::{CommandLine, CommandOption, Properties};

/// What words say of a disk's image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageWords {
    /// What the disk is called: as its drive, its device or its node; where it is, when that cannot be told.
    pub name: String,
    /// Of its drive, its device and its node, whatever it has.
    pub names: Vec<String>,
    /// Where it is.
    pub file: String,
    /// Such as `qcow2`; none where QEMU finds out.
    pub format: Option<String>,
    /// The guest only reads it.
    pub read_only: bool,
    /// How it is read and written, such as `native`.
    pub aio: Option<String>,
    /// What becomes of what the guest discards: `unmap`, `ignore`.
    pub discard: Option<String>,
    /// Its words say what is behind it, or that nothing is: what its file says of that does not count.
    pub says_what_is_behind: bool,
    /// The option with the format, and that with the file, which may be the same.
    options: (usize, usize),
}

impl CommandLine {
    /// Of all disks and drives whose words are plain.
    pub fn images(&self) -> Vec<ImageWords> {
        let mut virtio = 0;
        let mut found = Vec::new();
        for (at, option) in self.options.iter().enumerate() {
            match option.name.as_str() {
                "drive" => found.extend(Self::of_drive(at, option, &mut virtio)),
                "blockdev" => found.extend(self.of_node(at, option)),
                "hda" | "hdb" | "hdc" | "hdd" => found.push(ImageWords {
                    name: option.value().into(),
                    names: vec![option.value().into()],
                    file: option.value().into(),
                    format: None,
                    read_only: false,
                    aio: None,
                    discard: None,
                    says_what_is_behind: false,
                    options: (at, at),
                }),
                _ => {}
            }
        }
        found
    }

    fn of_drive(at: usize, option: &CommandOption, virtio: &mut usize) -> Option<ImageWords> {
        let words = option.properties();
        let given = words.get_some("id").map(str::to_owned);
        // QEMU numbers these by itself.
        let numbered = (words.get("if") == Some("virtio")).then(|| {
            let number = words.get("index").and_then(|it| it.parse().ok()).unwrap_or(*virtio);
            *virtio = number + 1;
            format!("virtio{number}")
        });
        let file = words.image()?;
        let name = given.or(numbered).unwrap_or_else(|| file.clone());
        let node = words.get_some("node-name").map(str::to_owned);
        Some(ImageWords {
            names: std::iter::once(name.clone()).chain(node).collect(),
            name,
            format: words.get("format").or(words.get("driver")).map(str::to_owned),
            read_only: ["readonly", "read-only"].iter().any(|key| words.is_on(key))
                || words.get("media") == Some("cdrom"),
            aio: words.get("aio").or(words.get("file.aio")).map(str::to_owned),
            discard: words.get("discard").map(str::to_owned),
            says_what_is_behind: words.iter().any(|(key, _)| is_behind(key)),
            file,
            options: (at, at),
        })
    }

    /// A node that a device has for its disk.
    fn of_node(&self, at: usize, option: &CommandOption) -> Option<ImageWords> {
        let words = option.properties();
        let node = words.get_some("node-name")?.to_owned();
        let device = self.all("device").map(CommandOption::properties).find(|it| it.get("drive") == Some(&node))?;
        let id = device.get_some("id").map(str::to_owned);
        let (below, own) = match words.get_some("file") {
            Some(named) => {
                let is_it =
                    |it: &&CommandOption| it.name == "blockdev" && it.properties().get("node-name") == Some(named);
                let below = self.options.iter().position(|it| is_it(&it))?;
                (below, self.options[below].properties())
            }
            None => (at, words.clone()),
        };
        let named = own.get_some("filename").or(own.get_some("file.filename"));
        let file = named.map(str::to_owned).or_else(|| own.described())?;
        let is_node_of_file = matches!(words.get("driver"), Some("file" | "host_device"));
        Some(ImageWords {
            name: id.clone().unwrap_or_else(|| node.clone()),
            names: id.into_iter().chain([node]).collect(),
            file,
            format: if is_node_of_file { Some("raw".into()) } else { words.get("driver").map(str::to_owned) },
            read_only: words.is_on("read-only"),
            aio: own.get("aio").or(own.get("file.aio")).map(str::to_owned),
            discard: words.get("discard").map(str::to_owned),
            says_what_is_behind: words.iter().any(|(key, _)| is_behind(key)),
            options: (at, below),
        })
    }

    /// The words of this command line where this image is that file, of that format, and has nothing behind it. `device`
    /// says that it is a block device.
    pub fn with_image_at(
        &self,
        image: &ImageWords,
        file: &str,
        format: &str,
        device: bool,
    ) -> Result<Vec<String>, String> {
        let mut changed = self.clone();
        let (top, below) = image.options;
        let option = &self.options[top];
        match option.name.as_str() {
            "hda" | "hdb" | "hdc" | "hdd" => {
                let index = option.name.as_bytes()[2] - b'a';
                let mut drive = Properties::default();
                for (key, value) in [("index", index.to_string()), ("media", "disk".into()), ("file", file.into())] {
                    drive.push(key, &value);
                }
                drive.push("format", format);
                changed.options[top] = CommandOption::new("drive", &drive.to_string());
            }
            "drive" => {
                let mut words = option.properties();
                words.retain(|key| {
                    !is_behind(key) && !matches!(key, "file.filename" | "file.driver" | "format" | "driver")
                });
                words.put_first("file", file);
                words.push("format", format);
                changed.options[top] = CommandOption::new("drive", &words.to_string());
            }
            _ => {
                let driver = if device { "host_device" } else { "file" };
                let mut words = option.properties();
                let is_node_of_file = top == below && words.get("filename").is_some();
                if is_node_of_file && format != "raw" {
                    return Err(format!(
                        "its node is that of a file, which cannot be {format}: give it one of the format"
                    ));
                }
                words.retain(|key| !is_behind(key));
                if !is_node_of_file {
                    words.put_first("driver", format);
                }
                changed.options[top] = CommandOption::new("blockdev", &words.to_string());
                let mut words = changed.options[below].properties();
                let prefix = if words.get("filename").is_some() { "" } else { "file." };
                for (key, value) in [("filename", file), ("driver", driver)] {
                    words.put_first(&format!("{prefix}{key}"), value);
                }
                changed.options[below] = CommandOption::new("blockdev", &words.to_string());
            }
        }
        Ok(changed.argv())
    }
}

fn is_behind(key: &str) -> bool {
    key == "backing" || key.starts_with("backing.")
}

/// What a node's words say besides where its image is.
const OF_NODE: [&str; 9] =
    ["node-name", "read-only", "auto-read-only", "cache", "discard", "detect-zeroes", "force-share", "aio", "backing"];

impl Properties {
    /// Where the image of a drive is, as QEMU takes it for a file's name.
    pub(crate) fn image(&self) -> Option<String> {
        let named = self.get_some("file").or(self.get_some("file.filename"));
        named.map(str::to_owned).or_else(|| self.described())
    }

    /// What is at a server.
    fn described(&self) -> Option<String> {
        let below = self.get("file.driver").is_some();
        if !below && matches!(self.get("driver"), None | Some("file")) {
            return None;
        }
        let is_of_place = |key: &str| match below {
            true => key == "driver" || key.starts_with("file."),
            false => !OF_NODE.contains(&key.split('.').next().unwrap_or(key)),
        };
        let place: serde_json::Map<String, serde_json::Value> =
            self.iter().filter(|(key, _)| is_of_place(key)).map(|(key, value)| (key.into(), value.into())).collect();
        Some(format!("json:{}", serde_json::Value::Object(place)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &str) -> CommandLine {
        let argv: Vec<String> = std::iter::once("qemu").chain(words.split(' ')).map(str::to_owned).collect();
        CommandLine::parse(&argv).unwrap()
    }

    #[test]
    fn disks_are_found_by_the_names_that_qemu_has_for_them() {
        let images = command(
            "-drive file=/a,format=raw,if=virtio,aio=native,cache=none,discard=unmap -drive if=none,id=d,file=/b \
             -blockdev driver=file,filename=/c,node-name=f,aio=io_uring -blockdev driver=qcow2,file=f,node-name=n \
             -device virtio-blk-pci,drive=n,id=dev -drive file=/e,if=virtio,readonly=on \
             -blockdev {\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/g\"},\"node-name\":\"j\"} \
             -device scsi-hd,drive=j -blockdev driver=raw,file.driver=nbd,file.export=x,node-name=r \
             -device scsi-hd,drive=r -blockdev driver=rbd,pool=p,image=i,node-name=c,discard=unmap \
             -device scsi-hd,drive=c",
        )
        .images();
        let told: Vec<_> = images.iter().map(|it| (it.name.as_str(), it.file.as_str(), it.format.as_deref())).collect();
        assert_eq!(
            told,
            [
                ("virtio0", "/a", Some("raw")),
                ("d", "/b", None),
                ("dev", "/c", Some("qcow2")),
                ("virtio1", "/e", None),
                ("j", "/g", Some("raw")),
                ("r", "json:{\"driver\":\"raw\",\"file.driver\":\"nbd\",\"file.export\":\"x\"}", Some("raw")),
                ("c", "json:{\"driver\":\"rbd\",\"image\":\"i\",\"pool\":\"p\"}", Some("rbd")),
            ]
        );
        assert_eq!((images[0].aio.as_deref(), images[0].discard.as_deref()), (Some("native"), Some("unmap")));
        assert_eq!(images[2].aio.as_deref(), Some("io_uring"));
        assert_eq!(images[2].names, ["dev", "n"]);
        assert!(images[3].read_only && !images[0].read_only);
    }

    #[test]
    fn words_of_every_kind_say_the_new_place_and_keep_the_rest() {
        for (words, expected) in [
            ("-drive file=/a,format=raw,if=virtio,cache=none", "-drive file=/new,,x,if=virtio,cache=none,format=qcow2"),
            (
                "-blockdev driver=file,filename=/a,node-name=f,aio=native \
                 -blockdev driver=raw,file=f,node-name=n,discard=unmap -device virtio-blk-pci,drive=n,id=d",
                "-blockdev driver=file,filename=/new,,x,node-name=f,aio=native \
                 -blockdev driver=qcow2,file=f,node-name=n,discard=unmap -device virtio-blk-pci,drive=n,id=d",
            ),
            (
                "-blockdev driver=qcow2,file.driver=file,file.filename=/a,backing=b,node-name=n -device ide-hd,drive=n",
                "-blockdev file.driver=file,file.filename=/new,,x,driver=qcow2,node-name=n -device ide-hd,drive=n",
            ),
            ("-hdb /a", "-drive index=1,media=disk,file=/new,,x,format=qcow2"),
        ] {
            let command = command(words);
            let image = command.images().remove(0);
            let changed = command.with_image_at(&image, "/new,x", "qcow2", false).unwrap();
            assert_eq!(changed[1..].join(" "), expected);
        }
        let of_file = command("-blockdev driver=file,filename=/a,node-name=n -device ide-hd,drive=n");
        let image = of_file.images().remove(0);
        assert!(of_file.with_image_at(&image, "/b", "qcow2", false).unwrap_err().contains("qcow2"));
        let changed = of_file.with_image_at(&image, "/dev/b", "raw", true).unwrap();
        assert_eq!(changed[2], "driver=host_device,filename=/dev/b,node-name=n");
    }
}
