"""One training step of T5 in transformers + torch: the peer of `quintet bench step`.

    python benchmarks/step_torch.py --model t5-small --batch-size 8 --source-length 128 --target-length 32

Random weights, a batch of full-length rows (nothing is padding, the peer's best case) or, with --ragged, of rows
padded to the longest, of which only the real tokens count; dropout as the preset's config has it; forward +
backward + clipping + AdamW (fused where torch offers it). Prints one JSON document with the keys of `quintet bench
step --json` plus `framework`. The --steps after --warmup follow each other as in training, in five rounds;
`seconds_per_step` is the rounds' median.

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
# bf16 and fp16 as Trainer has them: f32 weights under autocast. pure-bf16 has no f32 weights or moments at all.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ["fp32", "tf32", "bf16", "fp16", "pure-bf16"]
ROUNDS = 5


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


def lengths(arguments):
    """Source and target length of each row: full, or by the formula of `quintet bench step --ragged`."""

    def length(full, row, spread):
        least = -(-full // 4)
        fraction = (row + 1) * spread % 2**32
        return least + (fraction * (full - least + 1) >> 32) if arguments.ragged else full

    return [
        (length(arguments.source_length, row, 2_654_435_761), length(arguments.target_length, row, 2_246_822_519))
        for row in range(arguments.batch_size)
    ]


class Peer:
    """A model with its optimizer, and one training step of them."""

    def __init__(self, arguments, device):
        self.device, self.precision = device, arguments.precision
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        with device:
            self.model = build(arguments.model, arguments.attention)
        self.model.to(torch.bfloat16 if self.precision == "pure-bf16" else torch.float32).train()
        if arguments.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.config.use_cache = False
        self.forward = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        # As Trainer does for fp16; without effect elsewhere.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def compile(self):
        self.forward = torch.compile(self.model)

    def batch(self, arguments):
        """Arbitrary tokens, padded to the longest row as a collator does."""
        generator = torch.Generator().manual_seed(0)
        rows = lengths(arguments)

        def padded(column, pad):
            longest = max(row[column] for row in rows)
            tokens = torch.randint(2, self.model.config.vocab_size, (len(rows), longest), generator=generator)
            real = torch.arange(longest)[None, :] < torch.tensor([row[column] for row in rows])[:, None]
            return torch.where(real, tokens, pad).to(self.device), real.long().to(self.device)

        source, mask = padded(0, 0)
        return {"input_ids": source, "attention_mask": mask, "labels": padded(1, -100)[0]}

    def step(self, batch):
        with torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST):
            loss = self.forward(**batch).loss
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_per_step(self, batch, warmup, steps):
        for _ in range(warmup):
            self.step(batch)
        rounds = min(ROUNDS, steps)
        seconds = []
        for index in range(rounds):
            count = steps * (index + 1) // rounds - steps * index // rounds
            self.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                self.step(batch)
            self.synchronize()
            seconds.append((time.perf_counter() - start) / count)
        return statistics.median(seconds)


def report(arguments, peer, seconds, peak):
    """The document of one measurement."""
    rows = lengths(arguments)
    source_tokens, target_tokens = (sum(row[column] for row in rows) for column in (0, 1))
    flops = sum(training_flops(arguments.model, *row) for row in rows)
    cuda = peer.device.type == "cuda"
    compiled = ", torch.compile" if peer.forward is not peer.model else ""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {
        "framework": f"{versions}, {arguments.attention} attention{compiled}",
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "precision": arguments.precision,
        "model": arguments.model,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "parameters": sum(p.numel() for p in peer.model.parameters()),
        "batch_size": arguments.batch_size,
        "source_length": arguments.source_length,
        "target_length": arguments.target_length,
        "ragged": arguments.ragged,
        "source_tokens": source_tokens,
        "target_tokens": target_tokens,
        "steps": arguments.steps,
        "seconds_per_step": seconds,
        "tokens_per_second": (source_tokens + target_tokens) / seconds,
        "model_flops_per_step": flops,
        "mfu": flops / seconds / arguments.peak_flops if arguments.peak_flops else None,
        "peak_memory_bytes": peak,
    }


def add_case_arguments(parser):
    parser.add_argument("--model", default="t5-small", choices=sorted(preset_sizes()), metavar="PRESET")
    parser.add_argument("--source-length", type=int, default=128)
    parser.add_argument("--target-length", type=int, default=32)
    parser.add_argument("--ragged", action="store_true", help="rows of differing lengths, padded")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="bf16, fp16: f32 weights under autocast")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--peak-flops", type=float, help="FLOP/s of the device at this precision, for mfu")


def prepare(arguments):
    """The device of the arguments."""
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cuda = arguments.device == "cuda" or arguments.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="eager")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is JSON anyway")
    arguments = parser.parse_args()
    device = prepare(arguments)
    memory_before = resident_bytes()
    with PeakResidentSet() as resident:
        peer = Peer(arguments, device)
        if arguments.compile:
            peer.compile()
        seconds = peer.seconds_per_step(peer.batch(arguments), arguments.warmup, arguments.steps)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident.bytes - memory_before
    print(json.dumps(report(arguments, peer, seconds, peak)))


if __name__ == "__main__":
    main()
