//! Whatever is wrong ends with the right exit code and one line that says where; and leaves what was there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use safetensors::SafeTensors;

use crate::harness::{Ended, Process, quintet, references, run};
use crate::jobs::{Workspace, words};

/// Every file below a directory, with its content.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(contents(&path)),
            false => drop(files.insert(path.clone(), fs::read(path).unwrap())),
        }
    }
    files
}

/// Checks the code, that nothing went to stdout, and that the one line of error contains all of `needles`.
#[track_caller]
pub(crate) fn assert_refused(ended: &Ended, code: i32, needles: &[&str], what: &str) {
    assert_eq!(ended.code, Some(code), "{what}: it said:\n{}", ended.stderr);
    assert_eq!(ended.stdout, "", "{what}");
    let error = ended.error();
    for needle in needles {
        assert!(error.contains(needle), "{what}: {needle:?} is not in {error:?}");
    }
}

/// The header of a Parquet file's first page, a dictionary.
fn parquet_dictionary_header(uncompressed_bytes: i32, compressed_bytes: i32, values: i32) -> Vec<u8> {
    let field = |id_delta: u8, value: i32| {
        let mut zigzag = (value as u64) << 1;
        let mut bytes = vec![id_delta << 4 | 5];
        while zigzag >= 0x80 {
            bytes.push(zigzag as u8 | 0x80);
            zigzag >>= 7;
        }
        bytes.push(zigzag as u8);
        bytes
    };
    let page = [field(1, 2), field(1, uncompressed_bytes), field(1, compressed_bytes)].concat();
    let dictionary = [field(1, values), field(1, 0), vec![0]].concat();
    [page, vec![0x4c], dictionary, vec![0]].concat()
}

#[test]
fn sizes_that_a_parquet_file_claims_are_not_believed() {
    let workspace = Workspace::new();
    for (codec, header, says) in [
        ("snappy", parquet_dictionary_header(i32::MAX, 129, 50), "a page of 129 bytes says that it holds 2147483647"),
        (
            "none",
            parquet_dictionary_header(279, 279, i32::MAX),
            "a dictionary of 279 bytes says that it holds 2147483647",
        ),
    ] {
        let mut file = fs::read(references().join(format!("parquet/{codec}.parquet"))).unwrap();
        file[4..4 + header.len()].copy_from_slice(&header);
        fs::write(workspace.path().join("crafted.parquet"), file).unwrap();
        // In a gibibyte of addresses, there is no room for what they say.
        let mut command = Command::new("sh");
        let limited = "ulimit -v 1048576; exec \"$0\" data inspect crafted.parquet";
        command.current_dir(workspace.path()).args(["-c", limited, env!("CARGO_BIN_EXE_quintet")]);
        let ended = Process::start(&mut command).wait().expect(2);
        assert!(ended.error().contains("crafted.parquet:1: broken Parquet page"), "{}", ended.stderr);
        assert!(ended.error().contains(says), "{}", ended.stderr);
    }
}

