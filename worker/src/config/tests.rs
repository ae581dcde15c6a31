use quintet_data::TrainingLength;
use serde_json::{Value, json};

use super::*;

fn training(value: Value) -> TrainingConfig {
    serde_json::from_value(value).unwrap()
}

#[test]
fn the_interface_example_is_understood() {
    let config = training(json!({
        "max_steps": 1000, "global_batch_size": 64, "micro_batch_size": 8, "learning_rate": 1e-3,
        "lr_scheduler_type": "linear", "warmup_steps": 50, "optimizer": "adamw", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "precision": "bf16", "gradient_checkpointing": false,
        "label_smoothing_factor": 0.0, "seed": 42, "logging_steps": 1, "eval_steps": 200,
        "save_steps": 200, "save_total_limit": 3,
    }));
    config.validate().unwrap();
    assert_eq!(config.micro_batches(), 8);
    assert_eq!(config.length(), TrainingLength::Steps(1000));
    assert_eq!(config.schedule(1000).learning_rate_at(50), 1e-3);
    let again: TrainingConfig = serde_json::from_value(serde_json::to_value(&config).unwrap()).unwrap();
    assert_eq!(again, config);
    for name in ["adamw", "adamw_scaled", "adafactor"] {
        training(json!({ "optimizer": name })).validate().unwrap();
    }
    for name in ["linear", "constant", "constant_with_warmup", "cosine", "inverse_sqrt", "polynomial"] {
        training(json!({ "lr_scheduler_type": name })).validate().unwrap();
    }
}

#[test]
fn defaults_are_valid() {
    let config = training(json!({}));
    config.validate().unwrap();
    assert_eq!(config.length(), TrainingLength::Epochs(3.0));
    assert_eq!(config.micro_batch_size(), config.global_batch_size);
    EvaluationConfig::default().validate().unwrap();
}

#[test]
fn every_bad_value_names_its_key() {
    for (bad, key) in [
        (json!({ "max_steps": 0 }), "training.max_steps"),
        (json!({ "max_steps": 1, "num_train_epochs": 1.0 }), "training.max_steps"),
        (json!({ "num_train_epochs": 0.0 }), "training.num_train_epochs"),
        (json!({ "global_batch_size": 0 }), "training.global_batch_size"),
        (json!({ "micro_batch_size": 0 }), "training.micro_batch_size"),
        (json!({ "global_batch_size": 8, "micro_batch_size": 3 }), "training.micro_batch_size"),
        (json!({ "micro_batch_size": 16 }), "training.micro_batch_size"),
        (json!({ "learning_rate": 0.0 }), "training.learning_rate"),
        (json!({ "learning_rate": -1e-3 }), "training.learning_rate"),
        (json!({ "adam_beta1": 1.0 }), "training.adam_beta1"),
        (json!({ "adam_beta2": -0.1 }), "training.adam_beta2"),
        (json!({ "adam_epsilon": 0.0 }), "training.adam_epsilon"),
        (json!({ "weight_decay": -1.0 }), "training.weight_decay"),
        (json!({ "max_grad_norm": -1.0 }), "training.max_grad_norm"),
        (json!({ "label_smoothing_factor": 1.0 }), "training.label_smoothing_factor"),
        (json!({ "logging_steps": 0 }), "training.logging_steps"),
        (json!({ "eval_steps": 0 }), "training.eval_steps"),
        (json!({ "save_steps": 0 }), "training.save_steps"),
        (json!({ "save_total_limit": 0 }), "training.save_total_limit"),
        (json!({ "early_stopping_patience": 0 }), "training.early_stopping_patience"),
        (json!({ "early_stopping_threshold": 0.1 }), "training.early_stopping_threshold"),
        (
            json!({ "early_stopping_patience": 1, "early_stopping_threshold": -0.1 }),
            "training.early_stopping_threshold",
        ),
        (json!({ "metric_for_best_model": "loss" }), "training.metric_for_best_model"),
        (json!({ "metric_for_best_model": "blue", "load_best_model_at_end": true }), "training.metric_for_best_model"),
        (json!({ "greater_is_better": true }), "training.greater_is_better"),
        (json!({ "max_steps": 5, "warmup_steps": 6 }), "training.warmup_steps"),
        (json!({ "lr_scheduler_type": "constant", "warmup_steps": 6 }), "training.warmup_steps"),
        (json!({ "lr_scheduler_kwargs": {} }), "training.lr_scheduler_kwargs"),
        (
            json!({ "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": { "lr_end": 1.0 } }),
            "training.lr_scheduler_kwargs.lr_end",
        ),
        (
            json!({ "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": { "power": 0.0 } }),
            "training.lr_scheduler_kwargs.power",
        ),
    ] {
        let error = training(bad.clone()).validate().expect_err(&bad.to_string());
        assert!(error.is_user_error());
        assert!(error.to_string().starts_with(&format!("{key}: ")), "{bad}: {error}");
    }
    for (bad, key) in [
        (json!({ "max_new_tokens": 0 }), "evaluation.max_new_tokens"),
        (json!({ "batch_size": 0 }), "evaluation.batch_size"),
        (json!({ "max_examples": 0 }), "evaluation.max_examples"),
        (json!({ "num_beams": 0 }), "evaluation.num_beams"),
        (json!({ "num_beams": 4, "do_sample": true }), "evaluation.do_sample"),
        (json!({ "top_p": 2.0 }), "evaluation.top_p"),
    ] {
        let config: EvaluationConfig = serde_json::from_value(bad).unwrap();
        assert!(config.validate().unwrap_err().to_string().starts_with(key));
    }
}

#[test]
fn unknown_keys_are_refused() {
    for bad in [json!({ "learning_rat": 1.0 }), json!({ "optimizer": "sgd" })] {
        assert!(serde_json::from_value::<TrainingConfig>(bad).is_err());
    }
    assert!(serde_json::from_value::<EvaluationConfig>(json!({ "metrics": ["blue"] })).is_err());
    assert!(serde_json::from_value::<ModelSection>(json!({ "pretrain": "x" })).is_err());
}

#[test]
fn a_model_is_pretrained_or_described() {
    let model = |value| serde_json::from_value::<ModelSection>(value).unwrap();
    for good in [
        json!({ "pretrained": "google/t5-v1_1-small" }),
        json!({ "architecture": {}, "tokenizer": "byt5", "dropout_rate": 0.0 }),
    ] {
        model(good).validate().unwrap();
    }
    for (bad, key) in [
        (json!({}), "model:"),
        (json!({ "pretrained": "x", "architecture": {} }), "model:"),
        (json!({ "architecture": {} }), "model.tokenizer:"),
        (json!({ "pretrained": "x", "dropout_rate": 1.0 }), "model.dropout_rate:"),
    ] {
        assert!(model(bad).validate().unwrap_err().to_string().starts_with(key));
    }
}
