//! What of a run's files a worker's machine has, and what it gets from the coordinator's instead.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use quintet_coordinator::share;
use quintet_worker::fetch::{self, Fetched};
use quintet_worker::outbox::Outbox;
use quintet_worker::remote::Remote;

use crate::error::Result;
use crate::hub;
use crate::job::Job;

/// A worker's machine, as a job finds it.
pub(crate) struct Machine<'a> {
    pub(crate) remote: &'a Arc<Remote>,
    /// Of the job's relative paths.
    pub(crate) base: &'a Path,
    /// The content of the coordinator's probe.
    pub(crate) probe: &'a str,
}

/// What a job's paths have become.
pub(crate) struct Settled {
    /// What goes through the coordinator, and why.
    pub(crate) notes: Vec<String>,
    /// Artifacts in use, so that nobody removes them.
    pub(crate) fetched: Vec<Fetched>,
    /// Where what the run keeps is written.
    pub(crate) output: Outbox,
}

impl Machine<'_> {
    /// Has the job name what is on this machine: its model and adapter, fetched if need be, and folders to write to.
    pub(crate) fn settle(&self, job: &mut Job) -> Result<Settled> {
        let (mut notes, fetched) = (Vec::new(), Vec::new());
        let output = if self.sees(&job.output_dir) {
            Outbox::shared(job.output_dir.clone())
        } else {
            notes.push(format!("writes through here ({} is not shared)", job.output_dir.display()));
            if job.data.cache_dir == Some(job.output_dir.join("cache")) {
                job.data.cache_dir = Some(cache().join("data"));
            }
            Outbox::through(Arc::clone(self.remote), cache())?
        };
        let mut settled = Settled { notes, fetched, output };
        if let Some(name) = job.model.pretrained.clone() {
            let model = self.model(&name, ("model.pretrained", share::MODEL, "the model"), &mut settled)?;
            job.model.pretrained = Some(model.display().to_string());
        }
        if let Some(name) = job.evaluation.toxicity_model.clone() {
            let artifact = ("evaluation.toxicity_model", share::TOXICITY_MODEL, "the model of toxicity");
            job.evaluation.toxicity_model = Some(self.model(&name, artifact, &mut settled)?.display().to_string());
        }
        if let Some(lora) = &mut job.lora
            && let Some(name) = &lora.pretrained
            && !self.base.join(name).join("adapter_config.json").is_file()
        {
            let why = format!("{name}: no adapter in {}", self.base.display());
            lora.pretrained =
                Some(self.fetch(share::ADAPTER, "the adapter", &why, &mut settled)?.display().to_string());
        }
        Ok(settled)
    }

    /// The directory of a model, given the job's key, and what the coordinator and people call it: this machine's own, one
    /// of the hub at the commit that the coordinator chose, or the coordinator's.
    fn model(&self, name: &str, (key, artifact, what): (&str, &str, &str), settled: &mut Settled) -> Result<PathBuf> {
        let directory = self.base.join(name);
        let why = match hub::has_commit(name) {
            _ if directory.join("config.json").is_file() => return Ok(directory),
            true => match hub::model(key, name, self.base) {
                Ok(model) => return Ok(model.directory),
                Err(failure) => failure.message,
            },
            false => format!("{name}: no model in {}", self.base.display()),
        };
        self.fetch(artifact, what, &why, settled)
    }

    fn fetch(&self, artifact: &str, what: &str, why: &str, settled: &mut Settled) -> Result<PathBuf> {
        let start = Instant::now();
        let fetched = fetch::fetch(self.remote, artifact, &cache())?;
        let how = match fetched.bytes {
            0 => "had it from here before".to_owned(),
            bytes => {
                let (megabytes, seconds) = (bytes as f64 / 1e6, start.elapsed().as_secs_f64());
                format!("{megabytes:.1} MB in {seconds:.1} s")
            }
        };
        settled.notes.push(format!("reads {what} from here, {how} ({why})"));
        let directory = fetched.directory.clone();
        settled.fetched.push(fetched);
        Ok(directory)
    }

    /// Whether this machine shares a directory with the coordinator's.
    fn sees(&self, output_dir: &Path) -> bool {
        fs::read_to_string(self.base.join(output_dir).join(share::PROBE)).is_ok_and(|probe| probe == self.probe)
    }
}

/// This user's folder of caches.
fn cache() -> PathBuf {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
    caches.unwrap_or_else(std::env::temp_dir).join("quintet")
}
