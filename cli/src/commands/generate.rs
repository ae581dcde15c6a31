//! `quintet generate`: text out of a model, or how probable given texts are.

use std::io::Write;

use quintet_t5::{Generated, Generation, GenerationOptions, Generator, Sources};
use serde_json::json;

use crate::args::{GenerateArguments, GenerationFlags};
use crate::commands::classify::classify;
use crate::commands::evaluate::evaluation_of;
use crate::commands::{Loaded, print_json, require_decoder};
use crate::device;
use crate::error::{Failure, Result, exit};

/// Batches whose inputs are sorted by length together. What is printed waits for no more than these.
const BATCHES_SORTED: usize = 32;

pub(crate) fn run(arguments: GenerateArguments) -> Result<u8> {
    check(&arguments)?;
    let inputs = arguments.inputs.read()?;
    let loaded = arguments.model.open(&device::open(arguments.device)?)?;
    require_decoder(&loaded.model)?;
    if loaded.model.config().is_classifier() {
        classify(&arguments, &loaded, &inputs)?;
        return Ok(exit::DONE);
    }
    if !arguments.candidates.is_empty() {
        score_candidates(&arguments, &loaded, &inputs)?;
        return Ok(exit::DONE);
    }
    let defaults = GenerationOptions::from_pretrained(&loaded.directory)?;
    let flags = GenerationOptions {
        num_return_sequences: arguments.num_return_sequences,
        ..evaluation_of(&arguments.generation).generation()
    };
    let generation = flags.or(defaults).resolve(loaded.model.config()).map_err(flag_error)?;
    arguments.generation.check_use(&generation)?;
    let stream_tokens = arguments.stream && inputs.len() == 1 && !arguments.json;
    if stream_tokens && (generation.num_beams > 1 || generation.num_return_sequences > 1) {
        return Err(Failure::bad_input(
            "--stream: several beams or sequences are not written token by token; use one, or leave --stream out",
        ));
    }
    let generator = Generator::new(&loaded.model, &loaded.weights, generation);
    let writer = Writer { loaded: &loaded, generator, json: arguments.json };
    if stream_tokens {
        writer.stream(&inputs[0], arguments.inputs.max_source_length)?;
    } else {
        writer.all(&arguments, &inputs)?;
    }
    Ok(exit::DONE)
}

fn check(arguments: &GenerateArguments) -> Result<()> {
    for (flag, value) in
        [("--batch-size", arguments.batch_size), ("--max-source-length", arguments.inputs.max_source_length)]
    {
        if value == 0 {
            return Err(Failure::bad_input(format!("{flag}: is 0, must be at least 1")));
        }
    }
    let options = GenerationOptions {
        num_return_sequences: arguments.num_return_sequences.filter(|&count| count == 0),
        ..evaluation_of(&arguments.generation).generation()
    };
    options.check_ranges().map_err(flag_error)
}

/// Under the name of the flag.
pub(crate) fn flag_error(error: quintet_t5::Error) -> Failure {
    match error {
        quintet_t5::Error::Generation { key, problem } => {
            Failure::bad_input(format!("--{}: {problem}", key.replace('_', "-")))
        }
        other => other.into(),
    }
}

impl GenerationFlags {
    /// The first flag that is given.
    pub(crate) fn first_given(&self) -> Option<String> {
        let key = evaluation_of(self).generation_key()?;
        Some(format!("--{}", key.replace('_', "-")))
    }

    /// A flag without effect is a mistake.
    fn check_use(&self, generation: &Generation) -> Result<()> {
        let of_sampling = [
            ("--temperature", self.temperature.is_some()),
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        let of_beams =
            [("--length-penalty", self.length_penalty.is_some()), ("--early-stopping", self.early_stopping.is_some())];
        if let Some((flag, _)) = of_sampling.iter().find(|(_, given)| *given && !generation.do_sample) {
            return Err(Failure::bad_input(format!("{flag}: has no effect without --do-sample")));
        }
        if let Some((flag, _)) = of_beams.iter().find(|(_, given)| *given && generation.num_beams == 1) {
            return Err(Failure::bad_input(format!("{flag}: has no effect without --num-beams of at least 2")));
        }
        Ok(())
    }
}

/// Generates and prints.
struct Writer<'a> {
    loaded: &'a Loaded,
    generator: Generator<'a>,
    json: bool,
}