#[test]
fn a_wrong_job_is_refused_with_one_line() {
    let workspace = Workspace::new();
    workspace.write("empty.jsonl", "");
    workspace.write("broken.jsonl", "{\"source\": \"a\", \"target\": \"b\"}\n\n{\"source\": \"a\", \"target\n");
    workspace.write("list.jsonl", "{\"source\": \"a\", \"target\": \"b\"}\n[1, 2]\n");
    workspace.write("lacks.jsonl", "{\"source\": \"a\", \"target\": \"b\"}\n{\"source\": \"a\", \"goal\": \"b\"}\n");
    workspace.write("ragged.csv", "source,target\na,b\na,b,c\n");
    fs::write(workspace.path().join("latin.jsonl"), b"{\"source\": \"\xff\", \"target\": \"b\"}\n").unwrap();
    fs::write(workspace.path().join("torn.jsonl.gz"), b"\x1f\x8b\x08\0\0\0\0\0\0\x03{").unwrap();
    fs::write(workspace.path().join("torn.jsonl.zst"), b"\x28\xb5\x2f\xfd").unwrap();
    let mut parquet = fs::read(references().join("parquet/snappy.parquet")).unwrap();
    fs::write(workspace.path().join("torn.parquet"), &parquet[..parquet.len() / 2]).unwrap();
    parquet[4..1000].iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::write(workspace.path().join("page.parquet"), parquet).unwrap();
    fs::create_dir(workspace.path().join("folder")).unwrap();
    let cases: &[(&str, &[&str])] = &[
        ("data.train=torn.jsonl.gz", &["torn.jsonl.gz:0: broken gzip", "torn or damaged"]),
        ("data.train=torn.jsonl.zst", &["torn.jsonl.zst:0: broken zstd", "torn or damaged"]),
        ("data.train=torn.parquet", &["torn.parquet: no intact Parquet file"]),
        ("data.train=page.parquet", &["page.parquet:1: broken Parquet page", "torn or damaged"]),
        ("data.train=folder", &["folder: holds no file of a known format"]),
        ("data.train=folder:test", &["folder: holds no file of a known format"]),
        ("data.where=stars >", &["data.where: expected a field or a value, found the end at character 8"]),
        ("data.where=stars > 3", &["data.where: names the field \"stars\", which no record of data.train has"]),
        ("data.where=source == \"zzz\"", &["data.where: keeps none of the 37 records of data.train"]),
        ("data.where=source > 3", &["train.jsonl:1: data.where: the field \"source\"", "no number"]),
        ("data.sample=0", &["data.sample: is 0"]),
        ("data.sample=38", &["data.sample: 38 is more than the 37 examples there are"]),
        ("data.max_examples=0", &["data.max_examples: is 0"]),
        ("data.num_shots=37", &["data.num_shots: 37 is more than the 36 other"]),
        ("data.shot_template={x}", &["data.shot_template: no field \"x\""]),
        ("data.label_names={target=['a']}", &["train.jsonl:1: data.label_names: the field \"target\""]),
        ("data.mixture_limit=3", &["data.mixture_limit: has no effect"]),
        ("data.mixture_temperature=2.0", &["data.mixture_temperature: has no effect"]),
        ("data.mixture=[{name='a',train='x.csv'}]", &["data.mixture: every source has its own train"]),
        ("data.objective=ul3", &["data.objective", "`ul3`", "did you mean `ul2`?"]),
        ("data.objective=ul2", &["data.target: data.objective makes the targets"]),
        ("data.noise_density=0.5", &["data.noise_density: has no effect"]),
        ("data.mean_noise_span_length=2.0", &["data.mean_noise_span_length: has no effect"]),
        ("data.mode_tokens=true", &["data.mode_tokens: has no effect"]),
        ("data.denoisers=[{noise_density=0.1}]", &["data.denoisers: has no effect"]),
        // Data: file and line.
        ("data.train=absent.jsonl", &["absent.jsonl", "no such file"]),
        ("data.train=no*thing.jsonl", &["no*thing.jsonl", "no file matches"]),
        ("data.train=empty.jsonl", &["empty.jsonl", "no records"]),
        ("data.train=broken.jsonl", &["broken.jsonl:3: broken JSON"]),
        ("data.train=list.jsonl", &["list.jsonl:2: "]),
        ("data.train=lacks.jsonl", &["lacks.jsonl:2: no field \"target\"", "goal, source"]),
        ("data.train=ragged.csv", &["ragged.csv:3: "]),
        ("data.train=latin.jsonl", &["latin.jsonl:1: not valid UTF-8"]),
        ("data.validation=broken.jsonl", &["broken.jsonl:3: broken JSON"]),
        ("data.train=job.toml", &["job.toml: "]),
        // Templates: key and field.
        ("data.input={nothing}", &["train.jsonl:1: no field \"nothing\"", "source, target"]),
        ("data.input={source", &["data.input: ", "closes"]),
        // Unknown names: the nearest one.
        ("training.learning_rat=1e-3", &["learning_rat", "did you mean `learning_rate`?"]),
        ("trainin.learning_rate=1e-3", &["trainin", "did you mean `training`?"]),
        ("model.architecture.d_modl=16", &["model.architecture: ", "d_modl", "d_model"]),
        ("training.optimizer=sgd", &["training.optimizer", "`sgd`", "adafactor"]),
        ("training.metric_for_best_model=\"loss\"", &["training.metric_for_best_model", "load_best_model_at_end"]),
        ("evaluation.metrics=[\"blue\"]", &["evaluation.metrics", "`blue`", "`bleu`"]),
        // Types and ranges: the key.
        ("training=3", &["--set training=3: invalid type"]),
        ("training.max_steps=-1", &["--set training.max_steps=-1: invalid value"]),
        ("training.max_steps=0", &["training.max_steps: is 0"]),
        ("training.micro_batch_size=3", &["training.micro_batch_size: 3 does not divide", "(10)"]),
        ("training.micro_batch_size=0", &["training.micro_batch_size: is 0"]),
        ("training.global_batch_size=0", &["training.global_batch_size: is 0"]),
        ("training.learning_rate=-1", &["training.learning_rate: is -1"]),
        ("training.learning_rate=nan", &["training.learning_rate: is NaN"]),
        ("training.save_steps=0", &["training.save_steps: is 0"]),
        ("training.warmup_steps=23", &["training.warmup_steps: 23 is more than max_steps"]),
        ("training.num_train_epochs=2", &["training.max_steps: ", "num_train_epochs"]),
        ("training.precision=fp8", &["training.precision", "`fp8`", "fp16"]),
        ("cluster.device=tpu", &["cluster.device", "`tpu`", "did you mean"]),
        ("model.architecture.d_model=0", &["model.architecture: ", "d_model = 0", "1 to "]),
        ("model.architecture.num_heads=-2", &["model.architecture: ", "-2"]),
        ("model.architecture.d_model=100000000000", &["model.architecture: ", "d_model = 100000000000"]),
        ("model.dropout_rate=1.5", &["model.dropout_rate: is 1.5"]),
        ("data.max_source_length=1", &["data.max_source_length: 1 is out of range"]),
        ("data.validation_split=0.5", &["data.validation_split: ", "data.validation"]),
        ("evaluation.num_beams=0", &["evaluation.num_beams: is 0, must be 1 to 1024"]),
        ("evaluation.top_p=2", &["evaluation.top_p: is 2, must be above 0 and at most 1"]),
        ("evaluation.early_stopping=maybe", &["evaluation.early_stopping", "\"maybe\"", "\"never\""]),
        ("cluster.workers=0", &["cluster.workers: 0 is not between"]),
        ("cluster.min_workers=2", &["cluster.min_workers: 2 is more than cluster.workers, 1"]),
        ("cluster.listen=localhost", &["cluster.listen: \"localhost\"", "127.0.0.1:4700"]),
        // A tokenizer that is absent or does not fit.
        ("model.tokenizer=absent", &["tokenizer ", "absent: no such file", "\"byt5\""]),
        ("model.architecture.vocab_size=100", &["model.tokenizer: has 384 tokens", "vocab_size is 100"]),
        ("model.architecture.eos_token_id=7", &["model.tokenizer: ", "eos_token_id is 7"]),
        ("model.pretrained=absent", &["model: give either pretrained or architecture"]),
        // No assignment.
        ("=3", &["--set =3: write section.key=value"]),
        ("output_dir.x=3", &["--set output_dir.x=3: output_dir is no section"]),
    ];
    for &(assignment, needles) in cases {
        let ended = run(workspace.path(), ["train", "job.toml", "--output", "wrong", "--set", assignment]);
        assert_refused(&ended, 2, needles, assignment);
    }
    // All that went before is in nobody's way, resumed or not.
    workspace.trained("wrong", "--workers 2 --resume").check_ledger(22);
}

