//! Models by the name of a directory or of a repository of the hub, whose settings are Hugging Face's environment variables.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use quintet_hub::{Progress, Repository, Settings};

use crate::error::{Failure, Result};

/// A model that is on this machine.
pub(crate) struct LocalModel {
    pub(crate) directory: PathBuf,
    /// The same for another machine: the directory as it was named, or the repository at its commit.
    pub(crate) name: String,
}

/// The directory of a model, which is downloaded if it is the hub's and not in the cache. A directory of this name comes
/// first. `key` is where the name was given.
pub(crate) fn model(key: &str, name: &str, base: &Path) -> Result<LocalModel> {
    let directory = base.join(name);
    if directory.join("config.json").is_file() {
        return Ok(LocalModel { directory, name: name.to_string() });
    }
    let absent = format!("{key}: {name} is no directory with a config.json");
    let Some(repository) = Repository::parse(name).filter(|_| !directory.exists()) else {
        return Err(Failure::bad_input(format!("{absent}; name that of a model, or a repository of the hub")));
    };
    let mut bar = Bar::default();
    let outcome = quintet_hub::model(&settings(), &repository, &mut |progress| bar.show(progress));
    bar.finish();
    let directory = outcome.map_err(|error| match error.is_user_error() {
        true => Failure::bad_input(format!("{absent}, and from the hub: {error}")),
        false => Failure::failed(error.to_string()),
    })?;
    let commit = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(LocalModel { name: format!("{}@{commit}", repository.name()), directory })
}

/// A model's name without the commit that [`model`] put behind it.
pub(crate) fn without_commit(name: &str) -> String {
    match Repository::parse(name).filter(Repository::is_commit) {
        Some(repository) => repository.name().to_string(),
        None => name.to_string(),
    }
}

/// Whether a name is that of a repository at a commit, as [`model`] makes them.
pub(crate) fn has_commit(name: &str) -> bool {
    Repository::parse(name).is_some_and(|repository| repository.is_commit())
}

/// As huggingface_hub reads them.
fn settings() -> Settings {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let path = |name: &str| variable(name).map(PathBuf::from);
    let home = path("HF_HOME").unwrap_or_else(|| {
        let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| path("HOME").unwrap_or_default().join(".cache"));
        caches.join("huggingface")
    });
    let is_on = |name: &str| {
        variable(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
    };
    let kept_token = || std::fs::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
    let token = variable("HF_TOKEN").or_else(kept_token).map(|token| token.trim().to_string());
    Settings {
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
        cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
        token: token.filter(|token| !token.is_empty()),
        offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
    }
}

/// On a terminal a bar for each file, elsewhere a line for each large one.
#[derive(Default)]
struct Bar {
    file: String,
    bar: Option<ProgressBar>,
}

/// What takes long enough to be told of.
const LARGE_BYTES: u64 = 1 << 20;

impl Bar {
    fn show(&mut self, progress: Progress) {
        if progress.file != self.file {
            self.finish();
            self.file = progress.file.to_string();
            if std::io::stderr().is_terminal() {
                let style = ProgressStyle::with_template(
                    "{msg} {bar:30} {bytes}/{total_bytes} [{binary_bytes_per_sec}, {eta}]",
                );
                let bar = ProgressBar::new(progress.total_bytes).with_message(self.file.clone());
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.enable_steady_tick(Duration::from_millis(500));
                self.bar = Some(bar);
            } else if progress.total_bytes >= LARGE_BYTES {
                eprintln!("downloading {} ({} MB)", progress.file, progress.total_bytes / 1_000_000);
            }
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
