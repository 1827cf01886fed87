#!/usr/bin/env bash
# Builds the initial RAM disk of a guest that runs fio on a file system, over and over, and says how that went:
# scripts/build-fio-guest.sh OUTPUT. Its kernel is target/guest/vmlinuz with "fs=ext4" or "fs=xfs" in its command line,
# its disk the first virtio-blk one, on which such a file system is. `stop`, typed into its console, has it unmounted.
set -euo pipefail
output=$(realpath "$1")
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{bin,dev,mnt,modules,proc,sys}
for program in busybox fio; do
    cp "$(command -v "$program")" "$work/bin/$program"
    # What it is linked with, where it looks for that; nothing, if it is static.
    { ldd "$work/bin/$program" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r library; do
        mkdir -p "$work$(dirname "$library")"
        cp --dereference "$library" "$work$library"
    done
done
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk libcrc32c xfs; do
    cp "target/guest/modules/$module.ko" "$work/modules/"
    echo "$module" >>"$work/modules/order"
done

cat >"$work/init" <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
while read -r module; do insmod "/modules/$module.ko" || echo "no $module"; done </modules/order
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] || sleep 1; done
fs=$(sed 's/.*fs=\([a-z0-9]*\).*/\1/' /proc/cmdline)
mount -t "$fs" /dev/vda /mnt || { echo "FAILED to mount" && sleep 1d; }
(while read -r line; do [ "$line" != stop ] || : >/stop; done) </dev/console &
round=0
while [ ! -e /stop ]; do
    round=$((round + 1))
    # Written with syncs in between, read back, and compared with what it must be.
    if fio --name="v$((round % 3))" --directory=/mnt --size=6M --bs=4k --rw=randwrite --fsync=64 --verify=crc32c \
        --do_verify=1 --verify_fatal=1 --end_fsync=1 --minimal >/dev/null 2>/fio.err; then
        echo "round $round verified"
    else
        echo "FAILED in round $round: $(cat /fio.err)"
    fi
done
umount /mnt && echo "unmounted after $round"
while :; do sleep 60; done
END
chmod +x "$work/init"
(cd "$work" && find . | cpio --quiet --create --format newc --owner 0:0) | gzip -1 >"$output.new"
mv "$output.new" "$output"
