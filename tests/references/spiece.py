"""Trains a tiny SentencePiece model and writes the ids that transformers' T5Tokenizer gives odd texts by it.

    python tests/references/spiece.py [OUT_DIR]      (default: tests/data/references/spiece)

Needs sentencepiece and transformers. Writes spiece.model and expected.json: {"vocab_size", "texts": [[text, ids], ...]}.
The rules of normalisation are a few of NFKC's, so that the file stays small.
"""

import io
import json
import random
import sys
import tempfile
from pathlib import Path

import sentencepiece
from metrics import ODD, ROOTS, SUFFIXES, generate_text
from transformers import T5Tokenizer

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "data" / "references" / "spiece"
RULES = {
    "ﬁ": "fi", "ﬂ": "fl", "Ａ": "A", "ａ": "a", "①": "1", "②": "2", "½": "1⁄2", "…": "...", "\u3000": " ", "\u00a0": " ",
    "\t": " ", "\n": " ", "ｶﾞ": "ガ", "ｶ": "カ", "e\u0301": "é", "\u200b": "", "㌔": "キロ", "™": "TM", "ǆ": "dž",
}


def write_rules(path):
    def code(text):
        return " ".join(f"{ord(character):04X}" for character in text)

    path.write_text("".join(f"{code(source)}\t{code(target)}\n" for source, target in RULES.items()))


def train(rng, lexicon):
    texts = [generate_text(rng, lexicon) for _ in range(3000)] + [text for text in ODD if text.strip()] * 2
    texts = [line for text in texts for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as directory:
        rules = Path(directory) / "rules.tsv"
        write_rules(rules)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="unigram", vocab_size=500, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, character_coverage=0.998, normalization_rule_tsv=str(rules), num_threads=1,
            minloglevel=2, hard_vocab_limit=False,
        )
    return model.getvalue()


def odd_texts(rng, lexicon):
    rules = list(RULES) + [f"a{source}b" for source in RULES] + [f"{source} {source}" for source in RULES]
    special = [
        "<extra_id_0>", "a<extra_id_1>b", "This is a <extra_id_0> movie!", "<extra_id_99> <extra_id_100>", "<pad>", "a </s> b",
        "<unk>", "</s>", "< extra_id_0 >", "▁", "a▁b", "▁▁a", "  a   b  ", "\ta\n", "x" * 300, "\u2581\u2581",
    ]
    return ODD + rules + special + [generate_text(rng, lexicon) for _ in range(200)]


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    lexicon = [rng.choice(ROOTS) + rng.choice(SUFFIXES) for _ in range(150)]
    (output / "spiece.model").write_bytes(train(rng, lexicon))
    tokenizer = T5Tokenizer.from_pretrained(output)
    texts = [[text, tokenizer(text).input_ids] for text in odd_texts(rng, lexicon)]
    expected = {"vocab_size": len(tokenizer), "texts": texts}
    (output / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, separators=(",", ":")) + "\n")
    sizes = {path.name: path.stat().st_size for path in output.iterdir()}
    print(f"{len(texts)} texts, {len(tokenizer)} tokens, {sizes}")


if __name__ == "__main__":
    main()
