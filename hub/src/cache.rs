//! A repository's part of the cache, in the layout of huggingface_hub:
//!
//! ```text
//! .locks/models--google--flan-t5-small/<etag>.lock
//! models--google--flan-t5-small/
//!     refs/main                           the commit
//!     blobs/<etag>, <etag>.incomplete     contents
//!     snapshots/<commit>/config.json      -> ../../blobs/<etag>
//! ```

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::download::{Client, Entry};
use crate::repository::is_commit;
use crate::{Error, Progress, Repository, Result, wanted};

pub(crate) struct Cache {
    /// Of the repository.
    folder: PathBuf,
    locks: PathBuf,
    revision: String,
}

impl Cache {
    pub(crate) fn new(cache: &Path, repository: &Repository) -> Self {
        let name = format!("models--{}", repository.name().replace('/', "--"));
        Self {
            folder: cache.join(&name),
            locks: cache.join(".locks").join(&name),
            revision: repository.revision().to_string(),
        }
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The folder of the revision's files, if they are all there.
    pub(crate) fn complete_snapshot(&self) -> Result<Option<PathBuf>> {
        let commit = match is_commit(&self.revision) {
            true => self.revision.clone(),
            false => match fs::read_to_string(self.folder.join("refs").join(&self.revision)) {
                Ok(commit) => commit.trim().to_string(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::file("read", &self.folder.join("refs"))(error)),
            },
        };
        let snapshot = self.snapshot(&commit);
        Ok((is_commit(&commit) && wanted::is_complete(&snapshot)).then_some(snapshot))
    }

    /// Notes which commit the revision is.
    pub(crate) fn remember(&self, commit: &str) -> Result<()> {
        if is_commit(&self.revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(&self.revision);
        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        create_folder_of(&path)?;
        fs::write(&beside, commit).and_then(|()| fs::rename(&beside, &path)).map_err(Error::file("write", &path))
    }

    /// Sees to it that the snapshot has a file.
    pub(crate) fn fetch(
        &self,
        client: &Client,
        commit: &str,
        name: &str,
        report: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let link = self.snapshot(commit).join(name);
        if link.is_file() {
            return Ok(());
        }
        let entry = client.entry(commit, name)?;
        let blob = self.folder.join("blobs").join(&entry.etag);
        create_folder_of(&blob)?;
        create_folder_of(&link)?;
        let lock = self.locks.join(format!("{}.lock", entry.etag));
        create_folder_of(&lock)?;
        let lock_file = File::create(&lock).map_err(Error::file("create", &lock))?;
        // Some network file systems have no locks; there, two may download the same at once, each from the start.
        let exclusive = lock_file.lock().is_ok();
        if !blob.is_file() {
            self.download(client, &entry, &blob, exclusive, report)?;
        }
        let target = Path::new("../../blobs").join(&entry.etag);
        match symlink(&target, &link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::file("create", &link)(error)),
            _ => Ok(()),
        }
    }

    fn download(
        &self,
        client: &Client,
        entry: &Entry,
        blob: &Path,
        exclusive: bool,
        report: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let suffix = if exclusive { String::new() } else { format!(".{}", std::process::id()) };
        let mut incomplete = blob.as_os_str().to_owned();
        incomplete.push(format!("{suffix}.incomplete"));
        let incomplete = PathBuf::from(incomplete);
        client.download(entry, &incomplete, report)?;
        fs::rename(&incomplete, blob).map_err(Error::file("rename", &incomplete))
    }
}

fn create_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(Error::file("create", folder))
}
