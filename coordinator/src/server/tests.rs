//! Real streams over loopback, with workers that compute nothing.

use std::path::Path;

use quintet_data::{Schedule, Shelf, TrainingLength};
use quintet_proto::v1::coordinator_client::CoordinatorClient;
use quintet_proto::v1::{Actions, Finished, Lease, MicroBatch, Publication, Ready, Saved, StepDone};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;

use super::*;
use crate::files::CutOff;
use crate::journal::Identity;

mod certificates;

const TOKEN: [u8; 32] = [5; 32];
/// Longer than any run here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

fn settings(workers: u32, steps: u64) -> Settings {
    Settings {
        schedule: Schedule::new(20, 8, 2, TrainingLength::Steps(steps)).unwrap(),
        dataset_fingerprint: "data".to_owned(),
        workers_expected: workers,
        workers_min: 1,
        join_timeout_ms: 1_000,
        reconnect_timeout_ms: 1_000,
        restarts_max: None,
        heartbeat_timeout_ms: 60_000,
        step_timeout_ms: 60_000,
        logging_steps: 1,
        eval_steps: None,
        save_steps: None,
        digest_steps: None,
        start_step: 0,
        start_step_generation: 0,
        start_generation: 0,
        selection: None,
        past_evaluations: Vec::new(),
        abandoned: None,
    }
}

/// A served run, and where to find it.
struct Served {
    url: String,
    controls: mpsc::Sender<Control>,
    events: mpsc::Receiver<Event>,
    outcome: JoinHandle<Result<Outcome>>,
}

fn identity() -> Identity {
    Identity { run_token: Secret::from_bytes(TOKEN), collective_token: Secret::from_bytes([6; 32]) }
}

async fn start(settings: Settings, directory: &Path) -> Served {
    start_with(settings, directory, Admission::Secret(identity().run_token)).await
}

async fn start_with(settings: Settings, directory: &Path, admission: Admission) -> Served {
    serve_files(settings, RunFiles::create(directory, &identity()).unwrap(), None, admission).await
}

async fn serve_files(settings: Settings, files: RunFiles, taken_over: Option<Record>, admission: Admission) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let run = Run {
        settings,
        job_json: "{}".to_owned(),
        tokenizer_json: "t".repeat(10 << 20),
        admission,
        collective_token: identity().collective_token,
        share: Share::new(Shelf::default(), [], tempfile::tempdir().unwrap().path().to_owned()).unwrap(),
        taken_over,
        storage_timeout: Duration::from_secs(60),
        insecure: false,
    };
    let (controls, receiver) = mpsc::channel(8);
    let (sender, events) = mpsc::channel(1024);
    let serving = serve(listener, run, files, sender, receiver, mpsc::unbounded_channel().0);
    let outcome = async { tokio::time::timeout(DEADLINE, serving).await.expect("the run does not end") };
    let outcome = tokio::spawn(outcome);
    Served { url, controls, events, outcome }
}

/// A worker's end of a stream.
struct Worker {
    reports: mpsc::UnboundedSender<FromWorker>,
    commands: Streaming<ToWorker>,
    generation: u64,
}

impl Worker {
    async fn join(url: &str, hello: Hello) -> std::result::Result<Self, Status> {
        Self::join_with(url, hello, Ready::default()).await
    }

    async fn join_with(url: &str, hello: Hello, ready: Ready) -> std::result::Result<Self, Status> {
        Self::join_by(CoordinatorClient::connect(url.to_owned()).await.unwrap(), hello, ready).await
    }

    async fn join_by(
        client: CoordinatorClient<Channel>,
        hello: Hello,
        ready: Ready,
    ) -> std::result::Result<Self, Status> {
        let (reports, outgoing) = mpsc::unbounded_channel();
        reports.send(FromWorker { report: Some(Report::Hello(hello)) }).unwrap();
        let mut client = client.max_decoding_message_size(TO_WORKER_BYTES_MAX);
        let commands = client.work(UnboundedReceiverStream::new(outgoing)).await?.into_inner();
        let mut worker = Self { reports, commands, generation: 0 };
        let Command::Welcome(welcome) = worker.recv().await else { panic!("no welcome") };
        assert_eq!((welcome.tokenizer_json.len(), welcome.collective_token.as_slice()), (10 << 20, &[6; 32][..]));
        let dataset_fingerprint = "data".to_owned();
        worker.send(Report::Ready(Ready { dataset_fingerprint, ..ready }));
        Ok(worker)
    }

