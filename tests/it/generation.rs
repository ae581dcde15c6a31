//! Generation against Hugging Face's: beam search with every option, processors, sampling, scores of given targets; and
//! what must not matter: the batch, the device, the number of workers.

use std::fs;
use std::path::Path;

use quintet_kernels::Device;
use quintet_t5::{Generated, GenerationOptions};
use serde_json::{Value, json};

use crate::devices::emulator_is_missing;
use crate::harness::{references, run};
use crate::jobs::Workspace;
use crate::parity::Reference;

const NAMES: [&str; 6] = ["t5_v1_0", "t5_v1_1", "t5_v1_1_buckets", "byt5", "mt5", "umt5"];

fn options(value: Value) -> GenerationOptions {
    serde_json::from_value(value).unwrap()
}

/// Cases of `tests/references/generation.py`: options, and for each source the outputs.
fn cases(name: &str) -> Vec<Value> {
    let path = references().join(name).join("generation.json");
    let file: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    file["cases"].as_array().unwrap().clone()
}

/// Whether the tokens are those of the reference, and scores within `tolerance`.
#[track_caller]
fn assert_outputs(got: &[Vec<Generated>], case: &Value, tolerance: f64, name: &str) {
    let want = case["outputs"].as_array().unwrap();
    assert_eq!(got.len(), want.len());
    for (source, (got, want)) in got.iter().zip(want).enumerate() {
        let what = || format!("{name}, {}, source {source}", case["options"]);
        let tokens: Vec<Vec<u32>> = want
            .as_array()
            .unwrap()
            .iter()
            .map(|it| serde_json::from_value(it["token_ids"].clone()).unwrap())
            .collect();
        assert_eq!(got.iter().map(|it| it.token_ids.clone()).collect::<Vec<_>>(), tokens, "{}", what());
        for (got, want) in got.iter().zip(want.as_array().unwrap()) {
            if let Some(want) = want["score"].as_f64() {
                let error = (f64::from(got.score) - want).abs();
                assert!(error <= tolerance * want.abs().max(1.0), "{}: {} and {want}", what(), got.score);
            }
        }
    }
}

/// All sources in one batch: ragged, without padding. `margin` in the files says how far from a tie every choice is.
#[test]
fn outputs_are_those_of_hugging_face() {
    for name in NAMES {
        let reference = Reference::open(name);
        let cases = cases(name);
        assert!(cases.len() > 30, "{name}");
        for case in &cases {
            let got = reference.generate(&reference.source, options(case["options"].clone()));
            assert_outputs(&got, case, 1e-5, name);
        }
    }
}