#[test]
fn a_wrong_command_line_is_refused() {
    let workspace = Workspace::new();
    workspace.write("empty.jsonl", "");
    let cases: &[(&str, i32, &[&str])] = &[
        ("train absent.toml", 2, &["absent.toml: cannot read: No such file"]),
        ("train job.toml --set nothing", 2, &["section.key=value"]),
        ("train job.toml --workers 0", 2, &["cluster.workers: 0"]),
        ("train", 2, &["required arguments"]),
        ("coordinator job.toml --listen nonsense", 2, &["--listen", "nonsense"]),
        ("worker --coordinator https://127.0.0.1:1", 2, &["QUINTET_JOIN_TOKEN"]),
        ("coordinator job.toml --listen 198.51.100.1:1 --insecure-plaintext", 2, &["198.51.100.1:1"]),
        ("worker --coordinator http://127.0.0.1:1", 2, &["QUINTET_RUN_TOKEN"]),
        (
            "evaluate --model absent --data train.jsonl --input {source} --target {target}",
            2,
            &["--model: absent is no directory with a config.json"],
        ),
        (
            "evaluate --model . --data train.jsonl --input {source} --target {target} --where source>",
            2,
            &["--where: expected a field or a value"],
        ),
        (
            "evaluate --model . --data train.jsonl --input {source} --target {target} --where length>3",
            2,
            &["--where: names the field \"length\", which no record of --data has; they have: source, target"],
        ),
        ("evaluate --predictions absent.jsonl", 2, &["absent.jsonl: cannot read"]),
        ("evaluate --predictions train.jsonl", 2, &["train.jsonl:1: ", "\"prediction\"", "\"target\""]),
        ("evaluate --predictions train.jsonl --metrics blue", 2, &["--metrics: ", "`blue`", "`bleu`"]),
        ("evaluate --predictions train.jsonl --metrics rouge1,perplexity", 2, &["--metrics: perplexity", "--model"]),
        ("generate --model absent --input x", 2, &["--model: absent is no directory with a config.json"]),
        ("generate --model .", 2, &["required arguments"]),
        ("generate --model . --input x --num-beams 0", 2, &["--num-beams: is 0"]),
        ("generate --model . --input x --top-p 2 --do-sample", 2, &["--top-p: is 2"]),
        ("generate --model . --input x --do-sample --num-beams 4", 2, &["--do-sample: excludes num_beams = 4"]),
        ("generate --model . --input x --early-stopping soon", 2, &["--early-stopping", "\"soon\"", "\"never\""]),
        ("generate --model . --input x --batch-size 0", 2, &["--batch-size: is 0"]),
        ("generate --model . --input x --max-new-tokens 0", 2, &["--max-new-tokens: is 0"]),
        ("generate --model . --input-file empty.jsonl", 2, &["empty.jsonl: holds no inputs"]),
        ("bench generate --model absent", 2, &["--model absent", "t5-small"]),
        ("train job.toml --output train.jsonl", 2, &["output_dir: train.jsonl is no directory"]),
        ("data inspect absent.csv", 2, &["absent.csv: no such file"]),
        ("data inspect builtin:nothing", 2, &["builtin:nothing"]),
        ("bench step --model absent", 2, &["--model absent", "t5-small"]),
    ];
    for &(line, code, needles) in cases {
        assert_refused(&run(workspace.path(), line.split_whitespace()), code, needles, line);
    }
}