    fn send(&self, report: Report) {
        self.reports.send(FromWorker { report: Some(report) }).unwrap();
    }

    async fn recv(&mut self) -> Command {
        let message = tokio::time::timeout(DEADLINE, self.commands.message()).await.expect("no command comes");
        message.unwrap().unwrap().command.unwrap()
    }

    /// The next lease, once the actions before it are done.
    async fn lease(&mut self) -> std::result::Result<Lease, v1::Stop> {
        loop {
            let (step, actions, next) = match self.recv().await {
                Command::Plan(plan) => {
                    self.generation = plan.generation;
                    (plan.committed_step, plan.actions, plan.next)
                }
                Command::Commit(commit) => (commit.step, commit.actions, commit.next),
                Command::Stop(stop) => return Err(stop),
                Command::Welcome(_) => panic!("welcome twice"),
            };
            let Actions { save, finish, .. } = actions.unwrap();
            if save {
                self.send(Report::Saved(Saved { step }));
            }
            if finish {
                self.send(Report::Finished(Finished { generation: self.generation, weights_digest: vec![] }));
            }
            if let Some(lease) = next {
                return Ok(lease);
            }
        }
    }

    fn compute(&self, schedule: &Schedule, lease: &Lease) {
        let plan = schedule.step(lease.step);
        let micro_batch = |index| {
            let examples = plan.micro_batch(index).end - plan.micro_batch(index).start;
            MicroBatch { index, loss_sum: 2.0, target_tokens: 1, source_tokens: 1, examples }
        };
        self.send(Report::StepDone(StepDone {
            generation: self.generation,
            step: lease.step,
            grad_norm: 1.0,
            micro_batches: (lease.first_micro_batch..lease.last_exclusive).map(micro_batch).collect(),
            ..StepDone::default()
        }));
    }

    async fn work(mut self, schedule: Schedule) -> v1::Stop {
        loop {
            match self.lease().await {
                Ok(lease) => self.compute(&schedule, &lease),
                Err(stop) => return stop,
            }
        }
    }
}

fn hello() -> Hello {
    static INSTANCES: AtomicU64 = AtomicU64::new(0);
    let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
    Hello { protocol_version: PROTOCOL_VERSION, run_token: TOKEN.to_vec(), host: "h".to_owned(), pid: 1, instance }
}

fn steps_in(directory: &Path, name: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(directory.join(name)).unwrap();
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
    text.lines().map(step).collect()
}

#[tokio::test]
async fn workers_train_to_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(3, 40);
    let schedule = settings.schedule.clone();
    let mut served = start(settings, directory.path()).await;
    let mut workers = Vec::new();
    for _ in 0..3 {
        let worker = Worker::join(&served.url, hello()).await.unwrap();
        workers.push(tokio::spawn(worker.work(schedule.clone())));
    }
    for worker in workers {
        assert_eq!(worker.await.unwrap().exit_code, exit_code::DONE);
    }
    let outcome = served.outcome.await.unwrap().unwrap();
    let expected = Outcome { exit_code: 0, reason: "trained to step 40".to_owned(), abandoned: None };
    assert_eq!(outcome, expected);
    assert!(steps_in(directory.path(), "ledger.jsonl").into_iter().eq(1..=40));
    assert!(steps_in(directory.path(), "metrics.jsonl").into_iter().eq(1..=40));
    let mut trained = 0;
    while let Some(event) = served.events.recv().await {
        trained += u32::from(matches!(event, Event::Train(_)));
    }
    assert_eq!(trained, 40);
}

