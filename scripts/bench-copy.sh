#!/usr/bin/env bash
# An image between two hosts, by `vmferry copy` and by what people use today, side by side: `make bench-copy`, as root.
#
# The hosts are two network namespaces on this machine, made here and removed at the end. Each line is the median of
# ROUNDS (3) runs: seconds until all of it is on the other host's disk, bytes on the wire, room that the copy takes
# there, and processor time of both hosts together. Everybody begins with the image in the page cache.
#
#   SIZE=8G DATA=2G   the image: so large, with so much that does not compress in it, in four pieces
#   RATES="0 1gbit"   of the network; 0 is unshaped
#   FOLDER=/dev/shm   where the images lie: memory by default, so that it is the way there that is measured
#   PEERS="..."       who takes part, of: vmferry vmferry-unverified rsync-ssh rsync-ssh-aes rsyncd scp
#                     nbdcopy qemu-img
#   CLONE=1           with a copy of another image there already, which differs in 3 % of its data, 4 KiB here and there
#   RESUME=1          vmferry only: an agent is killed when half of the data is over, started again, and the copy, too; how
#                     many bytes both tries take together, beside a copy that nobody disturbs
set -euo pipefail
cd "$(dirname "$0")/.."

vmferry=${VMFERRY:-$PWD/target/release/vmferry}
size=${SIZE:-8G} data=${DATA:-2G} rounds=${ROUNDS:-3}
read -ra rates <<<"${RATES:-0 1gbit}"
read -ra peers <<<"${PEERS:-vmferry vmferry-unverified rsync-ssh rsync-ssh-aes rsyncd scp nbdcopy qemu-img}"
# What scripts/setup.sh has unpacked is not installed, and its library is beside it.
sshd=$(command -v sshd || echo "$PWD/target/sshd/usr/sbin/sshd")
sshd_libraries=$(dirname "$sshd")/../lib/$(uname -m)-linux-gnu

for tool in "$vmferry" ip tc ssh-keygen "$sshd" rsync scp nbdkit nbdcopy qemu-img qemu-nbd; do
    command -v "$tool" >/dev/null || { echo "bench-copy: $tool is missing" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "bench-copy: needs root, for network namespaces" >&2; exit 1; }

