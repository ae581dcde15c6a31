//! What both `train` and `coordinator` do before a run: read everything, refuse what is wrong, lay out the directory.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quintet_coordinator::admission::Admission;
use quintet_coordinator::files::{CutOff, RunFiles};
use quintet_coordinator::journal::Identity;
use quintet_coordinator::secret::Secret;
use quintet_coordinator::server::Run;
use quintet_coordinator::share::{self, Share};
use quintet_coordinator::state::{Record, Selection, Settings};
use quintet_data::{Classes, Shelf, Splits, Tokenizer, TokenizerSpec};
use quintet_identity::Authority;
use quintet_kernels::Device;
use quintet_t5::Model;
use quintet_worker::{Metric, adapter, checkpoint, replica, task, toxicity};

use crate::error::{Failure, Result};
use crate::hub::{self, LocalModel};
use crate::job::{self, Job};

/// A run that is ready to be served.
pub(crate) struct Prepared {
    pub(crate) job: Job,
    pub(crate) run: Run,
    pub(crate) files: RunFiles,
    pub(crate) total_steps: u64,
    /// The committed step to go on from; 0 for a fresh run.
    pub(crate) start_step: u64,
    /// How much of the model is trained, where it is not all.
    pub(crate) trainable: Option<String>,
    /// Damaged checkpoints that were passed over, and the like.
    pub(crate) warnings: Vec<String>,
    /// Keeps other coordinators out of the directory.
    pub(crate) lock: File,
}

/// Where a run listens, and whom it lets in.
pub(crate) struct Door {
    pub(crate) address: SocketAddr,
    pub(crate) insecure_plaintext: bool,
    /// The directory of the run's authority, where it is not in the run's.
    pub(crate) authority: Option<PathBuf>,
}

impl Door {
    /// By `run_token` in plain text on this machine, or where somebody takes the risk; by certificates elsewhere.
    fn admission(&self, output_dir: &Path, run_token: Secret) -> Result<Admission> {
        if quintet_identity::is_private(self.address.ip()) || self.insecure_plaintext {
            return Ok(Admission::Secret(run_token));
        }
        let own = security_directory(output_dir);
        let authority = Authority::open(self.authority.as_deref().unwrap_or(&own), &own)?;
        Ok(Admission::Authority(Arc::new(authority)))
    }
}

/// Where a run keeps its authority's key, the tokens that were made and those that were used.
pub(crate) fn security_directory(output_dir: &Path) -> PathBuf {
    output_dir.join("security")
}

/// Every how many steps the replicas' weights are compared, where several could differ.
const DIGEST_STEPS: u64 = 100;

/// How a run is served.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Serving {
    /// Go on from the newest checkpoint.
    pub(crate) resume: bool,
    /// Or, where a coordinator was cut off whose workers may still live, from where that was.
    pub(crate) take_over: bool,
    /// That was tried, and nobody came back.
    pub(crate) from_checkpoint: bool,
    /// Worker processes are children of this one.
    pub(crate) launches: bool,
}

