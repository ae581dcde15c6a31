//! `quintet coordinator`, and the serving of a run that `quintet train` shares with it.

use std::net::SocketAddr;
use std::time::Duration;

use quintet_coordinator::admission::{Admission, TOKEN_LIFETIME};
use quintet_coordinator::launch::remote::{RemoteEnd, RemoteEvent, Remotes};
use quintet_coordinator::launch::{Death, LocalWorkers};
use quintet_coordinator::server::{self, Control, Outcome};
use quintet_coordinator::state::{Abandoned, Event};
use quintet_identity::Role;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::CoordinatorArguments;
use crate::commands::tokens;
use crate::error::{Failure, Result, exit};
use crate::job::Job;
use crate::prepare::{Door, Prepared, Serving, prepare, security_directory};
use crate::report::{self, Reporter};

pub(crate) fn run(arguments: CoordinatorArguments) -> Result<u8> {
    let job = Job::load(&arguments.job)?;
    let mut serving = Serving { resume: arguments.job.resume, take_over: true, ..Serving::default() };
    let address = match arguments.listen {
        Some(address) => address,
        None => job.cluster.listen_address()?,
    };
    let (insecure_plaintext, authority) = (arguments.insecure_plaintext, arguments.authority);
    let mut door = Door { address, insecure_plaintext, authority };
    let mut abandoned = None;
    loop {
        let mut prepared = prepare(job.clone(), serving, &door)?;
        prepared.run.settings.abandoned = abandoned;
        let address = door.address;
        let options = RunOptions { address, json: arguments.json, announce: true, by_hand: true, device: None };
        match serve(prepared, &options, |_, _| Ok(Workers::Elsewhere))? {
            Served::Ended(code) => return Ok(code),
            Served::Abandoned { address: listened, reason, state } => {
                eprintln!("{reason}; going on from the last checkpoint");
                (door.address, abandoned) = (listened, Some(state));
                (serving.resume, serving.from_checkpoint) = (true, true);
            }
        }
    }
}

/// Serves a run whose workers are started from here; if its state is lost, from the last checkpoint with others.
///
/// `prepare` is told whether to resume.
pub(crate) fn serve_to_end(
    mut prepare: impl FnMut(bool) -> Result<(Prepared, RunOptions)>,
    mut launch: impl FnMut(SocketAddr, &Admission) -> Result<Workers>,
) -> Result<u8> {
    let (mut abandoned, mut begun, mut attempts) = (None, None, 0);
    loop {
        let (mut prepared, options) = prepare(abandoned.is_some())?;
        prepared.run.settings.abandoned = abandoned;
        let start = prepared.start_step;
        attempts = if begun == Some(start) { attempts + 1 } else { 1 };
        begun = Some(start);
        match serve(prepared, &options, &mut launch)? {
            Served::Ended(code) => return Ok(code),
            Served::Abandoned { reason, .. } if attempts == STARTS_MAX => {
                let what = format!("{reason}, for the {STARTS_MAX}rd time since the checkpoint of step {start}");
                return Err(Failure::failed(what));
            }
            Served::Abandoned { reason, state, .. } => {
                eprintln!("{reason}; going on from the last checkpoint");
                abandoned = Some(state);
            }
        }
    }
}

/// How often workers are all started anew from one and the same checkpoint.
const STARTS_MAX: u32 = 3;

/// What became of a run that was served.
pub(crate) enum Served {
    /// It ended, with this exit code.
    Ended(u8),
    /// Its state is lost; workers have this address to connect to.
    Abandoned { address: SocketAddr, reason: String, state: Abandoned },
}

impl Served {
    /// Of a run whose workers cannot come back by themselves.
    pub(crate) fn exit_code(self) -> Result<u8> {
        match self {
            Served::Ended(code) => Ok(code),
            Served::Abandoned { reason, .. } => {
                Err(Failure::failed(format!("{reason}; --resume goes on from the last checkpoint")))
            }
        }
    }
}

/// Who computes a run.
pub(crate) enum Workers {
    /// Processes that somebody else starts.
    Elsewhere,
    /// Processes of this machine.
    Local(LocalWorkers),
    /// Commands that stand for processes of other machines.
    Remote(Remotes),
}

/// What workers have to tell other than through their streams.
enum News {
    Death(Death),
    Remote(RemoteEvent),
}

impl Workers {
    async fn next(&mut self) -> Option<News> {
        match self {
            Workers::Elsewhere => std::future::pending().await,
            Workers::Local(workers) => workers.next_death().await.map(News::Death),
            Workers::Remote(remotes) => remotes.next().await.map(News::Remote),
        }
    }

