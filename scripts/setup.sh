#!/usr/bin/env bash
# Makes a fresh Debian 12 or 13 able to build vmferry and run its demo (and, with --for-tests, its tests).
#
# Run it as often as you like: it does nothing, and says nothing, when everything is there. Debian packages are installed
# only where a tool is missing; everything else it fetches goes under target/ and nowhere else:
#
#   target/guest/vmlinuz         the kernel of the measuring guest, out of Debian's own package, which is not installed
#   target/guest/modules/        some of its modules
#   target/guest/fio.gz          --for-tests: a guest that runs fio on a file system
#   target/qemu-second/          --for-tests: a QEMU of another major version, to migrate between the two
#   target/sshd/                 --for-tests: an sshd to measure the link beside, never started but by the measurement
#   target/apt/                  --for-tests: apt's lists and downloads for that second QEMU, apart from the system's
set -euo pipefail
cd "$(dirname "$0")/.."

for_tests=no
case "${1:-}" in
"") ;;
--for-tests) for_tests=yes ;;
*)
    echo "usage: scripts/setup.sh [--for-tests]" >&2
    exit 2
    ;;
esac

say() { echo "setup: $*"; }
stop() {
    echo "setup: $*" >&2
    exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort --version-sort | head -n 1)" = "$1" ]; } # at_least 1.89 1.95.0

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        stop "needs root for: $*   (no sudo here: run that as root, then start again)"
    fi
}

only_on_debian() {
    has apt-get || stop "$1 is missing, and this script knows only Debian's apt: please install it yourself"
}

# Refreshes the package lists, once in a run and only when something is to be fetched.
lists_are_fresh=no
refresh_lists() {
    [ "$lists_are_fresh" = no ] || return 0
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update ||
        stop "apt-get update failed (see above): is the network, or the Debian mirror, out of reach?"
    lists_are_fresh=yes
}

# Says why, then installs Debian packages: install_packages "why" package...
install_packages() {
    local why=$1
    shift
    only_on_debian "$*"
    say "installing $* ($why)"
    refresh_lists
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@" >/dev/null ||
        stop "apt-get install $* failed (see above)"
}

