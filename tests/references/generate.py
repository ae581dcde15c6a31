"""Generates the reference data that the tests compare this project's T5 against.

    python tests/references/generate.py [OUT_DIR]            writes (default: tests/data/references)
    python tests/references/generate.py --check [OUT_DIR]    recomputes losses and greedy outputs of what
                                                             is stored with the transformers at hand

Every model is tiny, random and of odd sizes: `num_heads * d_kv != d_model`, `d_ff` no multiple of 8,
stacks of unequal depth. For each of them a directory holds

    config.json, generation_config.json, model.safetensors
                           as `save_pretrained` names them (see "Tying" below)
    batch.json             five rows of token ids of very different length, not padded:
                           {"source": [[...], ...], "labels": [[...], ...]}
    gradients.safetensors  d loss / d parameter, under the parameters' names
    expected.json          the numbers; `expected()` below is their definition

and beside them `sharded/` (the first v1.1 model once more, in several files with an index) and
`byt5_tokenizer.json` (texts and the ids that ByT5Tokenizer gives them).

All is f32, on the CPU, with dropout 0 and eager attention. loss = sum of token losses / number of
target tokens. Optimizer trajectories are repeated in f64, and a seed is passed over unless both agree:
a reference that only one order of summation reproduces would be no reference.

Tying. transformers 5 forces `tie_word_embeddings = True` on every T5 and decides by the key in
config.json whether to scale the decoder's output; 4.x reads the same key as "tied and scaled". Both give
the original architecture for files as written here: v1.0 without `lm_head.weight` (tied, scaled by
d_model^-0.5), all later families with `"tie_word_embeddings": false` and `lm_head.weight` (own head, no
scale). The exception is UMT5 in 5.x, which scales an untied head all the same; `load()` corrects it.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, ByT5Tokenizer
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import LabelSmoother

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "data" / "references"
IGNORED_LABEL = -100
OPTIMIZER_STEPS = 20
MAX_NEW_TOKENS = 20
GREEDY_MARGIN_MIN = 2e-3
TRAJECTORY_SPREAD_MAX = 5e-6
LABEL_SMOOTHING = 0.1
ADAMW = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}
ADAFACTOR = {
    "lr": 3e-3,
    "eps": [1e-30, 1e-3],
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "weight_decay": 0.0,
    "scale_parameter": False,
    "relative_step": False,
    "max_grad_norm": None,
}

COMMON = {
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "use_cache": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BUCKETS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
GATED_UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# Which keys a config.json holds, and which it leaves to defaults, follows the published files of each
# family. `num_decoder_layers` absent means as many as `num_layers`.
MODELS = {
    # As t5-small's: neither `feed_forward_proj` nor `tie_word_embeddings`, but keys that no one reads.
    "t5_v1_0": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "n_positions": 512,
        "output_past": True,
        "task_specific_params": {"summarization": {"early_stopping": True, "prefix": "summarize: "}},
        "relative_attention_num_buckets": 32,
        **COMMON,
        **dict(vocab_size=131, d_model=14, d_kv=5, num_heads=3, d_ff=29, num_layers=2, num_decoder_layers=3),
    },
    "t5_v1_1": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **COMMON,
        **BUCKETS,
        **GATED_UNTIED,
        **dict(vocab_size=119, d_model=18, d_kv=4, num_heads=3, d_ff=27, num_layers=2, num_decoder_layers=1),
    },
    # Buckets that divide unevenly: 9 a side and 4 of them exact in the encoder, 18 and 9 in the decoder.
    "t5_v1_1_buckets": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **COMMON,
        **GATED_UNTIED,
        "relative_attention_num_buckets": 18,
        "relative_attention_max_distance": 50,
        **dict(vocab_size=67, d_model=12, d_kv=7, num_heads=5, d_ff=19, num_layers=1, num_decoder_layers=2),
    },
    "byt5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "tokenizer_class": "ByT5Tokenizer",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        **COMMON,
        **BUCKETS,
        **GATED_UNTIED,
        **dict(vocab_size=384, d_model=10, d_kv=4, num_heads=3, d_ff=21, num_layers=3, num_decoder_layers=1),
    },
    "mt5": {
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        "tokenizer_class": "T5Tokenizer",
        "relative_attention_num_buckets": 32,
        **COMMON,
        **GATED_UNTIED,
        **dict(vocab_size=203, d_model=15, d_kv=4, num_heads=3, d_ff=22, num_layers=2, num_decoder_layers=1),
    },
    # One relative bias table in every layer.
    "umt5": {
        "architectures": ["UMT5ForConditionalGeneration"],
        "model_type": "umt5",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "scalable_attention": True,
        **COMMON,
        **BUCKETS,
        **GATED_UNTIED,
        **dict(vocab_size=151, d_model=13, d_kv=3, num_heads=5, d_ff=23, num_layers=2, num_decoder_layers=2),
    },
}
SHARDED = "t5_v1_1"

# One source reaches beyond `max_distance`, one is a lone token; likewise the targets.
SOURCE_LENGTHS = [45, 7, 1, 163, 23]
TARGET_LENGTHS = {name: [20, 1, 9, 13, 4] for name in MODELS} | {"t5_v1_0": [20, 1, 137, 13, 4]}

BYT5_TEXTS = [
    "",
    "hello",
    "Hello, World! 123",
    "naïve café – Zürich",
    "日本語のテキスト",
    "emoji 🎉👩‍👩‍👧 end",
    "tab\tnewline\ncarriage\rnull\x00bell\x07delete\x7f",
    "The <extra_id_0> walks in <extra_id_1> park",
    "<extra_id_124><extra_id_125>",
    "<pad></s><unk>",
    "  two  spaces  ",
    "عربى עברית हिन्दी",
]


class Untelling(Exception):
    """What this seed gives would make a poor reference: try the next."""


def shared_names(config):
    """Names that `state_dict` lists and files do not hold: aliases of `shared.weight`."""
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    return aliases if config.get("tie_word_embeddings") is False else aliases | {"lm_head.weight"}


def random_weights(config, seed):
    """Weights by parameter name. Wider than a fresh model's where that makes the numbers tell more:
    attention that is far from uniform, norms away from 1, relative biases that matter."""
    model_type = config["model_type"]
    skeleton = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config))
    names = {name: tuple(w.shape) for name, w in skeleton.state_dict().items() if name not in shared_names(config)}
    assert model_type == skeleton.config.model_type
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(names.items()):
        normal = generator.standard_normal(shape)
        if "layer_norm" in name:
            value = 1.0 + 0.2 * normal
        elif "relative_attention_bias" in name:
            value = 0.5 * normal
        elif name == "shared.weight":
            value = normal
        elif name == "lm_head.weight":
            value = 0.5 * normal
        else:
            fan_in = shape[1]
            value = normal * fan_in**-0.5 * (1.5 * config["d_kv"] ** -0.5 if ".q." in name else 1.0)
        weights[name] = np.ascontiguousarray(value, dtype=np.float32)
    head = weights.get("lm_head.weight", weights["shared.weight"])
    head[config["eos_token_id"]] *= 2.0  # so that some greedy outputs end
    return weights


def random_batch(config, target_lengths, seed):
    """Rows end with eos, as tokenizers leave them. Ids repeat, so that embedding rows collect gradients."""
    generator = np.random.default_rng(seed)

    def row(length):
        ids = generator.integers(2, config["vocab_size"], size=length - 1)
        return [int(i) for i in ids] + [config["eos_token_id"]]

    return {"source": [row(n) for n in SOURCE_LENGTHS], "labels": [row(n) for n in target_lengths]}


def load(directory, dtype=torch.float32):
    """The model as the original architecture has it, or an error when a tensor does not fit."""
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        directory, attn_implementation="eager", dtype=dtype, output_loading_info=True
    )
    missing = set(info["missing_keys"]) - shared_names(read_json(directory / "config.json"))
    assert not missing and not info["unexpected_keys"], (directory, missing, info["unexpected_keys"])
    if model.config.model_type == "umt5" and model.lm_head.weight is not model.shared.weight:
        # transformers 5 sets this to True whatever the file says, and scales the decoder's output by it.
        model.config.tie_word_embeddings = False
    return model.train()  # dropout is 0, so this changes nothing but what users of `train` would see


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def forward(model, batch):
    """Logits [rows, longest target, vocabulary] and padded labels. The model shifts the labels itself."""
    source, labels = padded(batch["source"], 0), padded(batch["labels"], IGNORED_LABEL)
    mask = padded([[1] * len(row) for row in batch["source"]], 0)
    return model(input_ids=source, attention_mask=mask, labels=labels), labels


def token_losses(output, labels):
    """[rows, longest target], 0 where padded."""
    return torch.nn.functional.cross_entropy(
        output.logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )


def backward(model, batch, label_smoothing=0.0):
    """Loss; leaves gradients in the model."""
    model.zero_grad()
    output, labels = forward(model, batch)
    if label_smoothing > 0.0:
        loss = LabelSmoother(epsilon=label_smoothing)(output, labels)
    else:
        loss = token_losses(output, labels).sum() / sum(map(len, batch["labels"]))
        assert math.isclose(loss.item(), output.loss.item(), rel_tol=1e-6)
    loss.backward()
    return loss.item()


def grad_norm(model):
    return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters() if p.grad is not None))


def trajectory(directory, batch, make_optimizer, max_grad_norm, dtype):
    """The losses before each of OPTIMIZER_STEPS steps on the same batch."""
    model = load(directory, dtype)
    optimizer = make_optimizer(model.parameters())
    losses = []
    for _ in range(OPTIMIZER_STEPS):
        losses.append(backward(model, batch))
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return losses


def optimizer_reference(directory, batch, make_optimizer, hyper_parameters):
    """Hyper-parameters and losses. Untelling where rounding decides them or where they do not fall."""
    single, double = (
        trajectory(directory, batch, make_optimizer, hyper_parameters["max_grad_norm"], dtype)
        for dtype in (torch.float32, torch.float64)
    )
    spread = max(abs(a - b) / b for a, b in zip(single, double))
    if spread > TRAJECTORY_SPREAD_MAX:
        raise Untelling(f"losses of {make_optimizer.__name__} in f32 and f64 differ by {spread:.1e}")
    if single[-1] > 0.9 * single[0]:
        raise Untelling(f"{make_optimizer.__name__}: {single[0]} falls only to {single[-1]}")
    return {**hyper_parameters, "losses": single}


def adamw(parameters):
    options = {key: value for key, value in ADAMW.items() if key != "max_grad_norm"}
    return torch.optim.AdamW(parameters, **options)


def adafactor(parameters):
    options = {key: value for key, value in ADAFACTOR.items() if key != "max_grad_norm"}
    return Adafactor(parameters, **options)


@torch.no_grad()
def greedy(model, batch):
    """Ids after the decoder's start token, up to and with eos, for each row alone."""
    model.eval()
    outputs = []
    for row in batch["source"]:
        ids = model.generate(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            # transformers 5.23 sizes the cache by `num_layers` and fails where the decoder has more.
            use_cache=False,
        )
        outputs.append(ids[0, 1:].tolist())
    model.train()
    return outputs


