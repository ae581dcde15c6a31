//! `quintet embed`: what a model's encoder makes of texts, each as one vector.

use quintet_t5::Model;
use serde_json::json;

use crate::args::EmbedArguments;
use crate::commands::{Loaded, print_json};
use crate::device;
use crate::error::{Failure, Result, exit};

pub(crate) fn run(arguments: EmbedArguments) -> Result<u8> {
    if arguments.batch_size == 0 {
        return Err(Failure::bad_input("--batch-size: is 0, must be at least 1"));
    }
    let inputs = arguments.inputs.read()?;
    let loaded = arguments.model.open(&device::open(arguments.device)?)?;
    for inputs in inputs.chunks(arguments.batch_size) {
        let embeddings = embed(&loaded, inputs, arguments.inputs.max_source_length)?;
        for (input, embedding) in inputs.iter().zip(embeddings) {
            if arguments.json {
                print_json(&json!({"input": input, "embedding": embedding}));
            } else {
                let numbers: Vec<String> = embedding.iter().map(f32::to_string).collect();
                println!("{}", numbers.join("\t"));
            }
        }
    }
    Ok(exit::DONE)
}

/// Of each text the mean of the encoder's last hidden states over its tokens, the end of sequence included.
fn embed(loaded: &Loaded, texts: &[String], max_source_length: usize) -> Result<Vec<Vec<f32>>> {
    let (mut ids, mut offsets) = (Vec::new(), vec![0]);
    for text in texts {
        ids.extend(loaded.tokenizer.encode(text, max_source_length)?);
        offsets.push(ids.len() as u32);
    }
    let states = Model::encode(&loaded.model, &loaded.weights, &ids, &offsets)?;
    let width = loaded.model.config().d_model;
    let mean = |rows: &[f32]| -> Vec<f32> {
        let tokens = rows.len() / width;
        let sum = |column: usize| rows[column..].iter().step_by(width).map(|&value| f64::from(value)).sum::<f64>();
        (0..width).map(|column| (sum(column) / tokens as f64) as f32).collect()
    };
    let ranges = offsets.windows(2).map(|pair| pair[0] as usize * width..pair[1] as usize * width);
    Ok(ranges.map(|range| mean(&states[range])).collect())
}
