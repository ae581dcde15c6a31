#!/usr/bin/env bash
# Fetches texts with ratings for the recipes: 4,200 tweets, 3,708 sentences of product reviews and 10,605 of movie
# reviews (Hutto & Gilbert, "VADER", ICWSM 2014; MIT licence), from the source package vaderSentiment 3.3.2 on PyPI.
#
#     examples/fetch-texts.sh [DIRECTORY]
#
# Needs pip and tar. Writes tweets.jsonl, products.jsonl and movies.jsonl, by default into examples/texts: objects with
# id (of product sentences: review_sentence), text, rating (the mean of 20 people's, from -4 to 4) and label (negative
# below -0.5, positive above 0.5, else neutral). And reviews.jsonl, from the product reviews, whose first sentences are
# their titles: of every other sentence product_title, star_rating (from 1 to 5, by the sentence's rating) and
# review_body.
set -euo pipefail

output=${1:-$(dirname "$0")/texts}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m pip download --quiet --no-binary :all: --no-deps --dest "$scratch" vaderSentiment==3.3.2
tar -xzf "$scratch"/vaderSentiment-3.3.2.tar.gz -C "$scratch"
tar -xzf "$scratch"/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz -C "$scratch"

mkdir -p "$output"
convert() {
    # Escaped as JSON wants it; neither ids nor ratings have anything to escape.
    tr -d '\r' <"$scratch/hutto_ICWSM_2014/$1" | sed 's/\\/\\\\/g; s/"/\\"/g' | awk -F '\t' '{
        label = $2 > 0.5 ? "positive" : $2 < -0.5 ? "negative" : "neutral"
        gsub(/[\001-\037]/, " ", $3)
        printf "{\"id\": \"%s\", \"text\": \"%s\", \"rating\": %s, \"label\": \"%s\"}\n", $1, $3, $2, label
    }' >"$output/$2"
    printf '%s: %d lines\n' "$output/$2" "$(wc -l <"$output/$2")"
}
convert tweets_GroundTruth.txt tweets.jsonl
convert amazonReviewSnippets_GroundTruth.txt products.jsonl
convert movieReviewSnippets_GroundTruth.txt movies.jsonl

# Sentence 1 of a review becomes the title of all that follow.
awk -F '"' '{
    split($4, id, "_"); rating = $0; sub(/.*"rating": /, "", rating); sub(/,.*/, "", rating); rating += 0
    body = substr($0, index($0, "\"text\": ") + 8); sub(/, "rating": [-0-9.]*, "label": "[a-z]*"}$/, "", body)
    if (id[2] == 1) { title = body; next }
    stars = 3 + (rating > 0.5) + (rating > 1.5) - (rating < -0.5) - (rating < -1.5)
    printf "{\"product_title\": %s, \"star_rating\": %d, \"review_body\": %s}\n", title, stars, body
}' "$output/products.jsonl" >"$output/reviews.jsonl"
printf '%s: %d lines\n' "$output/reviews.jsonl" "$(wc -l <"$output/reviews.jsonl")"
