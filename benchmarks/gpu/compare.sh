#!/usr/bin/env bash
# Training steps of Quintet and, on the same GPU in the same run, of transformers + torch; attention alone; and what a
# large matrix product reaches. Prints a Markdown table; without torch, of Quintet alone.
#
#   benchmarks/gpu/compare.sh [--cases CASE,…] [--variants sdpa,eager,sdpa-compile,eager-compile] [--seconds 570]
#                             [--steps 20] [--precision bf16] [--device cuda] [--output DIR]
#   benchmarks/gpu/compare.sh --table FILE…       # the table of rows measured earlier
#
# A CASE is MODEL:SOURCE/TARGET:BATCH[:ragged], where BATCH is a number or "max": the largest power of two that fits; or
# "product", or "attention". Cases run one after the other, the most important first, until --seconds are over: what is
# left says so. A case that fails or runs out of memory is a row that says so. --output keeps rows.jsonl, table.md and
# what the programs wrote. Environment: QUINTET, KERNELS (the example `bench` of the kernels), PYTHON,
# MEMORY_BYTES (of the GPU, for "max"; default: what `quintet doctor` finds).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

cases=product
for batch in 8 max; do
    for lengths in 512/114 512/512; do
        for model in t5-large t5-base t5-v1_1-large t5-v1_1-base t5-small; do
            cases+=,$model:$lengths:$batch
        done
        # After the first models: what padding costs, and attention alone.
        [ "$batch:$lengths" = 8:512/114 ] && cases+=,attention,t5-base:512/114:64:ragged
    done
done
variants=sdpa,eager,sdpa-compile,eager-compile
seconds=570 steps=20 precision=bf16 device=cuda output=
QUINTET=${QUINTET:-$root/target/release/quintet}
KERNELS=${KERNELS:-$root/target/release/examples/bench}
PYTHON=${PYTHON:-python3}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

# table FILE…: rows to Markdown. Documents are flat, one a line; no string holds a comma or a quote.
table() {
    awk '
    function get(key,   text) {
        if (!match($0, "\"" key "\":(\"[^\"]*\"|[^,}]*)")) return ""
        text = substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
        gsub(/^"|"$/, "", text)
        return text == "null" ? "" : text
    }
    function number(format, value, scale) { return value == "" ? "" : sprintf(format, value * scale) }
    get("program") == "run" {
        printf "%s, commit %s; %s, driver %s; %s\n", get("date"), get("commit"), get("gpu"), get("driver"), get("peers")
        next
    }
    get("op") == "matrix product" {
        products = products sprintf("| %s | %.1f |\n", get("program"), get("flops_per_second") / 1e12)
        next
    }
    get("op") != "" {
        op = get("model") ", " get("op")
        if (!(op in seen)) { seen[op] = 1; ops[++op_count] = op }
        if (get("error") != "") why[op, get("program")] = get("error")
        else time[op, get("program")] = get("seconds")
        next
    }
    get("case") != "" {
        name = get("case"); program = get("program")
        if (!(name in case_seen)) { case_seen[name] = 1; names[++name_count] = name }
        rows[name] = rows[name] "\n" program
        if (get("error") != "") { failure[name, program] = get("error"); batch[name, program] = get("batch_size"); next }
        batch[name, program] = get("batch_size")
        step[name, program] = get("seconds_per_step")
        rate[name, program] = get("tokens_per_second")
        mfu[name, program] = get("mfu")
        peak_of[name] = get("peak_flops_of") == "" ? peak_of[name] : get("peak_flops_of")
        memory[name, program] = get("peak_memory_bytes")
    }
    END {
        if (products != "") printf "\n| large matrix product | TFLOP/s |\n| --- | --- |\n%s", products
        if (name_count) {
            print "\n| case | program | batch | ms/step | real tokens/s | MFU | peak GiB | quintet is … times as fast | memory, quintet / this |"
            print "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        }
        for (i = 1; i <= name_count; i++) {
            name = names[i]
            count = split(substr(rows[name], 2), programs, "\n")
            for (j = 1; j <= count; j++) {
                program = programs[j]; key = name SUBSEP program; ours = name SUBSEP "quintet"
                if (key in failure) {
                    printf "| %s | %s | %s | %s | | | | | |\n", name, program, batch[key], failure[key]
                    continue
                }
                ratio = program != "quintet" && rate[ours] > 0 ? sprintf("%.2f", rate[ours] / rate[key]) : ""
                share = program != "quintet" && memory[key] > 0 && memory[ours] > 0 && batch[key] == batch[ours] \
                    ? sprintf("%.2f", memory[ours] / memory[key]) : ""
                printf "| %s | %s | %s | %.2f | %.0f | %s | %s | %s | %s |\n", name, program, batch[key], step[key] * 1e3, rate[key],
                    number("%.1f %%", mfu[key], 100), number("%.2f", memory[key], 1 / 2^30), ratio, share
                peaks = peaks (peak_of[name] != "" && !index(peaks, peak_of[name]) ? peak_of[name] : "")
            }
        }
        if (peaks != "") print "\nMFU is of the peak of: " peaks
        if (op_count) {
            print "\n| attention, 8 sequences | quintet µs | torch sdpa µs | quintet is … times as fast |\n| --- | --- | --- | --- |"
        }
        for (i = 1; i <= op_count; i++) {
            ours = ops[i] SUBSEP "quintet"; theirs = ops[i] SUBSEP "sdpa"
            printf "| %s | %s | %s | %s |\n", ops[i],
                (ours in time) ? number("%.1f", time[ours], 1e6) : why[ours],
                (theirs in time) ? number("%.1f", time[theirs], 1e6) : why[theirs],
                (ours in time) && (theirs in time) ? sprintf("%.2f", time[theirs] / time[ours]) : ""
        }
    }' "$@"
}

while [ "$#" -gt 0 ]; do
    case $1 in
        --table) shift && table "$@" && exit ;;
        --help | -h) usage && exit ;;
        --cases | --variants | --seconds | --steps | --precision | --device | --output)
            [ "$#" -ge 2 ] || { echo "error: $1 wants a value" >&2 && exit 2; }
            declare "${1#--}=$2" && shift 2 ;;
        *) echo "error: unknown argument $1; see --help" >&2 && exit 2 ;;
    esac
