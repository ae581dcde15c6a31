//! What workers need to join a run: where, and with which tokens.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How often a file is looked for that another host is to write.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// From the coordinator to workers, in a file that only their user can read, or through a pipe.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invitation {
    /// The coordinator's URL.
    pub coordinator: String,
    /// By worker, by its index among those that the invitation is for: a token, and one for each that may take its place
    /// when it has died.
    pub tokens: Vec<Vec<String>>,
}

impl Invitation {
    /// One line of text.
    pub fn to_line(&self) -> String {
        // Strings and lists of them always have a text.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// From [`Invitation::to_line`]; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text.trim()).ok()
    }

    /// Waits until `path` is there, at most for `patience`.
    ///
    /// # Errors
    /// [`Error::NoInvitation`].
    pub fn wait_for(path: &Path, patience: Duration) -> Result<Self> {
        let start = Instant::now();
        loop {
            match fs::read_to_string(path) {
                Ok(text) => {
                    let problem = "it is no invitation".to_owned();
                    return Self::parse(&text).ok_or(Error::NoInvitation { path: path.to_owned(), problem });
                }
                Err(_) if start.elapsed() < patience => std::thread::sleep(LOOK_INTERVAL),
                Err(error) => {
                    let problem = format!("after {} s: {error}", patience.as_secs());
                    return Err(Error::NoInvitation { path: path.to_owned(), problem });
                }
            }
        }
    }
}

/// An invitation that lies in a folder which the workers share, until this is dropped.
#[derive(Debug)]
pub struct InvitationFile(PathBuf);

impl InvitationFile {
    /// Writes `path`, for the eyes of this user only, and whole: beside it first.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write(path: PathBuf, invitation: &Invitation) -> Result<Self> {
        let beside = path.with_extension("tmp");
        // One that a run left behind which was killed.
        let _ = fs::remove_file(&beside);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options.open(&beside).and_then(|mut file| {
            file.write_all(invitation.to_line().as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&beside, &path)).map_err(Error::file("write", &path))?;
        Ok(Self(path))
    }
}

impl Drop for InvitationFile {
    fn drop(&mut self) {
        // The tokens in it are worth nothing any more.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation() -> Invitation {
        Invitation {
            coordinator: "http://127.0.0.1:4700".to_owned(),
            tokens: vec![vec!["a".to_owned()], vec!["b".to_owned()]],
        }
    }

    #[test]
    fn a_file_is_private_and_goes_with_its_run() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("join");
        let file = InvitationFile::write(path.clone(), &invitation()).unwrap();
        assert!(Invitation::wait_for(&path, Duration::ZERO).unwrap() == invitation());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        drop(file);
        let error = Invitation::wait_for(&path, Duration::ZERO).err().unwrap();
        assert!(error.to_string().contains("join: nobody has invited this worker: after 0 s: No such file"), "{error}");
    }

    #[test]
    fn a_worker_may_come_before_its_invitation() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("join");
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || Invitation::wait_for(&path, Duration::from_secs(60)).unwrap()
        });
        let _file = InvitationFile::write(path, &invitation()).unwrap();
        assert!(waiting.join().unwrap() == invitation());
    }

    #[test]
    fn anything_else_is_refused() {
        assert!(Invitation::parse("{}").is_none() && Invitation::parse("").is_none());
        assert!(Invitation::parse(&invitation().to_line()) == Some(invitation()));
    }
}