@torch.no_grad()
def greedy_margin(model, batch, outputs):
    """The smallest lead of a chosen token over the runner-up."""
    output, labels = forward(model, {"source": batch["source"], "labels": outputs})
    top = output.logits.topk(2, dim=-1)
    chosen = labels != IGNORED_LABEL
    assert (top.indices[..., 0] == labels)[chosen].all()
    return (top.values[..., 0] - top.values[..., 1])[chosen].min().item()


def greedy_reference(model, config, batch):
    """Untelling unless some row ends by eos, some row does not, tokens vary and none is a near tie."""
    outputs = greedy(model, batch)
    margin = greedy_margin(model, batch, outputs)
    ended = [row[-1] == config["eos_token_id"] for row in outputs]
    if all(ended) or not any(ended) or len({token for row in outputs for token in row}) < 6:
        raise Untelling(f"greedy outputs {outputs}")
    if margin < GREEDY_MARGIN_MIN:
        raise Untelling(f"greedy margin {margin}")
    return {"max_new_tokens": MAX_NEW_TOKENS, "min_margin": margin, "outputs": outputs}


def expected(directory, config, batch):
    """Everything in expected.json, and the gradients by name."""
    model = load(directory)
    greedy_outputs = greedy_reference(model, config, batch)
    result = {"target_tokens": sum(map(len, batch["labels"])), "loss": backward(model, batch)}
    output, labels = forward(model, batch)
    result["row_loss_sums"] = token_losses(output, labels).double().sum(dim=1).tolist()
    result["logits_row_0_position_0"] = output.logits[0, 0].tolist()
    result["grad_norm"] = grad_norm(model)
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    smoothed = backward(model, batch, LABEL_SMOOTHING)
    result["label_smoothing"] = {"epsilon": LABEL_SMOOTHING, "loss": smoothed, "grad_norm": grad_norm(model)}
    result["greedy"] = greedy_outputs
    result["adamw"] = optimizer_reference(directory, batch, adamw, ADAMW)
    result["adafactor"] = optimizer_reference(directory, batch, adafactor, ADAFACTOR)
    return result, gradients


