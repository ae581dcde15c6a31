//! Which key becomes which. `docs/from-hugging-face.md` is the same table for people.

use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::Draft;

/// Hugging Face's defaults, by kind of file; `tests/references/arguments.py` made them.
static DEFAULTS: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("defaults.json")).unwrap_or_default());

/// What means the same under another or the same name: theirs, our section, our key.
const TRAINING: [(&str, &str, &str); 19] = [
    ("learning_rate", "training", "learning_rate"),
    ("weight_decay", "training", "weight_decay"),
    ("adam_beta1", "training", "adam_beta1"),
    ("adam_beta2", "training", "adam_beta2"),
    ("adam_epsilon", "training", "adam_epsilon"),
    ("max_grad_norm", "training", "max_grad_norm"),
    ("label_smoothing_factor", "training", "label_smoothing_factor"),
    ("gradient_checkpointing", "training", "gradient_checkpointing"),
    ("seed", "training", "seed"),
    ("logging_steps", "training", "logging_steps"),
    ("save_total_limit", "training", "save_total_limit"),
    ("load_best_model_at_end", "training", "load_best_model_at_end"),
    ("metric_for_best_model", "training", "metric_for_best_model"),
    ("greater_is_better", "training", "greater_is_better"),
    ("early_stopping_patience", "training", "early_stopping_patience"),
    ("early_stopping_threshold", "training", "early_stopping_threshold"),
    ("per_device_train_batch_size", "training", "micro_batch_size"),
    ("per_device_eval_batch_size", "evaluation", "batch_size"),
    ("generation_num_beams", "evaluation", "num_beams"),
];

/// Keys that others decide about, or that [`training`] looks at itself.
const TRAINING_HANDLED: [&str; 24] = [
    "hub_token",
    "logging_dir",
    "run_name",
    "local_rank",
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "bf16",
    "fp16",
    "tf32",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "use_cpu",
    "predict_with_generate",
    "generation_max_length",
    "generation_config",
];

const LORA: [(&str, &str, &str); 5] = [
    ("r", "lora", "r"),
    ("lora_alpha", "lora", "lora_alpha"),
    ("lora_dropout", "lora", "lora_dropout"),
    ("target_modules", "lora", "target_modules"),
    ("use_rslora", "lora", "use_rslora"),
];

/// Keys that say nothing of the training, or that [`lora`] looks at itself.
const LORA_HANDLED: [&str; 6] =
    ["base_model_name_or_path", "peft_type", "peft_version", "task_type", "inference_mode", "modules_to_save"];

/// What PEFT adds to `modules_to_save` of every classifier; T5 has no module of these names.
const OTHERS_HEADS: [&str; 2] = ["classifier", "score"];

const GENERATION: [(&str, &str, &str); 11] = [
    ("max_new_tokens", "evaluation", "max_new_tokens"),
    ("min_new_tokens", "evaluation", "min_new_tokens"),
    ("num_beams", "evaluation", "num_beams"),
    ("length_penalty", "evaluation", "length_penalty"),
    ("early_stopping", "evaluation", "early_stopping"),
    ("no_repeat_ngram_size", "evaluation", "no_repeat_ngram_size"),
    ("repetition_penalty", "evaluation", "repetition_penalty"),
    ("do_sample", "evaluation", "do_sample"),
    ("temperature", "evaluation", "temperature"),
    ("top_k", "evaluation", "top_k"),
    ("top_p", "evaluation", "top_p"),
];

/// What [`length`] looks at, and what the model's own generation_config.json says.
const GENERATION_HANDLED: [&str; 7] = [
    "max_length",
    "min_length",
    "transformers_version",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "decoder_start_token_id",
];

/// Takes over a file, whose keys tell what it is.
///
/// # Errors
/// If they do not.
pub(super) fn file(draft: &mut Draft, keys: &Map<String, Value>) -> Result<(), String> {
    let has = |key: &str| keys.contains_key(key);
    if has("peft_type") {
        if keys["peft_type"] != "LORA" {
            return Err(format!("an adapter of type {}; only LORA has a counterpart", keys["peft_type"]));
        }
        table(draft, keys, "lora", &LORA, &LORA_HANDLED);
        lora(draft, keys);
    } else if has("per_device_train_batch_size") || has("num_train_epochs") || has("learning_rate") {
        table(draft, keys, "training", &TRAINING, &TRAINING_HANDLED);
        training(draft, keys);
    } else if has("num_beams") || has("max_new_tokens") || has("transformers_version") || has("do_sample") {
        table(draft, keys, "generation", &GENERATION, &GENERATION_HANDLED);
        for (theirs, ours) in [("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")] {
            let is_default = DEFAULTS["generation"].get(theirs) == keys.get(theirs);
            if !is_default && keys.get(ours).is_none_or(Value::is_null) {
                length(draft, keys, theirs, ours);
            }
        }
    } else {
        return Err(
            "holds neither TrainingArguments, nor a LoraConfig (adapter_config.json), nor a GenerationConfig".into()
        );
    }
    Ok(())
}

