#!/usr/bin/env bash
# Trains an adapter over a model of every family, and opens what was saved with PEFT: over the same base it must give the
# same loss as the program, and so must the merged model. Likewise of a classifier, whose head comes with the adapter.
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

cat > classes.jsonl <<'DATA'
{"input": "h e l l o", "target": "word"}
{"input": "t e a", "target": "word"}
{"input": "a", "target": "letter"}
{"input": "r e a d", "target": "word"}
{"input": "b", "target": "letter"}
DATA

# check_classifier FAMILY TOKENIZER LORA: likewise of a classifier, over a model without a head.
check_classifier() {
    local name=$1 tokenizer=$2 lora=$3 run=$1-classifier
    cat > "$run.toml" <<JOB
output_dir = "$run"
[model]
pretrained = "$references/$name"
tokenizer = "$tokenizer"
task = "sequence_classification"
[data]
train = "classes.jsonl"
input = "{input}"
target = "{target}"
[training]
max_steps = 20
global_batch_size = 5
learning_rate = 1e-2
[lora]
$lora
JOB
    "$quintet" train "$run.toml" > "$run.log" 2>&1 || { cat "$run.log"; exit 1; }
    local data=(--data classes.jsonl --input '{input}' --target '{target}' --metrics loss --json)
    "$quintet" evaluate --model "$run/adapter" "${data[@]}" > evaluation.json
    "$quintet" merge --model "$run/adapter" --output "$run/merged" > /dev/null
    "$python" -W ignore - "$references" "$name" "$run" <<'PYTHON'
import json
import sys
from pathlib import Path

references, name, run = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, str(references.parent.parent / "references"))
import torch
from generate import load, padded
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

rows = [json.loads(line) for line in open("classes.jsonl")]
tokenizer = AutoTokenizer.from_pretrained(f"{run}/adapter")
source = [tokenizer(row["input"]).input_ids for row in rows]
labels = torch.tensor([["letter", "word"].index(row["target"]) for row in rows])
ours = json.load(open("evaluation.json"))["loss"]
def loss(model):
    ids, mask = padded(source, 0), padded([[1] * len(row) for row in source], 0)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
def fresh():
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(references / name, num_labels=2))
    stacks = {f"transformer.{key}": value for key, value in load(references / name).state_dict().items()}
    missing, _ = model.load_state_dict(stacks, strict=False)
    assert all(key.startswith("classification_head") for key in missing), missing
    return model
base, theirs = loss(fresh()), loss(PeftModel.from_pretrained(fresh(), f"{run}/adapter"))
merged = AutoModelForSequenceClassification.from_pretrained(f"{run}/merged")
assert merged.config.id2label == {0: "letter", 1: "word"}, merged.config.id2label
if abs(theirs - ours) > 1e-5 * ours or abs(loss(merged) - ours) > 1e-5 * ours or abs(theirs - base) < 1e-2 * base:
    sys.exit(f"{run}: loss {ours}, with PEFT {theirs}, merged {loss(merged)}, without the adapter {base}")
print(f"{run}: loss {ours:.6f}, with PEFT {theirs:.6f}, merged {loss(merged):.6f}; without the adapter {base:.6f}")
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
check_classifier t5_v1_0 wordlevel 'target_modules = "all-linear"'
check_classifier t5_v1_1 wordlevel 'target_modules = ["q", "v"]'
check_classifier umt5 wordlevel 'r = 2
use_rslora = true'
echo "all agree"