done
[ -x "$QUINTET" ] || { echo "error: no program at $QUINTET: build it (cargo build --release), or set QUINTET" >&2 && exit 2; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$output" ]; then mkdir -p "$output" || exit 2; else output=$scratch; fi
rows=$output/rows.jsonl log=$output/log
: >"$rows" >"$log"

left() { echo $((seconds - SECONDS)); }

# bounded COMMAND…: within the time that is left, and a run's own bound; says why it failed, for a table's cell.
bounded() {
    local limit status
    limit=$(left)
    [ "$limit" -gt 5 ] || { why="not run: out of time" && return 1; }
    echo "+ $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >"$scratch/out" 2>"$scratch/err"
    status=$?
    cat "$scratch/out" "$scratch/err" >>"$log"
    [ "$status" -eq 0 ] && return 0
    case $status in
        124 | 137) why="stopped after $limit s" ;;
        *) why=$(grep -m1 -E '^error|Error' "$scratch/err" | tr -d '"\\' | tr ',|' ';/' | cut -c1-160) ;;
    esac
    case $why in *"out of memory"*) why="out of memory" ;; '') why="failed with status $status" ;; esac
    return 1
}

field() { grep -o "\"$1\":[^,}]*" | head -n1 | cut -d: -f2- | tr -d '"'; }

torch_found=no peers="without torch"
if versions=$("$PYTHON" -c 'import torch, transformers as t; print("torch", torch.__version__ + "; transformers", t.__version__)' 2>"$scratch/err"); then
    torch_found=yes peers=$versions
else
    echo "torch and transformers are not in $PYTHON: Quintet is measured alone" >&2
fi
gpu=none driver=none
if command -v nvidia-smi >/dev/null; then
    IFS=, read -r gpu driver < <(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n1)
fi
memory_total=${MEMORY_BYTES:-$("$QUINTET" doctor --json 2>/dev/null | field memory_bytes)}
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo "${COMMIT:-unknown}")
printf '{"program":"run","date":"%s","commit":"%s","gpu":"%s","driver":"%s","peers":"%s"}\n' \
    "$(date -u +%Y-%m-%d)" "$commit" "${gpu:-none}" "$(echo "${driver:-none}" | tr -d ' ')" "$peers" >>"$rows"

