"""Generates the reference outputs of beam search and of the options of generation, for the stored models.

    python tests/references/generation.py [OUT_DIR]       writes OUT_DIR/MODEL/generation.json (default: tests/data/references)

For each model that `generate.py` made: the sources of its batch, padded into one batch, through transformers' `generate`
with every combination of

    beams 4 and 6 x length penalty 0, 1 and 2 x early_stopping false, true and "never" x no_repeat_ngram_size 0 and 2

and a few more options. A case is `{"options", "outputs": per source [{"token_ids", "score"}]}`.

Random models give near-ties. A case is kept if its tokens stay the same when noise of up to NOISE is added to every log
probability at every step, for each of NOISE_SEEDS: any two candidates whose order matters are then further apart than
rounding in f32 (about 1e-6) can bring them. `margin` in the file is NOISE; `dropped` says how many cases did not pass.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
import transformers
from generate import DEFAULT_OUTPUT, MODELS, load, padded, read_json
from transformers import LogitsProcessor, LogitsProcessorList

NOISE = 3e-5
NOISE_SEEDS = range(6)
MAX_NEW_TOKENS = 12
DROPPED_MAX = 0.34


class Noise(LogitsProcessor):
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        return scores + NOISE * (2 * torch.rand(scores.shape, generator=self.generator) - 1)


def cases():
    """The options of every case, in transformers' names."""
    search = itertools.product([4, 6], [0.0, 1.0, 2.0], [False, True, "never"], [0, 2])
    for index, (beams, penalty, early_stopping, ngram) in enumerate(search):
        yield {
            "num_beams": beams,
            "length_penalty": penalty,
            "early_stopping": early_stopping,
            "no_repeat_ngram_size": ngram,
            "num_return_sequences": (1, 3, beams)[index % 3],
            "max_new_tokens": MAX_NEW_TOKENS,
        }
    yield {"num_beams": 1, "max_new_tokens": MAX_NEW_TOKENS}
    yield {"num_beams": 1, "max_new_tokens": MAX_NEW_TOKENS, "no_repeat_ngram_size": 1}
    yield {"num_beams": 1, "max_new_tokens": MAX_NEW_TOKENS, "no_repeat_ngram_size": 3}
    yield {"num_beams": 1, "max_new_tokens": MAX_NEW_TOKENS, "min_new_tokens": 7}
    yield {"num_beams": 1, "max_new_tokens": MAX_NEW_TOKENS, "repetition_penalty": 1.7}
    yield {"num_beams": 1, "max_length": 9, "min_length": 5}
    yield {"num_beams": 3, "max_new_tokens": MAX_NEW_TOKENS, "min_new_tokens": 7}
    yield {"num_beams": 3, "max_new_tokens": MAX_NEW_TOKENS, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    yield {"num_beams": 3, "max_new_tokens": MAX_NEW_TOKENS, "length_penalty": -1.0, "num_return_sequences": 3}
    yield {"num_beams": 3, "max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": [1, 5, 9], "num_return_sequences": 2}
    yield {"num_beams": 2, "max_new_tokens": 1, "num_return_sequences": 2}


def tokens_of(row, eos):
    """Without the start token, up to and with the first eos."""
    row = row[1:]
    ends = [index for index, token in enumerate(row) if token in eos]
    return row[: ends[0] + 1] if ends else row


@torch.no_grad()
def outputs_of(model, sources, options, noise_seed=None):
    processors = LogitsProcessorList([] if noise_seed is None else [Noise(noise_seed)])
    result = model.generate(
        input_ids=padded(sources, 0),
        attention_mask=padded([[1] * len(row) for row in sources], 0),
        do_sample=False,
        use_cache=False,  # transformers 5.23 sizes the cache by `num_layers` and fails where the decoder has more
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=processors,
        **options,
    )
    eos = options.get("eos_token_id", [model.config.eos_token_id])
    count = options.get("num_return_sequences", 1)
    scores = getattr(result, "sequences_scores", None)
    rows = [{"token_ids": tokens_of(row, eos)} for row in result.sequences.tolist()]
    for index, row in enumerate(rows):
        row["score"] = None if scores is None else scores[index].item()
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def tokens(outputs):
    return [[output["token_ids"] for output in row] for row in outputs]


def reference(model, sources):
    kept, dropped = [], 0
    for options in cases():
        outputs = outputs_of(model, sources, options)
        if all(tokens(outputs_of(model, sources, options, seed)) == tokens(outputs) for seed in NOISE_SEEDS):
            kept.append({"options": options, "outputs": outputs})
        else:
            dropped += 1
    assert dropped <= DROPPED_MAX * (len(kept) + dropped), (dropped, len(kept))
    for beams, early_stopping in itertools.product([4, 6], [False, True, "never"]):
        of_kind = [case for case in kept if (case["options"]["num_beams"], case["options"].get("early_stopping")) == (beams, early_stopping)]
        assert of_kind, (beams, early_stopping)
    return {"transformers": transformers.__version__, "margin": NOISE, "dropped": dropped, "cases": kept}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_OUTPUT, metavar="OUT_DIR")
    output = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in MODELS:
        model = load(DEFAULT_OUTPUT / name).eval()
        result = reference(model, read_json(DEFAULT_OUTPUT / name / "batch.json")["source"])
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in result.pop("cases"))
        head = json.dumps(result)[:-1]
        (output / name / "generation.json").write_text(f'{head}, "cases": [\n{lines}\n]}}\n')
        print(f"{name}: {lines.count(chr(10)) + 1} cases, {result['dropped']} dropped", flush=True)


if __name__ == "__main__":
    main()
