//! What differs between processors: how a system call is made, and which registers that takes.

use nix::libc::user_regs_struct as Registers;

#[cfg(target_arch = "x86_64")]
mod here {
    use super::Registers;

    /// The instruction that makes a system call: `syscall`.
    pub(in crate::kernel) const INSTRUCTION: [u8; 2] = [0x0F, 0x05];
    /// Instructions begin at multiples of this.
    pub(in crate::kernel) const ALIGNMENT: usize = 1;
    pub(in crate::kernel) const CLOSE: u64 = 3;
    pub(in crate::kernel) const IOCTL: u64 = 16;
    pub(in crate::kernel) const USERFAULTFD: u64 = 323;

    /// The code segment of 64-bit programs.
    const CODE_64_BITS: u64 = 0x33;

    /// The registers of a thread that is about to make a system call with the instruction at this address.
    pub(in crate::kernel) fn calling(
        thread: &Registers,
        instruction: u64,
        call: u64,
        arguments: [u64; 3],
    ) -> Registers {
        Registers {
            rip: instruction,
            rax: call,
            rdi: arguments[0],
            rsi: arguments[1],
            rdx: arguments[2],
            // The thread may have been stopped in a system call, which the kernel is not to begin again here.
            orig_rax: u64::MAX,
            ..*thread
        }
    }

    /// What the system call gave back.
    pub(in crate::kernel) fn result(thread: &Registers) -> i64 {
        thread.rax as i64
    }

    /// The thread runs a 64-bit program, as we do.
    pub(in crate::kernel) fn is_like_us(thread: &Registers) -> bool {
        thread.cs == CODE_64_BITS
    }
}

#[cfg(target_arch = "aarch64")]
mod here {
    use super::Registers;

    /// The instruction that makes a system call: `svc #0`.
    pub(in crate::kernel) const INSTRUCTION: [u8; 4] = [0x01, 0x00, 0x00, 0xD4];
    /// Instructions begin at multiples of this.
    pub(in crate::kernel) const ALIGNMENT: usize = 4;
    pub(in crate::kernel) const CLOSE: u64 = 57;
    pub(in crate::kernel) const IOCTL: u64 = 29;
    pub(in crate::kernel) const USERFAULTFD: u64 = 282;

    /// The thread runs a 32-bit program.
    const STATE_32_BITS: u64 = 1 << 4;
    /// After an indirect branch: only a landing pad may follow, which `svc` is not.
    const BRANCH_TYPE: u64 = 3 << 10;

    /// The registers of a thread that is about to make a system call with the instruction at this address.
    ///
    /// If the thread was stopped in a system call, the kernel has already set its registers so that it begins again,
    /// and leaves alone a thread that continues elsewhere.
    pub(in crate::kernel) fn calling(
        thread: &Registers,
        instruction: u64,
        call: u64,
        arguments: [u64; 3],
    ) -> Registers {
        let mut calling = *thread;
        calling.pc = instruction;
        calling.regs[8] = call;
        calling.regs[..3].copy_from_slice(&arguments);
        calling.pstate &= !BRANCH_TYPE;
        calling
    }

    /// What the system call gave back.
    pub(in crate::kernel) fn result(thread: &Registers) -> i64 {
        thread.regs[0] as i64
    }

    /// The thread runs a 64-bit program, as we do.
    pub(in crate::kernel) fn is_like_us(thread: &Registers) -> bool {
        thread.pstate & STATE_32_BITS == 0
    }
}

pub(super) use here::*;

/// Where in this code, which begins at an address that is a multiple of [`ALIGNMENT`], a system call can be made.
///
/// On `x86_64` it may be in the middle of another instruction. That does not matter: it is executed from its first byte.
pub(super) fn find_instruction(code: &[u8]) -> Option<usize> {
    let starts = (0..code.len()).step_by(ALIGNMENT);
    starts.into_iter().find(|start| code[*start..].starts_with(&INSTRUCTION))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_found_where_one_can_begin() {
        let mut code = [0x90; 64];
        assert_eq!(find_instruction(&code), None);
        code[64 - INSTRUCTION.len()..].copy_from_slice(&INSTRUCTION);
        assert_eq!(find_instruction(&code), Some(64 - INSTRUCTION.len()));
        assert_eq!(find_instruction(&code[..63]), None);
    }
}