/// An input's outputs are the same to the bit, whatever is beside it in the batch.
#[test]
fn the_batch_makes_no_difference() {
    let reference = Reference::open("t5_v1_0");
    for value in [
        json!({"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 9, "no_repeat_ngram_size": 2}),
        json!({"do_sample": true, "num_return_sequences": 3, "max_new_tokens": 20, "top_k": 20}),
        json!({"do_sample": true, "max_new_tokens": 20, "top_k": 0, "top_p": 0.9, "temperature": 0.8}),
        json!({"max_new_tokens": 20, "repetition_penalty": 1.3}),
    ] {
        let numbers: Vec<u64> = vec![7, 3, 1000, 4, 5];
        let together = reference.generate_numbered(&reference.source, &numbers, options(value.clone()));
        for (index, source) in reference.source.iter().enumerate() {
            let source = std::slice::from_ref(source);
            let alone = reference.generate_numbered(source, &numbers[index..=index], options(value.clone()));
            assert_eq!(alone[0], together[index], "{value}, source {index}");
        }
    }
}

/// χ² of the first token of 4,000 samples against the softmax of Hugging Face's logits after the same warpers.
#[test]
fn samples_have_the_models_distribution() {
    let reference = Reference::open("t5_v1_1");
    let logits: Vec<f64> = serde_json::from_value(reference.expected["logits_row_0_position_0"].clone()).unwrap();
    let (temperature, top_k, top_p) = (1.5, 40, 0.95);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let weights: Vec<f64> = order[..top_k].iter().map(|&token| (logits[token] / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let before = weights.iter().scan(0.0, |sum, weight| {
        let before = *sum;
        *sum += weight;
        Some(before)
    });
    let kept = before.take_while(|before| *before < top_p * total).count();
    let total: f64 = weights[..kept].iter().sum();

    let draws = 4000;
    let numbers: Vec<u64> = (0..draws).collect();
    let sources = vec![reference.source[0].clone(); draws as usize];
    let sampling = |seed| {
        let value = json!({
            "do_sample": true, "temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1, "seed": seed
        });
        reference.generate_numbered(&sources, &numbers, options(value))
    };
    let outputs = sampling(1);
    let mut counts = vec![0_u32; logits.len()];
    outputs.iter().for_each(|outputs| counts[outputs[0].token_ids[0] as usize] += 1);
    let mut inside = 0;
    let mut chi_squared = 0.0;
    for (&token, weight) in order[..kept].iter().zip(&weights) {
        let expected = weight / total * draws as f64;
        assert!(expected > 5.0, "too few draws for token {token}");
        chi_squared += (f64::from(counts[token]) - expected).powi(2) / expected;
        inside += counts[token];
    }
    assert_eq!(u64::from(inside), draws, "drawn outside of what warping left");
    let freedom = (kept - 1) as f64;
    assert!(chi_squared < freedom + 4.0 * (2.0 * freedom).sqrt(), "χ² = {chi_squared} of {freedom} degrees of freedom");
    assert_eq!(sampling(1), outputs, "the same seed");
    assert_ne!(sampling(2), outputs, "another seed");
}

#[test]
fn scores_of_targets_are_their_losses() {
    for name in NAMES {
        let reference = Reference::open(name);
        let sums: Vec<f64> = serde_json::from_value(reference.expected["row_loss_sums"].clone()).unwrap();
        for (row, (source, want)) in reference.source.iter().zip(sums).enumerate() {
            // Beside the target in question, all others.
            let scores = reference.model.score_targets(&reference.weights, source, &reference.labels).unwrap();
            let got = -f64::from(scores[row]);
            assert!((got - want).abs() <= 1e-5 * want, "{name}, row {row}: {got} and {want}");
        }
    }
}

#[test]
fn the_emulated_gpu_generates_as_the_cpu() {
    if emulator_is_missing() {
        return;
    }
    let device = Device::emulated(31).unwrap();
    let reference = Reference::open_on(&device, "t5_v1_1");
    let with_beams = |case: &&Value| case["options"]["num_beams"].as_u64().unwrap() > 2;
    let cases = cases("t5_v1_1");
    for case in cases.iter().filter(with_beams).step_by(9) {
        let got = reference.generate(&reference.source[..3], options(case["options"].clone()));
        let first_three = json!({"options": case["options"], "outputs": case["outputs"].as_array().unwrap()[..3]});
        assert_outputs(&got, &first_three, 1e-4, "t5_v1_1");
    }
    let on_cpu = Reference::open("t5_v1_1");
    for value in
        [json!({"do_sample": true, "max_new_tokens": 5}), json!({"do_sample": true, "max_new_tokens": 5, "top_k": 0})]
    {
        let tokens = |reference: &Reference| -> Vec<Vec<u32>> {
            let outputs = reference.generate(&reference.source[..2], options(value.clone()));
            outputs.into_iter().map(|mut outputs| outputs.remove(0).token_ids).collect()
        };
        assert_eq!(tokens(&reference), tokens(&on_cpu), "{value}");
    }
}

/// Nine examples in batches of four: the last is smaller, and of four workers one has none.
#[test]
fn any_number_of_workers_makes_the_same_predictions() {
    let workspace = Workspace::new();
    let short = "training.max_steps=4 training.warmup_steps=1 training.eval_steps=4";
    for (name, generation) in [
        ("beams", "evaluation.num_beams=3 evaluation.no_repeat_ngram_size=2 evaluation.early_stopping=\"never\""),
        ("samples", "evaluation.do_sample=true evaluation.top_k=30 evaluation.temperature=0.9"),
    ] {
        let predictions = |workers: u32| {
            let arguments = format!("--workers {workers} {short} {generation}");
            workspace.trained(&format!("{name}-{workers}"), &arguments).lines("predictions.jsonl")
        };
        let one = predictions(1);
        assert_eq!(one.len(), 9);
        assert!(one.iter().any(|line| !line["prediction"].as_str().unwrap().is_empty()), "{name}");
        for workers in 2..=4 {
            assert_eq!(predictions(workers), one, "{name}, {workers} workers");
        }
    }
}

#[test]
fn the_command_generates_streams_and_scores() {
    let workspace = Workspace::new();
    workspace.trained("run", "training.max_steps=2 training.warmup_steps=1");
    let generate = |arguments: &str| {
        let arguments = ["generate", "--model", "run/model"].into_iter().chain(arguments.split(' '));
        run(workspace.path(), arguments).expect(0).stdout
    };
    let documents =
        |text: &str| -> Vec<Value> { text.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };

    let beams = documents(&generate("--input x --num-beams 3 --num-return-sequences 3 --max-new-tokens 5 --json"));
    let scores: Vec<f64> =
        beams[0]["outputs"].as_array().unwrap().iter().map(|it| it["score"].as_f64().unwrap()).collect();
    assert!(scores.len() == 3 && scores.is_sorted_by(|a, b| a >= b), "{scores:?}");

    // What streams is what does not.
    for flags in ["--max-new-tokens 12", "--max-new-tokens 12 --do-sample --seed 5"] {
        assert_eq!(generate(&format!("--input x --stream {flags}")), generate(&format!("--input x {flags}")));
    }
    // Lines come in the order of the inputs, whatever their lengths and the size of batches, with their own random numbers.
    workspace.write("inputs.txt", "a much longer line than the others are\nb\n\nmiddling line\n");
    let lines = "--input-file inputs.txt --max-new-tokens 6 --do-sample --json";
    let all = generate(lines);
    let inputs: Vec<Value> = documents(&all).iter().map(|document| document["input"].clone()).collect();
    assert_eq!(inputs, ["a much longer line than the others are", "b", "", "middling line"]);
    assert_eq!(generate(&format!("{lines} --batch-size 1")), all);
    assert_eq!(generate(&format!("{lines} --batch-size 3 --stream")), all);

    // Candidates: the most probable first, by the sum of log probabilities.
    let scored = documents(&generate("--input x --candidates A --candidates BEE --candidates Ü --json"));
    let outputs = scored[0]["outputs"].as_array().unwrap();
    let scores: Vec<f64> = outputs.iter().map(|output| output["score"].as_f64().unwrap()).collect();
    assert!(scores.len() == 3 && scores.is_sorted_by(|a, b| a >= b) && scores.iter().all(|&score| score < 0.0));
    assert!(outputs.iter().all(|output| output["token_ids"].as_array().unwrap().last() == Some(&json!(1))));
}

#[test]
fn the_models_file_says_what_the_flags_leave_open() {
    let workspace = Workspace::new();
    workspace.trained("run", "training.max_steps=2 training.warmup_steps=1");
    let generate = |flags: &str| {
        let arguments = "generate --model run/model --input x --json".split(' ').chain(flags.split_whitespace());
        run(workspace.path(), arguments)
    };
    let plain = generate("--num-beams 4 --max-new-tokens 5").expect(0).stdout;
    let file = |text: &str| workspace.write("run/model/generation_config.json", text);
    file(
        r#"{"num_beams": 4, "max_length": 6, "eos_token_id": 1, "pad_token_id": 0, "transformers_version": "5.23.0"}"#,
    );
    assert_eq!(generate("").expect(0).stdout, plain);
    assert_ne!(generate("--num-beams 1").expect(0).stdout, plain);
    file(r#"{"forced_bos_token_id": 4}"#);
    let ended = generate("").expect(2);
    assert!(ended.error().contains("forced_bos_token_id = 4 is not supported"), "{}", ended.error());
}

#[test]
fn what_a_model_says_of_generation_survives_its_fine_tuning() {
    let workspace = Workspace::fine_tuning(Path::new("base"), "");
    fs::create_dir(workspace.path().join("base")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(references().join("byt5").join(file), workspace.path().join("base").join(file)).unwrap();
    }
    let mut said = json!({"num_beams": 2, "max_length": 9, "eos_token_id": [1, 5], "cache_implementation": "static"});
    workspace.write("base/generation_config.json", &said.to_string());
    let run = workspace.trained("run", "training.max_steps=2 training.warmup_steps=1");
    (said["decoder_start_token_id"], said["pad_token_id"]) = (json!(0), json!(0));
    let saved = fs::read(run.path("model/generation_config.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&saved).unwrap(), said);
    workspace.write("base/generation_config.json", "[]");
    let ended = workspace.train("refused", "").expect(2);
    assert!(ended.error().contains("generation_config.json: not a JSON object"), "{}", ended.error());
}
