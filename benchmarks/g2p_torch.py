"""Grapheme to phoneme by a plain transformers loop: the peer of examples/g2p.toml.

    quintet data export builtin:cmudict --output cmudict.jsonl       # then split it, or take a run's own split
    python benchmarks/g2p_torch.py --train train.jsonl --validation validation.jsonl --seconds 150

Records have the fields `letters` and `phonemes`, tokens apart by spaces, and may have `word`; records of one word
are its accepted pronunciations, as in the example job. One token a letter and a phoneme. AdamW, linear warm-up, then
linear decay over --seconds, so that the schedule ends with the time. Prints one JSON document: phoneme error
rate (edit distance to the nearest pronunciation / its length, summed over words) and word error rate (words
with no exact match), greedy.
"""

import argparse
import json
import random
import time

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration

SPECIAL = ["<pad>", "</s>", "<unk>"]
PAD, EOS, UNK = range(3)
MAX_PHONEMES = 40


def read(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def vocabulary(records):
    tokens = {token for r in records for field in ("letters", "phonemes") for token in r[field].split()}
    return {token: id for id, token in enumerate([*SPECIAL, *sorted(tokens)])}


def encode(text, ids):
    return torch.tensor([ids.get(token, UNK) for token in text.split()] + [EOS])


def batches(records, ids, size, seed):
    """Endless shuffled batches of (source, labels), padded with 0 and -100."""
    pairs = [(encode(r["letters"], ids), encode(r["phonemes"], ids)) for r in records]
    order = random.Random(seed)
    while True:
        order.shuffle(pairs)
        for start in range(0, len(pairs) - size + 1, size):
            source, labels = zip(*pairs[start : start + size])
            yield pad_sequence(source, True, PAD), pad_sequence(labels, True, -100)


def train(model, stream, arguments):
    """Steps done within the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0, fused=True)
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < arguments.seconds:
        warm = min(1.0, (step + 1) / arguments.warmup_steps)
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * warm * (1.0 - elapsed / arguments.seconds)
        source, labels = next(stream)
        loss = model(input_ids=source, attention_mask=(source != PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@torch.no_grad()
def predict(model, letters, ids, batch_size=256):
    tokens = list(ids)
    predictions = []
    for start in range(0, len(letters), batch_size):
        source = pad_sequence([encode(text, ids) for text in letters[start : start + batch_size]], True, PAD)
        mask = (source != PAD).long()
        outputs = model.generate(source, attention_mask=mask, max_new_tokens=MAX_PHONEMES, do_sample=False, num_beams=1)
        predictions += [[tokens[i] for i in row if i not in (PAD, EOS)] for row in outputs[:, 1:].tolist()]
    return predictions


def error_rates(model, records, ids, max_words):
    """Phoneme and word error rate over the first `max_words` words, and the number of words."""
    pronunciations = {}
    for record in records:
        pronunciations.setdefault(record["letters"], []).append(record["phonemes"].split())
    words = list(pronunciations)[:max_words]
    errors = length = wrong = 0
    for word, prediction in zip(words, predict(model, words, ids)):
        distance, nearest = min((edit_distance(prediction, p), len(p)) for p in pronunciations[word])
        errors, length, wrong = errors + distance, length + nearest, wrong + (distance > 0)
    return errors / length, wrong / len(words), len(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time; evaluation comes on top")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-kv", type=int, default=32)
    parser.add_argument("--d-ff", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-decoder-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--dropout-rate", type=float, default=0.0)
    parser.add_argument("--max-words", type=int, default=1000, help="held-out words to score")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    records = read(arguments.train)
    ids = vocabulary(records)
    sizes = ("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dropout_rate")
    options = {name: getattr(arguments, name) for name in sizes}
    config = T5Config(vocab_size=len(ids), feed_forward_proj="relu", decoder_start_token_id=PAD, **options)
    model = T5ForConditionalGeneration(config).train()
    steps = train(model, batches(records, ids, arguments.batch_size, arguments.seed), arguments)
    per, wer, words = error_rates(model.eval(), read(arguments.validation), ids, arguments.max_words)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": arguments.seconds,
        "steps": steps,
        "words": words,
        "phoneme_error_rate": per,
        "word_error_rate": wer,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
