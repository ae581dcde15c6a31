//! What rank 0 leaves for people: the final model, and the predictions of the last evaluation.

use std::fs::{self, File};
use std::io::{BufWriter, Write};

use quintet_data::Tokenizer;
use quintet_t5::Parameters;

use crate::evaluation::Prediction;
use crate::outbox::Outbox;
use crate::replica::{AdapterAbout, Replica};
use crate::{Error, Result};

/// `model/`, in Hugging Face's layout, or `adapter/`, in PEFT's, with the tokenizer's files; replaces an older one only
/// when it is whole. Its weights are those of the replica, unless `weights` gives others.
pub fn write_model(
    output: &Outbox,
    replica: &Replica,
    weights: Option<&Parameters>,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let name = if replica.adapter().is_some() { "adapter" } else { "model" };
    let output_dir = output.directory();
    let (target, beside, old) =
        (output_dir.join(name), output_dir.join(".tmp-model"), output_dir.join(".tmp-model-old"));
    for leftover in [&beside, &old] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(Error::file("remove", leftover))?;
        }
    }
    fs::create_dir_all(&beside).map_err(Error::file("create", &beside))?;
    let (model, weights) = (replica.model(), weights.unwrap_or(replica.master()));
    match replica.adapter() {
        None => quintet_t5::save_pretrained(model, weights, &beside)?,
        Some(AdapterAbout { spec, base }) => {
            quintet_t5::save_adapter(model, spec, weights, &base.name, &base.fingerprint, &beside)?;
        }
    }
    tokenizer.save(&beside)?;
    if target.exists() {
        fs::rename(&target, &old).map_err(Error::file("rename", &target))?;
    }
    fs::rename(&beside, &target).map_err(Error::file("rename", &beside))?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(Error::file("remove", &old))?;
    }
    output.publish(name)
}

/// Of the last evaluation.
const PREDICTIONS: &str = "predictions.jsonl";

/// `predictions.jsonl`, replaced as a whole; none where no metric asked for texts.
pub fn write_predictions(output: &Outbox, predictions: &[Prediction]) -> Result<()> {
    if predictions.is_empty() {
        return Ok(());
    }
    let output_dir = output.directory();
    let (target, beside) = (output_dir.join(PREDICTIONS), output_dir.join(".tmp-predictions.jsonl"));
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(&beside)?);
        for prediction in predictions {
            serde_json::to_writer(&mut file, prediction)?;
            file.write_all(b"\n")?;
        }
        file.into_inner()?.sync_all()?;
        fs::rename(&beside, &target)
    };
    write().map_err(Error::file("write", &target))?;
    output.publish(PREDICTIONS)
}
