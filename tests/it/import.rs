//! Job files from Hugging Face's arguments.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::docs::known_keys;
use crate::harness::{Ended, run};
use crate::structure::read;

/// Runs `import-args` on files of these contents.
fn import(files: &[Value], flags: &[&str]) -> (TempDir, Ended) {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = vec!["import-args".to_string()];
    for (index, content) in files.iter().enumerate() {
        let name = format!("{index}.json");
        fs::write(directory.path().join(&name), content.to_string()).unwrap();
        arguments.push(name);
    }
    arguments.extend(flags.iter().map(|flag| flag.to_string()));
    let ended = run(directory.path(), arguments);
    (directory, ended)
}

#[test]
fn arguments_become_a_job_that_runs() {
    let arguments = json!({
        "output_dir": "out", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "max_steps": 100,
        "num_train_epochs": 3.0, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "warmup_steps": 0, "optim": "adafactor", "bf16": true, "fp16": false, "logging_steps": 10, "eval_strategy": "steps",
        "eval_steps": null, "save_strategy": "steps", "save_steps": 50, "save_total_limit": 2, "load_best_model_at_end": true,
        "metric_for_best_model": "eval_loss", "neftune_noise_alpha": 5.0, "dataloader_num_workers": 0, "report_to": [],
        "group_by_length": true, "generation_num_beams": null, "seed": 7, "hub_token": "<HUB_TOKEN>",
    });
    let (directory, ended) = import(&[arguments], &[]);
    let ended = ended.expect(0);
    let unconverted: Vec<&str> = ended.stderr.lines().filter_map(|line| line.strip_prefix("not converted: ")).collect();
    assert_eq!(
        unconverted,
        ["neftune_noise_alpha = 5.0: has no counterpart", "group_by_length = true: has no counterpart"]
    );
    assert!(ended.stderr.contains("note: training.global_batch_size = 32 is"), "{}", ended.stderr);
    let job: toml::Table = ended.stdout.parse().unwrap();
    assert_eq!(job["output_dir"].as_str(), Some("out"));
    let expected = json!({
        "micro_batch_size": 4, "global_batch_size": 32, "max_steps": 100, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": 10, "optimizer": "adafactor", "precision": "bf16", "logging_steps": 10,
        "eval_steps": 10, "save_steps": 50, "save_total_limit": 2, "load_best_model_at_end": true,
        "metric_for_best_model": "eval_loss", "seed": 7,
    });
    assert_eq!(serde_json::to_value(&job["training"]).unwrap(), expected);

    // With the blanks filled in, it is a job: whoever complains about the cluster, which comes last, found the rest in order.
    let filled = ended.stdout.replace(
        "# [model]\n# pretrained = \"…\"\n",
        "[model]\ntokenizer = \"byt5\"\narchitecture = {}\n[data]\ntrain = \"x.jsonl\"\ninput = \"{a}\"\ntarget = \"{b}\"\n",
    );
    fs::write(directory.path().join("job.toml"), filled).unwrap();
    let ended = run(directory.path(), ["train", "job.toml", "--set", "cluster.min_workers=0"]).expect(2);
    assert!(ended.error().contains("cluster.min_workers"), "{}", ended.error());
}