work=$(mktemp -d "${FOLDER:-/dev/shm}/vmferry-bench-copy-XXXXXX")
here=vmferry-copy-$$-a there=vmferry-copy-$$-b
clean_up() {
    ip netns del "$here" 2>/dev/null || true
    ip netns del "$there" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT

in_a() { ip netns exec "$here" "$@"; }
in_b() { ip netns exec "$there" "$@"; }

ip netns add "$here"
ip netns add "$there"
ip -n "$here" link add link0 type veth peer name link0 netns "$there"
number=1
for host in "$here" "$there"; do
    ip -n "$host" address add "192.0.2.$number/24" dev link0
    ip -n "$host" link set lo up
    ip -n "$host" link set link0 up
    number=2
done
to=192.0.2.2

# --- the image --------------------------------------------------------------------------------------------------------

bytes() { numfmt --from=iec "$1"; }
source_image=$work/source.raw target=$work/there/copy.raw known=$work/there/known.raw
mkdir "$work/there"
truncate -s "$size" "$source_image"
piece=$(($(bytes "$data") / 4 / 1048576))
apart=$(($(bytes "$size") / 4 / 1048576))
for at in 0 1 2 3; do
    dd if=/dev/urandom of="$source_image" bs=1M count=$piece seek=$((at * apart)) conv=notrunc status=none
done
if [ -n "${CLONE:-}" ]; then
    cp --sparse=always "$source_image" "$known"
    # It rests, and so it gets an index.
    touch --date '1 hour ago' "$known"
    # Every 33rd page of the data is another one.
    for at in 0 1 2 3; do
        for ((page = 0; page < piece * 256; page += 33)); do
            printf '%d\n' $((at * apart * 256 + page))
        done
    done | VMFERRY_IMAGE=$source_image perl -ne '
        BEGIN { open F, "+<", $ENV{VMFERRY_IMAGE} or die; binmode F }
        seek F, $_ * 4096 + 100, 0; print F pack "N2", $_, 0x5eed' -
fi

# --- who copies -------------------------------------------------------------------------------------------------------

ssh_dir=$work/ssh
mkdir "$ssh_dir"
for key in host user; do ssh-keygen -q -t ed25519 -N "" -f "$ssh_dir/$key"; done
cat >"$ssh_dir/config" <<END
ListenAddress $to:2222
HostKey $ssh_dir/host
AuthorizedKeysFile $ssh_dir/user.pub
UsePAM no
StrictModes no
PidFile none
PermitRootLogin prohibit-password
LogLevel ERROR
Subsystem sftp internal-sftp
END
mkdir -p /run/sshd
cp /etc/passwd "$work/passwd"
grep -q ^sshd: "$work/passwd" || echo "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin" >>"$work/passwd"
ssh_options=(-i "$ssh_dir/user" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR)
printf 'use chroot = no\n[there]\npath = %s\nread only = no\nuid = root\ngid = root\n' "$work/there" >"$work/rsyncd.conf"

for host in a b; do
    mkdir "$work/$host"
    printf 'name = "%s"\nrun_dir = "%s"\nstate_dir = "%s"\nimage_folders = ["%s"]\n' \
        "$host" "$work/$host/run" "$work/$host/state" "$work/there" >"$work/$host.toml"
done
a_socket=$work/a/run/agent.sock b_socket=$work/b/run/agent.sock

# Starts something in the background that ends with the run, and waits until this is so.
daemons=()
start() {
    local ready=$1
    shift
    "$@" >>"$work/daemons.log" 2>&1 &
    daemons+=($!)
    for _ in $(seq 200); do
        if eval "$ready"; then return; fi
        sleep 0.05
    done
    echo "bench-copy: does not start: $* (see below)" >&2
    tail "$work/daemons.log" >&2
    exit 1
}
listens() { in_b ss -Hltn "sport = :$1" | grep -q .; }

agent_a() { start "[ -S $a_socket ]" ip netns exec "$here" "$vmferry" agent --config "$work/a.toml" --listen 192.0.2.1:7420; }
agent_b() { start "[ -S $b_socket ]" ip netns exec "$there" "$vmferry" agent --config "$work/b.toml" --listen "$to:7420"; }

serve() {
    case $1 in
    vmferry*)
        agent_b
        agent_a
        ;;
    rsync-ssh* | scp)
        # It has a mount namespace of its own, in which its user may be made up.
        # shellcheck disable=SC2016 # They are the inner shell's.
        start "listens 2222" ip netns exec "$there" sh -c \
            'mount --bind "$1" /etc/passwd && export LD_LIBRARY_PATH="$2" && exec "$3" -D -e -f "$4"' \
            sh "$work/passwd" "$sshd_libraries" "$sshd" "$ssh_dir/config"
        ;;
    rsyncd) start "listens 873" ip netns exec "$there" rsync --daemon --no-detach --config "$work/rsyncd.conf" ;;
    nbdcopy)
        truncate -s "$size" "$target"
        start "listens 10809" ip netns exec "$there" nbdkit -f -i "$to" file "$target"
        ;;
    qemu-img)
        truncate -s "$size" "$target"
        start "listens 10809" ip netns exec "$there" qemu-nbd -t -b "$to" -f raw --discard=unmap --detect-zeroes=unmap -e 8 "$target"
        ;;
    esac
}

copy() {
    case $1 in
    vmferry) in_a "$vmferry" copy --socket "$a_socket" "$source_image" "b:$target" ;;
    vmferry-unverified) in_a "$vmferry" copy --no-verify --socket "$a_socket" "$source_image" "b:$target" ;;
    rsync-ssh) in_a rsync --sparse -e "ssh -p 2222 ${ssh_options[*]}" "$source_image" "$to:$target" ;;
    rsync-ssh-aes) in_a rsync --sparse -e "ssh -p 2222 -c aes128-gcm@openssh.com ${ssh_options[*]}" "$source_image" "$to:$target" ;;
    rsyncd) in_a rsync --sparse "$source_image" "rsync://$to/there/copy.raw" ;;
    scp) in_a scp -q -P 2222 "${ssh_options[@]}" "$source_image" "$to:$target" ;;
    nbdcopy) in_a nbdcopy -C 4 --destination-is-zero --flush "$source_image" "nbd://$to" ;;
    qemu-img) in_a qemu-img convert -n -W -m 16 --target-is-zero -f raw -O raw "$source_image" "nbd://$to" ;;
    esac
}

on_wire() { in_a cat /sys/class/net/link0/statistics/tx_bytes; }

# One run, in a shell of its own, whose children's processor time is that of the run.
run() {
    local peer=$1
    rm -f "$target"
    serve "$peer"
    local sent_before begun ended
    sent_before=$(on_wire)
    begun=$(date +%s.%N)
    copy "$peer" >>"$work/daemons.log" 2>&1 || { tail -n 5 "$work/daemons.log" >&2; exit 1; }
    sync "$target"
    ended=$(date +%s.%N)
    local sent=$(($(on_wire) - sent_before))
    kill "${daemons[@]}"
    wait "${daemons[@]}" 2>/dev/null || true
    # The shell's own line, then its children's.
    times >"$work/times"
    cmp "$source_image" "$target"
    local cpu
    cpu=$(tail -n 1 "$work/times" | tr 'ms' '  ' | awk '{ print $1 * 60 + $2 + $3 * 60 + $4 }')
    echo "$(awk "BEGIN { print $ended - $begun }") $sent $(($(stat -c %b "$target") * 512)) $cpu"
}

