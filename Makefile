# make demo   a guest moves between two hosts on this machine, with everything that needs
# make test   all tests, on real QEMU
# make lint   formatting, clippy, licences
# make bench  the figures of docs/FIGURES.md
# make study  the 2016 study's tables again, small: docs/study/

.PHONY: demo test lint bench study build install

demo:
	@scripts/setup.sh
	@scripts/build-demo.sh
	@target/release/examples/demo

test:
	scripts/setup.sh --for-tests
	cargo nextest run --workspace --no-fail-fast

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo deny check --hide-inclusion-graph bans licenses sources

bench:
	scripts/setup.sh --for-tests
	cargo build --release --package vmferry --bin vmferry --example figures
	target/release/examples/figures

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
