#!/usr/bin/env bash
# Times `quintet bench step` and its peer in transformers + torch, in turns on the same cores, and prints
# each round, both medians and their ratio (below 1: Quintet is faster).
#
#   benchmarks/compare_step.sh [--model t5-small --batch-size 8 --source-length 128 --target-length 32 ...]
#
# Arguments go to both programs; without any, the case above in fp32 on the CPU. Environment:
#   PYTHON    a Python that has torch and transformers; default: a virtual environment made in .venv-benchmarks
#   QUINTET   the binary; default: target/release/quintet, built when absent
#   ROUNDS    how often each is run; default 5
#   THREADS   CPU threads for both; default: all cores
set -euo pipefail
cd "$(dirname "$0")/.."

ROUNDS=${ROUNDS:-5}
export THREADS=${THREADS:-$(nproc)}
export OMP_NUM_THREADS=$THREADS MKL_NUM_THREADS=$THREADS RAYON_NUM_THREADS=$THREADS
QUINTET=${QUINTET:-target/release/quintet}
if [ "$#" -eq 0 ]; then
    set -- --model t5-small --batch-size 8 --source-length 128 --target-length 32 --precision fp32 --device cpu
fi

if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv-benchmarks/bin/python
    # The stamp says that the installation ended: one that was cut short is taken up again.
    if [ ! -e .venv-benchmarks/complete ]; then
        echo "installing torch and transformers into .venv-benchmarks (some GB)" >&2
        python3 -m venv .venv-benchmarks
        "$PYTHON" -m pip install --quiet -r benchmarks/requirements.txt
        touch .venv-benchmarks/complete
    fi
fi
if [ ! -x "$QUINTET" ]; then
    cargo build --release
fi

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
for round in $(seq "$ROUNDS"); do
    # Bound to the same cores; the pause between turns is the other's.
    taskset -c "0-$((THREADS - 1))" "$QUINTET" bench step "$@" --json >>"$results/quintet"
    taskset -c "0-$((THREADS - 1))" "$PYTHON" benchmarks/step_torch.py "$@" --threads "$THREADS" >>"$results/torch"
    echo "round $round of $ROUNDS done" >&2
done

"$PYTHON" - "$results" <<'PYTHON_END'
import json, statistics, sys
from pathlib import Path

runs = {name: [json.loads(line) for line in (Path(sys.argv[1]) / name).read_text().splitlines()] for name in ("quintet", "torch")}
print(f"{'':8} {'seconds per step, each round':48} {'median':>8} {'peak MB':>9}")
medians = {}
for name, rows in runs.items():
    seconds = [row["seconds_per_step"] for row in rows]
    medians[name] = statistics.median(seconds)
    peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"] is not None]
    peak = f"{statistics.median(peaks) / 1e6:9.0f}" if peaks else f"{'-':>9}"
    print(f"{name:8} {' '.join(f'{s:.3f}' for s in seconds):48} {medians[name]:8.3f} {peak}")
print(f"quintet / torch = {medians['quintet'] / medians['torch']:.3f}")
PYTHON_END
