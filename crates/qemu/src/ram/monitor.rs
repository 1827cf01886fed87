//! What QEMU's monitor for humans says about RAM, read with care: its words are no interface, so a line that is not
//! understood is skipped.

/// One of QEMU's RAM blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RamBlock {
    /// Of a backend: its id, or its path for machine types older than 4.0.
    pub(crate) name: String,
    /// In bytes.
    pub(super) page_size: Option<u64>,
    /// Where it begins in QEMU's address space; older QEMUs do not tell.
    pub(super) address: Option<u64>,
    /// How much of it is used, in bytes.
    pub(crate) used: Option<u64>,
    /// What it can grow to, in bytes.
    pub(crate) total: Option<u64>,
}

/// A part of a memory backend that the guest's physical memory has in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MappedRange {
    /// The id of the backend.
    pub(super) backend: String,
    /// What QEMU calls the backend's memory.
    pub(super) region: String,
    /// Where it begins in the guest's physical memory.
    pub(super) guest_address: u64,
    /// Where it begins in the backend, in bytes.
    pub(super) offset: u64,
}

/// Of what is connected to the guest's network cards, or could be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetClient {
    pub(crate) name: String,
    /// Such as `tap`, or `nic` for the card itself.
    pub(crate) kind: String,
    /// More words.
    pub(crate) about: String,
}

/// Reads the answer to `info ramblock`: a table whose columns grow with the version.
pub(crate) fn ram_blocks(text: &str) -> Vec<RamBlock> {
    let mut columns: Option<Vec<&str>> = None;
    let mut blocks = Vec::new();
    for line in text.lines() {
        if let Some(header) = line.trim_start().strip_prefix("Block Name") {
            columns = Some(header.split_whitespace().skip(1).collect());
        } else if let Some(columns) = &columns {
            blocks.extend(ram_block(line, columns));
        }
    }
    blocks
}

/// Name and page size, which is two words, come first; the columns are those after them. What has no name is a backend's
/// that no device has, and is moved by nobody.
fn ram_block(line: &str, columns: &[&str]) -> Option<RamBlock> {
    let mut words = line.split_whitespace();
    let (name, number, unit) = (words.next()?, words.next()?, words.next()?);
    if bytes(name, number).is_some() {
        return None;
    }
    let words: Vec<&str> = words.collect();
    let column = |name: &str| hex(words.get(columns.iter().position(|it| *it == name)?)?);
    Some(RamBlock {
        name: name.into(),
        page_size: bytes(number, unit),
        address: column("HVA").filter(|address| *address != 0),
        used: column("Used"),
        total: column("Total"),
    })
}

/// Reads the answer to `info mtree -f -o`: the guest's physical memory as it is now, once for every way to see it. The
/// one that counts is called `memory`; a block of lines begins with what it is called, and ends with an empty one.
pub(super) fn mapped_ranges(text: &str) -> Vec<MappedRange> {
    let mut is_memory = false;
    let mut ranges = Vec::new();
    for line in text.lines() {
        if line.starts_with("FlatView") {
            is_memory = false;
        } else if line.trim_start().starts_with("AS \"memory\",") {
            is_memory = true;
        } else if is_memory {
            ranges.extend(mapped_range(line));
        }
    }
    ranges
}

/// `0000000000100000-000000007fffffff (prio 0, ram): ram0 @0000000000100000 owner:{obj path=/objects/ram0}`
fn mapped_range(line: &str) -> Option<MappedRange> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let guest_address = hex(range.split_once('-')?.0)?;
    let (_, region) = rest.split_once("): ")?;
    let (region, owner) = region.split_once(" owner:{obj path=/objects/")?;
    let backend = owner.split_once('}')?.0;
    let mut words = region.split(' ');
    let region = words.next()?;
    let offset = match words.find_map(|word| word.strip_prefix('@')) {
        Some(offset) => hex(offset)?,
        None => 0,
    };
    Some(MappedRange { backend: backend.into(), region: region.into(), guest_address, offset })
}

impl MappedRange {
    /// Where the backend begins in QEMU's address space, from the answer to `gpa2hva` for this range's address:
    /// `Host virtual address for 0x100000 (ram0) is 0x7fb45bfff000`
    pub(super) fn backend_address(&self, text: &str) -> Option<u64> {
        let told = text.lines().find_map(|line| line.trim().strip_prefix("Host virtual address for "))?;
        let (region, address) = told.split_once(" (")?.1.rsplit_once(") is ")?;
        // The guest may have put something else there since.
        if region != self.region {
            return None;
        }
        hex(address)?.checked_sub(self.offset)
    }
}

