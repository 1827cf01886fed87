//! Writes cpio archives in the format "newc", which Linux unpacks as its first root file system.
//!
//! An entry is a header of eight-digit hexadecimal numbers, its name and its content, both padded to four bytes
//! (kernel documentation, driver-api/early-userspace/buffer-format). The build script uses this file too.

/// An archive that grows entry by entry. Directories come before what is in them.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    pub(crate) fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, (major, minor), &[]);
    }

    pub(crate) fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, (0, 0), content);
    }

    /// The whole archive, with the entry that ends it.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let size = u32::try_from(content.len()).expect("the format ends at 4 GiB");
        // Inode, mode, owner, group, links, time, size, device's two numbers, node's two numbers, name's size, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, (major, minor), content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// The format read back.
    fn read(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |n: usize| {
                let digits = &archive[at + 6 + n * 8..at + 14 + n * 8];
                u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
            };
            let (name_at, name_size, size) = (at + 110, field(11) as usize, field(6) as usize);
            let name = String::from_utf8(archive[name_at..name_at + name_size - 1].to_vec()).unwrap();
            let content_at = (name_at + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(content_at, archive.len());
                return entries;
            }
            entries.push((name, field(1), (field(9), field(10)), archive[content_at..content_at + size].to_vec()));
            at = (content_at + size).next_multiple_of(4);
        }
    }

    fn example() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        archive.program("init", b"#!/bin/sh");
        archive.finish()
    }

    #[test]
    fn what_was_written_is_read_back() {
        let expected = [
            ("dev".to_owned(), 0o040_755, (0, 0), vec![]),
            ("dev/console".to_owned(), 0o020_600, (5, 1), vec![]),
            ("init".to_owned(), 0o100_755, (0, 0), b"#!/bin/sh".to_vec()),
        ];
        assert_eq!(read(&example()), expected);
    }
}
