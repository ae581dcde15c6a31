#!/usr/bin/env bash
# All that only a GPU can tell, on a machine that has one and nothing to build with.
#
#   benchmarks/gpu/check.sh BINARIES OUTPUT [PART…]
#
# BINARIES is a folder that package.sh filled; OUTPUT gets a log of each PART, and summary.txt with a line for each:
# PASS, FAIL or SKIPPED, seconds, and why. Ends with status 1 if a part failed. Each part has a time limit of its own.
#
#   doctor      what the machine has
#   selftest    every kernel in every precision against the oracle, and training steps against stored references
#   precision   100 steps in tf32, bf16 and fp16: losses within 1 % of fp32's
#   ranks       two ranks on one GPU, through the host: the losses of one rank
#   nccl        the same through NCCL (2.30.3 or newer)
#   g2p         the example learns
#   memcheck    the selftest under compute-sanitizer: memory accesses
#   racecheck   the same: races in shared memory
#   profile     which kernels a t5-base step spends its time in, and Nsight Compute's report of our slowest one
#
# Environment: DEVICE, another device to try the script with (cpu, emulated).
set -uo pipefail

PARTS=(doctor selftest precision ranks nccl g2p memcheck racecheck profile)
declare -A LIMITS=([doctor]=60 [selftest]=180 [precision]=180 [ranks]=120 [nccl]=120 [g2p]=180 [memcheck]=300 [racecheck]=420 [profile]=300)
DEVICE=${DEVICE:-cuda}