# ours STEPS BATCH: a measurement of $case into $scratch/out.
ours() {
    # shellcheck disable=SC2086
    bounded "$QUINTET" bench step --device "$device" --precision "$precision" --model "$model" --batch-size "$2" \
        --source-length "$source" --target-length "$target" --steps "$1" $ragged --json
}

# largest: the power of two that should fit by what a batch of 8 takes; the caller halves it when it does not.
largest() {
    ours 1 8 || return 1
    local peak activations
    peak=$(field peak_memory_bytes <"$scratch/out") activations=$(field peak_activation_bytes <"$scratch/out")
    awk -v total="$memory_total" -v peak="$peak" -v activations="$activations" 'BEGIN {
        batch = 1
        while (batch < 4096 && peak - activations + activations / 8 * batch * 2 < 0.95 * total) batch *= 2
        print batch
    }'
}

failed_row() { printf '{"case":"%s","program":"%s","batch_size":"%s","error":"%s"}\n' "$case" "$1" "$2" "$3" >>"$rows"; }

# keep PROGRAM: what the last program printed, as rows of $case.
keep() {
    sed "s|^{|{\"case\":\"$case\",|; ${1:+s|^{|{\"program\":\"$1\",|}" "$scratch/out" >>"$rows"
}

step_case() {
    local lengths batch model source target ragged size why peak_flops variant
    IFS=: read -r model lengths batch ragged <<<"$case"
    source=${lengths%/*} target=${lengths#*/} ragged=${ragged:+--ragged} size=$batch peak_flops=
    if [ "$batch" = max ]; then
        if [ -z "$memory_total" ]; then
            why="the GPU's memory is not known"
            size=
        elif largest >"$scratch/size"; then
            size=$(cat "$scratch/size")
        elif [ "$why" = "out of memory" ]; then
            size=4
        else
            size=
        fi
    fi
    while [ -n "$size" ] && [ "$size" -ge 1 ]; do
        if ours "$steps" "$size"; then
            peak_flops=$(field peak_flops_per_second <"$scratch/out")
            keep quintet
            size=done && break
        fi
        if [ "$batch" = max ] && [ "$why" = "out of memory" ]; then size=$((size / 2)); else break; fi
    done
    [ "$size" = done ] || failed_row quintet "$batch" "${why:-failed}"
    [ "$torch_found" = yes ] || return
    # shellcheck disable=SC2086
    bounded "$PYTHON" "$here/peers.py" step --device "$device" --precision "$precision" --model "$model" \
        --batch-size "$batch" --source-length "$source" --target-length "$target" --steps "$steps" --warmup 5 $ragged \
        --variants "$variants" ${peak_flops:+--peak-flops "$peak_flops"} || local failure=$why
    keep ""
    for variant in ${variants//,/ }; do
        grep -q "\"program\":\"$variant\"" "$scratch/out" || failed_row "$variant" "$batch" "${failure:-failed}"
    done
}

product_case() {
    local why model=t5-small source=64 target=64 ragged=
    if ours 1 1; then
        printf '{"program":"quintet","op":"matrix product","flops_per_second":%s}\n' \
            "$(field matrix_product_flops_per_second <"$scratch/out")" >>"$rows"
    else
        failed_row quintet "" "$why"
    fi
    [ "$torch_found" = yes ] || return
    if bounded "$PYTHON" "$here/peers.py" product --device "$device"; then
        cat "$scratch/out" >>"$rows"
    else
        failed_row torch "" "$why"
    fi
}

attention_case() {
    local why
    if [ ! -x "$KERNELS" ]; then
        failed_row quintet "" "no program at $KERNELS"
    elif bounded "$KERNELS" --device "$device" --json t5-large t5-base attention; then
        sed 's|^{|{"program":"quintet",|' "$scratch/out" >>"$rows"
    else
        failed_row quintet "" "$why"
    fi
    [ "$torch_found" = yes ] || return
    bounded "$PYTHON" "$here/peers.py" attention --device "$device" || failed_row sdpa "" "$why"
    cat "$scratch/out" >>"$rows"
}

for case in ${cases//,/ }; do
    if [ "$(left)" -le 5 ]; then
        failed_row - "" "not run: out of time"
        continue
    fi
    echo "$case ($(left) s left)" >&2
    case $case in
        product | attention) "${case}_case" ;;
        *:*/*:*) step_case ;;
        *) failed_row - "" "not a case" ;;
    esac
done
table "$rows" | tee "$output/table.md"