/// Reads the answer to `info network`.
pub(crate) fn net_clients(text: &str) -> Vec<NetClient> {
    text.lines().filter_map(net_client).collect()
}

/// ` \ net0: index=0,type=tap,ifname=tap0`; the backslash says that it is connected to the one above.
fn net_client(line: &str) -> Option<NetClient> {
    let (name, about) = line.trim().trim_start_matches("\\ ").split_once(": index=")?;
    let (_, kind) = about.split_once(",type=")?;
    let (kind, about) = kind.split_once(',').unwrap_or((kind, ""));
    Some(NetClient { name: name.into(), kind: kind.into(), about: about.into() })
}

/// Reads the answer to `info registers`: the processor is one of Intel's kind and was told to be ready for guests.
pub(super) fn vmx_is_on(text: &str) -> bool {
    const CR4_VMXE: u64 = 1 << 13;
    let cr4 = text.split_whitespace().find_map(|word| hex(word.strip_prefix("CR4=")?));
    cr4.is_some_and(|cr4| cr4 & CR4_VMXE != 0)
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok()
}

fn bytes(number: &str, unit: &str) -> Option<u64> {
    let shift = ["B", "KiB", "MiB", "GiB"].iter().position(|known| *known == unit)? * 10;
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS_7_2: &str = "\
              Block Name    PSize              Offset               Used              Total\r
                    ram0    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000\r
                      hp    2 MiB  0x0000000140300000 0x0000000020000000 0x0000000020000000\r
                            4 KiB  0x0000000160300000 0x0000000020000000 0x0000000020000000\r
    /rom@etc/acpi/tables    4 KiB  0x0000000140080000 0x0000000000020000 0x0000000000200000\r
";
    const BLOCKS_10_0: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
              /objects/a    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f50cffff000  rw
         0000:00:01.0/vm    4 KiB  0x0000000010000000 0x0000000010000000 0x0000000010000000 0x00007f50bfffe000  rw
                 pc.bios    4 KiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 0x0000000000000000  ro
";
    /// The same from 7.2 and 10.0 but for the numbers.
    const MEMORY: &str = "\
FlatView #1
 AS \"cpu-smm-0\", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): other owner:{obj path=/objects/other}

FlatView #2
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): /objects/ram0 owner:{obj path=/objects/ram0}
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom parent:{obj path=/machine/unattached}
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000 parent:{obj path=/machine/unattached}
  0000000000100000-000000007fffffff (prio 0, ram): ram0 @0000000000100000 KVM owner:{obj path=/objects/ram0}
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic owner:{dev path=/machine/q35/ioapic}
  0000000100000000-0000000107dfffff (prio 0, nv-ram): nv owner:{obj path=/objects/nv}

FlatView #3
 AS \"mch\", root: bus master container
 Root memory region: (none)
  No rendered FlatView
";
    /// Of a guest that runs Linux.
    const REGISTERS: &str = "\
GDT=     fffffe4bf3b01000 0000007f\r
CR0=80050033 CR2=00007ffe6b1f0ff8 CR3=0000000002a3a000 CR4=003506f0\r
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000\r
";
    const NETWORK: &str = "\
n0: index=0,type=vhost-user,vhost-user0 to vu\r
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r
 \\ n1: index=0,type=user,net=10.0.2.0,restrict=off\r
hub 0\r
 \\ hub0port0: #net1: index=3,type=hubport\r
