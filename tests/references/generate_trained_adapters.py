"""Stores adapters that this project trained, with the logits that PEFT gives with them. For
generate_trained_adapters.sh, which trains them:

    python tests/references/generate_trained_adapters.py RUNS [OUT_DIR]      (default: tests/data/references)

For every model of generate.py a directory `NAME/trained` holds

    adapter_config.json, adapter_model.safetensors   as they were written
    logits.safetensors, expected.json                as in `NAME/lora`; of expected.json the loss

and `NAME/classifier/trained` the same of a classifier of two classes, with its logits [rows, classes] of the sources of the
model's batch and without expected.json.

Fails unless transformers computes the same of the model and adapter merged into one, and something else without the adapter.
"""

import shutil
import sys
from pathlib import Path

import torch
from generate import DEFAULT_OUTPUT, MODELS, forward, load, padded, read_json, write_json
from generate_adapters import last_logits
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

CLASSES = {0: "letter", 1: "word"}
TOLERANCE = 1e-5


def off(logits, others):
    """By how much they differ, of the largest."""
    return ((logits - others).abs().max() / others.abs().max()).item()


def store(base, run, merged, logits, out):
    """Of a run: its logits are those that `logits` computes of a model such as `base()` with the adapter."""
    model = PeftModel.from_pretrained(base(), run / "adapter").eval()
    theirs = logits(model)
    together, without = off(logits(merged), theirs), off(logits(base().eval()), theirs)
    assert together <= TOLERANCE and without > 1e-2, (run, together, without)
    out.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / "adapter" / name, out / name)
    save_file({"logits": theirs}, out / "logits.safetensors", metadata={"format": "pt"})
    print(f"{run.name}: merged {together:.1e} off; without the adapter {without:.1e}", flush=True)
    return model


def without_head(directory):
    """A classifier whose head is drawn at random."""
    config = AutoConfig.from_pretrained(directory, id2label=CLASSES, label2id={v: k for k, v in CLASSES.items()})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    weights = {f"transformer.{name}": value for name, value in load(directory).state_dict().items()}
    missing, _ = model.load_state_dict(weights, strict=False)
    assert all(name.startswith("classification_head") for name in missing), missing
    return model


@torch.no_grad()
def class_logits(model, batch):
    source = batch["source"]
    mask = padded([[1] * len(row) for row in source], 0)
    return model(input_ids=padded(source, 0), attention_mask=mask).logits


def write(output, runs, name):
    directory, batch = output / name, read_json(output / name / "batch.json")
    run, out = runs / f"{name}-seq2seq", directory / "trained"
    merged = load(run / "merged").eval()
    model = store(lambda: load(directory), run, merged, lambda model: last_logits(model, batch), out)
    write_json(out / "expected.json", {"loss": forward(model, batch)[0].loss.item()})
    run, out = runs / f"{name}-sequence_classification", directory / "classifier" / "trained"
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged", attn_implementation="eager").eval()
    assert merged.config.id2label == CLASSES, merged.config.id2label
    store(lambda: without_head(directory), run, merged, lambda model: class_logits(model, batch), out)


def main():
    runs = Path(sys.argv[1])
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT_OUTPUT
    torch.manual_seed(0)
    for name in MODELS:
        write(output, runs, name)


if __name__ == "__main__":
    main()
