//! What a qcow2 file says of other files, read from its header: of a VM that does not run no QEMU can be asked.
//!
//! See `docs/interop/qcow2.rst` in QEMU's sources.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disk_place::DiskPlace;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Its content is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// What QEMU allows, in bytes.
const LONGEST_NAME: u32 = 1023;

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2 {
    /// The file that has what this one does not, as it is named in it.
    pub backing: Option<String>,
    /// What the guest has written is in another file.
    pub has_data_elsewhere: bool,
}

impl Qcow2 {
    /// The header of this file; none when it is no qcow2 file.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        let file = File::open(path)?;
        let mut header = [0; 80];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        if header[..4] != MAGIC {
            return Ok(None);
        }
        let u32_at = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let (version, offset, length) = (u32_at(4), u64_at(8), u32_at(16));
        let backing = match offset {
            0 => None,
            _ if length > LONGEST_NAME => return Err(io::Error::other("the name of what is behind it is too long")),
            _ => {
                let mut name = vec![0; length as usize];
                file.read_exact_at(&mut name, offset)?;
                Some(String::from_utf8(name).map_err(io::Error::other)?)
            }
        };
        let has_data_elsewhere = version >= 3 && u64_at(72) & EXTERNAL_DATA != 0;
        Ok(Some(Self { backing, has_data_elsewhere }))
    }

    /// Where what is behind this image is, if that is a file.
    pub fn backing_file(&self, image: &Path) -> Option<PathBuf> {
        let place: DiskPlace = self.backing.as_deref()?.parse().ok()?;
        let folder = image.parent().unwrap_or(Path::new("/"));
        place.path().map(|path| folder.join(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32, features: u64, backing: &str) -> Vec<u8> {
        let mut bytes = vec![0; 104];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        if !backing.is_empty() {
            bytes[8..16].copy_from_slice(&104_u64.to_be_bytes());
            bytes[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
        }
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes.extend(backing.as_bytes());
        bytes
    }

    #[test]
    fn a_header_tells_what_is_behind_and_where_the_data_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let of = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Qcow2::of(&path)
        };
        for (backing, file) in [
            ("base.raw", Some(dir.path().join("base.raw"))),
            ("/srv/b", Some("/srv/b".into())),
            ("", None),
            ("nbd://h/x", None),
            ("json:{}", None),
        ] {
            let found = of(&header(3, 0, backing)).unwrap().unwrap();
            assert_eq!(found.backing.as_deref().unwrap_or_default(), backing);
            assert!(found.backing_file(&path) == file && !found.has_data_elsewhere, "{backing}");
        }
        assert!(of(&header(3, EXTERNAL_DATA, "")).unwrap().unwrap().has_data_elsewhere);
        assert!(!of(&header(2, EXTERNAL_DATA, "")).unwrap().unwrap().has_data_elsewhere);
        for none in [&b""[..], b"QFI\xfb", &[0; 200]] {
            assert_eq!(of(none).unwrap(), None);
        }
        let mut long = header(3, 0, "x");
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(of(&long).is_err());
    }
}
