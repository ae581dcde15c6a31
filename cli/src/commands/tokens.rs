//! `quintet tokens`: join tokens, and the file that holds them.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use quintet_coordinator::admission::JOIN_TOKEN_VARIABLE;
use quintet_identity::{Authority, Role, TOKEN_TEXT_BYTES_MAX};

use crate::args::TokensArguments;
use crate::error::{Failure, Result, exit};

/// The environment variable that names a file of join tokens, one a line.
pub(crate) const FILE_VARIABLE: &str = "QUINTET_JOIN_TOKEN_FILE";

/// A file of tokens for the largest run is not longer.
const FILE_BYTES_MAX: u64 = 64 << 20;

pub(crate) fn run(arguments: TokensArguments) -> Result<u8> {
    let authority = Authority::open(&arguments.authority, &arguments.authority)?;
    let lifetime = Duration::from_secs(u64::from(arguments.hours) * 3600);
    print!("{}", issue(&authority, Role::Worker, arguments.count, lifetime)?);
    Ok(exit::DONE)
}

/// So many tokens, one a line.
pub(crate) fn issue(authority: &Authority, role: Role, count: u32, lifetime: Duration) -> Result<String> {
    let token = |_| Ok(authority.issue_token(role, SystemTime::now(), lifetime)?.to_text() + "\n");
    (0..count).map(token).collect()
}

/// Writes a file that only its owner reads.
pub(crate) fn write(path: &Path, tokens: &str) -> Result<()> {
    let write = || {
        // One that is there may have other permissions.
        match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(tokens.as_bytes())
    };
    write().map_err(|error| Failure::failed(format!("{}: cannot write: {error}", path.display())))
}

/// The tokens that a worker was given, those from `index` on first.
pub(crate) fn given(index: usize) -> Result<Vec<String>> {
    if let Some(token) = variable(JOIN_TOKEN_VARIABLE) {
        return Ok(vec![token]);
    }
    let Some(path) = variable(FILE_VARIABLE) else {
        let problem = "or name a file of such, for the coordinator is beyond this machine";
        return Err(Failure::bad_input(format!(
            "{JOIN_TOKEN_VARIABLE} must hold a join token, {FILE_VARIABLE} {problem}"
        )));
    };
    let unfit = |problem: &str| Failure::bad_input(format!("{FILE_VARIABLE}: {path}: {problem}"));
    if fs::metadata(&path).map_err(|error| unfit(&error.to_string()))?.len() > FILE_BYTES_MAX {
        return Err(unfit("it is too large for a file of join tokens"));
    }
    let text = fs::read_to_string(&path).map_err(|error| unfit(&error.to_string()))?;
    let mut tokens: Vec<String> =
        text.lines().filter(|line| !line.is_empty() && line.len() <= TOKEN_TEXT_BYTES_MAX).map(String::from).collect();
    if tokens.is_empty() {
        return Err(unfit("it holds no join token"));
    }
    let first = index % tokens.len();
    tokens.rotate_left(first);
    Ok(tokens)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
