//! What the bits of CPUID are called, as QEMU's CPU models call them; which bit each is, Intel's and AMD's manuals say.

/// By leaf, subleaf and register: a name a bit, from bit 0 on.
const NAMES: [(&str, &str); 25] = [
    (
        "0x1.0 ECX",
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca \
         sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    ),
    (
        "0x1.0 EDX",
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx \
         fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    ("0x6.0 EAX", "- - arat"),
    (
        "0x7.0 EBX",
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - zero-fcs-fds mpx \
         - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er \
         avx512cd sha-ni avx512bw avx512vl",
    ),
    (
        "0x7.0 ECX",
        "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - \
         avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks",
    ),
    (
        "0x7.0 EDX",
        "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize - \
         tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d \
         arch-capabilities core-capability ssbd",
    ),
    (
        "0x7.1 EAX",
        "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - \
         amx-fp16 - avx-ifma - - lam",
    ),
    (
        "0x7.1 EDX",
        "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - - prefetchiti - - - - \
         avx10",
    ),
    ("0x7.2 EDX", "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no"),
    ("0xd.1 EAX", "xsaveopt xsavec xgetbv1 xsaves xfd"),
    ("0x12.0 EAX", "sgx1 sgx2 - - - - - - - - - sgx-edeccssa"),
    ("0x12.0 EBX", "sgx-exinfo"),
    ("0x12.1 EAX", "- sgx-debug sgx-mode64 - sgx-provisionkey sgx-tokenkey - sgx-kss - - sgx-aex-notify"),
    ("0x14.0 ECX", "- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - intel-pt-lip"),
    ("0x24.0 EBX", "- - - - - - - - - - - - - - - - avx10-128 avx10-256 avx10-512"),
    ("0x40000001.0 EDX", "kvm-hint-dedicated"),
    (
        "0x80000001.0 ECX",
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt \
         - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    ),
    (
        "0x80000001.0 EDX",
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext \
         3dnow",
    ),
    ("0x80000007.0 EBX", "overflow-recov succor"),
    ("0x80000007.0 EDX", "- - - - - - - - invtsc"),
    (
        "0x80000008.0 EBX",
        "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - stibp-always-on - - - - - - \
         amd-ssbd virt-ssbd amd-no-ssb - amd-psfd",
    ),
    (
        "0x8000000a.0 EDX",
        "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - pause-filter - \
         pfthreshold avic - v-vmsave-vmload vgif - - - - - - - - vnmi - - svme-addr-chk",
    ),
    (
        "0x80000021.0 EAX",
        "no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base - auto-ibrs - - - - - - - - - \
         - - - - - - eraps - - sbpb ibpb-brtype srso-no srso-user-kernel-no",
    ),
    ("0x80000022.0 EAX", "perfmon-v2"),
    ("0xc0000001.0 EDX", "- - xstore xstore-en - - xcrypt xcrypt-en ace2 ace2-en phe phe-en pmm pmm-en"),
];

/// The names of these bits of a word; one that has none is told as it is.
pub(super) fn names(word: &str, bits: u64) -> Vec<String> {
    let known = NAMES.iter().find(|(it, _)| *it == word).map_or("", |(_, names)| names);
    let mut known = known.split_whitespace();
    let named = (0..u64::BITS).map(|bit| (bit, known.next().filter(|name| *name != "-")));
    let set = named.filter(|(bit, _)| bits & 1 << bit != 0);
    set.map(|(bit, name)| name.map_or_else(|| format!("bit {bit} of CPUID {word}"), str::to_owned)).collect()
}

/// This is a feature that CPUID tells, so that who is said not to have it has it not; not one of a model-specific register.
pub(super) fn tells(feature: &str) -> bool {
    NAMES.iter().any(|(_, names)| names.split_whitespace().any(|name| name == feature))
}
