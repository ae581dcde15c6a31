//! What `quintet generate` does with a classifier: the class of each input.

use quintet_t5::Weights;
use quintet_worker::classify::log_probabilities;
use serde_json::json;

use crate::args::GenerateArguments;
use crate::commands::{Loaded, print_json};
use crate::error::{Failure, Result};

/// Prints the most probable class of each input; as JSON all of them, the most probable first, with their log
/// probabilities.
pub(crate) fn classify(arguments: &GenerateArguments, loaded: &Loaded, inputs: &[String]) -> Result<()> {
    refuse_what_is_of_generation(arguments)?;
    let labels = loaded.model.config().labels();
    for inputs in inputs.chunks(arguments.batch_size) {
        let (weights, length) = (Weights::from(&loaded.weights), arguments.inputs.max_source_length);
        let scores = log_probabilities(&loaded.model, weights, &loaded.tokenizer, inputs, length)?;
        for (input, scores) in inputs.iter().zip(scores) {
            let mut order: Vec<usize> = (0..labels.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            if arguments.json {
                let output = |&class: &usize| json!({"text": labels[class], "score": scores[class]});
                print_json(&json!({"input": input, "outputs": order.iter().map(output).collect::<Vec<_>>()}));
            } else {
                println!("{}", labels[order[0]]);
            }
        }
    }
    Ok(())
}

fn refuse_what_is_of_generation(arguments: &GenerateArguments) -> Result<()> {
    let given = [
        ("--num-return-sequences", arguments.num_return_sequences.is_some()),
        ("--candidates", !arguments.candidates.is_empty()),
        ("--stream", arguments.stream),
    ];
    let given = given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag.to_string());
    match given.or_else(|| arguments.generation.first_given()) {
        Some(flag) => Err(Failure::bad_input(format!("{flag}: the model is a classifier, which generates no text"))),
        None => Ok(()),
    }
}
