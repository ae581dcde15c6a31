#!/usr/bin/env bash
# Times `quintet bench step` or `quintet bench generate` and its peer in transformers + torch, in turns on the same cores,
# and prints each round, both medians and their ratio.
#
#   benchmarks/compare.sh step [--model t5-small --batch-size 8 --source-length 128 --target-length 32 ...]
#   benchmarks/compare.sh generate [--model t5-small --batch-size 32 --num-beams 4 --new-tokens 64 ...]
#
# Arguments go to both programs; without any, the case above in fp32 on the CPU. Environment:
#   PYTHON     a Python that has torch and transformers; default: a virtual environment made in .venv-benchmarks
#   QUINTET    the binary; default: target/release/quintet, built when absent
#   ROUNDS     how often each is run; default 5
#   THREADS    CPU threads for both; default: all cores
#   ATTENTION  the peer's: eager (default, the faster one for T5 on CPUs) or sdpa
set -euo pipefail
cd "$(dirname "$0")/.."

ROUNDS=${ROUNDS:-5}
export THREADS=${THREADS:-$(nproc)}
export OMP_NUM_THREADS=$THREADS MKL_NUM_THREADS=$THREADS RAYON_NUM_THREADS=$THREADS
QUINTET=${QUINTET:-target/release/quintet}
what=${1:-}
case $what in
step)
    shift
    [ "$#" -gt 0 ] || set -- --model t5-small --batch-size 8 --source-length 128 --target-length 32
    rounds=() # as many steps as the programs think right
    ;;
generate)
    shift
    [ "$#" -gt 0 ] || set -- --model t5-small --batch-size 32 --num-beams 4 --source-length 128 --new-tokens 64
    rounds=(--rounds 1) # one call after one that is not timed
    ;;
*)
    echo "usage: benchmarks/compare.sh step|generate [flags of quintet bench]" >&2
    exit 2
    ;;
esac

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
    taskset -c "0-$((THREADS - 1))" "$QUINTET" bench "$what" "$@" "${rounds[@]}" --device cpu --json >>"$results/quintet"
    taskset -c "0-$((THREADS - 1))" "$PYTHON" "benchmarks/${what}_torch.py" "$@" "${rounds[@]}" --device cpu \
        --threads "$THREADS" --attention "${ATTENTION:-eager}" >>"$results/torch"
    echo "round $round of $ROUNDS done" >&2
done

"$PYTHON" - "$results" "$what" <<'PYTHON_END'
import json, statistics, sys
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]
key, unit = {"step": ("seconds_per_step", "seconds a step"), "generate": ("tokens_per_second", "tokens a second")}[what]
print(f"{'':8} {unit + ', each round':48} {'median':>8} {'peak MB':>9}")
medians = {}
for name in ("quintet", "torch"):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    medians[name] = statistics.median(row[key] for row in rows)
    peaks = [row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes") is not None]
    peak = f"{statistics.median(peaks) / 1e6:9.0f}" if peaks else f"{'-':>9}"
    print(f"{name:8} {' '.join(f'{row[key]:.4g}' for row in rows):48} {medians[name]:8.4g} {peak}")
print(f"quintet / torch = {medians['quintet'] / medians['torch']:.3f}")
PYTHON_END