/// Renames what has a counterpart, and names what has none and is not as it is by default.
fn table(draft: &mut Draft, keys: &Map<String, Value>, kind: &str, renamed: &[(&str, &str, &str)], handled: &[&str]) {
    let defaults = &DEFAULTS[kind];
    for (key, value) in keys {
        let is_default = value.is_null() || defaults.get(key) == Some(value) || is_empty(value);
        if let Some((_, section, name)) = renamed.iter().find(|(theirs, ..)| theirs == key) {
            match toml::Value::try_from(value) {
                Ok(converted) if !value.is_null() && !is_neutral(key, value) => draft.set(section, name, converted),
                _ => {}
            }
        } else if !handled.contains(&key.as_str()) && !is_default {
            draft.refuse(key, value, "has no counterpart");
        }
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

/// What our configuration wants left out where it changes nothing.
fn is_neutral(key: &str, value: &Value) -> bool {
    match key {
        "early_stopping_threshold" => value == 0.0,
        "load_best_model_at_end" | "gradient_checkpointing" | "use_rslora" => value == false,
        _ => false,
    }
}

fn lora(draft: &mut Draft, keys: &Map<String, Value>) {
    if let Some(base) = text(keys, "base_model_name_or_path") {
        draft.set("model", "pretrained", base);
    }
    match text(keys, "task_type") {
        None | Some("SEQ_2_SEQ_LM") => {}
        Some("SEQ_CLS") => draft.set("model", "task", "sequence_classification"),
        Some(_) => draft.refuse("task_type", &keys["task_type"], "the tasks here are SEQ_2_SEQ_LM and SEQ_CLS"),
    }
    let names = keys.get("modules_to_save").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let (others, own): (Vec<&str>, Vec<&str>) = names.partition(|name| OTHERS_HEADS.contains(name));
    if !others.is_empty() {
        let note = "modules_to_save: without classifier and score, which PEFT adds for every classifier and T5 does not \
                    have; its head, classification_head, is always trained and saved here";
        draft.notes.push(note.into());
    }
    if !own.is_empty() {
        draft.set("lora", "modules_to_save", own);
    }
}

/// Lengths there count the decoder's start token.
fn length(draft: &mut Draft, keys: &Map<String, Value>, theirs: &str, ours: &str) {
    if let Some(length) = integer(keys, theirs) {
        draft.set("evaluation", ours, (length - 1).max(0));
    }
}

fn training(draft: &mut Draft, keys: &Map<String, Value>) {
    if let Some(output_dir) = text(keys, "output_dir") {
        draft.sections.insert("output_dir".into(), output_dir.into());
    }
    length_and_batch(draft, keys);
    schedule(draft, keys);
    optimizer_and_precision(draft, keys);
    intervals(draft, keys);
    if keys.get("use_cpu") == Some(&Value::Bool(true)) {
        draft.set("cluster", "device", "cpu");
    }
    length(draft, keys, "generation_max_length", "max_new_tokens");
    if keys.get("predict_with_generate") == Some(&Value::Bool(true)) {
        draft.notes.push("predict_with_generate: evaluation.metrics says which scores texts are generated for".into());
    }
    if !keys.get("generation_config").is_none_or(Value::is_null) {
        draft.refuse("generation_config", &keys["generation_config"], "give it to import-args as a file of its own");
    }
}

fn length_and_batch(draft: &mut Draft, keys: &Map<String, Value>) {
    match (integer(keys, "max_steps").filter(|&steps| steps > 0), number(keys, "num_train_epochs")) {
        (Some(steps), _) => draft.set("training", "max_steps", steps),
        (None, Some(epochs)) => draft.set("training", "num_train_epochs", epochs),
        (None, None) => {}
    }
    let accumulated = integer(keys, "gradient_accumulation_steps").unwrap_or(1);
    if let Some(per_device) = integer(keys, "per_device_train_batch_size") {
        draft.set("training", "global_batch_size", per_device * accumulated);
        draft.notes.push(format!(
            "training.global_batch_size = {} is per_device_train_batch_size × gradient_accumulation_steps: if several \
             processes trained, multiply it by their number",
            per_device * accumulated
        ));
    }
}

fn schedule(draft: &mut Draft, keys: &Map<String, Value>) {
    const SCHEDULES: [&str; 6] = ["linear", "constant", "constant_with_warmup", "cosine", "inverse_sqrt", "polynomial"];
    if let Some(schedule) = text(keys, "lr_scheduler_type") {
        match SCHEDULES.contains(&schedule) {
            true => draft.set("training", "lr_scheduler_type", schedule),
            false => draft.refuse("lr_scheduler_type", &keys["lr_scheduler_type"], "no such schedule here"),
        }
    }
    if let Some(kwargs) = keys.get("lr_scheduler_kwargs").filter(|kwargs| !kwargs.is_null() && !is_empty(kwargs)) {
        match toml::Value::try_from(kwargs) {
            Ok(table) if text(keys, "lr_scheduler_type") == Some("polynomial") => {
                draft.set("training", "lr_scheduler_kwargs", table);
            }
            _ => draft.refuse("lr_scheduler_kwargs", kwargs, "only the polynomial schedule has any"),
        }
    }
    let steps = integer(keys, "max_steps").filter(|&steps| steps > 0);
    for key in ["warmup_steps", "warmup_ratio"] {
        match (number(keys, key).filter(|&amount| amount > 0.0), steps) {
            (None, _) => {}
            (Some(amount), _) if amount >= 1.0 => draft.set("training", "warmup_steps", amount as i64),
            (Some(share), Some(steps)) => {
                draft.set("training", "warmup_steps", (share * steps as f64).ceil() as i64);
            }
            (Some(_), None) => {
                draft.refuse(key, &keys[key], "a share of the steps; set training.warmup_steps to their number")
            }
        }
    }
}

fn optimizer_and_precision(draft: &mut Draft, keys: &Map<String, Value>) {
    match text(keys, "optim") {
        Some("adafactor") => draft.set("training", "optimizer", "adafactor"),
        Some("adamw_torch" | "adamw_torch_fused" | "adamw_hf" | "adamw_apex_fused") => {
            draft.set("training", "optimizer", "adamw");
        }
        Some(_) => draft.refuse("optim", &keys["optim"], "the optimizers here are adamw, adamw_scaled and adafactor"),
        None => {}
    }
    let on = |key: &str| keys.get(key) == Some(&Value::Bool(true));
    match (on("bf16"), on("fp16"), on("tf32")) {
        (true, _, _) => draft.set("training", "precision", "bf16"),
        (_, true, _) => draft.set("training", "precision", "fp16"),
        (_, _, true) => draft.set("training", "precision", "tf32"),
        _ => draft.set("training", "precision", "fp32"),
    }
}

fn intervals(draft: &mut Draft, keys: &Map<String, Value>) {
    let logging = keys.get("logging_steps");
    for (strategy, steps, fallback) in [("eval_strategy", "eval_steps", logging), ("save_strategy", "save_steps", None)]
    {
        match text(keys, strategy) {
            Some("steps") => {
                let value = keys.get(steps).filter(|value| !value.is_null()).or(fallback);
                match value.and_then(Value::as_i64).filter(|&every| every > 0) {
                    Some(every) => draft.set("training", steps, every),
                    None => {
                        let value = value.cloned().unwrap_or_default();
                        draft.refuse(steps, &value, "must be a number of steps here");
                    }
                }
            }
            Some("no") | None => {}
            Some("best") => draft.notes.push("save_strategy = \"best\": load_best_model_at_end keeps the best".into()),
            Some(_) => {
                let why = format!("set training.{steps} to the steps of an epoch");
                draft.refuse(strategy, &keys[strategy], &why);
            }
        }
    }
}

fn text<'a>(keys: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    keys.get(key)?.as_str()
}

fn number(keys: &Map<String, Value>, key: &str) -> Option<f64> {
    keys.get(key)?.as_f64()
}

fn integer(keys: &Map<String, Value>, key: &str) -> Option<i64> {
    keys.get(key)?.as_i64()
}
