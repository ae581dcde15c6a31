//! Damaged model directories: what is said names the file and the tensor, and what to do.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use quintet_kernels::Device;
use quintet_t5::load_pretrained;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::references;

const WEIGHTS: &str = "model.safetensors";

fn copy_of(name: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let entries = fs::read_dir(references().join(name)).unwrap().map(Result::unwrap);
    // Folders beside them hold adapters.
    for file in entries.filter(|entry| entry.path().is_file()) {
        fs::copy(file.path(), directory.path().join(file.file_name())).unwrap();
    }
    directory
}

/// What is said of a directory, behind its path.
#[track_caller]
fn complaint(directory: &Path) -> String {
    let error = load_pretrained(&Device::cpu(), directory).err().expect("a damaged model does not load");
    assert!(error.is_user_error(), "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    let rest = message.strip_prefix(&directory.display().to_string());
    rest.unwrap_or_else(|| panic!("does not begin with the path: {message}")).trim_start_matches('/').to_string()
}

#[track_caller]
fn assert_complaint(directory: &TempDir, parts: &[&str]) {
    let message = complaint(directory.path());
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

/// A tensor with its shape and values.
type Tensors = HashMap<String, (Vec<usize>, Vec<u8>)>;

/// Writes the weights again with some of them changed.
fn edit(directory: &TempDir, change: impl FnOnce(&mut Tensors)) {
    let path = directory.path().join(WEIGHTS);
    let bytes = fs::read(&path).unwrap();
    let mut tensors: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_string(), (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views =
        tensors.iter().map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn a_directory_that_holds_no_model() {
    let directory = tempfile::tempdir().unwrap();
    assert_complaint(&directory, &["holds no model.safetensors"]);
    let missing = directory.path().join("missing");
    assert!(complaint(&missing).contains("no such directory"));
    let directory = copy_of("t5_v1_1");
    fs::remove_file(directory.path().join("config.json")).unwrap();
    assert_complaint(&directory, &["config.json: cannot read"]);
}

#[test]
fn weights_that_are_cut_short() {
    let whole = fs::read(references().join("t5_v1_1").join(WEIGHTS)).unwrap();
    for length in [0, 3, 8, 100, whole.len() / 2, whole.len() - 1] {
        let directory = copy_of("t5_v1_1");
        fs::write(directory.path().join(WEIGHTS), &whole[..length]).unwrap();
        assert_complaint(&directory, &["model.safetensors: not a whole safetensors file", "fetch or copy it again"]);
    }
}

#[test]
fn a_header_that_promises_more_than_memory_holds() {
    let directory = copy_of("t5_v1_1");
    let mut bytes = fs::read(directory.path().join(WEIGHTS)).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(directory.path().join(WEIGHTS), &bytes).unwrap();
    assert_complaint(&directory, &["model.safetensors: not a whole safetensors file"]);
}

#[test]
fn a_tensor_of_another_shape() {
    let directory = copy_of("t5_v1_1");
    edit(&directory, |tensors| {
        let (shape, _) = tensors.get_mut("encoder.block.1.layer.0.SelfAttention.q.weight").unwrap();
        shape.reverse();
    });
    let said = ["model.safetensors: tensor encoder.block.1.layer.0.SelfAttention.q.weight: shape [18, 12]", "[12, 18]"];
    assert_complaint(&directory, &said);
    assert_complaint(&directory, &["config.json asks for"]);
}

#[test]
fn a_tensor_that_is_missing_or_unknown() {
    let name = "decoder.block.0.layer.2.DenseReluDense.wo.weight";
    let directory = copy_of("t5_v1_1");
    edit(&directory, |tensors| {
        tensors.remove(name).unwrap();
    });
    assert_complaint(&directory, &[&format!("model.safetensors: tensor {name}: is missing"), "config.json"]);
    let directory = copy_of("t5_v1_1");
    edit(&directory, |tensors| {
        tensors.insert("decoder.block.7.layer.0.layer_norm.weight".into(), (vec![1], vec![0; 4]));
    });
    let said = ["model.safetensors: tensor decoder.block.7.layer.0.layer_norm.weight: is no part", "check config.json"];
    assert_complaint(&directory, &said);
}

/// Names that old files hold besides, and that mean nothing.
#[test]
fn aliases_of_old_files_are_ignored() {
    let directory = copy_of("t5_v1_1");
    edit(&directory, |tensors| {
        let shared = tensors["shared.weight"].clone();
        tensors.insert("encoder.embed_tokens.weight".into(), shared.clone());
        tensors.insert("decoder.embed_tokens.weight".into(), shared);
        let useless = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
        tensors.insert(useless.into(), (vec![1], vec![0; 4]));
    });
    load_pretrained(&Device::cpu(), directory.path()).unwrap();
}

#[test]
fn a_configuration_that_is_none() {
    let directory = copy_of("t5_v1_1");
    let config = directory.path().join("config.json");
    fs::write(&config, "{ \"model_type\": \"t5\",\n oops").unwrap();
    assert_complaint(&directory, &["config.json: not a T5 configuration", "line 2"]);
    for (key, value, said) in [
        ("model_type", json!("bert"), "unknown variant `bert`"),
        ("d_model", json!(0), "d_model = 0 is out of range"),
        ("num_heads", json!(-1), "-1"),
        ("feed_forward_proj", json!("gated-silu"), "unknown variant `gated-silu`"),
        ("eos_token_id", json!(119), "eos_token_id = 119 is not below vocab_size = 119"),
        ("dropout_rate", json!(1.0), "dropout_rate = 1 is out of range"),
    ] {
        let directory = copy_of("t5_v1_1");
        edit_json(&directory.path().join("config.json"), |config| config[key] = value);
        assert_complaint(&directory, &["config.json: ", said]);
    }
}

#[test]
fn an_index_that_leads_astray() {
    let index = "model.safetensors.index.json";
    for outside in ["../model.safetensors", "/etc/hostname", "a/b.safetensors", ".."] {
        let directory = copy_of("sharded");
        edit_json(&directory.path().join(index), |index| index["weight_map"]["shared.weight"] = outside.into());
        assert_complaint(&directory, &["model.safetensors.index.json: weight_map leaves the directory", outside]);
    }
    let directory = copy_of("sharded");
    fs::write(directory.path().join(index), "[").unwrap();
    assert_complaint(&directory, &["model.safetensors.index.json: not JSON"]);
    let directory = copy_of("sharded");
    fs::remove_file(directory.path().join("model-00003-of-00004.safetensors")).unwrap();
    assert_complaint(&directory, &["model-00003-of-00004.safetensors: cannot open"]);
}
