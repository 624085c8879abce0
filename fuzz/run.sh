#!/bin/sh
# Fuzzes one target: ./run.sh TARGET [SECONDS [LIBFUZZER-OPTION...]]
set -eu
cd "$(dirname "$0")"
target=$1
seconds=${2:-60}
[ $# -le 2 ] && set -- || shift 2

cargo run --quiet --release --example seeds
# What cargo-fuzz would set, apart from the address sanitizer, which needs a nightly compiler. `--target`
# keeps the flags away from build scripts and procedural macros.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --target "$(rustc --print host-tuple)" --bin "$target"
mkdir -p "artifacts/$target"
exec "${CARGO_TARGET_DIR:-target}/$(rustc --print host-tuple)/release/$target" \
    -max_total_time="$seconds" -artifact_prefix="artifacts/$target/" -rss_limit_mb=1024 "$@" "corpus/$target"