#[test]
fn a_broken_job_file_names_its_line() {
    let workspace = Workspace::new();
    let job = fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    for (from, to, needles) in [
        ("max_steps", "max_step", &["wrong.toml:17: unknown key `max_step`; did you mean `max_steps`?"][..]),
        ("eval_steps = 11", "eval_steps = 'x'", &["wrong.toml:22: invalid type: string \"x\""]),
        ("[evaluation]", "[evaluation", &["wrong.toml:25: "]),
        ("[data]", "[dat]", &["wrong.toml:8: unknown key `dat`; did you mean `data`?"]),
        ("output_dir = \"run\"", "", &["wrong.toml", "missing field `output_dir`"]),
    ] {
        workspace.write("wrong.toml", &job.replacen(from, to, 1));
        assert_refused(&run(workspace.path(), ["train", "wrong.toml"]), 2, needles, to);
    }
}

/// A copy of a reference model in the workspace, and a job that starts from it.
fn pretrained(workspace: &Workspace, family: &str, name: &str) -> PathBuf {
    let model = workspace.path().join(name);
    fs::create_dir(&model).unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(references().join(family).join(file), model.join(file)).unwrap();
    }
    let job = fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    let fresh = job.lines().find(|line| line.starts_with("architecture")).unwrap();
    workspace.write("pretrained.toml", &job.replace(fresh, &format!("pretrained = \"{name}\"")));
    model
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// `"key": 3` becomes `"key": 4` in a model's configuration.
fn increase(model: &Path, key: &str) {
    let path = model.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[key] = (config[key].as_u64().unwrap() + 1).into();
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_wrong_model_is_refused_by_tensor() {
    type Damage = fn(&Path);
    let cases: &[(&str, Damage, &[&str])] = &[
        (
            "cut",
            |m| edit(&m.join("model.safetensors"), |b| b.truncate(b.len() - 100)),
            &["cut/model.safetensors: not a whole safetensors file"],
        ),
        ("tiny", |m| edit(&m.join("model.safetensors"), |b| b.truncate(4)), &["tiny/model.safetensors: not a whole"]),
        ("header", |m| edit(&m.join("model.safetensors"), |b| b[7] = 0xff), &["header/model.safetensors: not a whole"]),
        ("wide", |m| increase(m, "d_ff"), &["wide/model.safetensors: tensor encoder.block.0", "wi_0.weight: shape ["]),
        ("deep", |m| increase(m, "num_layers"), &["deep/model.safetensors: tensor encoder.block.3", "is missing"]),
        (
            "shallow",
            |m| {
                edit(&m.join("config.json"), |b| {
                    let text = String::from_utf8(b.clone()).unwrap().replace("\"num_layers\": 3", "\"num_layers\": 2");
                    *b = text.into_bytes();
                })
            },
            &["shallow/model.safetensors: tensor encoder.block.2", "no part of this architecture"],
        ),
        (
            "unread",
            |m| fs::write(m.join("config.json"), "{\"d_model\": ").unwrap(),
            &["unread/config.json: not a T5 configuration"],
        ),
        ("bare", |m| fs::remove_file(m.join("config.json")).unwrap(), &["model.pretrained: bare is no directory"]),
        ("weightless", |m| fs::remove_file(m.join("model.safetensors")).unwrap(), &["weightless: holds no model.saf"]),
    ];
    let workspace = Workspace::new();
    for &(name, damage, needles) in cases {
        damage(&pretrained(&workspace, "byt5", name));
        let ended = run(workspace.path(), ["train", "pretrained.toml", "--workers", "3"]);
        assert_refused(&ended, 2, needles, name);
        let ended = run(workspace.path(), ["generate", "--model", name, "--tokenizer", "byt5", "--input", "x"]);
        assert_eq!(ended.expect(2).stdout, "");
    }
    pretrained(&workspace, "t5_v1_1", "narrow");
    let ended = run(workspace.path(), ["train", "pretrained.toml", "--workers", "2"]);
    assert_refused(&ended, 2, &["model.tokenizer: has 384 tokens", "vocab_size is 119"], "narrow");
    // The directory of so many failures serves the corrected job.
    pretrained(&workspace, "byt5", "whole");
    run(workspace.path(), ["train", "pretrained.toml", "--workers", "2"]).expect(0);
}

#[test]
fn a_directory_with_a_run_is_left_alone() {
    let workspace = Workspace::new();
    let run = workspace.trained("run", "--workers 1");
    let before = contents(&run.path(""));
    for (arguments, needles) in [
        ("", &["run already holds a run", "--resume"][..]),
        ("training.seed=3", &["run already holds a run"]),
        ("--resume training.seed=3", &["another job", "training.seed is 3, and was 42"]),
        ("--resume model.architecture.d_model=24", &["another job", "d_model is 24, and was 16"]),
        ("--resume data.train=absent.jsonl", &["absent.jsonl"]),
        ("--resume training.learning_rat=3", &["learning_rate"]),
    ] {
        assert_refused(&workspace.train("run", arguments), 2, needles, arguments);
        assert!(contents(&run.path("")) == before, "{arguments} has changed the run");
    }
    // What does not decide the numbers may change; a whole run has nothing left to do.
    let weights = run.weights();
    workspace
        .train("run", "--resume --workers 2 training.logging_steps=3 training.gradient_checkpointing=true")
        .expect(0);
    assert!(run.weights() == weights);
}

#[test]
fn a_run_under_way_is_left_alone() {
    let workspace = Workspace::new();
    let settings = "training.max_steps=160 training.eval_steps=160";
    let undisturbed = workspace.trained("undisturbed", &format!("--workers 1 {settings}"));
    let run = workspace.output("run");
    let mut process = workspace.start("run", &format!("--workers 2 {settings}"));
    assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 1));
    let second = workspace.train("run", &format!("--resume {settings}"));
    assert_refused(&second, 1, &["run: another coordinator is at work", "--output DIR"], "a second coordinator");
    process.wait().expect(0);
    assert!(run.weights() == undisturbed.weights());
    run.check_ledger(160);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let workspace = Workspace::new();
    let run = workspace.trained("run", "--workers 1");
    let weights = run.weights();
    let newest = run.path("checkpoints/step-00000022");
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 3] = [
        ("model.safetensors", |bytes| bytes.truncate(bytes.len() / 2)),
        ("optimizer.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("state.json", |bytes| bytes.truncate(10)),
    ];
    for (file, damage) in damages {
        edit(&newest.join(file), damage);
        fs::remove_dir_all(run.path("model")).unwrap();
        let ended = workspace.train("run", "--resume --workers 2").expect(0);
        let warnings: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
        assert_eq!(warnings.len(), 1, "{}", ended.stderr);
        assert!(warnings[0].contains("step-00000022") && warnings[0].contains(file), "{warnings:?}");
        assert!(ended.stderr.contains("resuming after step 20\n"), "{}", ended.stderr);
        assert!(run.weights() == weights);
        run.check_ledger(22);
    }
    for name in run.checkpoints() {
        edit(&run.path("checkpoints").join(name).join("state.json"), |bytes| bytes.clear());
    }
    let before = contents(&run.path(""));
    let needles = ["step-00000022/state.json: is not a state", "no checkpoint is intact", "--output DIR"];
    assert_refused(&workspace.train("run", "--resume"), 2, &needles, "all damaged");
    assert!(contents(&run.path("")) == before);
}

