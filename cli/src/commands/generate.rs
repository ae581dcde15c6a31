//! `quintet generate`: text out of a model.

use std::fs;

use serde_json::json;

use crate::args::GenerateArguments;
use crate::commands::{open_model, print_json};
use crate::device;
use crate::error::{Failure, Result, exit};

pub(crate) fn run(arguments: GenerateArguments) -> Result<u8> {
    let inputs = read_inputs(&arguments)?;
    let adapter = arguments.adapter.as_deref();
    let loaded =
        open_model(&device::open(arguments.device)?, &arguments.model, adapter, arguments.tokenizer.as_deref())?;
    for batch in inputs.chunks(arguments.batch_size.max(1)) {
        let (mut ids, mut offsets) = (Vec::new(), vec![0]);
        for input in batch {
            ids.extend(loaded.tokenizer.encode(input, arguments.max_source_length)?);
            offsets.push(ids.len() as u32);
        }
        let most = arguments.max_new_tokens as usize;
        let outputs = loaded.model.generate_greedy(&loaded.weights, &ids, &offsets, most)?;
        for (input, output) in batch.iter().zip(outputs) {
            let text = loaded.tokenizer.decode(&output.token_ids);
            if arguments.json {
                let output = json!({"text": text, "token_ids": output.token_ids, "score": output.score});
                print_json(&json!({"input": input, "outputs": [output]}));
            } else {
                println!("{text}");
            }
        }
    }
    Ok(exit::DONE)
}

fn read_inputs(arguments: &GenerateArguments) -> Result<Vec<String>> {
    match (&arguments.input, &arguments.input_file) {
        (Some(input), _) => Ok(vec![input.clone()]),
        (None, Some(path)) => {
            let text = fs::read_to_string(path)
                .map_err(|error| Failure::bad_input(format!("{}: cannot read: {error}", path.display())))?;
            Ok(text.lines().map(str::to_string).collect())
        }
        (None, None) => Err(Failure::bad_input("give --input or --input-file")),
    }
}
