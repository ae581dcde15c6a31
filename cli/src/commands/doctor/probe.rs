//! The end of `quintet doctor --cluster` on a host: answers questions on standard input until it ends.

use std::io::{BufRead, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use quintet_coordinator::launch::address;
use quintet_data::Splits;
use quintet_identity::{Credentials, FINGERPRINT_BYTES, MemberKey};
use serde::{Deserialize, Serialize};

use super::link::{self, Broken, Measured};
use crate::args::JobArguments;
use crate::error::{Failure, Result, exit};
use crate::job::Job;
use crate::prepare::working_directory;

/// A question; a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Question {
    /// Proves to others that this host is one of the cluster.
    Certificate {
        certificate: Vec<u8>,
        authority: Vec<u8>,
        fingerprint: [u8; FINGERPRINT_BYTES],
    },
    Clock,
    /// Listen, on the address that this host has on the way to another.
    Listen {
        towards: IpAddr,
    },
    Measure(SocketAddr),
}

/// What a probe says; a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// At the start.
    Hello {
        version: String,
        data: std::result::Result<String, String>,
        public_key: Vec<u8>,
    },
    Certified,
    /// Nanoseconds since 1970.
    Clock(u64),
    Listening(SocketAddr),
    Link(std::result::Result<Measured, Broken>),
    Failed(String),
}

pub(super) fn run(job: &Path) -> Result<u8> {
    let key = MemberKey::generate()?;
    let version = env!("CARGO_PKG_VERSION").to_string();
    say(&Answer::Hello { version, data: fingerprint(job), public_key: key.public_key().to_vec() })?;
    let mut key = Some(key);
    let mut credentials = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Failure::failed(format!("standard input: {error}")))?;
        let question = serde_json::from_str(&line)
            .map_err(|error| Failure::bad_input(format!("no question of a doctor: {error}")))?;
        let answer = match question {
            Question::Certificate { certificate, authority, fingerprint } => match key.take() {
                Some(key) => {
                    credentials = Some(Credentials::new(key, certificate, authority, &fingerprint)?);
                    Answer::Certified
                }
                None => Answer::Failed("this probe has a certificate".to_string()),
            },
            Question::Clock => Answer::Clock(now_ns()),
            Question::Listen { towards } => match &credentials {
                Some(credentials) => listen(towards, credentials).map_or_else(Answer::Failed, Answer::Listening),
                None => Answer::Failed("this probe has no certificate".to_string()),
            },
            Question::Measure(address) => match &credentials {
                Some(credentials) => Answer::Link(link::measure(address, credentials)),
                None => Answer::Failed("this probe has no certificate".to_string()),
            },
        };
        say(&answer)?;
    }
    Ok(exit::DONE)
}

/// A job, for all of it but its number of workers, which is told elsewhere.
pub(super) fn load(job: &Path) -> Result<Job> {
    let overrides = vec!["cluster.min_workers=1".to_string()];
    Job::load(&JobArguments { job: job.to_path_buf(), overrides, ..JobArguments::default() })
}

/// Of the data, as this host finds it.
fn fingerprint(job: &Path) -> std::result::Result<String, String> {
    let read = || -> Result<String> {
        let job = load(job)?;
        let splits = Splits::load(&job.data, &working_directory()?, job.training.seed)?;
        Ok(splits.fingerprint())
    };
    read().map_err(|failure| failure.message)
}

fn listen(towards: IpAddr, credentials: &Credentials) -> std::result::Result<SocketAddr, String> {
    let ip = address::towards(SocketAddr::new(towards, 9)).map_err(|error| format!("no way to {towards}: {error}"))?;
    let listener = TcpListener::bind((ip, 0)).map_err(|error| format!("cannot listen on {ip}: {error}"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let config = credentials.mesh_server().map_err(|error| error.to_string())?;
    std::thread::spawn(move || link::serve(listener, config));
    Ok(address)
}

/// Nanoseconds since 1970 by this host's clock.
pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn say(answer: &Answer) -> Result<()> {
    let line = serde_json::to_string(answer).map_err(|error| Failure::failed(error.to_string()))?;
    let mut stdout = std::io::stdout().lock();
    let said = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    said.map_err(|error| Failure::failed(format!("standard output: {error}")))
}