#[tokio::test]
async fn a_broken_stream_is_a_lost_worker_and_the_others_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(2, 5);
    let schedule = settings.schedule.clone();
    let served = start(settings, directory.path()).await;
    let mut dying = Worker::join(&served.url, hello()).await.unwrap();
    let survivor = Worker::join(&served.url, hello()).await.unwrap();
    let survivor = tokio::spawn(survivor.work(schedule.clone()));
    let lease = dying.lease().await.unwrap();
    dying.compute(&schedule, &lease);
    dying.lease().await.unwrap();
    drop(dying);
    assert_eq!(survivor.await.unwrap().exit_code, exit_code::DONE);
    assert_eq!(served.outcome.await.unwrap().unwrap().exit_code, exit_code::DONE);
    assert!(steps_in(directory.path(), "ledger.jsonl").into_iter().eq(1..=5));
    let metrics = std::fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
    let recovery = metrics.lines().nth(1).unwrap();
    assert!(recovery.starts_with(r#"{"event":"recovery","step":2,"generation":2,"lost":[{"worker":0,"#), "{recovery}");
}

#[tokio::test]
async fn a_coordinator_that_is_cut_off_is_taken_over_without_losing_or_repeating_a_step() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(2, 9);
    let schedule = settings.schedule.clone();
    let served = start(settings.clone(), directory.path()).await;
    let mut first = [0, 1].map(|_| None);
    for worker in &mut first {
        *worker = Some(Worker::join(&served.url, hello()).await.unwrap());
    }
    let mut first = first.map(Option::unwrap);
    for _ in 0..4 {
        for worker in &mut first {
            let lease = worker.lease().await.unwrap();
            worker.compute(&schedule, &lease);
        }
    }
    // The fourth commit is on record; one has heard of it, the other may not.
    first[0].lease().await.unwrap();
    served.outcome.abort();
    assert!(served.outcome.await.unwrap_err().is_cancelled());

    let CutOff { files, record, .. } = RunFiles::take_over(directory.path()).unwrap().unwrap();
    assert_eq!((record.committed_step, record.generation, record.workers), (4, 1, 2));
    let served = serve_files(settings, files, Some(record), Admission::Secret(identity().run_token)).await;
    let state = |step| v1::State { step, generation: 1 };
    let heard = Ready { committed_step: 4, committed_generation: 1, ..Ready::default() };
    let unheard = Ready { committed_step: 3, committed_generation: 1, pending: Some(state(4)), ..Ready::default() };
    let mut second = Vec::new();
    for ready in [heard, unheard] {
        second.push(Worker::join_with(&served.url, hello(), ready).await.unwrap());
    }
    for mut worker in second {
        let Command::Plan(plan) = worker.recv().await else { panic!("no plan") };
        assert_eq!((plan.generation, plan.committed_step, plan.committed_generation), (2, 4, 1));
        assert!(plan.healed.is_empty(), "both hold the committed state");
        worker.generation = 2;
        worker.compute(&schedule, &plan.next.unwrap());
        tokio::spawn(worker.work(schedule.clone()));
    }
    assert_eq!(served.outcome.await.unwrap().unwrap().exit_code, exit_code::DONE);
    assert!(steps_in(directory.path(), "ledger.jsonl").into_iter().eq(1..=9));
    let metrics = std::fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
    let (recoveries, trained): (Vec<&str>, Vec<&str>) = metrics.lines().partition(|line| line.contains("recovery"));
    assert_eq!((recoveries.len(), trained.len()), (1, 9));
    assert!(recoveries[0].contains("\"step\":5,\"generation\":2") && recoveries[0].contains("_restarted\":true"));
    assert!(RunFiles::take_over(directory.path()).unwrap().is_none(), "the run has ended");
}

#[tokio::test]
async fn preemption_saves_first() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(1, 1_000_000);
    let schedule = settings.schedule.clone();
    let mut served = start(settings, directory.path()).await;
    let worker = Worker::join(&served.url, hello()).await.unwrap();
    let worker = tokio::spawn(worker.work(schedule));
    while !matches!(served.events.recv().await, Some(Event::Train(_))) {}
    served.controls.send(Control::Preempt).await.unwrap();
    let stop = worker.await.unwrap();
    assert_eq!(stop.exit_code, exit_code::PREEMPTED, "{}", stop.reason);
    let outcome = served.outcome.await.unwrap().unwrap();
    assert_eq!(outcome.exit_code, exit_code::PREEMPTED);
    let committed = steps_in(directory.path(), "ledger.jsonl").len();
    assert_eq!(outcome.reason, format!("preempted; step {committed} is saved, --resume goes on from it"));
}

