# What scripts beside it begin with: the program, Python, a folder to work in, some data, and how to train. They source it
# with their own arguments.

root=$(cd "$(dirname "$0")/../.." && pwd)
quintet=$(realpath "${1:-${CARGO_TARGET_DIR:-$root/target}/release/quintet}")
python=${PYTHON:-python3}
references=$root/tests/data/references
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Letters and sounds as words of their own; few enough for the vocabulary of every reference.
cat > data.jsonl <<'DATA'
{"input": "h e l l o", "target": "HH AH L OW", "class": "word"}
{"input": "w o r l d", "target": "W ER L D", "class": "word"}
{"input": "t e a", "target": "T IY", "class": "word"}
{"input": "a", "target": "AH", "class": "letter"}
{"input": "l e t t e r s", "target": "L EH T ER Z", "class": "word"}
{"input": "r e a d", "target": "R EH D", "class": "word"}
{"input": "b", "target": "B IY", "class": "letter"}
{"input": "d o o r", "target": "D AO R", "class": "word"}
DATA

# train NAME FIELD MODEL [MORE]: some steps of learning a field of the data, into the folder NAME. MODEL is lines of the
# job's [model], MORE further sections.
train() {
    local name=$1 field=$2 model=$3 more=${4:-}
    cat > "$name.toml" <<JOB
output_dir = "$name"
[model]
$model
dropout_rate = 0.1
[data]
train = "data.jsonl"
input = "{input}"
target = "{$field}"
[training]
max_steps = 40
global_batch_size = 8
micro_batch_size = 4
learning_rate = 1e-2
$more
JOB
    "$quintet" train "$name.toml" > "$name.log" 2>&1 || { cat "$name.log"; exit 1; }
}