if [ "$#" -lt 2 ] || [ ! -x "$1/quintet" ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
binaries=$(cd "$1" && pwd) && mkdir -p "$2" && output=$(cd "$2" && pwd) || exit 2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
quintet=$binaries/quintet
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A part is a function that runs in a process of its own and writes to its log; its last line is the reason that the
# summary gives. Status 0 passes, 77 was skipped, others failed.
skipped() { echo "$*" && exit 77; }
failed() { echo "$*" && exit 1; }

# tool NAME: the path of one of NVIDIA's, also where it is not on the PATH.
tool() {
    command -v "$1" && return
    local candidate
    for candidate in /usr/local/cuda/bin/"$1" /opt/nvidia/nsight-compute/*/"$1"; do
        [ -x "$candidate" ] && echo "$candidate" && return
    done
    return 1
}

# The names of our kernels, one a line.
kernel_names() { grep -hoE 'KERNEL( +LAUNCH_BOUNDS\([^)]*\))? +[a-z0-9_]+\(' "$root"/kernels/cuda/*.cu | grep -oE '[a-z0-9_]+\($' | tr -d '('; }

# train NAME ARGUMENTS…: 100 steps of a small model without dropout, whose losses are in NAME/metrics.jsonl.
train() {
    local name=$1
    shift
    "$quintet" train "$scratch/job.toml" --device "$DEVICE" --output "$scratch/$name" "$@" || failed "$name: training failed"
    cp "$scratch/$name/metrics.jsonl" "$output/losses-$name.jsonl"
}

write_job() {
    cat >"$scratch/job.toml" <<'JOB'
output_dir = "run"

[model]
architecture = { d_model = 256, d_kv = 64, d_ff = 512, num_layers = 4, num_decoder_layers = 4, num_heads = 4, feed_forward_proj = "gated-gelu" }
tokenizer = "wordlevel"
dropout_rate = 0.0

[data]
train = "builtin:cmudict"
input = "{letters}"
target = "{phonemes}"
max_source_length = 40
max_target_length = 40

[training]
max_steps = 100
global_batch_size = 128
micro_batch_size = 64
learning_rate = 1e-3
warmup_steps = 10
JOB
}

# apart A B TOLERANCE: the largest relative difference between two runs' losses of the same step; fails beyond TOLERANCE.
apart() {
    awk -v tolerance="$3" -v names="$2 against $1" '
        function get(key) { match($0, "\"" key "\":[^,}]*"); return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) }
        !/"event":"train"/ { next }
        FNR == NR { loss[get("step")] = get("loss"); next }
        {
            step = get("step"); steps++
            if (!(step in loss)) { missing = 1; next }
            error = (get("loss") - loss[step]) / loss[step]
            if (error < 0) error = -error
            # A loss that is no number is not close.
            if (!(error <= worst)) { worst = error; at = step }
        }
        END {
            printf "%s: %d steps, losses at most %.4f %% apart (step %s), %s %% allowed\n", names, steps, worst * 100, at, tolerance * 100
            exit !(steps > 0 && !missing && worst <= tolerance)
        }' "$output/losses-$1.jsonl" "$output/losses-$2.jsonl"
}

part_doctor() {
    nvidia-smi || true
    "$quintet" doctor || failed "doctor failed"
    "$quintet" doctor --json
    local found
    found=$("$quintet" doctor | grep '^devices:')
    case $found in *"$DEVICE"*) echo "$found" ;; *) failed "no $DEVICE: $found" ;; esac
}

part_selftest() {
    local status=0 counts
    "$quintet" selftest --device "$DEVICE" >"$scratch/rows" || status=$?
    cat "$scratch/rows"
    grep FAILED "$scratch/rows"
    counts=$(awk '/tolerance/ { for (i = 1; i <= NF; i++) if ($i == "error") rows[$(i - 1)]++ }
        END { for (type in rows) printf "%s %d rows; ", type, rows[type] }' "$scratch/rows")
    [ "$status" -eq 0 ] || failed "status $status, $(grep -c FAILED "$scratch/rows") rows failed; ${counts}see the log"
    for type in f32 tf32 bf16 f16; do
        grep -q " $type .*ok$" "$scratch/rows" || failed "no rows of $type"
    done
    echo "${counts%; }"
}

part_precision() {
    local result worst=0 said=
    write_job
    train fp32 --workers 1 --set training.precision=fp32
    for precision in tf32 bf16 fp16; do
        train "$precision" --workers 1 --set "training.precision=$precision"
        result=$(apart fp32 "$precision" 0.01) || worst=1
        echo "$result"
        said+="$result; "
    done
    echo "${said%; }"
    return $worst
}

# two_ranks NAME: against one, in fp32: sums in another order, which 30 steps enlarge.
two_ranks() {
    write_job
    train one-rank --workers 1 --set training.precision=fp32 --set training.max_steps=30
    train "$1" --workers 2 --set training.precision=fp32 --set training.max_steps=30 2>&1 | tee "$scratch/said"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed "two ranks: training failed"
}

part_ranks() {
    unset NCCL_MULTI_RANK_GPU_ENABLE
    two_ranks two-ranks
    apart one-rank two-ranks 0.001
}

part_nccl() {
    export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=8 NCCL_DEBUG=WARN
    [ "$DEVICE" = cpu ] && skipped "not on the CPU"
    two_ranks two-ranks-nccl
    local line
    line=$(grep -m1 'gradients are reduced' "$scratch/said")
    case $line in *"by NCCL"*) ;; *) skipped "${line:-nothing says that NCCL was used}" ;; esac
    apart one-rank two-ranks-nccl 0.001
}

part_g2p() {
    "$quintet" train "$root/examples/g2p.toml" --device "$DEVICE" --workers 1 --output "$scratch/g2p" --json \
        --set training.max_steps=400 --set training.warmup_steps=50 --set evaluation.max_examples=512 || failed "training failed"
    cp "$scratch/g2p/metrics.jsonl" "$output/losses-g2p.jsonl"
    awk '/"event":"train"/ { match($0, /"loss":[^,]*/); last = substr($0, RSTART + 7, RLENGTH - 7) + 0; if (!first) first = last }
        /"event":"eval"/ { evaluation = $0; gsub(/[{}"]/, "", evaluation) }
        END { printf "loss %.3f to %.3f; %s\n", first, last, evaluation; exit !(last > 0 && last < first / 3) }' "$scratch/g2p/metrics.jsonl"
}

# sanitize TOOL: libraries' kernels are checked too, but only what is said of ours fails.
sanitize() {
    local sanitizer status=0 errors
    [ "$DEVICE" = cuda ] || skipped "needs a GPU"
    sanitizer=$(tool compute-sanitizer) || skipped "no compute-sanitizer here"
    # Kernels are compiled beforehand, outside.
    "$quintet" selftest --device cuda >/dev/null || echo "the selftest fails without the sanitizer too"
    "$sanitizer" --tool "$1" --error-exitcode 99 --print-limit 1000 "$quintet" selftest --device cuda 2>&1 | tee "$scratch/sanitizer"
    status=${PIPESTATUS[0]}
    errors=$(grep -E '^=+ .*(SUMMARY|hazard|error)' "$scratch/sanitizer" | tail -n 1 | sed 's/^=* *//')
    grep -q 'train_step' "$scratch/sanitizer" || failed "the selftest did not get to its end: ${errors:-status $status}"
    [ "$status" -eq 0 ] && echo "$errors" && return
    if grep '^=====' "$scratch/sanitizer" | grep -qwF -f <(kernel_names); then failed "$errors, in our kernels"; fi
    [ "$status" -eq 99 ] || failed "status $status: $errors"
    echo "$errors, none of them in our kernels"
}

part_memcheck() { sanitize memcheck; }
part_racecheck() { sanitize racecheck; }

part_profile() {
    local ncu slowest
    [ "$DEVICE" = cuda ] || skipped "needs a GPU"
    ncu=$(tool ncu) || skipped "no ncu here"
    # Clocks are left as they are. After the warm-up steps, more launches than a step has.
    local step=("$quintet" bench step --device cuda --model t5-base --batch-size 8 --source-length 512 --target-length 114 --steps 2)
    "${step[@]}" || failed "bench step failed"
    "$ncu" --clock-control none --metrics gpu__time_duration.sum --print-units base --csv --launch-skip 6000 --launch-count 3000 \
        "${step[@]}" >"$scratch/launches.csv" || echo "ncu ended with status $?"
    awk -F'","' '/gpu__time_duration/ { value = $NF; gsub(/[",]/, "", value); name = substr($5, 1, 100); time[name] += value; count[name]++; all += value }
        END { for (name in time) printf "%10.1f us %5.1f %% %6d launches  %s\n", time[name] / 1e3, 100 * time[name] / all, count[name], name }' \
        "$scratch/launches.csv" | sort -rn >"$output/profile-step.txt"
    cat "$output/profile-step.txt"
    [ -s "$output/profile-step.txt" ] || failed "ncu measured nothing: $(tail -n 1 "$scratch/launches.csv")"
    slowest=$(grep -wF -f <(kernel_names) "$output/profile-step.txt" | head -n 1 | sed 's/.*launches  //; s/(.*//')
    [ -n "$slowest" ] || failed "none of our kernels is among the launches"
    "$ncu" --clock-control none --set full --kernel-name "$slowest" --launch-skip 24 --launch-count 2 "${step[@]}" \
        >"$output/profile-$slowest.txt" || failed "ncu --set full failed"
    grep -E 'Duration|Throughput|Registers Per|Achieved Occ|Bank|Uncoalesced|Est. ' "$output/profile-$slowest.txt"
    echo "slowest of ours: $slowest, $(grep -wF "$slowest" "$output/profile-step.txt" | head -n 1 | awk '{ print $3, $4 }') of the time"
}

[ "$#" -gt 0 ] || set -- "${PARTS[@]}"
for part in "$@"; do
    declare -F "part_$part" >/dev/null || { echo "error: no part $part; there are ${PARTS[*]}" >&2 && exit 2; }
done

# In a process group of its own, so that the limit ends what a part has started too.
run_part() {
    export -f "part_$1" skipped failed tool kernel_names train write_job apart two_ranks sanitize
    export root quintet output scratch DEVICE
    timeout --kill-after=10 "${LIMITS[$1]}" bash -uc "set -o pipefail; part_$1" >"$output/$1.log" 2>&1
}

summary=$output/summary.txt any_failed=0
{
    date -u +"%Y-%m-%d %H:%M UTC, commit ${COMMIT:-$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)}"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
} | tee "$summary"
for part in "$@"; do
    started=$SECONDS
    run_part "$part"
    status=$?
    why=$(tail -n 1 "$output/$part.log" | cut -c1-500)
    case $status in
        0) verdict=PASS ;;
        77) verdict=SKIPPED ;;
        124 | 137) verdict=FAIL why="not done within ${LIMITS[$part]} s; last: $why" ;;
        *) verdict=FAIL ;;
    esac
    [ "$verdict" = FAIL ] && any_failed=1
    printf '%-8s %-10s %4d s  %s\n' "$verdict" "$part" $((SECONDS - started)) "$why" | tee -a "$summary"
done
exit $any_failed