def write_model(directory, config, weights):
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    tokens = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    write_json(directory / "generation_config.json", {key: config[key] for key in tokens})
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_reference(directory, name, config):
    """Takes the first seed that tells something. Returns the number of parameters and expected.json."""
    for seed in range(1000):
        batch = random_batch(config, TARGET_LENGTHS[name], seed)
        write_model(directory, config, random_weights(config, seed))
        try:
            result, gradients = expected(directory, config, batch)
            break
        except Untelling as reason:
            print(f"{name}: passing over seed {seed}: {reason}", file=sys.stderr)
    else:
        raise RuntimeError(f"{name}: no seed gives a telling reference")
    model = load(directory)
    check_names(directory, model)
    result = {"seed": seed, **result}
    write_json(directory / "batch.json", batch)
    write_json(directory / "expected.json", result)
    save_file(gradients, directory / "gradients.safetensors", metadata={"format": "pt"})
    return sum(p.numel() for p in model.parameters()), result


def check_names(directory, model):
    """What we wrote is what `save_pretrained` would have written, name by name."""
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(other)
        theirs, ours = load_file(Path(other) / "model.safetensors"), load_file(directory / "model.safetensors")
    assert theirs.keys() == ours.keys(), sorted(theirs.keys() ^ ours.keys())
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


