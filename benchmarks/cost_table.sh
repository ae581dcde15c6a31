#!/usr/bin/env bash
# How the cost of a training step grows: its time and memory over sequence lengths and model sizes, with and without
# gradient checkpointing, as Markdown tables. Needs only the release binary (QUINTET, default target/release/quintet).
set -euo pipefail
cd "$(dirname "$0")/.."
quintet=${QUINTET:-target/release/quintet}
steps=${STEPS:-3}

# row MODEL BATCH SOURCE TARGET [FLAG...]: one line of a table.
row() {
  local model=$1 batch=$2 source=$3 target=$4
  shift 4
  "$quintet" bench step --model "$model" --batch-size "$batch" --source-length "$source" --target-length "$target" \
    --precision fp32 --steps "$steps" --json "$@" |
    sed -E 's/[{}"]//g; s/,/\n/g' |
    awk -F: -v label="| $model | $batch × $source/$target | ${1:+yes}" '
      { value[$1] = $2 }
      END {
        printf "%s | %.3f | %.0f | %.0f %% | %.0f | %.0f |\n", label, value["seconds_per_step"],
          value["tokens_per_second"], 100 * value["mfu"], value["peak_activation_bytes"] / 2^20,
          value["peak_memory_bytes"] / 2^20
      }'
}

header() {
  printf '\n%s\n\n' "$1"
  echo '| model | batch × source/target | checkpointing | s/step | tokens/s | of matrix products | activations, MiB | process peak, MiB |'
  echo '| --- | --- | --- | --- | --- | --- | --- | --- |'
}

header 'By length'
for length in 64 128 256 512 1024; do
  row t5-small 4 "$length" "$((length / 4))"
done
header 'By model'
for model in t5-small t5-v1_1-small byt5-small t5-base t5-v1_1-base; do
  row "$model" 2 128 32
done
header 'By gradient checkpointing'
row t5-base 2 512 128
row t5-base 2 512 128 --gradient-checkpointing
