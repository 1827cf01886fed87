//! What keeps a measurement from being run at all, found out before anything is started.

use super::{RunError, RunOptions, Transport};
use crate::GuestKind;
use crate::report::size;

/// For QEMU itself and what else runs, in bytes.
const SPARE: u64 = 256 << 20;

/// Capabilities of a process by their bits (linux/capability.h), and why they are needed.
const RIGHTS: [(u32, &str); 2] =
    [(21, "CAP_SYS_ADMIN, to make network namespaces"), (12, "CAP_NET_ADMIN, to join and shape them")];

/// Refuses what cannot work here.
pub(super) fn look_for_obstacles(options: &RunOptions) -> Result<(), RunError> {
    let skip = |reason: String| Err(RunError::CannotHere { reason });
    let scenario = &options.scenario;
    if !scenario.engines.contains(&options.engine) {
        let others: Vec<String> = scenario.engines.iter().map(ToString::to_string).collect();
        return skip(format!("{} is for the engine {}, not {}", scenario.name, others.join(" or "), options.engine));
    }
    if options.kind == GuestKind::Bare && (options.vcpus > 1 || options.to.is_some()) {
        let why = "the guest that needs no kernel has one processor, and goes between two hosts on this one".into();
        return Err(RunError::Senseless { why });
    }
    match options.transport {
        _ if options.to.is_some() => {
            if options.transport != Transport::Link || options.link_bits.is_some() {
                return Err(RunError::Senseless {
                    why: "the link to another host is what it is: --transport and --link are for two hosts on this one"
                        .into(),
                });
            }
        }
        Transport::Link => {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            if let Some(missing) = missing_rights(&status) {
                return Err(RunError::NoRights { missing });
            }
        }
        Transport::Tcp | Transport::Unix if options.link_bits.is_some() => {
            return Err(RunError::Senseless {
                why: "only a link between two hosts can be shaped: --transport link".into(),
            });
        }
        Transport::Unix if options.by_agents() => {
            return skip("agents talk over TCP; only QEMU itself migrates over a Unix socket".into());
        }
        Transport::Rdma => {
            let devices = std::fs::read_dir("/sys/class/infiniband").map_or(0, Iterator::count);
            return skip(match devices {
                0 => "this host has no RDMA device".into(),
                _ => "RDMA between two guests of one host is not measured yet".into(),
            });
        }
        Transport::Tcp | Transport::Unix => {}
    }
    let guests_here = if options.to.is_some() { 1 } else { 2 };
    let needed = guests_here * options.ram() + SPARE;
    let free = available_memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
    if free.is_some_and(|free| free < needed) {
        return Err(RunError::NoMemory { needed: size(needed), free: size(free.unwrap_or(0)) });
    }
    Ok(())
}

fn missing_rights(status: &str) -> Option<String> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let held = u64::from_str_radix(line.trim(), 16).ok()?;
    let missing: Vec<&str> = RIGHTS.iter().filter(|(bit, _)| held >> bit & 1 == 0).map(|(_, why)| *why).collect();
    (!missing.is_empty()).then(|| missing.join("; and "))
}

fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_that_are_missing_are_named() {
        assert_eq!(missing_rights("CapEff:\t000001ffffffffff\n"), None);
        let none = missing_rights("CapEff:\t0000000000000000\n").unwrap();
        assert!(none.contains("CAP_SYS_ADMIN") && none.contains("CAP_NET_ADMIN"), "{none}");
        let one = missing_rights(&format!("CapEff:\t{:016x}\n", 1u64 << 21)).unwrap();
        assert!(!one.contains("CAP_SYS_ADMIN") && one.contains("CAP_NET_ADMIN"), "{one}");
    }

    #[test]
    fn free_memory_is_what_the_kernel_says_is_available() {
        assert_eq!(available_memory("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available_memory(""), None);
    }
}
