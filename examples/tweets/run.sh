#!/usr/bin/env bash
# The sentiment of tweets, from nothing to a table: pre-training, instruction tuning, zero-, one- and few-shot prompts,
# fine-tuning, LoRA, and all of them compared on the same tweets. Started again, it goes on where it was stopped; remove
# runs/pretrain and runs/tweets to begin anew.
#
#     examples/tweets/run.sh [--set section.key=value]…      # settings for every step
#
# Needs pip and tar for the texts, and the network for these alone.
set -euo pipefail
cd "$(dirname "$0")/../.."

quintet() { cargo run --release --quiet -- "$@"; }
step() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }
train() { [ -e "$1" ] || quintet train "${@:2}" --resume; }

[ -e examples/texts/reviews.jsonl ] || examples/fetch-texts.sh

step "pre-training by span corruption"
train runs/pretrain/model examples/pretrain.toml "$@"
step "instruction tuning on reviews"
train runs/tweets/instruct/model examples/tweets/instruct.toml "$@"

for shots in 0 1 4; do
    step "tweets with $shots examples in the prompt"
    quintet evaluate --job examples/tweets/finetune.toml --model runs/tweets/instruct/model \
        --set data.num_shots=$shots "$@" --output "runs/tweets/$shots-shot"
done

step "fine-tuning"
train runs/tweets/finetune/model examples/tweets/finetune.toml "$@"
step "LoRA"
train runs/tweets/lora/adapter examples/tweets/lora.toml "$@"

step "the table"
cd runs/tweets
quintet evaluate --compare 0-shot 1-shot 4-shot finetune lora --metrics accuracy,macro_f1,rouge1,rougeL
printf '(after %d s)\n' "$SECONDS"
