"""One training step of T5 in transformers + torch: the peer of `quintet bench step`.

    python benchmarks/step_torch.py --model t5-small --batch-size 8 --source-length 128 --target-length 32

Random weights, a batch of full-length rows (nothing is padding, the peer's best case), dropout as the preset's
config has it, forward + backward + AdamW (fused where torch offers it). Prints one JSON document with the keys
of `quintet bench step --json` plus `framework`. `seconds_per_step` is the median of --steps after --warmup.

`peak_memory_bytes`: on CUDA `torch.cuda.max_memory_allocated`; on the CPU the highest resident set during the
steps less the one before the model was built, read from /proc (weights, gradients and moments included).
"""

import argparse
import json
import os
import statistics
import threading
import time

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

SIZES_V1_0 = {  # d_model, d_ff, d_kv, layers, heads
    "small": (512, 2048, 64, 6, 8),
    "base": (768, 3072, 64, 12, 12),
    "large": (1024, 4096, 64, 24, 16),
    "3b": (1024, 16384, 128, 24, 32),
}
SIZES_V1_1 = {
    "small": (512, 1024, 64, 8, 6),
    "base": (768, 2048, 64, 12, 12),
    "large": (1024, 2816, 64, 24, 16),
    "xl": (2048, 5120, 64, 24, 32),
    "xxl": (4096, 10240, 64, 24, 64),
}
# d_model, d_ff, d_kv, encoder layers, decoder layers, heads
SIZES_BYT5 = {
    "small": (1472, 3584, 64, 12, 4, 6),
    "base": (1536, 3968, 64, 18, 6, 12),
    "large": (1536, 3840, 64, 36, 12, 16),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def preset_sizes():
    """Size of every preset by name: (d_model, d_ff, d_kv, encoder layers, decoder layers, heads, vocabulary, gated)."""
    presets = {}
    for size, (d, ff, kv, layers, heads) in SIZES_V1_0.items():
        presets[f"t5-{size}"] = (d, ff, kv, layers, layers, heads, 32128, False)
    for size, (d, ff, kv, layers, heads) in SIZES_V1_1.items():
        presets[f"t5-v1_1-{size}"] = (d, ff, kv, layers, layers, heads, 32128, True)
        presets[f"mt5-{size}"] = (d, ff, kv, layers, layers, heads, 250112, True)
    for size, (d, ff, kv, encoder_layers, decoder_layers, heads) in SIZES_BYT5.items():
        presets[f"byt5-{size}"] = (d, ff, kv, encoder_layers, decoder_layers, heads, 384, True)
    return presets


def config_of(preset):
    d, ff, kv, encoder_layers, decoder_layers, heads, vocabulary, gated = preset_sizes()[preset]
    return T5Config(
        vocab_size=vocabulary,
        d_model=d,
        d_ff=ff,
        d_kv=kv,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
    )


def build(preset, attention):
    model = T5ForConditionalGeneration._from_config(config_of(preset), attn_implementation=attention)
    if preset_sizes()[preset][-1] and model.lm_head.weight is model.shared.weight:
        # transformers 5 ties every T5; the v1.1 family has a head of its own.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    return model


def training_flops(preset, source, target):
    """Model FLOPs of one sequence, forward and backward (three times forward), without recomputation."""
    d, ff, kv, encoder_layers, decoder_layers, heads, vocabulary, gated = preset_sizes()[preset]
    inner, matrices = heads * kv, 3 if gated else 2
    encoder = encoder_layers * (2 * (4 * d * inner + matrices * d * ff) * source + 4 * inner * source**2)
    decoder = decoder_layers * (2 * (6 * d * inner + matrices * d * ff) * target + 4 * inner * target**2)
    cross = decoder_layers * (4 * d * inner * source + 4 * inner * target * source)
    return 3 * (encoder + decoder + cross + 2 * vocabulary * d * target)


class PeakResidentSet:
    """The highest resident set while inside, in bytes, looked at every few milliseconds."""

    def __enter__(self):
        self.bytes, self.done = resident_bytes(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train_step(model, optimizer, batch, autocast):
    with autocast:
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss


def time_steps(step, synchronize, warmup, steps):
    seconds = []
    for _ in range(warmup + steps):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def measure(arguments, device):
    memory_before = resident_bytes()
    model = build(arguments.model, arguments.attention).to(device).train()
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        shape = (arguments.batch_size, length)
        return torch.randint(2, model.config.vocab_size, shape, generator=generator).to(device)

    source = ids(arguments.source_length)
    batch = {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": ids(arguments.target_length)}
    autocast = torch.autocast(device.type, DTYPES[arguments.precision], enabled=arguments.precision != "fp32")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with PeakResidentSet() as resident:
        step = lambda: train_step(model, optimizer, batch, autocast)
        seconds = time_steps(step, synchronize, arguments.warmup, arguments.steps)
    on_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_cuda else resident.bytes - memory_before
    return seconds, peak, sum(p.numel() for p in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5-small", choices=sorted(preset_sizes()), metavar="PRESET")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--source-length", type=int, default=128)
    parser.add_argument("--target-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: f32 weights under autocast")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="eager")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--peak-flops", type=float, help="FLOP/s of the device at this precision, for mfu")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is JSON anyway")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cuda = arguments.device == "cuda" or arguments.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    seconds, peak, parameters = measure(arguments, device)
    lengths = arguments.source_length, arguments.target_length
    flops = arguments.batch_size * training_flops(arguments.model, *lengths)
    report = {
        "framework": f"transformers {transformers.__version__}, torch {torch.__version__}, {arguments.attention} attention",
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "precision": arguments.precision,
        "parameters": parameters,
        "batch_size": arguments.batch_size,
        "source_length": arguments.source_length,
        "target_length": arguments.target_length,
        "seconds_per_step": seconds,
        "tokens_per_second": arguments.batch_size * sum(lengths) / seconds,
        "model_flops_per_step": flops,
        "mfu": flops / seconds / arguments.peak_flops if arguments.peak_flops else None,
        "peak_memory_bytes": peak,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