#[test]
fn numbers_that_are_not_finite_stop_the_run_at_its_last_good_checkpoint() {
    let workspace = Workspace::new();
    let settings =
        "training.learning_rate=1e30 training.max_grad_norm=0.0 training.warmup_steps=0 training.save_steps=1";
    let ended = workspace.train("run", &format!("--workers 2 {settings}"));
    assert_refused(
        &ended,
        70,
        &["error: step 2: ", "is not finite, on worker ", "not updated"],
        "a rate beyond reason",
    );
    let run = workspace.output("run");
    run.check_ledger(1);
    assert_eq!(run.checkpoints(), ["step-00000001"]);
    assert!(!run.path("model").exists());
    // It ends there again.
    let ended = workspace.train("run", &format!("--resume {settings}"));
    assert_refused(&ended, 70, &["error: step 2: "], "resumed");

    let model = pretrained(&workspace, "byt5", "poisoned");
    edit(&model.join("model.safetensors"), |bytes| {
        let tensors = SafeTensors::deserialize(bytes).unwrap();
        let weight = tensors.tensor("encoder.final_layer_norm.weight").unwrap().data().as_ptr();
        let offset = weight as usize - bytes.as_ptr() as usize;
        bytes[offset..offset + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let ended =
        crate::harness::run(workspace.path(), ["train", "pretrained.toml", "--output", "other", "--workers", "2"]);
    assert_refused(&ended, 70, &["error: step 1: ", "is not finite, on worker "], "a weight that is not a number");
    workspace.output("other").check_ledger(0);
}

/// The program with a limit on the size of the files that it and its workers write, as on a disk that is full.
fn start_on_a_full_disk(workspace: &Workspace, kilobytes: u32, arguments: &str) -> Process {
    let mut command = std::process::Command::new("bash");
    let script = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$0\" \"$@\"");
    command.current_dir(workspace.path()).args(["-c", &script]).arg(quintet(workspace.path()).get_program());
    command.args(["train", "job.toml", "--output", "run"]).args(words(arguments));
    Process::start(&mut command)
}

#[test]
fn a_full_disk_loses_nothing() {
    let workspace = Workspace::new();
    let undisturbed = workspace.trained("undisturbed", "--workers 1 training.max_steps=60");
    let run = workspace.output("run");
    let mut process = workspace.start("run", "--workers 2 training.max_steps=60");
    process.wait_for("step 10: checkpoint saved");
    process.signal(Signal::TERM);
    process.wait().expect(75);
    let before = run.checkpoints();
    // Some tens of kilobytes are enough for the small files, not for the weights.
    let ended = start_on_a_full_disk(&workspace, 40, "--resume --workers 2 training.max_steps=60").wait();
    assert_refused(&ended, 1, &["cannot write ", "checkpoints/", "File too large", "--resume"], "full disk");
    assert_eq!(run.checkpoints(), before, "the checkpoints that were there, and nothing half-written");
    workspace.train("run", "--resume --workers 2 training.max_steps=60").expect(0);
    assert!(run.weights() == undisturbed.weights());
    run.check_ledger(60);
}

#[test]
fn an_evaluation_needs_something_to_evaluate_on() {
    let workspace = Workspace::new();
    let job = fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    workspace.write("job.toml", &job.replace("validation = \"validation.jsonl\"\n", ""));
    let needles = ["training.eval_steps: ", "data.validation_split"];
    assert_refused(&workspace.train("run", ""), 2, &needles, "no validation data");
    workspace
        .write("job.toml", &job.replace("validation = \"validation.jsonl\"\n", "").replace("eval_steps = 11\n", ""));
    let run = workspace.trained("run", "--workers 2");
    assert!(run.events("eval").is_empty());
}
