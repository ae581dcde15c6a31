//! `quintet merge`: a model with an adapter folded into it.

use std::fs;

use quintet_kernels::Device;
use quintet_t5::into_encoder;

use crate::args::MergeArguments;
use crate::error::{Failure, Result, exit};

pub(crate) fn run(arguments: MergeArguments) -> Result<u8> {
    let output = &arguments.output;
    if output.exists() {
        return Err(Failure::bad_input(format!("--output {}: is there already; choose another", output.display())));
    }
    let mut loaded = arguments.model.open(&Device::cpu())?;
    if arguments.encoder_only {
        (loaded.model, loaded.weights) = into_encoder(loaded.model, loaded.weights)?;
    }
    if !loaded.model.config().tie_word_embeddings && loaded.model.config().head_scale() != 1.0 {
        let problem = "adapts a head that is tied to the embedding, which no model directory can hold merged";
        return Err(Failure::bad_input(format!("the adapter {problem}; use it with --adapter")));
    }
    // Under its name only when it is whole.
    let beside = output.with_extension("tmp");
    let failed = |error: std::io::Error| Failure::failed(format!("cannot write {}: {error}", output.display()));
    fs::create_dir_all(&beside).map_err(failed)?;
    quintet_t5::save_pretrained(&loaded.model, &loaded.weights, &beside)?;
    loaded.tokenizer.save(&beside)?;
    fs::rename(&beside, output).map_err(failed)?;
    println!("model: {}", output.display());
    Ok(exit::DONE)
}
