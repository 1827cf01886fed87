//! Turning the guest off: when it is told to, or when its power button is pressed (QEMU's `system_powerdown`).
//!
//! Debian's cloud kernel has the driver of the power button as a module only, and a module would have to come from the
//! very kernel that is booted. The button needs no driver, though: in ACPI (specification, 4.8.2 and 4.8.3.1) it is bit
//! 8 of a register whose port the FADT names, the kernel's ACPI core takes the interrupt once that bit is enabled, and
//! counts it where we can read it.

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::console::Console;
use crate::kernel;

const POWER_BUTTON: u16 = 1 << 8;
const PRESSES: &str = "/sys/firmware/acpi/interrupts/ff_pwr_btn";

/// Off, at once. There is no file system to be synced.
pub(crate) fn off(console: &Console) -> ! {
    console.drain();
    kernel::power_off()
}

/// Suspends the guest to RAM; it goes on when QEMU wakes it.
pub(crate) fn suspend(console: &Console) {
    if let Err(error) = fs::write("/sys/power/state", "mem") {
        console.say(&format!(r#"{{"error":"cannot be suspended: {error}"}}"#));
    }
}

/// Turns the guest off when its power button is pressed. A machine without one (microvm) just has no button.
pub(crate) fn watch_button(console: Arc<Console>) {
    let Ok(fadt) = fs::read("/sys/firmware/acpi/tables/FACP") else { return };
    let Some(port) = enable_port(&fadt) else { return };
    let before = presses();
    if kernel::set_port_bits(port, POWER_BUTTON).is_err() {
        return;
    }
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_millis(100));
            if presses() != before {
                off(&console);
            }
        }
    });
}

/// The port of the PM1 enable register: the second half of the event block, which offset 56 names and offset 88 sizes.
fn enable_port(fadt: &[u8]) -> Option<u16> {
    let block = u32::from_le_bytes(fadt.get(56..60)?.try_into().ok()?);
    let length = u16::from(*fadt.get(88)?);
    let port = u16::try_from(block).ok()?.checked_add(length / 2)?;
    (block != 0 && length >= 4).then_some(port)
}

/// How often the button was pressed: the first number of the file.
fn presses() -> Option<u64> {
    fs::read_to_string(PRESSES).ok()?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_enable_register_is_the_second_half_of_the_event_block() {
        let mut fadt = vec![0; 116];
        fadt[56..60].copy_from_slice(&0x600_u32.to_le_bytes());
        fadt[88] = 4;
        assert_eq!(enable_port(&fadt), Some(0x602));
    }

    #[test]
    fn a_machine_without_the_register_has_no_button() {
        assert_eq!(enable_port(&[0; 116]), None);
        assert_eq!(enable_port(&[0; 20]), None);
    }
}