def write_sharded(output, name):
    """The same model, split as transformers splits large ones."""
    directory = output / "sharded"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as split:
        load(output / name).save_pretrained(split, max_shard_size="16KB")
        files = [path for path in Path(split).iterdir() if "safetensors" in path.name]
        for path in files:
            (directory / path.name).write_bytes(path.read_bytes())
    assert len(files) >= 3, "an index and at least two shards"
    for file in ("config.json", "generation_config.json"):
        (directory / file).write_bytes((output / name / file).read_bytes())
    write_json(directory / "source.json", {"same_model_as": name})


def write_tokenizer(path):
    tokenizer = ByT5Tokenizer()
    write_json(path, [{"text": text, "ids": tokenizer(text).input_ids} for text in BYT5_TEXTS])


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path, value):
    """One line an entry of a long list would be unreadable; one line a top-level entry is."""
    if isinstance(value, dict) and "architectures" not in value:
        lines = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
    elif isinstance(value, list):
        text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n]\n"
    else:
        text = json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def generate(output):
    for name, config in MODELS.items():
        parameters, result = write_reference(output / name, name, config)
        losses = [result[o]["losses"] for o in ("adamw", "adafactor")]
        print(
            f"{name}: {parameters} parameters, loss {result['loss']:.4f}, grad_norm {result['grad_norm']:.4f}, "
            f"20 steps to {losses[0][-1]:.4f} (AdamW), {losses[1][-1]:.4f} (Adafactor), "
            f"seed {result['seed']}, greedy margin {result['greedy']['min_margin']:.4f}"
        )
    write_sharded(output, SHARDED)
    write_tokenizer(output / "byt5_tokenizer.json")


def check(output):
    """Fails unless the transformers at hand agree with what is stored: both 4.57 and 5.x must."""
    for name in [*MODELS, "sharded"]:
        stored = output / (SHARDED if name == "sharded" else name)
        batch, reference = read_json(stored / "batch.json"), read_json(stored / "expected.json")
        model = load(output / name)
        loss = backward(model, batch)
        assert math.isclose(loss, reference["loss"], rel_tol=1e-6), (name, loss, reference["loss"])
        assert math.isclose(grad_norm(model), reference["grad_norm"], rel_tol=1e-5), name
        gradients = load_file(stored / "gradients.safetensors")
        assert gradients.keys() == {n for n, _ in model.named_parameters()}, name
        for parameter_name, parameter in model.named_parameters():
            theirs, ours = parameter.grad.numpy(), gradients[parameter_name]
            assert np.linalg.norm(theirs - ours) <= 1e-5 * np.linalg.norm(ours), (name, parameter_name)
        assert greedy(model, batch) == reference["greedy"]["outputs"], name
        print(f"{name}: loss {loss:.7f} agrees")
    for entry in read_json(output / "byt5_tokenizer.json"):
        assert ByT5Tokenizer()(entry["text"]).input_ids == entry["ids"], entry["text"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_OUTPUT, metavar="OUT_DIR")
    parser.add_argument("--check", action="store_true", help="compare what is stored, write nothing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are too small to share
    (check if arguments.check else generate)(arguments.output)


if __name__ == "__main__":
    main()
