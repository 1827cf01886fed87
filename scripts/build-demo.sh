#!/usr/bin/env bash
# Builds the demo and says how far that is: at a terminal cargo does, elsewhere there is a line every now and then.
set -euo pipefail
cd "$(dirname "$0")/.."

EVERY=20 # seconds

build() { cargo build --release --package vmferry --bin vmferry --example demo 2>&1; }

# Packages that a build from nothing compiles, about.
packages() { cargo tree --package vmferry --edges normal,build --prefix none --no-dedupe 2>/dev/null | sort -u | wc -l; }

# Of what cargo says, only how far it is, and what is no everyday word.
tell() {
    local all line compiled=0 told=$SECONDS
    all=$(packages)
    while true; do
        if IFS= read -r -t 1 line; then
            case "$line" in
            *Compiling*) compiled=$((compiled + 1)) ;;
            *Updating* | *Locking* | *Download* | *Blocking* | *Finished* | "") ;;
            *) echo "$line" ;;
            esac
        elif [ $? -le 128 ]; then # The end, and not only a second without a word.
            return
        fi
        [ $((SECONDS - told)) -ge $EVERY ] || continue
        told=$SECONDS
        if [ "$compiled" -lt "$all" ]; then
            echo "  building for $SECONDS s: $compiled of $all packages"
        else
            echo "  building for $SECONDS s: all packages are begun, the last ones and linking take a while"
        fi
    done
}

[ -e target/release/examples/demo ] || echo "Building vmferry and the demo, in release mode; the first time takes many minutes."
if [ -t 2 ]; then build >&2; else build | tell; fi
