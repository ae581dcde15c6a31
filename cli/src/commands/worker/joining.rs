//! Where a worker joins and with what: by flags, variables, or a launcher's invitation.

use std::io::{BufRead, Read};
use std::path::Path;
use std::time::Duration;

use quintet_coordinator::admission::{JOIN_TOKEN_VARIABLE, RUN_TOKEN_VARIABLE};
use quintet_coordinator::config::ClusterConfig;
use quintet_coordinator::launch::environment::Place;
use quintet_coordinator::launch::invitation::Invitation;
use quintet_coordinator::secret::Secret;
use quintet_worker::access::{Access, Pass};
use quintet_worker::session::SessionError;

use super::say;
use crate::args::WorkerArguments;
use crate::commands::tokens;
use crate::error::{Failure, Result, exit};

/// Longer than a coordinator takes to read its data and to train a tokenizer, where it starts with its workers.
const INVITATION_PATIENCE: Duration = Duration::from_secs(600);

/// Where to join and with what.
pub(super) struct Joining {
    pub(super) coordinator: String,
    /// By worker of this process: its token, and those of the processes that may take its place. A worker joins with the
    /// first that nobody has used.
    tokens: Vec<Vec<String>>,
    /// The file that they are from, and the line of the first: workers look there for themselves.
    pub(super) file: Option<(String, usize)>,
    /// How often a worker may be replaced.
    pub(super) max_restarts: u32,
}

impl Joining {
    pub(super) fn find(arguments: &WorkerArguments, place: &Place, count: u32) -> Result<Self> {
        let first = arguments.token_index.unwrap_or((place.rank.value * count) as usize);
        let joining = match &arguments.join {
            Some(path) if path == Path::new("-") => Self::from(read_invitation()?, arguments.token_index.unwrap_or(0)),
            Some(path) => Self::from(Invitation::wait_for(path, INVITATION_PATIENCE)?, first),
            None => {
                let coordinator = place.coordinator.as_ref().ok_or_else(|| {
                    Failure::bad_input(
                        "where is the coordinator? Give --coordinator URL, as it printed it, or set QUINTET_COORDINATOR",
                    )
                })?;
                Self::by_variables(coordinator.value.clone(), first, count)?
            }
        };
        let is_secret = |token: &String| Secret::from_hex(token).is_some();
        if !is_encrypted(&joining.coordinator) && !joining.tokens.iter().flatten().all(is_secret) {
            return Err(Failure::bad_input(format!(
                "{RUN_TOKEN_VARIABLE} must hold the token that the coordinator printed"
            )));
        }
        let tokens = if joining.file.is_some() { joining.tokens[0].len() } else { joining.tokens.len() };
        if tokens < count as usize {
            return Err(Failure::bad_input(format!("there are not {count} tokens to join by")));
        }
        Ok(joining)
    }

    fn from(invitation: Invitation, first: usize) -> Self {
        let Invitation { coordinator, mut tokens } = invitation;
        tokens.retain(|lives| !lives.is_empty());
        let first = first % tokens.len().max(1);
        tokens.rotate_left(first);
        let max_restarts = tokens.first().map_or(0, |lives| lives.len() as u32 - 1);
        Joining { coordinator, tokens, file: None, max_restarts }
    }

    /// What the environment gives; how often the run would have workers replaced, is not known yet.
    fn by_variables(coordinator: String, first: usize, count: u32) -> Result<Self> {
        let often = ClusterConfig::default().max_restarts;
        if !is_encrypted(&coordinator) {
            // The run has one for all.
            let token = std::env::var(RUN_TOKEN_VARIABLE).unwrap_or_default();
            let tokens = vec![vec![token]; count as usize];
            return Ok(Joining { coordinator, tokens, file: None, max_restarts: often });
        }
        let file = std::env::var(tokens::FILE_VARIABLE).ok().map(|path| (path, first));
        let max_restarts = if file.is_some() { often } else { 0 };
        Ok(Joining { coordinator, tokens: vec![tokens::given(first)?], file, max_restarts })
    }

    /// For the worker of this index in this process, which was replaced so often: the variable by which it joins.
    pub(super) fn ticket(&self, index: usize, restarts: usize) -> (&'static str, String) {
        if let Some((path, _)) = &self.file {
            return (tokens::FILE_VARIABLE, path.clone());
        }
        let lives = &self.tokens[index];
        if is_encrypted(&self.coordinator) {
            (JOIN_TOKEN_VARIABLE, lives[restarts].clone())
        } else {
            (RUN_TOKEN_VARIABLE, lives[0].clone())
        }
    }

    pub(super) fn access(&self, insecure: bool) -> std::result::Result<Access, SessionError> {
        let tokens = &self.tokens[0];
        match Secret::from_hex(&tokens[0]).filter(|_| !is_encrypted(&self.coordinator)) {
            Some(secret) => Ok(Access::Plain { run_token: *secret.as_bytes(), insecure }),
            None => Pass::join(&self.coordinator, tokens).map(Access::Certificate),
        }
    }
}

pub(super) fn is_encrypted(url: &str) -> bool {
    url.starts_with("https://")
}

/// From the launcher's pipe, whose end is this process's.
fn read_invitation() -> Result<Invitation> {
    let mut line = String::new();
    let mut stdin = std::io::stdin().lock();
    let read = stdin.read_line(&mut line);
    drop(stdin);
    read.map_err(|error| Failure::failed(format!("standard input: {error}")))?;
    std::thread::spawn(|| {
        // Whatever comes is none of ours; what counts is that it ends.
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        // Nor may there be anybody to read this.
        say("error: the launcher is gone");
        std::process::exit(i32::from(exit::FAILURE));
    });
    Invitation::parse(&line).ok_or_else(|| Failure::bad_input("standard input holds no invitation of a launcher"))
}
