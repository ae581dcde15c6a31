"""Generation by T5 in transformers: the peer of `quintet bench generate`.

    python benchmarks/generate_torch.py --model t5-small --batch-size 32 --num-beams 4 --source-length 128 --new-tokens 64

Random weights, sources of full length (nothing is padding, the peer's best case) or, with --ragged, padded to the
longest. Every output has exactly --new-tokens tokens (`min_new_tokens`), so that both programs do the same work.
The peer has its cache, inference mode, and the faster of its attentions (--attention). Prints one JSON document
with the keys of `quintet bench generate --json` plus `framework`; `seconds` is the median of --rounds after one
that is not timed. A token counts once for each input, whatever the number of beams.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from step_torch import PeakResidentSet, build, lengths, preset_sizes, resident_bytes


def batch(arguments, vocabulary):
    """Arbitrary tokens, padded to the longest source as a collator does."""
    generator = torch.Generator().manual_seed(0)
    real = [source for source, _ in lengths(arguments)]
    tokens = torch.randint(2, vocabulary, (len(real), max(real)), generator=generator)
    mask = (torch.arange(max(real))[None, :] < torch.tensor(real)[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def options(arguments):
    sampling = {"do_sample": True, "top_k": 50} if arguments.do_sample else {"do_sample": False}
    count = arguments.new_tokens
    return {"num_beams": arguments.num_beams, "max_new_tokens": count, "min_new_tokens": count, "use_cache": True, **sampling}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5-small", choices=sorted(preset_sizes()), metavar="PRESET")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--source-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--do-sample", action="store_true")
    parser.add_argument("--ragged", action="store_true", help="sources of differing lengths, padded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="eager")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is JSON anyway")
    arguments = parser.parse_args()
    arguments.target_length = arguments.new_tokens
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    memory_before = resident_bytes()
    seconds = []
    with PeakResidentSet() as resident, torch.inference_mode():
        model = build(arguments.model, arguments.attention).to(arguments.device).eval()
        inputs = {name: value.to(arguments.device) for name, value in batch(arguments, model.config.vocab_size).items()}
        for _ in range(1 + arguments.rounds):
            start = time.perf_counter()
            outputs = model.generate(**inputs, **options(arguments))
            seconds.append(time.perf_counter() - start)
    assert outputs.shape == (arguments.batch_size, 1 + arguments.new_tokens), outputs.shape
    median = statistics.median(seconds[1:])
    tokens = arguments.batch_size * arguments.new_tokens
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    result = {
        "framework": f"{versions}, {arguments.attention} attention",
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "source_length": arguments.source_length,
        "new_tokens": arguments.new_tokens,
        "num_beams": arguments.num_beams,
        "do_sample": arguments.do_sample,
        "ragged": arguments.ragged,
        "seconds": median,
        "rounds": seconds[1:],
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": resident.bytes - memory_before,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
