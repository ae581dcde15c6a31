//! The jobs in examples/, shortened, on texts made up here: that they fit together, not that they learn.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Ended, run};
use crate::jobs::words;
use crate::structure::root;

/// Tiny, for a few steps.
const SHORT: &str = "training.num_train_epochs=0.5 training.warmup_steps=0 training.global_batch_size=4 \
    training.micro_batch_size=2 evaluation.max_examples=6 cluster.workers=1";
/// Where texts are predicted.
const SHORT_TEXTS: &str = "evaluation.max_new_tokens=3";

/// A folder in which the recipes find their texts and leave their runs.
struct Recipes {
    directory: TempDir,
}

impl Recipes {
    fn new() -> Self {
        let recipes = Recipes { directory: tempfile::tempdir().unwrap() };
        for name in ["movies", "products", "tweets"] {
            recipes.write(&format!("examples/texts/{name}.jsonl"), (0..30).map(text));
        }
        recipes.write("examples/texts/reviews.jsonl", (0..30).map(review));
        recipes
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write(&self, name: &str, records: impl Iterator<Item = Value>) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, records.map(|record| format!("{record}\n")).collect::<String>()).unwrap();
    }

    fn train(&self, job: &str, settings: &str) -> Ended {
        let job = example(job);
        let settings = format!("{SHORT} {settings}");
        run(self.path(), ["train", job.to_str().unwrap()].into_iter().chain(words(&settings))).expect(0)
    }

    /// Of what a job holds out.
    fn evaluate(&self, job: &str, arguments: &str) -> Ended {
        let job = example(job);
        run(self.path(), ["evaluate", "--job", job.to_str().unwrap()].into_iter().chain(words(arguments)))
    }

    /// The model that the others begin with.
    fn pretrain(&self) {
        let model = "model.architecture.vocab_size=180 model.architecture.d_model=16 model.architecture.d_ff=16 \
            model.architecture.num_layers=1 model.architecture.num_decoder_layers=1 data.max_source_length=32";
        self.train("pretrain.toml", model);
    }

    fn predictions(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path().join(run).join("predictions.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn example(name: &str) -> PathBuf {
    root().join("examples").join(name)
}

fn text(number: usize) -> Value {
    let (word, label) = [("good", "positive"), ("plain", "neutral"), ("bad", "negative")][number % 3];
    json!({"text": format!("it was a {word} thing number {number}"), "label": label})
}

fn review(number: usize) -> Value {
    let body = format!("this is all that can be said of it, {number} times");
    json!({"product_title": "a kettle", "star_rating": 1 + number % 5, "review_body": body})
}

#[test]
fn the_recipes_for_tweets_fit_together() {
    let recipes = Recipes::new();
    recipes.pretrain();
    recipes.train("tweets/instruct.toml", SHORT_TEXTS);
    for shots in [0, 1] {
        let asked = format!("--model runs/tweets/instruct/model --output runs/tweets/{shots}-shot");
        let settings = format!("data.num_shots={shots} {SHORT_TEXTS}");
        recipes.evaluate("tweets/finetune.toml", &format!("{asked} {settings}")).expect(0);
    }
    let all = format!("{SHORT_TEXTS} evaluation.max_examples=30");
    recipes.train("tweets/finetune.toml", &all);
    recipes.train("tweets/lora.toml", &all);
    // The same tweets are held out by all, and are asked in the words of each.
    let asked = |run: &str| -> Vec<(Value, Value)> {
        let fields = |line: Value| (line["input"].clone(), line["target"].clone());
        recipes.predictions(run).into_iter().map(fields).collect()
    };
    let zero_shot = asked("runs/tweets/0-shot");
    assert_eq!(zero_shot.len(), 6, "a fifth of 30");
    assert_eq!(asked("runs/tweets/finetune"), zero_shot);
    assert_eq!(asked("runs/tweets/lora"), zero_shot);
    for ((shorter, target), (longer, same_target)) in zero_shot.iter().zip(asked("runs/tweets/1-shot")) {
        let words = |input: &Value| input.as_str().unwrap().matches("Sentiment:").count();
        assert_eq!((words(shorter), words(&longer)), (1, 2), "{longer}");
        assert_eq!(*target, same_target);
    }
    let runs = ["0-shot", "1-shot", "finetune", "lora"].map(|name| format!("runs/tweets/{name}"));
    let compare = ["evaluate", "--metrics", "accuracy,rouge1", "--compare"].map(str::to_string).into_iter().chain(runs);
    let table = run(recipes.path(), compare).expect(0).stdout;
    assert!(table.contains("rouge1") && table.contains("6 examples"), "{table}");
    // What a run's own evaluation found, the command finds in the model it left.
    let again = format!("--model runs/tweets/lora/adapter --output again {SHORT_TEXTS}");
    recipes.evaluate("tweets/finetune.toml", &again).expect(0);
    assert_eq!(recipes.predictions("again"), recipes.predictions("runs/tweets/lora"));
}

#[test]
fn the_other_recipes_run() {
    let recipes = Recipes::new();
    recipes.pretrain();
    let reviews = recipes.train("reviews.toml", &format!("{SHORT_TEXTS} training.eval_steps=2"));
    assert!(reviews.stdout.contains("rougeL"), "{}", reviews.stdout);
    // A folder as that of SQuAD: two splits, and answers that are lists within an object.
    let question = |number: usize| {
        json!({"id": number, "title": "Rome", "context": format!("Rome has {number} hills."),
            "question": "How many hills has Rome?", "answers": {"text": [number.to_string()], "answer_start": [9]}})
    };
    recipes.write("squad/plain_text/train-00000-of-00001.jsonl", (0..12).map(question));
    recipes.write("squad/plain_text/validation-00000-of-00001.jsonl", (12..18).map(question));
    let settings = format!("{SHORT_TEXTS} model.pretrained=runs/pretrain/model training.eval_steps=2");
    let answered = recipes.train("question-answering.toml", &settings);
    assert!(answered.stdout.contains("adapter: runs/question-answering/adapter"), "{}", answered.stdout);
    assert_eq!(recipes.predictions("runs/question-answering").len(), 6);
}

#[test]
fn the_recipe_for_a_classifier_runs() {
    let recipes = Recipes::new();
    recipes.pretrain();
    let settings = "training.eval_steps=2 data.validation_split=0.3 evaluation.max_examples=30";
    let classified = recipes.train("classification.toml", settings);
    assert!(classified.stdout.contains("accuracy"), "{}", classified.stdout);
    let predictions = recipes.predictions("runs/classification");
    let known = |line: &Value| ["negative", "positive"].contains(&line["prediction"].as_str().unwrap());
    assert!(predictions.len() == 6 && predictions.iter().all(known), "{predictions:?}");
    let model = "--model runs/classification/model";
    let again = format!("{model} --output again data.validation_split=0.3");
    recipes.evaluate("classification.toml", &again).expect(0);
    assert_eq!(recipes.predictions("again"), predictions);
    // The three classes of tweets are not its two; and it writes nothing.
    let other = recipes.evaluate("tweets/finetune.toml", model).expect(2);
    assert!(other.error().contains("data.target"), "{}", other.error());
    let two = "data.where=label!='neutral' evaluation.metrics=[\"accuracy\"]";
    let written = recipes.evaluate("tweets/finetune.toml", &format!("{model} {two}")).expect(2);
    assert!(written.error().contains("evaluation.max_new_tokens: a classifier"), "{}", written.error());
}

#[test]
fn a_job_is_asked_as_it_says_or_not_at_all() {
    let recipes = Recipes::new();
    let refused = |arguments: &str| recipes.evaluate("tweets/finetune.toml", arguments).expect(2).stderr;
    let nothing = refused("--model x --output y evaluation.metrics=[\"loss\"]");
    assert!(nothing.contains("--output: nothing predicts"), "{nothing}");
    let conflict = refused("--model x --metrics loss");
    assert!(conflict.contains("cannot be used with"), "{conflict}");
    let unknown = recipes.evaluate("pretrain.toml", "--model x data.x=1").expect(2);
    assert!(unknown.error().contains("unknown key `x`"), "{}", unknown.error());
}