#[tokio::test]
async fn strangers_are_refused_and_the_run_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(1, 3);
    let schedule = settings.schedule.clone();
    let served = start(settings, directory.path()).await;
    let refusal = async |hello: Hello| Worker::join(&served.url, hello).await.map(|_| ()).unwrap_err();
    let status = refusal(Hello { run_token: vec![5; 31], ..hello() }).await;
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    let status = refusal(Hello { protocol_version: PROTOCOL_VERSION + 1, ..hello() }).await;
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert!(status.message().contains("run the same quintet on all machines"), "{status}");

    let mut client = CoordinatorClient::connect(served.url.clone()).await.unwrap();
    let rude = FromWorker { report: Some(Report::Finished(Finished::default())) };
    let status = client.work(tokio_stream::iter([rude])).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);

    let worker = Worker::join(&served.url, hello()).await.unwrap();
    assert_eq!(worker.work(schedule).await.exit_code, exit_code::DONE);
    served.outcome.await.unwrap().unwrap();
}

/// How each of the calls for files is answered that asks for what is not there, or leads out of the run.
async fn calls_for_files(client: &mut CoordinatorClient<Channel>, run_token: &[u8]) -> [tonic::Code; 4] {
    let (run_token, artifact, name) = (run_token.to_vec(), "../model".to_owned(), "../config.json".to_owned());
    let leaves = LeavesRequest { run_token: run_token.clone(), store: 0, numbers: vec![0] };
    let list = ListRequest { run_token: run_token.clone(), artifact: artifact.clone() };
    let read = ReadRequest { run_token: run_token.clone(), artifact: artifact.clone(), name, offset: 0 };
    let publication = Publication { run_token, artifact, ..Publication::default() };
    let parts = tokio_stream::iter([Part { content: Some(Content::Publication(publication)) }]);
    [
        client.leaves(leaves).await.unwrap_err().code(),
        client.list(list).await.unwrap_err().code(),
        client.read(read).await.map(|_| ()).unwrap_err().code(),
        client.publish(parts).await.unwrap_err().code(),
    ]
}

/// How [`calls_for_files`] of a worker are answered.
const NOTHING_THERE: [tonic::Code; 4] =
    [tonic::Code::NotFound, tonic::Code::NotFound, tonic::Code::NotFound, tonic::Code::InvalidArgument];

#[tokio::test]
async fn strangers_neither_read_nor_write_files() {
    let directory = tempfile::tempdir().unwrap();
    let served = start(settings(1, 3), directory.path()).await;
    let mut client = CoordinatorClient::connect(served.url.clone()).await.unwrap();
    for token in [&[][..], &TOKEN[..31], &[0; 32]] {
        assert_eq!(calls_for_files(&mut client, token).await, [tonic::Code::Unauthenticated; 4]);
    }
    assert_eq!(calls_for_files(&mut client, &TOKEN).await, NOTHING_THERE);
    let rude = tokio_stream::iter([Part { content: Some(Content::Data(vec![1])) }]);
    assert_eq!(client.publish(rude).await.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn a_process_that_dies_before_it_joins_ends_the_run() {
    let directory = tempfile::tempdir().unwrap();
    let served = start(settings(1, 3), directory.path()).await;
    let death = Death { pid: 77, exit_code: Some(2), status: "exit status: 2".to_owned() };
    served.controls.send(Control::WorkerDied(death)).await.unwrap();
    let outcome = served.outcome.await.unwrap().unwrap();
    assert_eq!(outcome.exit_code, exit_code::BAD_INPUT);
    assert_eq!(outcome.reason, "worker process 77 ended before it joined: exit status: 2");
}

#[tokio::test]
async fn plain_text_stays_on_the_machine() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let run = Run {
        settings: settings(1, 1),
        job_json: String::new(),
        tokenizer_json: String::new(),
        admission: Admission::Secret(identity().run_token),
        collective_token: identity().collective_token,
        share: Share::new(Shelf::default(), [], tempfile::tempdir().unwrap().path().to_owned()).unwrap(),
        taken_over: None,
        storage_timeout: Duration::ZERO,
        insecure: false,
    };
    let files = RunFiles::create(directory.path(), &identity()).unwrap();
    let (events, controls) = (mpsc::channel(1).0, mpsc::channel(1).1);
    let error = serve(listener, run, files, events, controls, mpsc::unbounded_channel().0).await.unwrap_err();
    assert!(matches!(error, Error::NotLoopback(_)) && error.is_user_error());
}
