"""Generates the scores that the tests compare this project's metrics against.

    python tests/references/metrics.py [OUT_FILE]      (default: tests/data/references/metrics.json)

Needs rouge-score (with NLTK) and sacrebleu. The file holds

    names     of the scores of a pair
    pairs     [prediction, target, repeats, [score, ...]]: the texts are to be repeated so many times
    corpora   {"first", "last_exclusive", "bleu", "chrf", "chrf++"}: scores of ranges of pairs as whole sets
    stems     words and their stems

All scores are fractions of 1, rounded to 10 digits. Texts come from a seeded generator and a list of odd ones.
"""

import collections
import json
import random
import re
import string
import sys
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "data" / "references" / "metrics.json"
PAIRS = 1150
NAMES = ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "chrf++", "exact_match", "f1"]

ROOTS = """act adapt agree allow analog angular apply argu bake beauty bli bowdler brand busi cat ceas commun condition
conflat control cry cycle decid deni depend die differ digit dog elect enjoy excit fail fall feud file fizz fly form
geo grad happ hesit hop hope hous howe infer inning instal just know lie light log marri mat measur motor move nation
news occur oper organ play plot poni possibl predic probat quiz radic rat rela repl respons reviv roll run sens sing
size sky snow sol spy standard stir studi succeed tan theo tie trace tri troubl try use valenc vil walk whiz will
wonder write yell yoyo zoolog""".split()
SUFFIXES = """ s es ies ed ing eed ied y ly ational tional enci anci izer bli alli entli eli ousli ization ation ator
alism iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic
able ible ant ement ment ent sion tion ou ism ate iti ous ive ize e ll lly ings edly fully ically""".split(" ")
ODD = [
    "", " ", "\n", "\n\n", "a", "A.", "the", "The an a", ".", "...", "!?", "-", "--", "1", "1.", ".5", "3.14", "1,000.50",
    "1-2", "x-\ny", "a\nb", "a\n\nb\n", "tab\tseparated", "e.g. i.e. etc.", "don't can't", "U.S.A. vs. U.K.",
    "&quot;quoted&quot; &amp; &lt;b&gt;", "<skipped> text", "http://example.com/a?b=c&d=e", "@user #tag", "(hi)", "((x))",
    "Straße STRASSE straße", "ÀÉÎÕÜ àéîõü", "e\u0301 \u00e9", "I\u0307 \u0130 i", "\u212alvin kelvin", "ΣΑΣ σας", "fi ﬁ",
    "日本語の文章です。", "日本語 の 文章 です 。", "中文,标点。!", "한국어 문장입니다.", "emoji 😀😃 😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷",
    "العربية نص", "עברית טקסט", "हिन्दी में वाक्य", "ไทยไม่มีช่องว่าง", "zero\u200bwidth \ufeffbom",
    "nbsp\u00a0here", "ideographic\u3000space", "line\u2028sep", "next\u0085line", "unit\x1fsep group\x1dsep", "bell\x07",
    "½ cup ² ³ Ⅷ ①", "a①b", "an_the the_a", "the-end", "a/b\\c", "[x] {y} ~z `q` ^w |p|", "5% of $10 = 0.5 €", "½",
    "yyyy yyyying sayyyed", "aaaa eeee iiii", "dying lying skies news innings proceed exceed", "bb cc lls zzs sses",
    "running runs ran runner", "generalizations generically", "2nd 3rd 100th x2 y2k ab12ed", "word " * 5, "same same same",
]


def generate_text(rng, lexicon):
    words = []
    for _ in range(rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 14])):
        word = rng.choice(lexicon)
        if rng.random() < 0.1:
            word = rng.choice([str.upper, str.capitalize])(word)
        if rng.random() < 0.04:
            word = rng.choice(ODD)
        if rng.random() < 0.12:
            word += rng.choice(list(".,;:!?-)'\"") + ["...", "'s", "-"])
        if rng.random() < 0.05:
            word = rng.choice(list("(\"'-$")) + word
        words.append(word)
    text = ""
    for index, word in enumerate(words):
        text += (rng.choice([" "] * 12 + ["\n", "  ", "-\n", " - "]) if index else "") + word
    return text


