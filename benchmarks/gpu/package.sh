#!/usr/bin/env bash
# Builds what check.sh and compare.sh run on a machine that has a GPU but no Rust, stripped, into a folder.
#
#   benchmarks/gpu/package.sh [FOLDER]            # default: target/gpu
#
# They run on x86-64 Linux whose C library is not older than the one here. BYTES_MAX bounds the folder (64 MiB).
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-target/gpu}
bytes_max=${BYTES_MAX:-67108864}
target=$(cargo metadata --format-version 1 --no-deps | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')

cargo build --release ${JOBS:+-j "$JOBS"}
cargo build --release ${JOBS:+-j "$JOBS"} -p quintet-kernels --example bench

mkdir -p "$folder"
strip -o "$folder/quintet" "$target/release/quintet"
strip -o "$folder/bench" "$target/release/examples/bench"
bytes=$(du -cb "$folder"/* | tail -n 1 | cut -f1)
needs=$(objdump -T "$folder/quintet" "$folder/bench" | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -n 1)
ls -l "$folder"
echo "$((bytes >> 20)) MiB; needs ${needs:-no C library}"
if [ "$bytes" -gt "$bytes_max" ]; then
    echo "error: $folder holds $bytes bytes, more than $bytes_max" >&2
    exit 1
fi
