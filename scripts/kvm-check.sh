#!/usr/bin/env bash
# What a migration costs a guest under this host's KVM, in ten minutes at most: a report to send.
#
# Much of what KVM does to a migration differs from processor to processor, and from kernel to kernel. This tells what it
# is here: which KVM it is, what it costs a guest that its writes are tracked, and what some migrations do to it, all on
# this machine, between two hosts that are made on it and go when it ends. Where KVM emulates kernels, as in some clouds,
# a guest is measured that needs none; elsewhere Linux is, too.
#
# The report names no host, address or user. What is not known stays out, and says why.
set -uo pipefail
cd "$(dirname "$0")/.."

MOST=570 # seconds, so that what is under way then can still clean up within ten minutes
VMFERRY=${VMFERRY:-target/release/vmferry}
REPORT=${1:-target/kvm-check-$(date +%Y%m%d-%H%M%S).txt}

stop() {
    echo "kvm-check: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || stop "needs root, for network namespaces and for KVM's counters: sudo make kvm-check"
[ -x "$VMFERRY" ] || stop "$VMFERRY is missing: make build"
[ -e /dev/kvm ] || stop "there is no /dev/kvm here"

work=$(mktemp -d) || exit 1
counters=""         # the folder of KVM's counters
mounted=""          # ours, and to be unmounted
sampler=""          # its process
clean_up() {
    [ -z "$sampler" ] || { kill "$sampler" && wait "$sampler"; } 2>/dev/null
    [ -z "$mounted" ] || umount "$mounted"
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

mkdir -p "$(dirname "$REPORT")"
: >"$REPORT"
say() { echo "$*" >>"$REPORT"; }
part() {
    printf '\n== %s\n' "$*" >>"$REPORT"
    echo "kvm-check: $* (after $SECONDS s)"
}

# --- the host ---------------------------------------------------------------------------------------------------------

# told NAME FILE: what a file of the kernel says, in one line.
told() { say "$(printf '%-44s %s' "$1" "$(cat "$2" 2>/dev/null | tr '\n' ' ' | cut -c1-120)")"; }

tell_host() {
    part "the host"
    say "vmferry     $("$VMFERRY" --version), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    say "kernel      $(uname -srvm)"
    say "processor   $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) of them"
    say "flags       $(grep -m1 '^flags' /proc/cpuinfo | grep -owE 'vmx|svm|ept|npt|hypervisor|pml|ept_ad|avic|pdpe1gb' | sort -u | tr '\n' ' ')"
    say "vmx flags   $(grep -m1 '^vmx flags' /proc/cpuinfo | cut -d: -f2)"
    say "memory      $(awk '/^MemTotal|^MemAvailable|^HugePages_Total/ { printf "%s %s %s  ", $1, $2, $3 }' /proc/meminfo)"
    say "load        $(cut -d' ' -f1-3 /proc/loadavg) before anything was measured"
    say "QEMU        $(qemu-system-x86_64 --version 2>/dev/null | head -n 1)"
    say "another     $(target/qemu-second/bin/qemu-system-x86_64 --version 2>/dev/null | head -n 1)"
    say "measured is the newer of the two."

    part "KVM and memory, as they are set"
    local file
    for file in /sys/module/kvm*/parameters/*; do
        [ ! -r "$file" ] || told "${file#/sys/module/}" "$file"
    done
    # On: the guest's kernel is told of a page that is missing, and does something else meanwhile.
    say "$(printf '%-44s %s' "async page faults (CONFIG_KVM_ASYNC_PF)" "$(zgrep -hs CONFIG_KVM_ASYNC_PF= /proc/config.gz "/boot/config-$(uname -r)" 2>/dev/null | head -n 1)")"
    for file in /sys/kernel/mm/transparent_hugepage/{enabled,defrag,shmem_enabled,khugepaged/defrag} \
        /proc/sys/vm/unprivileged_userfaultfd /proc/sys/kernel/yama/ptrace_scope /sys/kernel/mm/ksm/run \
        /proc/sys/kernel/numa_balancing /sys/devices/system/clocksource/clocksource0/current_clocksource; do
        [ ! -r "$file" ] || told "$file" "$file"
    done
}

# --- what KVM counts --------------------------------------------------------------------------------------------------

find_counters() {
    local at
    for at in /sys/kernel/debug "$work/debug"; do
        if [ "$at" = "$work/debug" ]; then
            mkdir "$at"
            mount -t debugfs none "$at" 2>/dev/null || break
            mounted=$at
        fi
        # What may be read by its mode may be forbidden by a lockdown.
        if [ -n "$(cat "$at/kvm/exits" 2>/dev/null)" ]; then
            counters=$at/kvm
            return
        fi
    done
}

COUNTED="exits pf_fixed pf_taken pf_mmio_spte_created tlb_flush remote_tlb_flush mmu_shadow_zapped mmu_unsync halt_exits io_exits pages_4k pages_2m"

# Each second a line: the time; for how many ms of it our QEMUs ran their guests, and for how many the kernel worked for
# them; and KVM's counters, which are those of all VMs of the host.
sample() {
    local tick pid name last_guest=-1 last_kernel=0 guest kernel now
    tick=$(getconf CLK_TCK)
    while sleep 1; do
        guest=0 kernel=0
        for pid in $(grep -lzs 'vmferry\.mode=' /proc/[0-9]*/cmdline | cut -d/ -f3); do
            case "$(cat "/proc/$pid/comm" 2>/dev/null)" in qemu-system*) ;; *) continue ;; esac
            # shellcheck disable=SC2046 # Fields, of which the first is the state.
            set -- $(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null)
            [ $# -gt 41 ] || continue
            kernel=$((kernel + ${13} * 1000 / tick)) guest=$((guest + ${41} * 1000 / tick))
        done
        now=$SECONDS
        if [ "$last_guest" -ge 0 ] && [ "$guest" -ge "$last_guest" ] && [ "$guest$kernel" != 00 ]; then
            printf '%s %s %s' "$now" $((guest - last_guest)) $((kernel - last_kernel))
            if [ -n "$counters" ]; then
                for name in $COUNTED; do printf ' %s' "$(cat "$counters/$name" 2>/dev/null || echo -)"; done
            fi
            echo
        fi
        last_guest=$guest last_kernel=$kernel
    done
}

