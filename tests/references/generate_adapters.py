"""Generates what the tests compare this project's LoRA against: adapters that PEFT made over the models of generate.py.

    python tests/references/generate_adapters.py [OUT_DIR]      (default: tests/data/references)

For every model a directory `NAME/lora` holds

    adapter_config.json, adapter_model.safetensors   as PEFT saves them; B is random too, so that everything has a gradient
    gradients.safetensors                            d loss / d parameter, under the names of the adapter's file
    logits.safetensors                               `logits` [rows, vocabulary] of the last target token of each row of the
                                                     model's batch, which depends on all before it
    expected.json                                    loss, number of trainable parameters, the losses of ten AdamW steps on
                                                     the model's batch, each before its update; and for some other batches
                                                     the mean distance, 1 - cosine, of the gradient in bf16 (weights and
                                                     all) from that in f32

All else is f32, on the CPU, without dropout.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from generate import ADAMW, DEFAULT_OUTPUT, MODELS, adamw, backward, forward, load, read_json, write_json
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

STEPS = 10
BF16_BATCHES = 8
SPREAD_MAX = 1e-5

# Lists of names, a pattern, all linear layers; the head, tied and not; both scales.
TARGETS = {
    "t5_v1_0": dict(r=3, lora_alpha=5, target_modules=["q", "k", "wi", "lm_head"]),
    "t5_v1_1": dict(r=2, lora_alpha=4, use_rslora=True),
    "t5_v1_1_buckets": dict(r=4, lora_alpha=4, target_modules=r"decoder\..*\.(o|v|wi_1)"),
    "byt5": dict(r=3, lora_alpha=2, target_modules="all-linear"),
    "mt5": dict(r=1, lora_alpha=3, target_modules=["EncDecAttention.k", "o", "wi_0", "wo"]),
    "umt5": dict(r=2, lora_alpha=4, target_modules=["q", "v", "wi_1", "lm_head"], use_rslora=True),
}
KEYS = ["peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
        "use_rslora", "bias", "modules_to_save"]


def adapted(directory, options, dtype=torch.float32):
    """The model with an adapter of random numbers."""
    model = get_peft_model(load(directory, dtype), LoraConfig(task_type="SEQ_2_SEQ_LM", **options)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(trainable(model).items()):
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps(directory, options, batch, dtype):
    model = adapted(directory, options, dtype)
    optimizer = adamw(trainable(model).values())
    losses = []
    for _ in range(STEPS):
        losses.append(backward(model, batch))
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), ADAMW["max_grad_norm"])
        optimizer.step()
    return losses


@torch.no_grad()
def last_logits(model, batch):
    """Of the last target token of each row."""
    logits = forward(model, batch)[0].logits
    return torch.stack([logits[row, len(labels) - 1] for row, labels in enumerate(batch["labels"])])


def cosine(model, gradients):
    """Of the angle between the gradient in a model and another, of the same parameters in the same order."""
    theirs = torch.cat([parameter.grad.double().flatten() for parameter in trainable(model).values()])
    exact = torch.cat([gradient.double().flatten() for gradient in gradients.values()])
    return torch.nn.functional.cosine_similarity(theirs, exact, dim=0).item()


def draw(generator, least, end, count):
    return torch.randint(least, end, (count,), generator=generator).tolist()


def draw_rows(generator, directory, count):
    """Rows of tokens that end with eos."""
    vocabulary = read_json(directory / "config.json")["vocab_size"]
    return [draw(generator, 2, vocabulary, length) + [1] for length in draw(generator, 3, 12, count)]


def bf16_reference(directory, options):
    """Of several batches: of one alone the distance is what its roundings happen to make of it."""
    generator = torch.Generator().manual_seed(5)
    batches, distances = [], []
    for _ in range(BF16_BATCHES):
        batch = {key: draw_rows(generator, directory, 5) for key in ("source", "labels")}
        exact, rounded = adapted(directory, options), adapted(directory, options).to(torch.bfloat16)
        for model in (exact, rounded):
            forward(model, batch)[0].loss.backward()
        batches.append(batch)
        distances.append(1 - cosine(rounded, {name: p.grad for name, p in trainable(exact).items()}))
    return {"batches": batches, "distance": sum(distances) / len(distances)}


def write(directory, options):
    batch = read_json(directory / "batch.json")
    out = directory / "lora"
    out.mkdir(exist_ok=True)
    model = adapted(directory, options)
    loss = backward(model, batch)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        config = read_json(Path(saved) / "adapter_config.json")
        tensors = load_file(Path(saved) / "adapter_model.safetensors")
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set, in PEFT
    config["base_model_name_or_path"] = None  # a path of this machine
    write_json(out / "adapter_config.json", {key: config[key] for key in KEYS})
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    gradients = {name.replace(".default", ""): p.grad for name, p in trainable(model).items()}
    # With an adapter of the head PEFT saves the frozen head too.
    assert gradients.keys() == {name for name in tensors if ".base_layer." not in name}, (gradients.keys(), tensors.keys())
    save_file(gradients, out / "gradients.safetensors", metadata={"format": "pt"})
    save_file({"logits": last_logits(model, batch)}, out / "logits.safetensors", metadata={"format": "pt"})
    single, double = (steps(directory, options, batch, dtype) for dtype in (torch.float32, torch.float64))
    spread = max(abs(a - b) / b for a, b in zip(single, double))
    assert spread < SPREAD_MAX and single[-1] < single[0], (spread, single)
    parameters, _ = model.get_nb_trainable_parameters()
    reference = {"loss": loss, "trainable_parameters": parameters, "adamw": {**ADAMW, "losses": single}}
    write_json(out / "expected.json", {**reference, "bf16": bf16_reference(directory, options)})
    return loss, single[-1], spread


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT
    for name in MODELS:
        print(name, *write(output / name, TARGETS[name]))


if __name__ == "__main__":
    main()