";
    const ADDRESS: &str = "Host virtual address for 0x100000000 (dm) is 0x7fb4dbfff000\r\n";

    #[test]
    fn ram_blocks_have_page_sizes_and_in_newer_versions_addresses() {
        let block = |name: &str, page_size, address, size| RamBlock {
            name: name.into(),
            page_size: Some(page_size),
            address,
            used: size,
            total: size,
        };
        let old = ram_blocks(BLOCKS_7_2);
        assert_eq!(
            old[..2],
            [block("ram0", 4096, None, Some(0x1_4000_0000)), block("hp", 2 << 20, None, Some(0x2000_0000))]
        );
        assert!(old.iter().all(|block| block.address.is_none()));
        let grows = old.iter().find(|block| block.name == "/rom@etc/acpi/tables").expect("it is there");
        assert_eq!((grows.used, grows.total), (Some(0x2_0000), Some(0x20_0000)));
        assert_eq!(
            ram_blocks(BLOCKS_10_0),
            [
                block("/objects/a", 4096, Some(0x7f50_cfff_f000), Some(0x1000_0000)),
                block("0000:00:01.0/vm", 4096, Some(0x7f50_bfff_e000), Some(0x1000_0000)),
                block("pc.bios", 4096, None, Some(0x4_0000)),
            ]
        );
        let nameless = "Block Name PSize Offset\n            4 KiB  0x0000000007380000 0x08000000\n";
        assert_eq!(ram_blocks(nameless), []);
        // A column more, and columns in another order.
        let newer = "Block Name PSize HVA Colour Total\n a 1 GiB 0x1000 blue 0x0\nnonsense\n\n b x y 0x2000 red\n";
        let b = RamBlock { name: "b".into(), page_size: None, address: Some(0x2000), used: None, total: None };
        let a = RamBlock { used: None, ..block("a", 1 << 30, Some(0x1000), Some(0)) };
        assert_eq!(ram_blocks(newer), [a, b]);
    }

    #[test]
    fn ranges_are_those_of_backends_in_the_guests_memory() {
        let range = |backend: &str, region: &str, guest_address, offset| MappedRange {
            backend: backend.into(),
            region: region.into(),
            guest_address,
            offset,
        };
        assert_eq!(
            mapped_ranges(MEMORY),
            [
                range("ram0", "/objects/ram0", 0, 0),
                range("ram0", "ram0", 0x10_0000, 0x10_0000),
                range("nv", "nv", 0x1_0000_0000, 0)
            ]
        );
        let unreadable =
            "FlatView #0\n AS \"memory\", root: system\n  0-1 (prio 0, ram): a @x owner:{obj path=/objects/a}\n";
        assert_eq!(mapped_ranges(unreadable), [], "an offset that cannot be read is not taken for 0");
    }

    #[test]
    fn where_a_backend_begins_follows_from_where_a_part_of_it_is() {
        let part =
            MappedRange { backend: "dm".into(), region: "dm".into(), guest_address: 1 << 32, offset: 0x8000_0000 };
        assert_eq!(part.backend_address(ADDRESS), Some(0x7fb4_5bff_f000));
        for not in [
            "Host virtual address for 0x100000000 (pc.rom) is 0x7fb4dbfff000",
            "Host virtual address for 0x100000000 (dm) is 0x1000",
            "Memory at address 0x100000000 is not RAM",
            "No memory is mapped at address 0x100000000",
            "",
        ] {
            assert_eq!(part.backend_address(not), None, "{not}");
        }
    }

    #[test]
    fn net_clients_have_a_name_and_a_type() {
        let clients = net_clients(NETWORK);
        let told: Vec<_> = clients.iter().map(|it| (it.name.as_str(), it.kind.as_str(), it.about.as_str())).collect();
        assert_eq!(
            told,
            [
                ("n0", "vhost-user", "vhost-user0 to vu"),
                ("virtio-net-pci.0", "nic", "model=virtio-net-pci,macaddr=52:54:00:12:34:56"),
                ("n1", "user", "net=10.0.2.0,restrict=off"),
                ("hub0port0: #net1", "hubport", ""),
            ]
        );
    }

    /// Any text, and recorded text with anything in the place of one character.
    fn nearly_an_answer() -> impl Strategy<Value = String> {
        let recorded = prop::sample::select(vec![BLOCKS_7_2, BLOCKS_10_0, MEMORY, NETWORK, ADDRESS]);
        let spoilt =
            (recorded, any::<prop::sample::Index>(), "(\\PC|[ \\n:@()\\-]){0,20}").prop_map(|(text, at, words)| {
                let at = at.index(text.len());
                format!("{}{words}{}", &text[..at], &text[at + 1..])
            });
        prop_oneof![any::<String>(), spoilt]
    }

    #[test]
    fn a_guest_that_is_a_hypervisor_is_known_by_its_registers() {
        assert!(!vmx_is_on(REGISTERS) && !vmx_is_on("PC=0000000040000000 X00=0\n"));
        assert!(vmx_is_on(&REGISTERS.replace("CR4=003506f0", "CR4=003526f0")));
    }

    proptest! {
        #[test]
        fn no_answer_is_a_panic(text in nearly_an_answer()) {
            let range = MappedRange { backend: "dm".into(), region: "dm".into(), guest_address: 0, offset: 1 };
            let _ = (ram_blocks(&text), mapped_ranges(&text), range.backend_address(&text), net_clients(&text));
        }

        #[test]
        fn a_size_and_an_address_are_read_or_not(number in ".{0,24}", unit in "(B|KiB|MiB|GiB|.{0,3})") {
            let _ = (bytes(&number, &unit), hex(&number));
        }
    }
}