impl Writer<'_> {
    /// All inputs, printed in their order.
    fn all(&self, arguments: &GenerateArguments, inputs: &[String]) -> Result<()> {
        let sorted = arguments.batch_size.saturating_mul(if arguments.stream { 1 } else { BATCHES_SORTED });
        for (first, inputs) in (0..).step_by(sorted).zip(inputs.chunks(sorted)) {
            let encode = |input: &String| self.loaded.tokenizer.encode(input, arguments.inputs.max_source_length);
            let ids: Vec<Vec<u32>> = inputs.iter().map(encode).collect::<quintet_data::Result<_>>()?;
            // Of similar length together: a batch takes as long as its longest.
            let mut order: Vec<usize> = (0..inputs.len()).collect();
            order.sort_by_key(|&index| ids[index].len());
            let mut outputs = vec![Vec::new(); inputs.len()];
            for batch in order.chunks(arguments.batch_size) {
                let sources: Vec<&[u32]> = batch.iter().map(|&index| &ids[index][..]).collect();
                let numbers: Vec<u64> = batch.iter().map(|&index| (first + index) as u64).collect();
                let generated = self.batch(&sources, &numbers, &mut |_| {})?;
                batch.iter().zip(generated).for_each(|(&index, generated)| outputs[index] = generated);
            }
            inputs.iter().zip(&outputs).for_each(|(input, outputs)| self.print(input, outputs));
        }
        Ok(())
    }

    /// One input, its text as it comes.
    fn stream(&self, input: &str, max_source_length: usize) -> Result<()> {
        let ids = self.loaded.tokenizer.encode(input, max_source_length)?;
        let (mut tokens, mut printed) = (Vec::new(), String::new());
        self.batch(&[&ids], &[0], &mut |token| {
            tokens.push(token);
            let text = self.text(input, &tokens);
            // A character may take several tokens; until they are there, its place is held by another.
            if let Some(news) = text.strip_prefix(&printed).filter(|news| !news.ends_with('\u{fffd}')) {
                print!("{news}");
                std::io::stdout().flush().ok(); // whoever closed the pipe does not want it
                printed = text;
            }
        })?;
        let text = self.text(input, &tokens);
        println!("{}", text.strip_prefix(&printed).unwrap_or_default());
        Ok(())
    }

    fn batch(&self, sources: &[&[u32]], numbers: &[u64], on_token: &mut dyn FnMut(u32)) -> Result<Vec<Vec<Generated>>> {
        let ends = sources.iter().scan(0, |end, source| {
            *end += source.len() as u32;
            Some(*end)
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let sources = Sources { ids: &sources.concat(), offsets: &offsets, numbers };
        Ok(self.generator.generate(sources, &mut |_, _, token| on_token(token))?)
    }

    /// With sentinels where the input has some, because what comes would otherwise be one text out of several gaps.
    fn text(&self, input: &str, tokens: &[u32]) -> String {
        match input.contains("<extra_id_") {
            true => self.loaded.tokenizer.decode_spans(tokens),
            false => self.loaded.tokenizer.decode(tokens),
        }
    }

    fn print(&self, input: &str, outputs: &[Generated]) {
        let text = |output: &Generated| self.text(input, &output.token_ids);
        if self.json {
            let outputs: Vec<_> = outputs
                .iter()
                .map(|output| json!({"text": text(output), "token_ids": output.token_ids, "score": output.score}))
                .collect();
            print_json(&json!({"input": input, "outputs": outputs}));
        } else {
            outputs.iter().for_each(|output| println!("{}", text(output)));
        }
    }
}

/// Prints the candidates of each input, the most probable first, with the log probability of all their tokens, eos
/// included.
fn score_candidates(arguments: &GenerateArguments, loaded: &Loaded, inputs: &[String]) -> Result<()> {
    // Not cut: another text would be scored.
    let encode = |text: &String| loaded.tokenizer.encode(text, usize::MAX);
    let targets: Vec<Vec<u32>> = arguments.candidates.iter().map(encode).collect::<quintet_data::Result<_>>()?;
    for input in inputs {
        let source = loaded.tokenizer.encode(input, arguments.inputs.max_source_length)?;
        let scores = loaded.model.score_targets(&loaded.weights, &source, &targets)?;
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        if arguments.json {
            let outputs: Vec<_> = order
                .iter()
                .map(|&index| {
                    let text = &arguments.candidates[index];
                    json!({"text": text, "token_ids": targets[index], "score": scores[index]})
                })
                .collect();
            print_json(&json!({"input": input, "outputs": outputs}));
        } else {
            order.iter().for_each(|&index| println!("{}\t{}", scores[index], arguments.candidates[index]));
        }
    }
    Ok(())
}