#[test]
fn an_adapter_and_a_generation_become_sections() {
    let adapter = json!({
        "peft_type": "LORA", "base_model_name_or_path": "google/flan-t5-base", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
        "target_modules": ["q", "v"], "modules_to_save": null, "use_rslora": true, "use_dora": true, "bias": "none",
    });
    let generation = json!({
        "max_length": 129, "min_new_tokens": 4, "min_length": 3, "num_beams": 4, "length_penalty": 2.0,
        "early_stopping": "never", "no_repeat_ngram_size": 3, "repetition_penalty": 1.5, "do_sample": false,
        "temperature": 0.7, "top_k": 20, "top_p": 0.9, "num_return_sequences": 2, "decoder_start_token_id": 0,
    });
    let training = json!({"per_device_train_batch_size": 2, "max_steps": 5, "generation_max_length": 65});
    let (directory, ended) = import(&[training, adapter, generation], &[]);
    let ended = ended.expect(0);
    let unconverted: Vec<&str> = ended.stderr.lines().filter_map(|line| line.strip_prefix("not converted: ")).collect();
    assert_eq!(unconverted, ["use_dora = true: has no counterpart", "num_return_sequences = 2: has no counterpart"]);
    let job: toml::Table = ended.stdout.parse().unwrap();
    assert_eq!(job["model"]["pretrained"].as_str(), Some("google/flan-t5-base"));
    let lora =
        json!({"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q", "v"], "use_rslora": true});
    assert_eq!(serde_json::to_value(&job["lora"]).unwrap(), lora);
    let evaluation = json!({
        "max_new_tokens": 128, "min_new_tokens": 4, "num_beams": 4, "length_penalty": 2.0, "early_stopping": "never",
        "no_repeat_ngram_size": 3, "repetition_penalty": 1.5, "do_sample": false, "temperature": 0.7, "top_k": 20,
        "top_p": 0.9,
    });
    assert_eq!(serde_json::to_value(&job["evaluation"]).unwrap(), evaluation);
    let data = "\n[data]\ntrain = \"x.jsonl\"\ninput = \"{a}\"\ntarget = \"{b}\"\n";
    fs::write(directory.path().join("job.toml"), format!("output_dir = \"out\"\n{}{data}", ended.stdout)).unwrap();
    let ended = run(directory.path(), ["train", "job.toml", "--set", "cluster.min_workers=0"]).expect(2);
    assert!(ended.error().contains("cluster.min_workers"), "{}", ended.error());
}

#[test]
fn a_classifiers_adapter_becomes_a_job_of_classification() {
    let of_peft =
        |task: &str, saved: Value| json!({"peft_type": "LORA", "task_type": task, "r": 4, "modules_to_save": saved});
    for (saved, kept, notes) in [
        (json!(["classifier", "score"]), Value::Null, 1),
        (json!(["classification_head", "classifier", "score"]), json!(["classification_head"]), 1),
        (json!(["score", "lm_head"]), json!(["lm_head"]), 1),
        (json!(["classification_head"]), json!(["classification_head"]), 0),
    ] {
        let (_, ended) = import(&[of_peft("SEQ_CLS", saved)], &["--json"]);
        let document: Value = serde_json::from_str(&ended.expect(0).stdout).unwrap();
        assert_eq!(document["job"]["model"]["task"], "sequence_classification");
        assert_eq!(document["job"]["lora"]["modules_to_save"], kept);
        assert_eq!(document["not_converted"], json!([]));
        let said = document["notes"].as_array().unwrap();
        assert_eq!(said.len(), notes, "{said:?}");
        assert!(said.iter().all(|note| note.as_str().unwrap().contains("classifier and score")), "{said:?}");
    }
    let (_, ended) = import(&[of_peft("TOKEN_CLS", Value::Null)], &[]);
    assert!(ended.expect(0).stderr.contains("not converted: task_type = \"TOKEN_CLS\": "));
}

#[test]
fn what_is_as_by_default_is_not_worth_a_word() {
    let defaults: Value = serde_json::from_str(&read("cli/src/commands/import_args/defaults.json")).unwrap();
    let mut training = defaults["training"].clone();
    training["output_dir"] = json!("out");
    let (_, ended) = import(&[training, defaults["generation"].clone()], &["--json"]);
    let document: Value = serde_json::from_str(&ended.expect(0).stdout).unwrap();
    assert_eq!(document["not_converted"], json!([]));
    assert_eq!(document["job"]["evaluation"]["num_beams"], 1);
}

#[test]
fn what_is_none_of_theirs_is_refused() {
    for (content, needle) in [
        (json!({"model_type": "t5"}), "holds neither"),
        (json!([1, 2]), "no JSON object"),
        (json!({"peft_type": "PREFIX_TUNING"}), "only LORA"),
    ] {
        let (_, ended) = import(&[content], &[]);
        let ended = ended.expect(2);
        assert!(ended.error().contains(needle) && ended.error().contains("0.json"), "{}", ended.error());
    }
}

#[test]
fn every_key_in_the_table_exists() {
    let text = read("docs/from-hugging-face.md");
    let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").nth(1));
    let keys: Vec<&str> =
        cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).filter(|key| !key.contains(' ')).collect();
    assert!(keys.len() > 30);
    for key in keys {
        let Some((section, name)) = key.split_once('.') else {
            assert_eq!(key, "output_dir");
            continue;
        };
        assert!(known_keys(section).contains(&key.to_string()), "{name} is no key of {section}");
    }
}