# A copy with an agent (a, b) that is killed when half of the data is over, or with none: bytes, and seconds of the copies.
resumed() {
    local killed=$1 sent_before begun copying agent status
    rm -f "$target" "$target.vmferry-part"
    serve vmferry
    sent_before=$(on_wire)
    begun=$(date +%s.%N)
    if [ "$killed" != - ]; then
        copy vmferry >>"$work/daemons.log" 2>&1 &
        copying=$!
        while [ $(($(on_wire) - sent_before)) -lt $(($(bytes "$data") / 2)) ]; do sleep 0.01; done
        agent=${daemons[0]} # b is started first
        if [ "$killed" = a ]; then agent=${daemons[1]}; fi
        kill -9 "$agent"
        wait "$agent" 2>/dev/null || true
        rm "$work/$killed/run/agent.sock"
        "agent_$killed"
        status=0
        wait "$copying" || status=$?
        if [ "$status" = 0 ]; then echo "bench-copy: the copy did not end when its agent did" >&2; exit 1; fi
    fi
    copy vmferry >>"$work/daemons.log" 2>&1 || { tail -n 5 "$work/daemons.log" >&2; exit 1; }
    echo "$(($(on_wire) - sent_before)) $(awk "BEGIN { print $(date +%s.%N) - $begun }")"
    kill "${daemons[@]}" 2>/dev/null || true
    wait "${daemons[@]}" 2>/dev/null || true
    cmp "$source_image" "$target"
}

median() { sort -g | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }

# Each knows the other.
(
    serve vmferry
    "$vmferry" pair --socket "$a_socket" "$("$vmferry" pair --quiet --socket "$b_socket")" >/dev/null
    if [ -n "${CLONE:-}" ]; then
        for _ in $(seq 600); do
            if compgen -G "$work/b/state/known/*.known" >/dev/null; then break; fi
            sleep 0.2
        done
    fi
    kill "${daemons[@]}"
    wait "${daemons[@]}" 2>/dev/null || true
)

shape() {
    for host in "$here" "$there"; do
        tc -n "$host" qdisc del dev link0 root 2>/dev/null || true
        if [ "$1" != 0 ]; then tc -n "$host" qdisc add dev link0 root tbf rate "$1" burst 256kb latency 50ms; fi
    done
}

if [ -n "${RESUME:-}" ]; then
    printf '| network | killed at half | sent, MiB | more than undisturbed | seconds |\n| --- | --- | --- | --- | --- |\n'
    for rate in "${rates[@]}"; do
        shape "$rate"
        whole=0
        for killed in - a b; do
            (resumed "$killed") >"$work/resumed"
            read -r sent seconds <"$work/resumed"
            if [ "$killed" = - ]; then whole=$sent; fi
            awk -v network="$rate" -v killed="$killed" -v sent="$sent" -v whole="$whole" -v seconds="$seconds" 'BEGIN {
                if (network == "0") network = "unshaped"
                name["-"] = "nobody"; name["a"] = "the agent that reads"; name["b"] = "the agent that writes"
                printf "| %s | %s | %d | %.2f %% | %.1f |\n", network, name[killed], sent / 1048576, \
                    (sent / whole - 1) * 100, seconds
            }'
        done
    done
    exit
fi

printf '| network | who | seconds | of the wire | sent, MiB | allocated there, MiB | CPU s a GiB of data |\n'
printf '| --- | --- | --- | --- | --- | --- | --- |\n'
for rate in "${rates[@]}"; do
    shape "$rate"
    for peer in "${peers[@]}"; do
        rm -f "$work/runs"
        for _ in $(seq "$rounds"); do (run "$peer") >>"$work/runs"; done
        column() { cut -d ' ' -f "$1" "$work/runs" | median; }
        seconds=$(column 1) cpu=$(column 4)
        share=-
        if [ "$rate" != 0 ]; then
            wire=$(($(numfmt --from=si "$(tr -d 'bit' <<<"$rate" | tr gmk GMK)") / 8))
            share=$(awk "BEGIN { printf \"%.2f\", $(bytes "$data") / $wire / $seconds }")
        fi
        awk -v network="$rate" -v who="$peer" -v seconds="$seconds" -v share="$share" -v sent="$(column 2)" \
            -v there="$(column 3)" -v cpu="$cpu" -v data="$(bytes "$data")" 'BEGIN {
                if (network == "0") network = "unshaped"
                printf "| %s | %s | %.1f | %s | %d | %d | %.2f |\n", network, who, seconds, share, sent / 1048576, \
                    there / 1048576, cpu / (data / 1073741824)
            }'
    done
done
