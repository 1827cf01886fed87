# make demo   a guest moves between two hosts on this machine, with everything that needs
# make test   all tests, on real QEMU
# make model  explores the migration protocol further than make test does (MODEL=faults,acts,states,seconds)
# make machines  random machines, changed while they run, there and back (MACHINES=, FIRST=)
# make lint   formatting, clippy, licences
# make bench  the figures of docs/FIGURES.md
# make torture  hundreds of migrations with faults in them; SEEDS=, MINUTES=, or SEED= for one
# make soak   what takes too long for make test: the protocol explored further, 200 random machines, slow disks and own ones, the torture
# make kvm-check  what a migration costs a guest under this host's KVM, in ten minutes: a report to send (as root)
# make study  the 2016 study's tables again, small: docs/study/

.PHONY: demo test model machines lint bench torture soak study build install

demo:
	@scripts/setup.sh
	@scripts/build-demo.sh
	@target/release/examples/demo

test:
	scripts/setup.sh --for-tests
	cargo nextest run --workspace --no-fail-fast

MODEL ?= 3,2,400000000,1800
model:
	VMFERRY_MODEL=$(MODEL) cargo test --workspace --test check -- --nocapture exactly_one

lint:
	cargo fmt --all --check
	rustfmt --edition 2024 --check guest/bare/main.rs
	cargo clippy --workspace --all-targets -- -D warnings
	cargo deny check --hide-inclusion-graph bans licenses sources

bench:
	scripts/setup.sh --for-tests
	cargo build --release --package vmferry --bin vmferry --example figures
	target/release/examples/figures

# SEEDS runs (300 when not said), or as many as begin within MINUTES; SEED=1042 repeats one. Cut links and full disks
# need root.
torture: export SEEDS := $(SEEDS)
torture: export MINUTES := $(MINUTES)
torture: export SEED := $(SEED)
torture: export RUST_BACKTRACE := 0
torture:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --ignored --exact torture::whatever_strikes_the_guest_ends_up_once --nocapture

# MACHINES random machines (200 when not said), changed while they run, there and back; from seed FIRST.
machines: export MACHINES := $(MACHINES)
machines: export FIRST := $(FIRST)
machines:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --ignored --exact generator::hundreds_of_random_machines_arrive_equal_or_are_refused_before_they_move --nocapture

# A disk that takes its time, around the host's cache: 50 migrations with each QEMU.
.PHONY: slow-disk
slow-disk: export VMFERRY_TEST_MIGRATIONS := 50
slow-disk:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --exact direct_io::what_a_slow_disk_around_the_hosts_cache_brings_into_ram_arrives --nocapture

# Guests with disks of their own: 30 migrations with each pair of QEMUs, and real file systems.
.PHONY: own-disks
own-disks:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --ignored --exact disks::whatever_was_written_is_there_after_thirty_migrations_with_each_pair_of_qemus --nocapture
	cargo test --workspace --test system -- --ignored --exact filesystems::file_systems_move_with_their_guests_on_each_pair_of_qemus --nocapture

# An image between two hosts, beside rsync, scp, nbdcopy and qemu-img; as root.
.PHONY: bench-copy
bench-copy:
	scripts/setup.sh --for-tests
	cargo build --release --package vmferry --bin vmferry
	scripts/bench-copy.sh

# The NBD server beside nbdkit and qemu-nbd on the same file; ROUNDS of each (5 when not said).
.PHONY: bench-nbd
bench-nbd:
	scripts/setup.sh --for-tests
	cargo run --release --package vmferry-nbd --example beside -- $(ROUNDS)

# A guest with a disk of its own over 1 Gbit/s, beside QEMU's mirror and NBD server; as root.
.PHONY: bench-disks
bench-disks:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --ignored disk_figures:: --nocapture --test-threads 1

# Single tests that would make `make test` too long.
.PHONY: long-tests
long-tests:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --ignored --exact --test-threads 1 \
	    bench::every_means_of_a_batch_really_acts_and_a_batch_goes_on_where_it_was_in_namespaces \
	    disks::a_guest_that_writes_fast_takes_its_disk_along_paced \
	    disks::a_guest_that_writes_to_its_disk_faster_than_it_is_copied_is_slowed_and_has_its_own_limits_afterwards \
	    machines::a_qemu_that_takes_its_time_to_start_is_waited_for

# How far predictions of migrations are off: 32 of them.
.PHONY: predictions
predictions:
	scripts/setup.sh --for-tests
	cargo test --workspace --test system -- --ignored --exact predict::predictions_of_all_kinds_of_guests_are_about_right --nocapture

soak: model machines slow-disk own-disks long-tests torture

# The ten minutes begin when all is built.
.PHONY: kvm-check
kvm-check:
	scripts/setup.sh
	cargo build --release --package vmferry --bin vmferry
	scripts/kvm-check.sh

# Goes on where it was interrupted; MINUTES=10 make study runs as much as fits.
study:
	scripts/setup.sh --for-tests
	cargo build --release --package vmferry --bin vmferry
	scripts/study.sh

build:
	cargo build --release --package vmferry

# Installs the binary and the systemd unit: make install PREFIX=/usr/local
PREFIX ?= /usr/local
install: build
	install -D target/release/vmferry $(DESTDIR)$(PREFIX)/bin/vmferry
	sed 's|@PREFIX@|$(PREFIX)|' packaging/vmferry.service | install -D -m 644 /dev/stdin $(DESTDIR)/etc/systemd/system/vmferry.service
