"""Generates what the tests compare this project's classifiers against: sequence classification by transformers over the
stacks of generate.py's models.

    python tests/references/generate_classifiers.py [OUT_DIR]      (default: tests/data/references)

For every model a directory `NAME/classifier` holds

    config.json              as `save_pretrained` writes it for a ...ForSequenceClassification
    head.safetensors         the tensors of the head; all others are the model's, under the prefix `transformer.`
    gradients.safetensors    d loss / d parameter
    expected.json            labels of the batch's sources, logits, loss and gradient norm; and for some other batches the
                             mean distance, 1 - cosine, of the gradient in bf16 (weights and all) from that in f32

    lora/                    an adapter that PEFT made over the classifier and its head, which is trained whole; gradients
                             and expected.json (loss, number of trainable parameters, logits) as above

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
from generate_adapters import BF16_BATCHES, KEYS, cosine, draw, draw_rows, trainable
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTextEncoding

CLASSES = {0: "bad", 1: "good", 2: "so-so"}
LABELS = [2, 0, 1, 1, 0]
ADAPTERS = {
    "t5_v1_0": dict(r=3, lora_alpha=5, target_modules=["q", "wi"]),
    "t5_v1_1": dict(r=2, lora_alpha=3, target_modules=["k", "o"]),
    "t5_v1_1_buckets": dict(r=1, lora_alpha=2, target_modules=["EncDecAttention.v", "wi_0"]),
    "byt5": dict(r=2, lora_alpha=1, target_modules=["q", "wo"]),
    "mt5": dict(r=1, lora_alpha=3, target_modules="all-linear"),
    "umt5": dict(r=2, lora_alpha=4, target_modules=["q", "v", "wo"], use_rslora=True),
}


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


def run(model, source, labels=LABELS):
    ids, mask = padded(source, 0), padded([[1] * len(row) for row in source], 0)
    return model(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels))


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bf16_reference(directory):
    """Of several batches: of five examples alone the distance is what their roundings happen to make of it."""
    generator = torch.Generator().manual_seed(5)
    batches, distances = [], []
    for _ in range(BF16_BATCHES):
        source = draw_rows(generator, directory, len(LABELS))
        labels = draw(generator, 0, len(CLASSES), len(LABELS))
        exact, rounded = classifier(directory), classifier(directory).to(torch.bfloat16)
        for model in (exact, rounded):
            run(model, source, labels).loss.backward()
        batches.append({"source": source, "labels": labels})
        distances.append(1 - cosine(rounded, gradients_of(exact)))
    return {"batches": batches, "distance": sum(distances) / len(distances)}


def write(directory):
    out = directory / "classifier"
    out.mkdir(exist_ok=True)
    model = classifier(directory)
    output = run(model, read_json(directory / "batch.json")["source"])
    output.loss.backward()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        config = read_json(Path(saved) / "config.json")
    write_json(out / "config.json", config)
    named = dict(model.named_parameters())
    head = {name: p.detach().clone() for name, p in named.items() if name.startswith("classification_head")}
    save_file(head, out / "head.safetensors", metadata={"format": "pt"})
    gradients = gradients_of(model)
    norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients.values()))
    save_file(gradients, out / "gradients.safetensors", metadata={"format": "pt"})
    expected = {"labels": LABELS, "loss": output.loss.item(), "logits": output.logits.tolist(), "grad_norm": norm}
    write_json(out / "expected.json", {**expected, "bf16": bf16_reference(directory)})
    return output.loss.item()


def write_adapter(directory, options):
    out = directory / "classifier" / "lora"
    out.mkdir(exist_ok=True)
    config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["classification_head"], **options)
    model = get_peft_model(classifier(directory), config).train()
    trained = trainable(model)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(trained.items()):
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    output = run(model, read_json(directory / "batch.json")["source"])
    output.loss.backward()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        config = read_json(Path(saved) / "adapter_config.json")
        tensors = load_file(Path(saved) / "adapter_model.safetensors")
    config["target_modules"].sort()  # a set, in PEFT
    config["base_model_name_or_path"] = None  # a path of this machine
    write_json(out / "adapter_config.json", {key: config[key] for key in KEYS})
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    gradients = {name.replace(".default", "").replace(".modules_to_save", ""): p.grad for name, p in trained.items()}
    assert gradients.keys() == tensors.keys(), (gradients.keys(), tensors.keys())
    save_file(gradients, out / "gradients.safetensors", metadata={"format": "pt"})
    parameters, _ = model.get_nb_trainable_parameters()
    expected = {"loss": output.loss.item(), "trainable_parameters": parameters, "logits": output.logits.tolist()}
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
    for name, options in ADAPTERS.items():
        print(name, "with an adapter", write_adapter(output / name, options))


if __name__ == "__main__":
    main()
