#!/usr/bin/env bash
# Compiles kernels/cuda/*.cu by the real NVRTC (from PyPI; needs no GPU) and prints what each kernel takes.
#
#   tests/cuda/compile.sh [--arch 90a]… [-DNAME=VALUE]… [FILE.cu]…
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${QUINTET_NVRTC_VENV:-${TMPDIR:-/tmp}/quintet-nvrtc}
if ! "$venv/bin/python" -c 'import nvidia.cu13' 2>/dev/null; then
    python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet nvidia-cuda-nvrtc 2>"$venv/log"; then
        echo "SKIPPED: no kernel was compiled for a GPU, because NVRTC cannot be fetched from PyPI here:"
        tail -n 3 "$venv/log"
        exit 0
    fi
fi
exec "$venv/bin/python" tests/cuda/compile.py "$@"
