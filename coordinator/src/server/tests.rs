//! Real streams over loopback, with workers that compute nothing.

use std::path::Path;

use quintet_data::{Schedule, TrainingLength};
use quintet_proto::v1::coordinator_client::CoordinatorClient;
use quintet_proto::v1::{Actions, Finished, Lease, MicroBatch, Ready, Saved, StepDone};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;

use super::*;

mod certificates;

const TOKEN: [u8; 32] = [5; 32];

fn settings(workers: u32, steps: u64) -> Settings {
    Settings {
        schedule: Schedule::new(20, 8, 2, TrainingLength::Steps(steps)).unwrap(),
        dataset_fingerprint: "data".to_owned(),
        workers_expected: workers,
        workers_min: 1,
        heartbeat_timeout_ms: 60_000,
        step_timeout_ms: 60_000,
        logging_steps: 1,
        eval_steps: None,
        save_steps: None,
        digest_steps: None,
        start_step: 0,
        start_generation: 0,
        selection: None,
        past_evaluations: Vec::new(),
    }
}

/// A served run, and where to find it.
struct Served {
    url: String,
    controls: mpsc::Sender<Control>,
    events: mpsc::Receiver<Event>,
    outcome: JoinHandle<Result<Outcome>>,
}

async fn start(settings: Settings, directory: &Path) -> Served {
    start_with(settings, directory, Admission::Secret(Secret::from_bytes(TOKEN))).await
}

async fn start_with(settings: Settings, directory: &Path, admission: Admission) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let run = Run {
        settings,
        job_json: "{}".to_owned(),
        tokenizer_json: "t".repeat(10 << 20),
        admission,
        collective_token: Secret::from_bytes([6; 32]),
        insecure: false,
    };
    let files = RunFiles::create(directory).unwrap();
    let (controls, receiver) = mpsc::channel(8);
    let (sender, events) = mpsc::channel(1024);
    let outcome = tokio::spawn(serve(listener, run, files, sender, receiver));
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
        Self::join_by(CoordinatorClient::connect(url.to_owned()).await.unwrap(), hello).await
    }

    async fn join_by(client: CoordinatorClient<Channel>, hello: Hello) -> std::result::Result<Self, Status> {
        let (reports, outgoing) = mpsc::unbounded_channel();
        reports.send(FromWorker { report: Some(Report::Hello(hello)) }).unwrap();
        let mut client = client.max_decoding_message_size(TO_WORKER_BYTES_MAX);
        let commands = client.work(UnboundedReceiverStream::new(outgoing)).await?.into_inner();
        let mut worker = Self { reports, commands, generation: 0 };
        let Command::Welcome(welcome) = worker.recv().await else { panic!("no welcome") };
        assert_eq!((welcome.tokenizer_json.len(), welcome.collective_token.as_slice()), (10 << 20, &[6; 32][..]));
        let dataset_fingerprint = "data".to_owned();
        worker.send(Report::Ready(Ready { dataset_fingerprint, ..Ready::default() }));
        Ok(worker)
    }

    fn send(&self, report: Report) {
        self.reports.send(FromWorker { report: Some(report) }).unwrap();
    }

    async fn recv(&mut self) -> Command {
        self.commands.message().await.unwrap().unwrap().command.unwrap()
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
    Hello { protocol_version: PROTOCOL_VERSION, run_token: TOKEN.to_vec(), host: "h".to_owned(), pid: 1 }
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
    assert_eq!(outcome, Outcome { exit_code: 0, reason: "trained to step 40".to_owned() });
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
    let secret = Secret::from_bytes(TOKEN);
    let run = Run {
        settings: settings(1, 1),
        job_json: String::new(),
        tokenizer_json: String::new(),
        admission: Admission::Secret(secret.clone()),
        collective_token: secret,
        insecure: false,
    };
    let files = RunFiles::create(directory.path()).unwrap();
    let error = serve(listener, run, files, mpsc::channel(1).0, mpsc::channel(1).1).await.unwrap_err();
    assert!(matches!(error, Error::NotLoopback(_)) && error.is_user_error());
}
