#!/usr/bin/env bash
# Trains an adapter over a model of every family, and opens what was saved with PEFT: over the same base it must give the
# same loss as the program, and so must the merged model.
#
#     PYTHON=venv/bin/python tests/references/check_adapters.sh [QUINTET]
#
# PYTHON has torch, transformers 5 and peft. QUINTET is the program; by default target/release/quintet. Ends with 0 if all
# agree.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
quintet=$(realpath "${1:-${CARGO_TARGET_DIR:-$root/target}/release/quintet}")
python=${PYTHON:-python3}
references=$root/tests/data/references
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > data.jsonl <<'DATA'
{"input": "h e l l o", "target": "HH AH L OW"}
{"input": "t e a", "target": "T IY"}
{"input": "a", "target": "AH"}
{"input": "r e a d", "target": "R EH D"}
DATA

# check FAMILY TOKENIZER LORA: trains a few steps of an adapter, the lines of the job's [lora], and compares.
check() {
    local name=$1 tokenizer=$2 lora=$3
    cat > "$name.toml" <<JOB
output_dir = "$name"
[model]
pretrained = "$references/$name"
tokenizer = "$tokenizer"
[data]
train = "data.jsonl"
input = "{input}"
target = "{target}"
[training]
max_steps = 20
global_batch_size = 4
learning_rate = 1e-2
[lora]
$lora
JOB
    "$quintet" train "$name.toml" > "$name.log" 2>&1 || { cat "$name.log"; exit 1; }
    local data=(--data data.jsonl --input '{input}' --target '{target}' --metrics loss --json)
    "$quintet" evaluate --model "$name/adapter" "${data[@]}" > evaluation.json
    "$python" -W ignore - "$references" "$name" <<'PYTHON'
import json
import sys
from pathlib import Path

references, name = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(references.parent.parent / "references"))
from generate import load, token_losses, forward
from peft import PeftModel
from transformers import AutoTokenizer

rows = [json.loads(line) for line in open("data.jsonl")]
tokenizer = AutoTokenizer.from_pretrained(f"{name}/adapter")
batch = {"source": [tokenizer(row["input"]).input_ids for row in rows],
         "labels": [tokenizer(row["target"]).input_ids for row in rows]}
ours = json.load(open("evaluation.json"))["loss"]
def loss(model):
    return (token_losses(*forward(model.eval(), batch)).sum() / sum(map(len, batch["labels"]))).item()
base = loss(load(references / name))
theirs = loss(PeftModel.from_pretrained(load(references / name), f"{name}/adapter"))
if abs(theirs - ours) > 1e-5 * ours or abs(theirs - base) < 1e-2 * base:
    sys.exit(f"{name}: loss {ours}, with PEFT {theirs}, without the adapter {base}")
print(f"{name}: loss {ours:.6f}, with PEFT {theirs:.6f}; without the adapter {base:.6f}")
PYTHON
}

check byt5 byt5 'target_modules = "all-linear"'
check t5_v1_0 wordlevel 'r = 3
target_modules = ["q", "wi", "wo"]'
check t5_v1_1 wordlevel 'r = 4
lora_alpha = 16
use_rslora = true
target_modules = ["q", "v", "lm_head"]'
check t5_v1_1_buckets wordlevel 'target_modules = "decoder\\..*\\.(k|o)"'
check mt5 wordlevel 'r = 2
modules_to_save = ["lm_head"]'
check umt5 wordlevel 'lora_dropout = 0.1'
echo "all agree"