pub(crate) fn prepare(job: Job, serving: Serving, door: &Door) -> Result<Prepared> {
    let base = working_directory()?;
    let splits = Splits::load(&job.data, &base, job.training.seed)?;
    let pretrained = pretrained(&job, &base)?;
    let lock = lock(&job.output_dir)?;
    // A run that has committed nothing is none: what stopped it can be put right and the job started again.
    let resume = serving.resume && holds_work(&job.output_dir);
    let tokenizer = Arc::new(run_tokenizer(&job, &base, pretrained.as_ref(), &splits, resume)?);
    let directory = pretrained.as_ref().map(|pretrained| pretrained.directory.as_path());
    let toxicity_model = toxicity_model(&job, &base)?;
    let classes = task::classes(&job.model, job.lora.as_ref(), directory, &splits)?;
    let trainable = check_model(&job, directory, &tokenizer, classes.as_deref())?;
    let shelf = splits.shelf();
    let splits = splits.tokenized(&tokenizer)?;
    let schedule = job.training.steps(splits.order().positions())?;
    let eval_steps = eval_steps(&job, &splits, schedule.total_steps)?;
    if resume {
        check_same_job(&job)?;
    }
    let started = Started::open(&job, Serving { resume, ..serving })?;
    write_job(&job, &tokenizer)?;
    let share = share(&job, &base, pretrained.as_ref(), toxicity_model.as_ref(), shelf)?;
    let selection = selection(&job, eval_steps)?;
    let past_evaluations = match selection {
        Some(_) if resume => RunFiles::evaluations(&job.output_dir)?,
        _ => Vec::new(),
    };
    let settings = Settings {
        schedule: schedule.clone(),
        dataset_fingerprint: splits.fingerprint(),
        workers_expected: job.cluster.workers(),
        workers_min: job.cluster.min_workers,
        join_timeout_ms: milliseconds(job.cluster.join_timeout_seconds),
        reconnect_timeout_ms: milliseconds(job.cluster.reconnect_timeout_seconds),
        restarts_max: serving.launches.then_some(job.cluster.max_restarts),
        heartbeat_timeout_ms: milliseconds(job.cluster.heartbeat_timeout_seconds),
        step_timeout_ms: milliseconds(job.cluster.step_timeout_seconds),
        logging_steps: job.training.logging_steps,
        eval_steps,
        save_steps: Some(job.training.save_steps.unwrap_or(schedule.total_steps)),
        digest_steps: Some(DIGEST_STEPS),
        start_step: started.step,
        start_step_generation: started.step_generation,
        start_generation: started.generation,
        selection,
        past_evaluations,
        abandoned: None,
    };
    let run = Run {
        settings,
        job_json: for_workers(&job, pretrained.as_ref(), toxicity_model.as_ref())?,
        tokenizer_json: tokenizer.to_json(),
        admission: door.admission(&job.output_dir, started.identity.run_token)?,
        collective_token: started.identity.collective_token,
        share,
        taken_over: started.taken_over,
        storage_timeout: Duration::from_secs_f64(job.cluster.storage_timeout_seconds),
        insecure: door.insecure_plaintext,
    };
    let Started { files, step, warnings, .. } = started;
    let total_steps = schedule.total_steps;
    Ok(Prepared { job, run, files, total_steps, start_step: step, trainable, warnings, lock })
}

fn milliseconds(seconds: f64) -> u64 {
    (seconds * 1000.0) as u64
}

/// How often to evaluate: at the end, unless the job asks for more, and never without data.
fn eval_steps(job: &Job, splits: &Splits, total_steps: u64) -> Result<Option<u64>> {
    match (&splits.validation, job.training.eval_steps) {
        (Some(_), steps) => Ok(Some(steps.unwrap_or(total_steps))),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Failure::bad_input(
            "training.eval_steps: there is nothing to evaluate on; give data.validation or data.validation_split",
        )),
    }
}

/// The model that the job begins with, on this machine.
pub(crate) fn pretrained(job: &Job, base: &Path) -> Result<Option<LocalModel>> {
    job.model.pretrained.as_ref().map(|name| hub::model("model.pretrained", name, base)).transpose()
}

/// The classifier that toxicity is measured by, if it is.
fn toxicity_model(job: &Job, base: &Path) -> Result<Option<LocalModel>> {
    let Some(name) = &job.evaluation.toxicity_model else { return Ok(None) };
    let model = hub::model("evaluation.toxicity_model", name, base)?;
    toxicity::toxic_class(&quintet_t5::read_config(&model.directory)?, job.evaluation.toxic_label())?;
    Ok(Some(model))
}

/// What workers whose machines lack the run's files read from here.
fn share(
    job: &Job,
    base: &Path,
    pretrained: Option<&LocalModel>,
    toxicity_model: Option<&LocalModel>,
    shelf: Shelf,
) -> Result<Share> {
    let model = pretrained.map(|model| (share::MODEL, model.directory.clone()));
    let toxicity_model = toxicity_model.map(|model| (share::TOXICITY_MODEL, model.directory.clone()));
    let adapter = job.lora.as_ref().and_then(|lora| lora.pretrained.as_ref());
    let adapter = adapter.map(|directory| (share::ADAPTER, base.join(directory)));
    Ok(Share::new(shelf, model.into_iter().chain(adapter).chain(toxicity_model), job.output_dir.clone())?)
}

/// What follows from the best evaluation, if anything does.
fn selection(job: &Job, eval_steps: Option<u64>) -> Result<Option<Selection>> {
    let training = &job.training;
    if !training.selects() {
        return Ok(None);
    }
    if eval_steps.is_none() {
        let key = if training.load_best_model_at_end { "load_best_model_at_end" } else { "early_stopping_patience" };
        return Err(Failure::bad_input(format!(
            "training.{key}: there is nothing to evaluate on; give data.validation or data.validation_split"
        )));
    }
    let (metric, greater_is_better) = training.metric_for_best()?;
    if metric != Metric::Loss && !job.evaluation.metrics.contains(&metric) {
        let name = metric.name();
        return Err(Failure::bad_input(format!(
            "training.metric_for_best_model: {name} is not computed; put it into evaluation.metrics"
        )));
    }
    Ok(Some(Selection {
        metric: metric.name().to_string(),
        greater_is_better,
        load_best_model_at_end: training.load_best_model_at_end,
        early_stopping_patience: training.early_stopping_patience,
        early_stopping_threshold: training.early_stopping_threshold,
    }))
}

