#!/usr/bin/env bash
# Trains adapters over the models of generate.py, and over a classifier on each, and stores them with the logits that PEFT
# gives with them, for the tests to compare: generate_trained_adapters.py, which this ends with, says what it stores.
#
#     PYTHON=venv/bin/python tests/references/generate_trained_adapters.sh [QUINTET]
#
# PYTHON has torch, transformers 5 and peft. QUINTET is the program; by default target/release/quintet.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ln -s "$references"/*/ .

# adapt NAME TOKENIZER LORA [FIELD TASK]: trains an adapter over a model, lines of the job's [lora], and merges them.
adapt() {
    local name=$1 tokenizer=$2 lora=$3 field=${4:-target} task=${5:-seq2seq} run=$1-${5:-seq2seq}
    train "$run" "$field" "pretrained = \"$name\"
tokenizer = \"$tokenizer\"
task = \"$task\"" "[lora]
$lora"
    "$quintet" merge --model "$run/adapter" --output "$run/merged" > "$run.log"
}

adapt byt5 byt5 'r = 2
target_modules = "all-linear"'
adapt t5_v1_0 wordlevel 'r = 3
target_modules = ["q", "wi", "wo"]'
adapt t5_v1_1 wordlevel 'r = 4
lora_alpha = 16
use_rslora = true
target_modules = ["q", "v", "lm_head"]'
adapt t5_v1_1_buckets wordlevel 'target_modules = "decoder\\..*\\.(k|o)"'
adapt mt5 wordlevel 'r = 2
modules_to_save = ["lm_head"]'
adapt umt5 wordlevel 'lora_dropout = 0.1'

classify() { adapt "$@" class sequence_classification; }
classify byt5 byt5 'r = 3
lora_dropout = 0.2'
classify t5_v1_0 wordlevel 'r = 2
target_modules = "all-linear"'
classify t5_v1_1 wordlevel 'target_modules = ["q", "v"]'
classify t5_v1_1_buckets wordlevel 'r = 4
target_modules = "transformer\\.decoder\\..*\\.(k|o)"'
classify mt5 wordlevel 'r = 1
lora_alpha = 3
target_modules = ["wi_0", "wi_1", "wo"]'
classify umt5 wordlevel 'r = 2
use_rslora = true'

"$python" -W ignore "$root/tests/references/generate_trained_adapters.py" "$work"
