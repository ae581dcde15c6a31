"""Opens a model saved by Quintet in Hugging Face transformers and compares what it computes.

    python tests/references/check_saved_model.py MODEL_DIR EXPECTED.json [--greedy] [--text TEXT]

EXPECTED.json: {"batch": {"source": [[ids], ...], "labels": [[ids], ...]}, "loss": number, "greedy": [[ids], ...]},
rows not padded, `loss` = sum of token losses / number of target tokens, `greedy` only for --greedy: the ids after
the decoder's start token, up to and with eos, as many as the longest row at most.

Exits 1, and says what differs, unless the loss agrees within 1e-5 relative (and greedy ids are equal). Prints
one JSON line: {"transformers", "loss", "token_ids"}, the last for --text where tokenizer files are present.
Works with transformers 4.57 and 5.x.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

LOSS_TOLERANCE = 1e-5
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


def load(directory):
    """The model, or an exit when a tensor is missing or unknown: transformers would only warn."""
    model, info = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", True):
        aliases.add("lm_head.weight")
    wrong = sorted((set(info["missing_keys"]) - aliases) | set(info["unexpected_keys"]))
    if wrong or info["mismatched_keys"]:
        sys.exit(f"{directory}: missing, unknown or mis-shaped tensors: {wrong} {info['mismatched_keys']}")
    if model.config.model_type == "umt5" and model.lm_head.weight is not model.shared.weight:
        # transformers 5 ignores the file's `tie_word_embeddings: false` here and would scale an untied head.
        model.config.tie_word_embeddings = False
    return model.eval()


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@torch.no_grad()
def loss_of(model, batch):
    source, labels = batch["source"], batch["labels"]
    pad = model.config.pad_token_id
    mask = padded([[1] * len(row) for row in source], 0)
    return model(input_ids=padded(source, pad), attention_mask=mask, labels=padded(labels, -100)).loss.item()


@torch.no_grad()
def greedy(model, batch, max_new_tokens):
    outputs = []
    for row in batch["source"]:
        ids = torch.tensor([row])
        # Without a cache: transformers 5.23 fails with one where the decoder has more layers than the encoder.
        options = dict(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=False)
        outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist())
    return outputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("expected", type=Path, metavar="EXPECTED.json")
    parser.add_argument("--greedy", action="store_true", help="also compare greedy outputs")
    parser.add_argument("--text", help="print this text's token ids")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    expected = json.loads(arguments.expected.read_text(encoding="utf-8"))
    model = load(arguments.model)
    loss = loss_of(model, expected["batch"])
    report = {"transformers": transformers.__version__, "loss": loss}
    if arguments.text is not None and any((arguments.model / file).exists() for file in TOKENIZER_FILES):
        report["token_ids"] = AutoTokenizer.from_pretrained(arguments.model)(arguments.text).input_ids
    print(json.dumps(report))
    if not abs(loss - expected["loss"]) <= LOSS_TOLERANCE * abs(expected["loss"]):
        sys.exit(f"loss {loss} differs from {expected['loss']}")
    if arguments.greedy:
        outputs = greedy(model, expected["batch"], max(map(len, expected["greedy"])))
        for row, (ours, theirs) in enumerate(zip(expected["greedy"], outputs, strict=True)):
            if ours != theirs:
                sys.exit(f"greedy output of row {row}: {ours}, transformers gives {theirs}")


if __name__ == "__main__":
    main()