pub(crate) fn working_directory() -> Result<PathBuf> {
    std::env::current_dir().map_err(|error| Failure::failed(format!("no working directory: {error}")))
}

/// The tokenizer of a run: on resuming the one it began with, else the job's, trained on the data if it says so.
pub(crate) fn run_tokenizer(
    job: &Job,
    base: &Path,
    pretrained: Option<&LocalModel>,
    splits: &Splits,
    resume: bool,
) -> Result<Tokenizer> {
    let kept = tokenizer_file(job);
    if resume && kept.is_file() {
        let text = fs::read_to_string(&kept)
            .map_err(|error| Failure::failed(format!("{}: cannot read: {error}", kept.display())))?;
        return Ok(Tokenizer::from_json(&text)?);
    }
    let spec = match (&job.model.tokenizer, pretrained) {
        (Some(tokenizer), _) => TokenizerSpec::parse(tokenizer, base),
        (None, Some(pretrained)) => TokenizerSpec::Path(pretrained.directory.clone()),
        (None, None) => return Err(Failure::bad_input("model.tokenizer: fresh weights need one, such as \"byt5\"")),
    };
    let vocab_size = job.model.architecture.as_ref().and_then(|keys| keys.get("vocab_size")?.as_u64());
    if spec.is_trained() {
        // Of megabytes of text that takes a while.
        eprintln!("learning the vocabulary from {} training examples", splits.train.len());
    }
    Ok(Tokenizer::from_spec(&spec, splits.train.texts(), vocab_size.map(|size| size as usize))?)
}

fn tokenizer_file(job: &Job) -> PathBuf {
    job.output_dir.join("tokenizer.json")
}

/// The job as workers get it: with the commits of a hub's models, so that all of them load the same ones.
fn for_workers(job: &Job, pretrained: Option<&LocalModel>, toxicity_model: Option<&LocalModel>) -> Result<String> {
    let mut job = job.clone();
    job.model.pretrained = pretrained.map(|model| model.name.clone());
    job.evaluation.toxicity_model = toxicity_model.map(|model| model.name.clone());
    serde_json::to_string(&job).map_err(|error| Failure::failed(error.to_string()))
}

/// Finds a wrong model before any process starts. A directory's weights are checked by the workers that load them. For a
/// LoRA run, a line that says how much is trained, as PEFT's `print_trainable_parameters` has it.
fn check_model(
    job: &Job,
    directory: Option<&Path>,
    tokenizer: &Tokenizer,
    classes: Option<&Classes>,
) -> Result<Option<String>> {
    let Some(directory) = directory else {
        replica::fresh_config(&job.model, tokenizer)?;
        return Ok(None);
    };
    let Some(lora) = &job.lora else { return Ok(None) };
    let mut model = quintet_t5::open_pretrained(&Device::cpu(), directory)?;
    if let Some(classes) = classes {
        model = Model::new(&Device::cpu(), model.config().clone().into_classifier(classes.names()))?;
    }
    let trained = adapter::plan(lora, &model)?.1.parameter_count();
    let all = model.layout().parameter_count() + trained;
    let share = 100.0 * trained as f64 / all as f64;
    Ok(Some(format!(
        "trainable params: {} || all params: {} || trainable%: {share:.4}",
        grouped(trained),
        grouped(all)
    )))
}

/// 1234567 as 1,234,567.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// A directory that holds a run is of the same job.
fn check_same_job(job: &Job) -> Result<()> {
    let directory = &job.output_dir;
    let job_file = directory.join("job.toml");
    let Ok(text) = fs::read_to_string(&job_file) else { return Ok(()) };
    let earlier = job::parse(&job_file, &text)?;
    match job.conflict(&earlier) {
        None => Ok(()),
        Some(conflict) => Err(Failure::bad_input(format!(
            "{} holds the run of another job: {conflict}; write elsewhere with --output DIR",
            directory.display()
        ))),
    }
}