def disturb(rng, text, lexicon):
    """A prediction that has something in common with its target."""
    words = text.split(" ")
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(words))
        match rng.randrange(5):
            case 0:
                del words[place]
            case 1:
                words.insert(place, rng.choice(lexicon))
            case 2:
                words[place] = rng.choice(lexicon)
            case 3:
                other = rng.randrange(len(words))
                words[place], words[other] = words[other], words[place]
            case 4:
                words[place] = words[place].swapcase()
        words = words or [""]
    return " ".join(words)


def generate_pairs(rng):
    # Few words, so that pairs have some in common by chance.
    lexicon = [rng.choice(ROOTS) + rng.choice(SUFFIXES) for _ in range(60)] + ["the", "a", "an", "of", "to", "is", "not", "it"]
    pairs = [(text, text, 1) for text in ODD] + [(text, rng.choice(ODD), 1) for text in ODD]
    while len(pairs) < PAIRS - 6:
        target = generate_text(rng, lexicon)
        prediction = generate_text(rng, lexicon) if rng.random() < 0.25 else disturb(rng, target, lexicon)
        pairs.append((prediction, target, 1))
    for repeats in [40, 90, 150]:
        long = max((generate_text(rng, lexicon) for _ in range(20)), key=len)
        pairs.append((disturb(rng, long, lexicon) + "\n", long + "\n", repeats))
        pairs.append((disturb(rng, long, lexicon) + " ", long.replace("\n", " ") + " ", repeats))
    return pairs


def normalize_answer(text):
    """As in the official script of SQuAD 1.1."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(prediction, target):
    prediction, target = normalize_answer(prediction).split(), normalize_answer(target).split()
    same = sum((collections.Counter(prediction) & collections.Counter(target)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(target)
    return 2 * precision * recall / (precision + recall)


def corpus_scores(predictions, targets):
    scores = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2)}
    return {name: metric.corpus_score(predictions, [targets]).score / 100 for name, metric in scores.items()}


def pair_scores(scorer, prediction, target):
    rouge = scorer.score(target, prediction)
    scores = [rouge[name].fmeasure for name in NAMES[:4]]
    scores += corpus_scores([prediction], [target]).values()
    scores.append(float(normalize_answer(prediction) == normalize_answer(target)))
    scores.append(squad_f1(prediction, target))
    return [round(score, 10) for score in scores]


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT
    rng = random.Random(20)
    pairs = generate_pairs(rng)
    scorer = RougeScorer(NAMES[:4], use_stemmer=True)
    lines = []
    for prediction, target, repeats in pairs:
        scores = pair_scores(scorer, prediction * repeats, target * repeats)
        lines.append(json.dumps([prediction, target, repeats, scores], ensure_ascii=False, separators=(",", ":")))
    whole = [(prediction * repeats, target * repeats) for prediction, target, repeats in pairs]
    corpora = []
    for first, last in [(0, len(pairs)), (0, 100), (100, 700), (700, 710), (1000, len(pairs))]:
        predictions, targets = zip(*whole[first:last])
        corpora.append({"first": first, "last_exclusive": last, **corpus_scores(predictions, targets)})
    stemmer = PorterStemmer()
    words = sorted({root + suffix for root in rng.sample(ROOTS, 40) for suffix in SUFFIXES} | set(ROOTS))
    stems = " ".join(f"{word}:{stemmer.stem(word)}" for word in words if len(word) > 3)
    output.write_text(
        f'{{"names":{json.dumps(NAMES)},\n"pairs":[\n' + ",\n".join(lines) + f'\n],\n"corpora":{json.dumps(corpora)},\n'
        f'"stems":{json.dumps(stems)}}}\n'
    )
    print(f"{output}: {len(pairs)} pairs, {len(words)} words, {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