    async fn end(self, grace: Duration, reporter: &Reporter) {
        match self {
            Workers::Elsewhere => {}
            Workers::Local(workers) => workers.end(grace).await,
            Workers::Remote(remotes) => {
                remotes
                    .end(grace, |event| {
                        show(News::Remote(event), reporter);
                    })
                    .await;
            }
        }
    }
}

/// Shows what is for people, and hands on what is for the run.
fn show(news: News, reporter: &Reporter) -> Option<Death> {
    match news {
        News::Death(death) => Some(death),
        News::Remote(RemoteEvent::Line { name, text }) => {
            reporter.line(&format!("[{name}] {text}"));
            None
        }
        News::Remote(RemoteEvent::Ended(end)) => Some(death(end, reporter)),
    }
}

/// A launcher's command that ended. What is not one of our exit codes is ssh's or a shell's.
fn death(end: RemoteEnd, reporter: &Reporter) -> Death {
    use quintet_coordinator::exit_code::{BAD_INPUT, DONE, FAILURE, NUMERIC_GUARD, PREEMPTED, TOO_FEW_WORKERS};
    let exit_code = end.exit_code.map(|code| match code {
        DONE | FAILURE | BAD_INPUT | TOO_FEW_WORKERS | NUMERIC_GUARD | PREEMPTED => code,
        // The program cannot be run there.
        126 | 127 => BAD_INPUT,
        _ => FAILURE,
    });
    if exit_code != Some(DONE) {
        reporter.line(&format!("[{}] ended: {}", end.name, end.status));
    }
    Death { pid: end.pid, exit_code, status: format!("on {}: {}", end.name, end.status) }
}

/// How to serve a run.
pub(crate) struct RunOptions {
    pub(crate) address: SocketAddr,
    pub(crate) json: bool,
    /// Say which workers join.
    pub(crate) announce: bool,
    /// Say how workers can join.
    pub(crate) by_hand: bool,
    /// Where the workers compute, and why, where that is known here.
    pub(crate) device: Option<String>,
}

/// Serves a run to its end and sums it up; `launch` starts workers once the address is known.
pub(crate) fn serve(
    prepared: Prepared,
    options: &RunOptions,
    launch: impl FnOnce(SocketAddr, &Admission) -> Result<Workers>,
) -> Result<Served> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the event loop: {error}")))?;
    let mut reporter = Reporter::new(prepared.total_steps, prepared.start_step, options.announce);
    for warning in &prepared.warnings {
        reporter.line(&format!("warning: {warning}"));
    }
    let schedule = &prepared.run.settings.schedule;
    reporter.line(&format!(
        "{} examples, {} steps of {}, on {} worker(s), into {}",
        schedule.examples,
        schedule.total_steps,
        schedule.global_batch_size,
        prepared.run.settings.workers_expected,
        prepared.job.output_dir.display()
    ));
    if let Some(device) = &options.device {
        reporter.line(device);
    }
    if let Some(trainable) = &prepared.trainable {
        reporter.line(trainable);
    }
    match &prepared.run.taken_over {
        Some(record) => reporter.line(&format!(
            "taking over after step {}; {} worker(s) of it are to come back",
            record.committed_step, record.workers
        )),
        None if prepared.start_step > 0 => reporter.line(&format!("resuming after step {}", prepared.start_step)),
        None => {}
    }
    let job = prepared.job.clone();
    let (outcome, address) = runtime.block_on(drive(prepared, options, launch, &mut reporter))?;
    reporter.finish();
    if let Some(state) = outcome.abandoned {
        return Ok(Served::Abandoned { address, reason: outcome.reason, state });
    }
    summarize(&job, &outcome, &reporter, options.json);
    Ok(Served::Ended(outcome.exit_code as u8))
}

/// How long workers that were told to stop may take to finish a checkpoint.
const STOP_GRACE: Duration = Duration::from_secs(5);
const EVENTS_WAITING_MAX: usize = 1024;
const CONTROLS_WAITING_MAX: usize = 64;

