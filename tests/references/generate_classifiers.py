"""Generates what the tests compare this project's classifiers against: sequence classification by transformers over the
stacks of generate.py's models.

    python tests/references/generate_classifiers.py [OUT_DIR]      (default: tests/data/references)

For every model a directory `NAME/classifier` holds

    config.json              as `save_pretrained` writes it for a ...ForSequenceClassification
    head.safetensors         the tensors of the head; all others are the model's, under the prefix `transformer.`
    gradients.safetensors    d loss / d parameter
    expected.json            labels of the batch's sources, logits, loss and gradient norm

and beside it `NAME/encoder.safetensors` the last hidden states that ...EncoderModel gives the batch's sources, one source
after the other without padding: `last_hidden_state` [tokens, d_model].

All is f32, on the CPU, without dropout.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch
from generate import DEFAULT_OUTPUT, MODELS, load, padded, read_json, write_json
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTextEncoding

CLASSES = {0: "bad", 1: "good", 2: "so-so"}
LABELS = [2, 0, 1, 1, 0]


def classifier(directory):
    base = load(directory)
    config = AutoConfig.from_pretrained(directory, id2label=CLASSES, label2id={v: k for k, v in CLASSES.items()})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").train()
    weights = {f"transformer.{name}": value for name, value in base.state_dict().items() if not name.startswith("lm_head")}
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if name.startswith("classification_head"):
            weights[name] = torch.randn(value.shape, generator=generator) * 0.4
    model.load_state_dict(weights)
    return model


def write(directory):
    out = directory / "classifier"
    out.mkdir(exist_ok=True)
    batch = read_json(directory / "batch.json")
    model = classifier(directory)
    source, mask = padded(batch["source"], 0), padded([[1] * len(row) for row in batch["source"]], 0)
    output = model(input_ids=source, attention_mask=mask, labels=torch.tensor(LABELS))
    output.loss.backward()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        config = read_json(Path(saved) / "config.json")
    write_json(out / "config.json", config)
    named = dict(model.named_parameters())
    head = {name: p.detach().clone() for name, p in named.items() if name.startswith("classification_head")}
    save_file(head, out / "head.safetensors", metadata={"format": "pt"})
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients.values()))
    save_file(gradients, out / "gradients.safetensors", metadata={"format": "pt"})
    expected = {"labels": LABELS, "loss": output.loss.item(), "logits": output.logits.tolist(), "grad_norm": norm}
    write_json(out / "expected.json", expected)
    return output.loss.item()


def write_encoder(directory):
    model = AutoModelForTextEncoding.from_pretrained(directory, attn_implementation="eager").eval()
    states = []
    with torch.no_grad():
        for row in read_json(directory / "batch.json")["source"]:
            states.append(model(input_ids=torch.tensor([row])).last_hidden_state[0])
    save_file({"last_hidden_state": torch.cat(states)}, directory / "encoder.safetensors", metadata={"format": "pt"})
    return type(model).__name__


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT
    for name in MODELS:
        print(name, write(output / name), write_encoder(output / name))


if __name__ == "__main__":
    main()