/// Where a run starts, and its files.
struct Started {
    files: RunFiles,
    identity: Identity,
    /// Where another coordinator left it.
    taken_over: Option<Record>,
    /// The committed step to go on from; 0 for a fresh run.
    step: u64,
    /// The generation in which it was committed.
    step_generation: u64,
    /// The last there was.
    generation: u64,
    warnings: Vec<String>,
}

impl Started {
    /// Refuses a directory with a run in it, unless that run is to be resumed.
    fn open(job: &Job, serving: Serving) -> Result<Self> {
        let directory = &job.output_dir;
        if !serving.resume && holds_work(directory) {
            return Err(Failure::bad_input(format!(
                "{} already holds a run; continue it with --resume, or write elsewhere with --output DIR",
                directory.display()
            )));
        }
        if serving.resume
            && serving.take_over
            && !serving.from_checkpoint
            && let Some(cut_off) = RunFiles::take_over(directory)?
        {
            return Ok(Self::where_it_was(cut_off));
        }
        // Workers that wait for a coordinator to come back know it by these.
        let known = if serving.take_over { RunFiles::identity(directory)? } else { None };
        let identity = known.map_or_else(Identity::generate, Ok)?;
        if serving.resume {
            return Self::at_checkpoint(job, identity);
        }
        let files = RunFiles::create(directory, &identity)?;
        let (step, step_generation, generation, warnings) = (0, 0, 0, Vec::new());
        Ok(Self { files, identity, taken_over: None, step, step_generation, generation, warnings })
    }

    fn where_it_was(CutOff { files, record, identity }: CutOff) -> Self {
        let (step, step_generation) = (record.committed_step, record.committed_generation);
        let generation = record.generation;
        Self { files, identity, taken_over: Some(record), step, step_generation, generation, warnings: Vec::new() }
    }

    fn at_checkpoint(job: &Job, identity: Identity) -> Result<Self> {
        let checkpoints = job.output_dir.join("checkpoints");
        checkpoint::remove_leftovers(&checkpoints)?;
        let latest = checkpoint::latest(&checkpoints).map_err(|error| match error {
            quintet_worker::Error::Checkpoint { .. } => {
                Failure::bad_input(format!("{error}; no checkpoint is intact, train anew with --output DIR"))
            }
            other => other.into(),
        })?;
        let warnings = latest.skipped.iter().map(|error| format!("passed over: {error}")).collect();
        let step = latest.checkpoint.map_or(0, |checkpoint| checkpoint.progress.step);
        let (files, generation, step_generation) = RunFiles::resume(&job.output_dir, step, &identity)?;
        Ok(Self { files, identity, taken_over: None, step, step_generation, generation, warnings })
    }
}

/// What a run keeps of its job.
fn write_job(job: &Job, tokenizer: &Tokenizer) -> Result<()> {
    let directory = &job.output_dir;
    let text = toml::to_string(job).map_err(|error| Failure::failed(error.to_string()))?;
    for (path, text) in [(directory.join("job.toml"), text), (tokenizer_file(job), tokenizer.to_json())] {
        replace(&path, &text).map_err(|error| Failure::failed(format!("{}: cannot write: {error}", path.display())))?;
    }
    Ok(())
}

/// Creates the output directory, and keeps other coordinators out of it for as long as the file is open.
fn lock(directory: &Path) -> Result<File> {
    let name = directory.display();
    fs::create_dir_all(directory).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            Failure::bad_input(format!("output_dir: {name} is no directory; choose another with --output DIR"))
        }
        _ => Failure::failed(format!("{name}: cannot create: {error}")),
    })?;
    let file = File::open(directory).map_err(|error| Failure::failed(format!("{name}: cannot open: {error}")))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Failure::failed(format!(
            "{name}: another coordinator is at work in it; wait for its end, or write elsewhere with --output DIR"
        ))),
        // Some network file systems have no locks; that is no reason not to train.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Whether a directory holds committed steps, checkpoints, a model or an adapter.
fn holds_work(directory: &Path) -> bool {
    let committed = fs::metadata(directory.join("ledger.jsonl")).is_ok_and(|ledger| ledger.len() > 0);
    let saved = fs::read_dir(directory.join("checkpoints")).is_ok_and(|mut entries| entries.next().is_some());
    committed || saved || ["model", "adapter"].iter().any(|name| directory.join(name).exists())
}

/// Replaces a file's content at once, so that a full disk leaves the one before.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    let beside = path.with_extension("tmp");
    fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).inspect_err(|_| {
        // The error that stopped the write is the one to report.
        let _ = fs::remove_file(&beside);
    })
}
