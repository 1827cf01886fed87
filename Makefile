# make demo   a guest moves between two hosts on this machine, with everything that needs
# make test   all tests, on real QEMU
# make lint   formatting, clippy, licences
# make bench  the figures of docs/FIGURES.md

.PHONY: demo test lint bench build install

demo:
	@scripts/setup.sh
	@cargo build --quiet --release --package vmferry --bin vmferry --example demo
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

build:
	cargo build --release --package vmferry

# Installs the binary and the systemd unit: make install PREFIX=/usr/local
PREFIX ?= /usr/local
install: build
	install -D target/release/vmferry $(DESTDIR)$(PREFIX)/bin/vmferry
	sed 's|@PREFIX@|$(PREFIX)|' packaging/vmferry.service | install -D -m 644 /dev/stdin $(DESTDIR)/etc/systemd/system/vmferry.service
