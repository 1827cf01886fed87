//! Which of a process's mappings a memory backend is.

use std::fmt;
use std::ops::Range;

use super::{Backend, MemoryError};
use crate::PAGE;
use crate::process::Mapping;

/// What a process has mapped in one piece; the kernel may keep it as several mappings that lie beside one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) range: Range<u64>,
    /// The first of its mappings.
    pub(super) first: Range<u64>,
    /// Where in its file it begins.
    pub(super) offset: u64,
    pub(super) file: (u32, u32, u64),
    path: String,
    /// Others see what is written to it.
    shared: bool,
}

impl Area {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x} ({})", self.range.start, self.range.end, self.path)
    }
}

/// The writable areas of a process.
pub(super) fn areas(mappings: &[Mapping]) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.permissions.starts_with("rw")) {
        let shared = mapping.permissions.ends_with('s');
        match areas.last_mut() {
            Some(last)
                if last.range.end == mapping.range.start
                    && (last.shared, last.file) == (shared, mapping.file)
                    && (!shared || last.offset + last.size() == mapping.offset) =>
            {
                last.range.end = mapping.range.end;
            }
            _ => areas.push(Area {
                range: mapping.range.clone(),
                first: mapping.range.clone(),
                offset: mapping.offset,
                file: mapping.file,
                path: mapping.path.clone(),
                shared,
            }),
        }
    }
    areas
}

/// The area of a backend: the one at its address, or the only one of its size that no other backend has.
pub(super) fn find<'a>(areas: &'a [Area], backends: &[Backend], backend: &Backend) -> Result<&'a Area, MemoryError> {
    let (id, size) = (backend.id.clone(), backend.size.next_multiple_of(PAGE));
    if let Some(address) = backend.address {
        let area = areas.iter().find(|area| area.range.contains(&address));
        return match area {
            Some(area) if !area.shared => Err(MemoryError::NotShared { id }),
            Some(area) if area.range.start == address && area.size() == size => Ok(area),
            Some(area) => Err(MemoryError::Size { id, size: backend.size, mapped: area.range.end - address }),
            None => Err(MemoryError::Missing { id, size: backend.size }),
        };
    }
    let known = |area: &Area| backends.iter().any(|other| other.address == Some(area.range.start));
    let fits = |area: &&Area| area.size() == size && !known(area);
    let mut shared = areas.iter().filter(|area| area.shared).filter(fits);
    match (shared.next(), shared.next()) {
        (Some(area), None) => Ok(area),
        (Some(one), Some(other)) => Err(MemoryError::Ambiguous { id, one: one.to_string(), other: other.to_string() }),
        (None, _) if areas.iter().any(|area| !area.shared && area.size() >= size) => Err(MemoryError::NotShared { id }),
        (None, _) => Err(MemoryError::Missing { id, size: backend.size }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn mapping(start: u64, end: u64, permissions: &str, offset: u64, inode: u64) -> Mapping {
        let path = format!("/memfd:{inode}");
        Mapping { range: start..end, permissions: permissions.into(), offset, file: (0, 1, inode), path }
    }

    fn backend(id: &str, size: u64, address: Option<u64>) -> Backend {
        Backend { id: id.into(), size, address }
    }

    fn start(areas: &[Area], backends: &[Backend], index: usize) -> Result<u64, String> {
        find(areas, backends, &backends[index]).map(|area| area.range.start).map_err(|error| error.to_string())
    }

    #[test]
    fn a_backend_is_found_by_its_size_in_pieces() {
        let areas = areas(&[
            mapping(MIB, 3 * MIB, "rw-s", 0, 7),
            mapping(3 * MIB, 5 * MIB, "rw-s", 2 * MIB, 7),
            mapping(5 * MIB, 6 * MIB, "rw-s", 0, 8),
            mapping(6 * MIB, 7 * MIB, "rw-s", 4 * MIB, 8),
            mapping(8 * MIB, 12 * MIB, "r--s", 0, 9),
        ]);
        assert_eq!(areas.len(), 3);
        assert_eq!(start(&areas, &[backend("ram", 4 * MIB, None)], 0), Ok(MIB));
        assert_eq!(areas[0].first, MIB..3 * MIB);
        assert!(
            start(&areas, &[backend("ram", 2 * MIB, None)], 0).unwrap_err().contains("no shared memory of 2097152")
        );
    }

    #[test]
    fn two_of_one_size_are_named_unless_addresses_tell_them_apart() {
        let areas = areas(&[mapping(MIB, 2 * MIB, "rw-s", 0, 7), mapping(4 * MIB, 5 * MIB, "rw-s", 0, 8)]);
        let two = [backend("a", MIB, None), backend("b", MIB, None)];
        let error = start(&areas, &two, 0).unwrap_err();
        assert!(error.contains("100000-200000 (/memfd:7)") && error.contains("400000-500000 (/memfd:8)"), "{error}");
        let two = [backend("a", MIB, Some(4 * MIB)), backend("b", MIB, None)];
        assert_eq!((start(&areas, &two, 0), start(&areas, &two, 1)), (Ok(4 * MIB), Ok(MIB)));
        let wrong = [backend("a", 2 * MIB, Some(4 * MIB)), backend("b", MIB, Some(3 * MIB))];
        assert!(start(&areas, &wrong, 0).unwrap_err().contains("has mapped 1048576"));
        assert!(start(&areas, &wrong, 1).unwrap_err().contains("no shared memory"));
    }

    #[test]
    fn private_memory_is_refused_with_what_would_help() {
        let areas = areas(&[mapping(MIB, 2 * MIB, "rw-p", 0, 0)]);
        for address in [None, Some(MIB)] {
            assert!(start(&areas, &[backend("ram", MIB, address)], 0).unwrap_err().contains("share=on"));
        }
    }
}
