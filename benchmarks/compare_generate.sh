#!/usr/bin/env bash
# Times `quintet bench generate` and its peer, the `generate` of transformers, in turns on the same cores, and prints each
# round's tokens per second, both medians and their ratio (above 1: Quintet is faster).
#
#   benchmarks/compare_generate.sh [--model t5-small --batch-size 32 --num-beams 4 --source-length 128 --new-tokens 64 ...]
#
# Arguments go to both programs; without any, the case above in fp32 on the CPU. Environment:
#   PYTHON     a Python that has torch and transformers; default: a virtual environment made in .venv-benchmarks
#   QUINTET    the binary; default: target/release/quintet, built when absent
#   ROUNDS     how often each is run; default 3
#   THREADS    CPU threads for both; default: all cores
#   ATTENTION  the peer's: eager (default, the faster one for T5 on CPUs) or sdpa
set -euo pipefail
cd "$(dirname "$0")/.."

ROUNDS=${ROUNDS:-3}
export THREADS=${THREADS:-$(nproc)}
export OMP_NUM_THREADS=$THREADS MKL_NUM_THREADS=$THREADS RAYON_NUM_THREADS=$THREADS
QUINTET=${QUINTET:-target/release/quintet}
if [ "$#" -eq 0 ]; then
    set -- --model t5-small --batch-size 32 --num-beams 4 --source-length 128 --new-tokens 64
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
    # Bound to the same cores; the pause between turns is the other's. Each program times one call after one that it does not.
    taskset -c "0-$((THREADS - 1))" "$QUINTET" bench generate "$@" --device cpu --rounds 1 --json >>"$results/quintet"
    taskset -c "0-$((THREADS - 1))" "$PYTHON" benchmarks/generate_torch.py "$@" --rounds 1 --threads "$THREADS" \
        --attention "${ATTENTION:-eager}" >>"$results/torch"
    echo "round $round of $ROUNDS done" >&2
done

"$PYTHON" - "$results" <<'PYTHON_END'
import json, statistics, sys
from pathlib import Path

runs = {name: [json.loads(line) for line in (Path(sys.argv[1]) / name).read_text().splitlines()] for name in ("quintet", "torch")}
print(f"{'':8} {'tokens per second, each round':48} {'median':>8}")
medians = {}
for name, rows in runs.items():
    rates = [row["tokens_per_second"] for row in rows]
    medians[name] = statistics.median(rates)
    print(f"{name:8} {' '.join(f'{rate:.1f}' for rate in rates):48} {medians[name]:8.1f}")
print(f"quintet / torch = {medians['quintet'] / medians['torch']:.2f}")
PYTHON_END
