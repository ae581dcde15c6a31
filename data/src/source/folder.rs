//! Folders of a data set as Hugging Face lays them out: the files of a split carry its name, as in
//! `data/train-00000-of-00002.parquet`, `train.jsonl` or `train/0.csv`.
//!
//! A file belongs to a split if one of the words of its path below the folder is the split's name; words are parted by
//! everything that is neither letter nor digit. `validation` is also written `valid`, `val` and `dev`, and `test` also
//! `testing`, `eval` and `evaluation`; `train` also `training`. Where no file's path has a split's name, all files are
//! `train`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Format, Source};
use crate::error::{Error, Result};

/// A split's name and the other ways to write it.
const SPLITS: [&[&str]; 3] =
    [&["train", "training"], &["validation", "valid", "val", "dev"], &["test", "testing", "eval", "evaluation"]];

/// The files of `split` in `folder`, in alphabetical order; `shown` is the folder as the user wrote it.
pub(super) fn open(folder: &Path, shown: &str, split: &str) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    walk(folder, &mut files)?;
    files.sort();
    if files.is_empty() {
        return Err(Error::source(shown, "holds no file of a known format (.parquet, .jsonl, .csv, .tsv)"));
    }
    let below = |file: &PathBuf| file.strip_prefix(folder).unwrap_or(file).to_string_lossy().into_owned();
    let is_split = |file: &PathBuf, name: &str| split_of(&below(file), name);
    let named: BTreeSet<&str> = SPLITS
        .iter()
        .flat_map(|names| names.first())
        .copied()
        .filter(|name| files.iter().any(|file| is_split(file, name)))
        .collect();
    let everything = named.is_empty() && names_of(split).contains(&"train");
    let chosen: Vec<&PathBuf> = files.iter().filter(|file| everything || is_split(file, split)).collect();
    if chosen.is_empty() {
        let there = named.into_iter().collect::<Vec<_>>().join(", ");
        let there = if there.is_empty() { "train" } else { &there };
        return Err(Error::source(shown, format!("has no files of the split {split:?}; it has: {there}")));
    }
    let shown = shown.trim_end_matches('/');
    chosen.into_iter().map(|file| Source::file(file.clone(), &format!("{shown}/{}", below(file)))).collect()
}

fn names_of(split: &str) -> &[&str] {
    SPLITS.iter().find(|names| names.contains(&split)).copied().unwrap_or_default()
}

/// Whether a path has a word that is the split's name.
fn split_of(path: &str, split: &str) -> bool {
    let names = names_of(split);
    let mut words = path.split(|c: char| !c.is_alphanumeric());
    words.any(|word| word == split || names.contains(&word))
}

/// All files of a known format. What is hidden is somebody else's, such as `.git` and `.cache`.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let entry = entry.map_err(|error| Error::io(folder, error))?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // A folder that is a link may lead back here; a file that is one is how the hub's cache stores files.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, files)?;
        } else if path.is_file() && Format::of(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for file in files {
            let path = directory.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        directory
    }

    fn opened(directory: &Path, split: &str) -> Result<Vec<String>, String> {
        let sources = open(directory, "d/", split).map_err(|error| error.to_string())?;
        Ok(sources.iter().map(Source::to_string).collect())
    }

    #[test]
    fn a_split_is_a_word_of_the_path() {
        let directory = folder(&[
            "README.md",
            ".cache/train.csv",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/dev-00000-of-00001.parquet",
            "data/constraint.parquet",
        ]);
        let train = ["d/data/train-00000-of-00002.parquet", "d/data/train-00001-of-00002.parquet"];
        assert_eq!(opened(directory.path(), "train").unwrap(), train);
        assert_eq!(opened(directory.path(), "validation").unwrap(), ["d/data/dev-00000-of-00001.parquet"]);
        assert_eq!(opened(directory.path(), "constraint").unwrap(), ["d/data/constraint.parquet"]);
        let message = "d/: has no files of the split \"test\"; it has: train, validation";
        assert_eq!(opened(directory.path(), "test").unwrap_err(), message);
    }

    #[test]
    fn a_folder_without_splits_is_all_for_training() {
        let directory = folder(&["b.jsonl.gz", "a/x.csv"]);
        assert_eq!(opened(directory.path(), "train").unwrap(), ["d/a/x.csv", "d/b.jsonl.gz"]);
        let message = "d/: has no files of the split \"validation\"; it has: train";
        assert_eq!(opened(directory.path(), "validation").unwrap_err(), message);
    }
}