version_apt_offers() { apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'; }

# --- tools ------------------------------------------------------------------------------------------------------------

install_missing_tools() {
    has qemu-system-x86_64 || install_packages "the hypervisor that vmferry moves guests between" qemu-system-x86
    has cc || install_packages "Rust links with it" gcc libc6-dev
    # Compiles nothing: only asks where the linker would find the file, which it echoes bare when there is none.
    [ "$(cc -print-file-name=libc.a)" != libc.a ] || install_packages "the measuring guest's init is static" libc6-dev
    has make || install_packages "make demo, make test" make
    has ip || install_packages "hosts in network namespaces" iproute2
}

# --- Rust -------------------------------------------------------------------------------------------------------------

RUST_NEEDED=1.89

cargo_version() { cargo --version 2>/dev/null | awk '{ print $2 }'; }

install_rust() {
    local version
    if has cargo; then
        version=$(cargo_version)
        if [ -n "$version" ] && at_least "$RUST_NEEDED" "$version"; then return; fi
    fi
    local why="vmferry needs Rust $RUST_NEEDED or newer"
    local advice="$why and Debian offers none here: install it with rustup, then start again"
    has apt-cache || stop "$advice"
    refresh_lists
    if has rustup; then # An older toolchain of rustup's stands before anything of Debian's in the PATH.
        stop "$why, this is cargo ${version:-without a toolchain}: run 'rustup update stable' and 'rustup default stable'"
    fi
    # Debian's rustc-web is the newer Rust that it keeps for browsers; it takes the place of rustc.
    if version=$(version_apt_offers cargo-web) && [ -n "$version" ] && at_least "$RUST_NEEDED" "$version"; then
        install_packages "$why" cargo-web rustc-web
    elif version=$(version_apt_offers cargo) && [ -n "$version" ] && at_least "$RUST_NEEDED" "$version"; then
        install_packages "$why" cargo rustc
    elif [ -n "$(version_apt_offers rustup)" ]; then
        install_packages "$why" rustup
        say "rustup toolchain install stable ($why)"
        rustup toolchain install --profile minimal stable && rustup default stable ||
            stop "rustup could not install Rust (see above)"
    else
        stop "$advice"
    fi
    hash -r
    at_least "$RUST_NEEDED" "$(cargo_version)" || stop "$why, but $(command -v cargo) is $(cargo_version)"
}

install_nextest() {
    [ ! -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo-nextest" ] || return 0
    ! has cargo-nextest || return 0
    say "cargo install cargo-nextest --locked (runs the tests; takes some minutes)"
    cargo install --quiet --locked cargo-nextest || stop "cargo install cargo-nextest failed (see above)"
}

# --- the measuring guest's kernel -------------------------------------------------------------------------------------

fetch_guest_kernel() {
    [ ! -s target/guest/vmlinuz ] || [ ! -d target/guest/modules ] || return 0
    only_on_debian "target/guest/vmlinuz"
    [ "$(dpkg --print-architecture)" = amd64 ] || stop "the measuring guest is an x86-64 one; this is $(dpkg --print-architecture)"
    [ -n "$(version_apt_offers linux-image-cloud-amd64)" ] || refresh_lists
    local work=target/guest/unpacking
    rm -rf "$work"
    mkdir -p "$work"
    if ! download_kernel_package "$work"; then
        refresh_lists # The lists may be older than what the mirror still has.
        download_kernel_package "$work" || stop "Debian's cloud kernel cannot be downloaded (see above)"
    fi
    dpkg-deb --fsys-tarfile "$work"/*.deb | tar --extract --directory "$work" --wildcards './boot/vmlinuz-*' \
        '*/drivers/virtio/*.ko' '*/virtio_blk.ko' '*/libcrc32c.ko' '*/xfs.ko'
    mkdir "$work/modules"
    find "$work/lib" -name '*.ko' -exec mv --target-directory "$work/modules" {} +
    rm -rf target/guest/modules
    mv "$work/modules" target/guest/modules
    mv "$work"/boot/vmlinuz-* target/guest/vmlinuz
    say "target/guest/vmlinuz is the kernel of $(basename "$work"/*.deb)"
    rm -rf "$work"
}

# linux-image-cloud-amd64 itself is empty: it depends on the package of the newest kernel.
download_kernel_package() {
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-[0-9]/ { print $2; exit }')
    [ -n "$package" ] || stop "apt knows no linux-image-cloud-amd64: is Debian's main archive among its sources?"
    (cd "$1" && apt-get -qq -o APT::Sandbox::User=root download "$package")
}

# --- a second QEMU, for tests -----------------------------------------------------------------------------------------

SECOND=target/qemu-second

qemu_major() { "$1" --version | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p'; }

fetch_second_qemu() {
    [ ! -x $SECOND/bin/qemu-system-x86_64 ] || return 0
    if ! try_second_qemu; then
        rm -rf $SECOND
        say "no second QEMU: tests that migrate between two versions will fail for want of $SECOND"
    fi
}

try_second_qemu() {
    has apt-get || return 1
    local suites system_major
    system_major=$(qemu_major qemu-system-x86_64)
    # Debian 12 has 7.2, and 10.0 in its backports.
    if [ "$system_major" -lt 10 ]; then suites="bookworm-backports bookworm"; else suites="bookworm"; fi

    local mirror
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || { refresh_lists && mirror=$(debian_mirror); }
    [ -n "$mirror" ] || { say "apt has no Debian archive among its sources"; return 1; }

    # An apt of our own that believes that nothing is installed: so it fetches the whole closure of what QEMU needs, and
    # neither reads nor changes the system's state.
    local apt=$PWD/target/apt suite
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" $SECOND
    : >"$apt/status"
    for suite in $suites; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done >"$apt/sources.list"
    local own=(-qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o "Dir::State=$apt" -o "Dir::State::status=$apt/status" -o "Dir::State::lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o APT::Update::Error-Mode=any)
    apt-get "${own[@]}" update ||
        { say "the lists of ${suites%% *} cannot be fetched from $mirror: is the network out of reach?"; return 1; }
    apt-get "${own[@]}" install --yes --download-only --no-install-recommends -t "${suites%% *}" qemu-system-x86 >/dev/null ||
        { say "the QEMU of ${suites%% *} cannot be fetched from $mirror"; return 1; }

    local package
    for package in "$apt"/cache/archives/{qemu,seabios,ipxe}*.deb; do dpkg-deb -x "$package" $SECOND; done
    local binary=$SECOND/usr/bin/qemu-system-x86_64 libraries=""
    if LC_ALL=C ldd $binary | grep -q 'not found'; then
        # The C library stays the system's: it is as new or newer, and it must match the loader.
        for package in "$apt"/cache/archives/{lib,zlib}*.deb; do
            case "$package" in */libc6_* | */libpam* | */libsemanage*) ;; *) dpkg-deb -x "$package" $SECOND/libraries ;; esac
        done
        # shellcheck disable=SC2016 # $here is the wrapper's.
        libraries='"$here/libraries/lib/x86_64-linux-gnu:$here/libraries/usr/lib/x86_64-linux-gnu"'
    fi
    # Modules of the system's QEMU are of another build, which aborts this one when it finds them.
    LC_ALL=C sed -i 's#/usr/lib/x86_64-linux-gnu/qemu#/usr/lib/x86_64-linux-gnu/none#g' $binary
    rm -rf "$apt" $SECOND/usr/share/{doc,man,icons,applications,lintian,doc-base}

    mkdir -p $SECOND/bin
    {
        echo '#!/bin/bash'
        echo '# A QEMU of another major version than the system'"'"'s, with its own firmware. Made by scripts/setup.sh.'
        # shellcheck disable=SC2016
        echo 'here=$(dirname "$(dirname "$(readlink -f "$0")")")'
        # shellcheck disable=SC2016
        echo 'export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"'
        [ -z "$libraries" ] || echo "export LD_LIBRARY_PATH=$libraries"
        # shellcheck disable=SC2016
        echo 'exec "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" -L "$here/usr/lib/ipxe/qemu" "$@"'
    } >$SECOND/bin/new
    chmod +x $SECOND/bin/new
    local major
    major=$(qemu_major $SECOND/bin/new) && [ -n "$major" ] || { say "the unpacked QEMU does not start"; return 1; }
    [ "$major" != "$system_major" ] || { say "${suites%% *} has QEMU $major, as the system has"; return 1; }
    mv $SECOND/bin/new $SECOND/bin/qemu-system-x86_64
    say "$SECOND/bin/qemu-system-x86_64 is QEMU $major, from ${suites%% *}"
}

# --- an sshd, for measuring -------------------------------------------------------------------------------------------

# Installing openssh-server would start it; here it is only unpacked.
fetch_sshd() {
    [ ! -x target/sshd/usr/sbin/sshd ] && [ ! -x /usr/sbin/sshd ] || return 0
    has apt-get || return 0
    local work=target/sshd-unpacking package
    rm -rf "$work"
    mkdir -p "$work" target/sshd
    for package in openssh-server libwrap0; do
        (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package") ||
            { refresh_lists && (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package"); } ||
            { say "no sshd: the link is measured without ssh beside it"; rm -rf "$work" target/sshd; return 0; }
    done
    for package in "$work"/*.deb; do dpkg-deb -x "$package" target/sshd; done
    rm -rf "$work" target/sshd/usr/share target/sshd/etc target/sshd/lib/systemd
    say "target/sshd is Debian's openssh-server, unpacked"
}

# --- a browser, for the test that looks at pages of reports -----------------------------------------------------------

install_browser() {
    has chromium || has chromium-browser || has google-chrome ||
        (install_packages "a test shows it the page of reports" chromium) ||
        say "no browser: the page of reports is not looked at"
}

install_tpm() {
    has swtpm || (install_packages "a test moves a TPM" swtpm) || say "no swtpm: no test moves a TPM"
}

# What speaks NBD beside us: tests of crates/nbd skip those that are missing.
install_nbd_peers() {
    local missing=()
    has qemu-img || missing+=(qemu-utils)
    has nbdkit || missing+=(nbdkit)
    has nbdcopy || missing+=(libnbd-bin)
    [ -x /usr/sbin/nbd-client ] || missing+=(nbd-client)
    has fio || missing+=(fio)
    has rsync || missing+=(rsync)
    [ ${#missing[@]} = 0 ] ||
        (install_packages "tests talk to them, figures stand beside them" "${missing[@]}") ||
        say "no ${missing[*]}: nothing is tried with them"
}

# Tests give each of their hosts a libvirt of its own, in namespaces. Of these packages none starts a service.
install_libvirt() {
    local missing=() package
    if ! [ -x /usr/sbin/libvirtd ] || ! [ -x /usr/sbin/virtlogd ] || ! has virsh; then
        for package in libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-driver-storage libvirt-daemon-log libvirt-clients; do
            # Debian 12 has some of them in others.
            [ -z "$(version_apt_offers $package)" ] || missing+=($package)
        done
        (install_packages "tests move domains of two libvirts" "${missing[@]}") ||
            say "no libvirt: the tests of its domains will fail"
    fi
}

# Storage that QEMU speaks to itself: tests skip what is missing. Where systemd runs it would start these servers.
install_storages() {
    local missing=()
    # Of a package that others only name dpkg knows the name.
    [ "$(dpkg-query --show --showformat '${db:Status-Status}' qemu-block-extra 2>/dev/null)" = installed ] ||
        missing+=(qemu-block-extra)
    if [ ! -d /run/systemd/system ]; then
        has tgtd || missing+=(tgt)
        has ganesha.nfsd || missing+=(nfs-ganesha nfs-ganesha-vfs rpcbind)
        { has ceph-mon && has ceph-osd && has rbd; } || missing+=(ceph-mon ceph-osd ceph-common)
    fi
    [ ${#missing[@]} = 0 ] ||
        (install_packages "tests move disks to iSCSI, NFS and Ceph" "${missing[@]}") ||
        say "no ${missing[*]}: no disk is moved there"
}

# A guest with a file system and fio on it.
build_fio_guest() {
    [ ! -s target/guest/fio.gz ] || return 0
    local missing=()
    has busybox || missing+=(busybox-static)
    has fio || missing+=(fio)
    has cpio || missing+=(cpio)
    has mkfs.xfs || missing+=(xfsprogs)
    has mkfs.ext4 || missing+=(e2fsprogs)
    [ ${#missing[@]} = 0 ] ||
        (install_packages "a test moves a guest with a file system" "${missing[@]}") ||
        { say "no ${missing[*]}: no test moves a file system" && return 0; }
    scripts/build-fio-guest.sh target/guest/fio.gz
}

# The mirror that this system takes Debian's own packages from.
debian_mirror() {
    local codename
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016 # $(...) is apt's.
    apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == "Debian" && $2 == codename { print $3; exit }'
}

# ----------------------------------------------------------------------------------------------------------------------

install_missing_tools
install_rust
fetch_guest_kernel
if [ "$for_tests" = yes ]; then
    install_nextest
    fetch_second_qemu
    fetch_sshd
    install_browser
    install_tpm
    install_nbd_peers
    install_libvirt
    install_storages
    build_fio_guest
fi
