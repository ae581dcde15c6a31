#!/usr/bin/env bash
# Compiles every kernel by the real NVRTC, which PyPI has and which needs no GPU, and prints what each takes of a GPU.
# Fails where a kernel does not compile, or where one that its source calls hot spills registers; then runs the tests that
# want NVRTC, and those that want NCCL, which PyPI has too.
#
#     tests/cuda/compile.sh [--arch sm_90a]… [TEXT]     TEXT keeps the modules whose name contains it
set -euo pipefail
cd "$(dirname "$0")/../.."

# Beside the build, so that the next run finds it.
target=$(cargo metadata --format-version 1 --no-deps | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
venv=$target/nvrtc
folder() { find "$venv" -name "$1" -printf '%h\n' 2>/dev/null | head -n 1; }

if [ -z "$(folder 'libnvrtc.so.1[23]')" ]; then
    mkdir -p "$target"
    if ! { python3 -m venv "$venv" && "$venv/bin/pip" install --quiet nvidia-cuda-nvrtc; } >"$target/nvrtc.log" 2>&1; then
        echo "SKIPPED: no kernel was compiled for GPUs, because NVRTC cannot be had from PyPI here:"
        tail -n 3 "$target/nvrtc.log"
        exit 0
    fi
fi
# So that tests find it too.
LD_LIBRARY_PATH=$(folder 'libnvrtc.so.1[23]')${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH

cargo run --quiet --release -p quintet-kernels --example compile -- "$@"
if [ $# = 0 ]; then
    cargo test --quiet --release -p quintet-kernels --lib driver::cuda::nvrtc
    if [ -z "$(folder libnccl.so.2)" ] && ! "$venv/bin/pip" install --quiet nvidia-nccl-cu13 >"$target/nccl.log" 2>&1; then
        echo "SKIPPED: NVIDIA's NCCL was not loaded, because it cannot be had from PyPI here:"
        tail -n 3 "$target/nccl.log"
        exit 0
    fi
    LD_LIBRARY_PATH=$(folder libnccl.so.2):$LD_LIBRARY_PATH cargo test --quiet --release -p quintet-kernels --lib driver::nccl
fi