# What the samples say: each second's difference.
tell_samples() {
    [ -s "$work/samples" ] || { say "no second of it was seen in /proc"; return; }
    say "each second: for how many ms of it QEMU ran the guest, and the kernel worked for it${counters:+; then what KVM counted}"
    # shellcheck disable=SC2086 # Words.
    { [ -n "$counters" ] && printf '%8s%8s%8s' second guest kernel && printf '%22s' $COUNTED || printf '%8s%8s%8s' second guest kernel; echo; } >>"$REPORT"
    awk '{
        line = sprintf("%8d%8d%8d", $1, $2, $3)
        for (i = 4; i <= NF; i++) line = line sprintf("%22s", ($i == "-" || !(i in last) || $i < last[i]) ? "-" : $i - last[i])
        for (i = 4; i <= NF; i++) last[i] = $i
        print line
    }' "$work/samples" >>"$REPORT"
    [ -n "$counters" ] || say "KVM's counters cannot be read here: /sys/kernel/debug/kvm is not there, or forbidden"
}

# --- measurements -----------------------------------------------------------------------------------------------------

# measure SECONDS WHAT COMMAND...: its table goes into the report. Left out when it might not be over in time.
measure() {
    local most=$1 what=$2 status
    shift 2
    if [ $((SECONDS + most)) -gt $MOST ]; then
        say "$what: left out, there was no time"
        return 1
    fi
    # Ctrl-C is what it cleans up after, from a terminal too.
    timeout --foreground --signal=INT --kill-after=20 "$most" "$VMFERRY" bench "$@" >"$work/said" 2>"$work/told"
    status=$?
    sed '/^$/d; s/ QEMU in [^,]*,//' "$work/said" >>"$REPORT"
    [ $status = 0 ] || say "$what: $([ $status = 124 ] && echo "not over within $most s" || echo "failed"): $(tail -n 2 "$work/told" | tr '\n' ' ')"
    return $status
}

# Whether KVM runs a guest, and an ordinary one: asked of `bench ram` with no set-up.
try_kvm() {
    part "does KVM run guests?"
    if ! "$VMFERRY" bench ram --rounds 1 --accel kvm --only '(none)' >/dev/null 2>"$work/told"; then
        say "no: $(tail -n 1 "$work/told")"
        return 1
    fi
    if "$VMFERRY" bench ram --rounds 1 --only '(none)' 2>/dev/null | grep -q ', kvm; '; then
        kernels=yes
        say "yes, kernels and programs"
    else
        kernels=no
        say "programs, yes; but it emulates kernels, instruction by instruction: only the guest that needs none is measured"
    fi
}

rows() {
    local text
    for text in "$@"; do measure 100 "$text" ram --rounds 1 "${guest[@]}" --only "$text"; done
}

tell_host
find_counters
kernels=no
if try_kvm; then
    for what in writing reading; do
        part "what tracking costs: a guest that only keeps $what"
        sample >"$work/samples" &
        sampler=$!
        guest=(--accel kvm)
        measure 60 "tracking" ram --rounds 1 "${guest[@]}" --only "$what, tracked and nothing else"
        { kill "$sampler" && wait "$sampler"; } 2>/dev/null
        sampler=""
        tell_samples
    done
    [ $kernels = no ] || guest=()
    part "migrations of $([ $kernels = yes ] && echo Linux || echo 'the guest without a kernel'), each once"
    rows "idle, unshaped: external" "idle, unshaped: qemu" "writing, 1 Gbit/s: external" "writing, 1 Gbit/s: qemu" \
        "hotcold, 1 Gbit/s"
    part "post-copy, and what the guest felt of it"
    measure 60 "post-copy" run --scenario post-copy-1-iters --engine external "${guest[@]}" --vcpus 1 --mem 256M \
        --link 1gbit --before 2s -o "$work/post-copy.json"
    grep -ihE '"[a-z_]*fault[a-z_]*": [^n]' "$work/post-copy.json" >>"$REPORT" ||
        say "how long faults took is not told by this vmferry"
fi
part "the end"
say "load        $(cut -d' ' -f1-3 /proc/loadavg) at the end, after $SECONDS s"
echo
echo "kvm-check: done. Please send this file: $(realpath "$REPORT")"
