#!/usr/bin/env bash
# Trains a tiny model of every family and with every tokenizer, and opens what was saved in Hugging Face transformers:
# its tokenizer must give the same ids and texts, its model the same loss and the same greedy outputs.
#
#     PYTHON=venv/bin/python tests/references/check_saved.sh [QUINTET]
#
# PYTHON has torch and transformers (4.57 or 5.x: run it with both). QUINTET is the program; by default
# target/release/quintet. Ends with 0 if all agree.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

# check NAME TOKENIZER MODEL: trains a few steps of MODEL, a line of the job's [model], and compares.
check() {
    local name=$1 tokenizer=$2 model=$3
    train "$name" target "$model
tokenizer = \"$tokenizer\""
    "$quintet" evaluate --model "$name/model" --data data.jsonl --input '{input}' --target '{target}' \
        --metrics loss --json > evaluation.json
    "$python" -c 'import json; [print(json.loads(line)["input"]) for line in open("data.jsonl")]' > inputs.txt
    "$quintet" generate --model "$name/model" --input-file inputs.txt --max-new-tokens 12 --json > outputs.jsonl
    "$python" - "$name/model" > expected.json <<'PYTHON'
"""What check_saved_model.py compares with: the texts as transformers tokenizes them, and what the program computed."""
import json
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = [json.loads(line) for line in open("data.jsonl")]
outputs = [json.loads(line)["outputs"][0] for line in open("outputs.jsonl")]
for output in outputs:
    text = tokenizer.decode(output["token_ids"], skip_special_tokens=True)
    if text.strip() != output["text"].strip():
        sys.exit(f"{output['token_ids']} is {output['text']!r}; transformers decodes {text!r}")
batch = {"source": [tokenizer(row["input"]).input_ids for row in rows],
         "labels": [tokenizer(row["target"]).input_ids for row in rows]}
evaluation = json.load(open("evaluation.json"))
targets = sum(map(len, batch["labels"]))
if targets != evaluation["target_tokens"]:
    sys.exit(f"{evaluation['target_tokens']} target tokens; transformers has {targets}")
greedy = [output["token_ids"] for output in outputs]
json.dump({"batch": batch, "loss": evaluation["loss"], "greedy": greedy}, sys.stdout)
PYTHON
    echo "$name: $("$python" "$root/tests/references/check_saved_model.py" "$name/model" expected.json \
        --greedy --text "h e l l o")"
}

small='d_model = 24, d_kv = 5, d_ff = 40, num_layers = 2, num_decoder_layers = 1, num_heads = 3'
gated='feed_forward_proj = "gated-gelu", tie_word_embeddings = false'
check fresh_byt5_v1_0 byt5 "architecture = { $small }"
check fresh_wordlevel_v1_1 wordlevel "architecture = { $small, $gated }"
check fresh_unigram_mt5 unigram "architecture = { $small, $gated, model_type = \"mt5\", vocab_size = 130 }"
check tuned_byt5 byt5 "pretrained = \"$references/byt5\""
for family in t5_v1_0 t5_v1_1 t5_v1_1_buckets mt5 umt5 sharded; do
    check "tuned_$family" wordlevel "pretrained = \"$references/$family\""
done
echo "all agree"