async fn drive(
    prepared: Prepared,
    options: &RunOptions,
    launch: impl FnOnce(SocketAddr, &Admission) -> Result<Workers>,
    reporter: &mut Reporter,
) -> Result<(Outcome, SocketAddr)> {
    // Before anybody is told where to join: whoever sees a run may want to stop it.
    let mut stop = StopSignals::new()?;
    // Until the last worker is gone.
    let _lock = prepared.lock;
    let listener = TcpListener::bind(options.address)
        .await
        .map_err(|error| Failure::bad_input(format!("cannot listen on {}: {error}", options.address)))?;
    let address = listener.local_addr().map_err(|error| Failure::failed(format!("no local address: {error}")))?;
    if options.by_hand {
        let workers = prepared.run.settings.workers_expected;
        let how = invitation(&prepared.run.admission, &prepared.job, workers)?;
        let scheme = prepared.run.admission.scheme();
        reporter.line(&format!(
            "waiting for {workers} worker(s); start each with\n  {how} quintet worker --coordinator {scheme}://{address}"
        ));
    }
    let mut workers = launch(address, &prepared.run.admission)?;
    let (events, mut shown) = mpsc::channel::<Event>(EVENTS_WAITING_MAX);
    let (control, controls) = mpsc::channel(CONTROLS_WAITING_MAX);
    let (replace, mut replacements) = mpsc::unbounded_channel();
    let serving = server::serve(listener, prepared.run, prepared.files, events, controls, replace);
    tokio::pin!(serving);
    let outcome = loop {
        tokio::select! {
            biased;
            Some(event) = shown.recv() => reporter.show(event),
            outcome = &mut serving => break outcome,
            Some(news) = workers.next() => if let Some(death) = show(news, reporter) {
                // A full queue means that the run is ending; it will find the stream closed.
                let _ = control.try_send(Control::WorkerDied(death));
            },
            Some(pid) = replacements.recv() => if let Workers::Local(workers) = &mut workers
                && let Err(error) = workers.replace(pid)
            {
                let death = Death { pid, exit_code: None, status: error.to_string() };
                let _ = control.try_send(Control::WorkerDied(death));
            },
            () = stop.next() => {
                reporter.line("stopping: the step in flight is finished and saved; once more to stop at once");
                let _ = control.try_send(Control::Preempt);
            }
        }
    };
    while let Ok(event) = shown.try_recv() {
        reporter.show(event);
    }
    let abandoned = outcome.as_ref().is_ok_and(|outcome| outcome.abandoned.is_some());
    // Who was told nothing does not end by itself.
    workers.end(if abandoned { Duration::ZERO } else { STOP_GRACE }, reporter).await;
    Ok((outcome?, address))
}

/// The variable that lets workers in, for a shell. Join tokens are in a file, so that no log has them.
fn invitation(admission: &Admission, job: &Job, workers: u32) -> Result<String> {
    match admission {
        Admission::Secret(_) => admission.ticket().map(|(name, value)| format!("{name}={value}")).map_err(Into::into),
        Admission::Authority(authority) => {
            let tokens = tokens::issue(authority, Role::Worker, workers, TOKEN_LIFETIME)?;
            let path = security_directory(&job.output_dir).join("tokens");
            tokens::write(&path, &tokens)?;
            Ok(format!("{}={}", tokens::FILE_VARIABLE, path.display()))
        }
    }
}

/// Ctrl-C, or the SIGTERM or SIGUSR1 of a scheduler; the second one ends the process at once.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    user: Signal,
    seen: bool,
}

impl StopSignals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")));
        Ok(StopSignals {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            user: listen(SignalKind::user_defined1())?,
            seen: false,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.user.recv() => {}
        }
        if self.seen {
            std::process::exit(i32::from(exit::FAILURE));
        }
        self.seen = true;
    }
}

/// What a person, or a program, is told at the end.
fn summarize(job: &Job, outcome: &Outcome, reporter: &Reporter, json: bool) {
    let output_dir = &job.output_dir;
    let done = outcome.exit_code == u32::from(exit::DONE);
    let samples = if done { report::sample_predictions(output_dir, 5) } else { Vec::new() };
    match done {
        true => eprintln!("{}", outcome.reason),
        false => eprintln!("error: {}", outcome.reason),
    }
    if json {
        let value = json!({
            "exit_code": outcome.exit_code,
            "reason": outcome.reason,
            "output_dir": output_dir,
            "step": reporter.last_train.as_ref().map(|metrics| metrics.step),
            "loss": reporter.last_train.as_ref().map(|metrics| metrics.loss),
            "eval_loss": reporter.last_eval.as_ref().map(|metrics| metrics.eval_loss),
            "metrics": reporter.last_eval.as_ref().map(|metrics| &metrics.metrics),
            "predictions": samples,
        });
        println!("{value}");
    } else if done {
        let what = if job.lora.is_some() { "adapter" } else { "model" };
        println!("{what}: {}", output_dir.join(what).display());
        if let Some(metrics) = &reporter.last_eval {
            println!("{}", report::scores(metrics));
        }
        for sample in &samples {
            let text = |key: &str| sample[key].as_str().unwrap_or_default().to_string();
            println!("  {} -> {}   (target: {})", text("input"), text("prediction"), text("target"));
        }
    }
}
