//! Models from the Hugging Face hub, in the cache that Python's huggingface_hub uses too.
//!
//! A file is downloaded once, under a lock that Python's programs respect as well, into `blobs/`, under the name of its
//! content's hash; `snapshots/<commit>/` links to it under its own name. What is there under these names is whole: an
//! interrupted download stays beside it as `.incomplete`, and the next one goes on from there.
//!
//! *Absent:* a model, a tokenizer, the terminal, the environment.

mod cache;
mod download;
mod error;
mod repository;
mod wanted;

use std::path::PathBuf;

pub use crate::error::{Error, Result};
pub use crate::repository::Repository;

use crate::cache::Cache;
use crate::download::Client;

/// Where the hub is and what it may be asked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Such as `https://huggingface.co`.
    pub endpoint: String,
    /// The folder of all repositories, such as `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// Of an account, for private and gated repositories.
    pub token: Option<String>,
    /// Only the cache is asked.
    pub offline: bool,
}

/// How far the download of a file is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    pub file: &'a str,
    pub bytes: u64,
    pub total_bytes: u64,
}

/// The folder of a model's files: downloaded where they are not in the cache. Of a revision that may move, such as `main`,
/// the hub is asked first; when it cannot be reached, what is in the cache counts.
///
/// # Errors
/// One line for people; what was downloaded so far stays.
pub fn model(settings: &Settings, repository: &Repository, report: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    let cache = Cache::new(&settings.cache, repository);
    if settings.offline {
        return cache
            .complete_snapshot()?
            .ok_or_else(|| Error::Offline { repository: repository.to_string(), cache: settings.cache.clone() });
    }
    if repository.is_commit()
        && let Some(snapshot) = cache.complete_snapshot()?
    {
        return Ok(snapshot);
    }
    let client = Client::new(settings, repository);
    let about = match client.about() {
        Err(error @ Error::Unreachable { .. }) => return cache.complete_snapshot()?.ok_or(error),
        about => about?,
    };
    let mut files = wanted::beside_weights(&about.files);
    let weights = wanted::weights(repository, &about.files)?;
    files.push(weights.clone());
    for file in &files {
        cache.fetch(&client, &about.commit, file, report)?;
    }
    for shard in wanted::shards(&cache.snapshot(&about.commit).join(&weights))? {
        cache.fetch(&client, &about.commit, &shard, report)?;
    }
    cache.remember(&about.commit)?;
    Ok(cache.snapshot(&about.commit))
}
