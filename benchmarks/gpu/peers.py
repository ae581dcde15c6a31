"""What `benchmarks/gpu/compare.sh` compares with: transformers + torch, one JSON document a line.

    python benchmarks/gpu/peers.py step --model t5-large --batch-size 8 --source-length 512 --target-length 114 \\
        --variants sdpa,eager,sdpa-compile,eager-compile --precision bf16
    python benchmarks/gpu/peers.py product       # what one large bf16 matrix product reaches
    python benchmarks/gpu/peers.py attention     # scaled_dot_product_attention with T5's bias, alone

A variant that fails or runs out of memory is a document with `error`; the others still run. --batch-size max doubles
from 8 (or halves) until memory ends.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import step_torch  # noqa: E402

# The shapes of `kernels/examples/bench.rs`: heads, head size, sequences, source and target length.
ATTENTION = {
    "t5-base": (12, 64, 8, 512, 114),
    "t5-large": (16, 64, 8, 512, 114),
    "tiny": (4, 32, 64, 8, 8),
}


def say(document):
    print(json.dumps(document, separators=(",", ":")), flush=True)


def empty_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(measure):
    """What `measure` gives, and why it failed. The exception is gone on return, and what it held on to with it."""
    try:
        return measure(), None
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:  # whatever torch.compile or a kernel says
        # No comma and no quote: the table's reader takes documents apart by them.
        line = (str(error).strip().splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {line}"[:160].translate(str.maketrans(",\"\\{}|", ";' ()/"))


def measure_step(arguments, peer, batch_size):
    arguments.batch_size = batch_size
    empty_memory(peer.device)
    batch = peer.batch(arguments)
    seconds = peer.seconds_per_step(batch, arguments.warmup, arguments.steps)
    peak = torch.cuda.max_memory_allocated() if peer.device.type == "cuda" else None
    return step_torch.report(arguments, peer, seconds, peak)


def fits(arguments, peer, batch_size):
    """Two steps: the first makes the optimizer's state, the second runs beside it."""

    def run():
        arguments.batch_size = batch_size
        batch = peer.batch(arguments)
        for _ in range(2):
            peer.step(batch)
        peer.synchronize()
        return True

    result, error = attempt(run)
    peer.optimizer.zero_grad()
    empty_memory(peer.device)
    if error not in (None, "out of memory"):
        raise RuntimeError(error)
    return result is not None


def largest_batch(arguments, peer):
    size = 8
    if not fits(arguments, peer, size):
        while size > 1:
            size //= 2
            if fits(arguments, peer, size):
                return size
        return None
    while size < arguments.batch_max and fits(arguments, peer, 2 * size):
        size *= 2
    return size


def steps(arguments):
    device = step_torch.prepare(arguments)
    wanted = arguments.variants.split(",")
    unknown = set(wanted) - {"sdpa", "eager", "sdpa-compile", "eager-compile"}
    if unknown:
        sys.exit(f"--variants: {unknown}")
    peer, kind, sizes = None, None, {}
    for variant in wanted:
        arguments.attention = variant.removesuffix("-compile")
        if arguments.attention != kind:
            peer = None
            empty_memory(device)
            peer, error = attempt(lambda: step_torch.Peer(arguments, device))
            kind = arguments.attention
            if peer is None:
                say({"program": variant, "error": error})
                kind = None
                continue
        peer.forward = peer.model
        size = arguments.batch_size_wanted
        if size == "max":
            if kind not in sizes:
                # Searched without torch.compile, which would compile anew for each size.
                sizes[kind], error = attempt(lambda: largest_batch(arguments, peer))
            size = sizes[kind]
            if size is None:
                say({"program": variant, "error": error or "out of memory at batch 1"})
                continue
        if variant.endswith("-compile"):
            peer.compile()
        document, error = attempt(lambda: measure_step(arguments, peer, int(size)))
        say({"program": variant, **(document or {"batch_size": int(size), "error": error})})
        peer.optimizer.zero_grad()


def best_seconds(f, device, repeats):
    """Of one call among `repeats` in a row, which keep the device busy; the best of several such rows."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    f()
    best, begin = float("inf"), time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - begin < 0.5:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            f()
        synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
        rounds += 1
    return best


def product(arguments):
    device = step_torch.prepare(arguments)
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = best_seconds(lambda: torch.mm(a, b), device, 20 if cuda else 1)
    say({"program": "torch", "op": "matrix product", "size": size, "flops_per_second": 2 * size**3 / seconds})


def attention(arguments):
    device = step_torch.prepare(arguments)
    dtype = torch.bfloat16
    repeats = 20 if device.type == "cuda" else 1
    for name in arguments.models.split(","):
        heads, head_size, count, source, target = ATTENTION[name]
        for kind, queries, keys in [
            ("encoder", source, source),
            ("cross", target, source),
            ("decoder", target, target),
        ]:

            def run():
                def leaf(*shape):
                    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

                q = leaf(count, heads, queries, head_size)
                k, v = leaf(count, heads, keys, head_size), leaf(count, heads, keys, head_size)
                leaves, mask = [q, k, v], None
                # Cross-attention has no bias; without a mask either it is the peer's best case.
                if kind != "cross":
                    bias = leaf(1, heads, queries, keys)
                    leaves.append(bias)
                    hidden = torch.full((queries, keys), float("-inf"), device=device, dtype=dtype).triu(1)
                    mask = (bias + hidden if kind == "decoder" else bias).expand(count, -1, -1, -1)
                forward = lambda: F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.1, scale=1.0)
                out = forward()
                d_out = torch.randn_like(out)
                backward = lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
                return best_seconds(forward, device, repeats), best_seconds(backward, device, repeats)

            empty_memory(device)
            seconds, error = attempt(run)
            for index, direction in enumerate(["forward", "backward"]):
                document = {"program": "sdpa", "op": f"attention {kind} {direction}", "model": name}
                say(document | ({"seconds": seconds[index]} if seconds else {"error": error}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step")
    step_torch.add_case_arguments(step)
    step.add_argument("--batch-size", dest="batch_size_wanted", default="8", help="a number, or max")
    step.add_argument("--batch-max", type=int, default=4096, help="where the search for max ends")
    step.add_argument("--variants", default="sdpa,eager,sdpa-compile,eager-compile")
    step.set_defaults(run=steps)
    for name, run in [("product", product), ("attention", attention)]:
        command = commands.add_parser(name)
        command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
        command.add_argument("--threads", type=int)
        command.set_defaults(run=run)
    commands.choices["attention"].add_argument("--models", default="t5-large,t5-base")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        arguments.run(arguments)


if __name__ == "__main__":
    main()
