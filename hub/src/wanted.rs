//! Which of a repository's files a model needs.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::{Error, Repository, Result};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// In every complete snapshot.
pub(crate) const CONFIG: &str = "config.json";

/// All that is needed beside the weights, as far as it is there. A `spiece.model` only where it is the only tokenizer.
pub(crate) fn beside_weights(files: &[String]) -> Vec<String> {
    let is_there = |name: &&str| files.iter().any(|file| file == name);
    let tokenizer = ["tokenizer.json", "spiece.model"].into_iter().find(is_there);
    [CONFIG, "generation_config.json", "tokenizer_config.json"]
        .into_iter()
        .filter(is_there)
        .chain(tokenizer)
        .map(str::to_string)
        .collect()
}

/// The file of the weights, or the index of several.
pub(crate) fn weights(repository: &Repository, files: &[String]) -> Result<String> {
    let is_there = |name: &str| files.iter().any(|file| file == name);
    if !is_there(CONFIG) {
        return Err(Error::NoModel { repository: repository.to_string() });
    }
    if let Some(name) = [WEIGHTS, INDEX].into_iter().find(|name| is_there(name)) {
        return Ok(name.to_string());
    }
    let pickled = files.iter().any(|file| file.starts_with("pytorch_model") && file.ends_with(".bin"));
    let repository = repository.to_string();
    Err(if pickled { Error::OnlyPickle { repository } } else { Error::NoWeights { repository } })
}

/// The files that an index names; none of a file that is no index.
///
/// # Errors
/// If it does not parse, or names a file outside the folder.
pub(crate) fn shards(weights: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    if weights.file_name().is_none_or(|name| name != INDEX) {
        return Ok(Vec::new());
    }
    let damaged = |problem: String| Error::Damaged { file: weights.display().to_string(), problem };
    let text = fs::read(weights).map_err(Error::file("read", weights))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort_unstable();
    shards.dedup();
    match shards.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        Some(name) => Err(damaged(format!("names {name:?}, which is no file beside it"))),
        None => Ok(shards),
    }
}

/// Whether a folder has all that [`weights`] and [`shards`] ask for.
pub(crate) fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    let shards = || shards(&folder.join(INDEX)).is_ok_and(|shards| shards.iter().all(|shard| has(shard)));
    has(CONFIG) && (has(WEIGHTS) || (has(INDEX) && shards()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed() {
        let files = |names: &str| -> Vec<String> { names.split(' ').map(str::to_string).collect() };
        let repository = Repository::parse("a/b").unwrap();
        let all = files(
            "README.md config.json flax_model.msgpack model.safetensors pytorch_model.bin spiece.model tokenizer.json",
        );
        assert_eq!(beside_weights(&all), ["config.json", "tokenizer.json"]);
        assert_eq!(weights(&repository, &all).unwrap(), WEIGHTS);
        let sharded = files("config.json model-00001-of-00002.safetensors model.safetensors.index.json spiece.model");
        assert_eq!(beside_weights(&sharded), ["config.json", "spiece.model"]);
        assert_eq!(weights(&repository, &sharded).unwrap(), INDEX);
        let error = weights(&repository, &files("config.json pytorch_model-00001-of-00002.bin")).unwrap_err();
        assert!(matches!(error, Error::OnlyPickle { .. }));
        assert!(matches!(weights(&repository, &files("config.json")), Err(Error::NoWeights { .. })));
        assert!(matches!(weights(&repository, &files("README.md")), Err(Error::NoModel { .. })));
    }

    #[test]
    fn an_index_leads_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX);
        for (text, good) in [
            (r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#, true),
            (r#"{"weight_map": {"a": "../1.safetensors"}}"#, false),
            (r#"{"weight_map": {"a": "/etc/passwd"}}"#, false),
            ("half a fi", false),
        ] {
            fs::write(&index, text).unwrap();
            assert_eq!(shards(&index).is_ok(), good, "{text}");
        }
    }
}
