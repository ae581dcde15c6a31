//! The hub's protocol: what a repository has, what a file is, and its content.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use serde::Deserialize;
use ureq::Agent;
use ureq::http::{HeaderMap, Response};

use crate::repository::is_commit;
use crate::{Error, Progress, Repository, Result, Settings};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the hub may be silent within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// So often in a row a connection may break without a byte.
const FRUITLESS_ATTEMPTS_MAX: u32 = 3;
const REDIRECTS_MAX: u32 = 5;
const BUFFER_BYTES: usize = 1 << 18;

/// What a repository is at a revision.
pub(crate) struct About {
    pub(crate) commit: String,
    pub(crate) files: Vec<String>,
}

/// What a file is.
pub(crate) struct Entry {
    name: String,
    url: String,
    /// The hash of its content: SHA-256 of large files, git's of others.
    pub(crate) etag: String,
    bytes: u64,
}

/// Asks the hub about one repository.
pub(crate) struct Client {
    agent: Agent,
    endpoint: String,
    repository: Repository,
    authorization: Option<String>,
}

type Answer = Response<ureq::Body>;

impl Client {
    pub(crate) fn new(settings: &Settings, repository: &Repository) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("quintet/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            // A token is for the hub, not for the servers it sends us to.
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .max_redirects(REDIRECTS_MAX)
            .build();
        Self {
            agent: config.new_agent(),
            endpoint: settings.endpoint.trim_end_matches('/').to_string(),
            repository: repository.clone(),
            authorization: settings.token.as_ref().map(|token| format!("Bearer {token}")),
        }
    }

    pub(crate) fn about(&self) -> Result<About> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let what = "its list of files";
        let revision = self.repository.revision().replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, self.repository.name());
        let mut answer = self.get(&url, what, |request| request)?;
        let text = answer.body_mut().read_to_string().map_err(|error| self.unreachable(&error))?;
        let info: Info = serde_json::from_str(&text).map_err(|error| self.senseless(what, error.to_string()))?;
        if !is_commit(&info.sha) {
            return Err(self.senseless(what, format!("{:?} is no commit", info.sha)));
        }
        Ok(About { commit: info.sha, files: info.siblings.into_iter().map(|sibling| sibling.rfilename).collect() })
    }

    /// Large files lie elsewhere, and only the answer that says where tells what they are: it is not followed.
    pub(crate) fn entry(&self, commit: &str, name: &str) -> Result<Entry> {
        let mut url = format!("{}/{}/resolve/{commit}/{name}", self.endpoint, self.repository.name());
        for _ in 0..=REDIRECTS_MAX {
            let request = self.agent.head(&url).header("Accept-Encoding", "identity").config().max_redirects(0).build();
            let request = match &self.authorization {
                Some(authorization) => request.header("Authorization", authorization),
                None => request,
            };
            let answer = request.call().map_err(|error| self.unreachable(&error))?;
            let headers = answer.headers();
            let location = text(headers, "location").filter(|_| answer.status().is_redirection());
            match location {
                // A repository that was renamed.
                Some(path) if path.starts_with('/') => url = format!("{}{path}", self.endpoint),
                Some(_) => return self.describe(name, url, headers),
                None if answer.status().is_success() => return self.describe(name, url, headers),
                None => return Err(self.refused(name, &answer)),
            }
        }
        Err(self.senseless(name, "it leads in circles".to_string()))
    }

    fn describe(&self, name: &str, url: String, headers: &HeaderMap) -> Result<Entry> {
        let etag = text(headers, "x-linked-etag").or(text(headers, "etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        // It becomes the name of a file.
        if etag.is_empty() || !etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return Err(self.senseless(name, format!("{etag:?} is no hash of its content")));
        }
        let bytes = text(headers, "x-linked-size").or(text(headers, "content-length"));
        let Some(bytes) = bytes.and_then(|bytes| bytes.parse().ok()) else {
            return Err(self.senseless(name, "no size".to_string()));
        };
        Ok(Entry { name: name.to_string(), url, etag: etag.to_string(), bytes })
    }

    /// Brings the whole content into `path`, from where it ends now, and verifies it.
    pub(crate) fn download(&self, entry: &Entry, path: &Path, report: &mut dyn FnMut(Progress)) -> Result<()> {
        let mut file =
            OpenOptions::new().create(true).append(true).read(true).open(path).map_err(Error::file("open", path))?;
        let mut have = file.metadata().map_err(Error::file("look at", path))?.len();
        if have > entry.bytes {
            have = restart(&file, path)?;
        }
        let mut fruitless = 0;
        while have < entry.bytes {
            let before = have;
            let problem = self.append(entry, &mut file, path, &mut have, report)?;
            fruitless = if have > before { 0 } else { fruitless + 1 };
            if fruitless == FRUITLESS_ATTEMPTS_MAX {
                return Err(Error::Interrupted {
                    repository: self.repository.to_string(),
                    file: entry.name.clone(),
                    bytes: have,
                    total_bytes: entry.bytes,
                    problem,
                });
            }
        }
        file.sync_all().map_err(Error::file("sync", path))?;
        self.verify(entry, path).inspect_err(|_| {
            // What is wrong with it is the error to report.
            let _ = std::fs::remove_file(path);
        })
    }

    /// Takes what one connection gives; what was wrong with it, if not all came.
    fn append(
        &self,
        entry: &Entry,
        file: &mut File,
        path: &Path,
        have: &mut u64,
        report: &mut dyn FnMut(Progress),
    ) -> Result<String> {
        let range = format!("bytes={have}-");
        let mut answer = match self.get(&entry.url, &entry.name, |request| match have {
            0 => request,
            _ => request.header("Range", &range),
        }) {
            Err(Error::Unreachable { problem, .. }) => return Ok(problem),
            answer => answer?,
        };
        if *have > 0 && answer.status() != 206 {
            *have = restart(file, path)?;
        }
        let mut body = answer.body_mut().with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        while *have < entry.bytes {
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok("it ended early".to_string()),
                Ok(count) => count,
                Err(error) => return Ok(error.to_string()),
            };
            let room = usize::try_from(entry.bytes - *have).unwrap_or(count);
            let chunk = &buffer[..count.min(room)];
            file.write_all(chunk).map_err(Error::file("write", path))?;
            *have += chunk.len() as u64;
            report(Progress { file: &entry.name, bytes: *have, total_bytes: entry.bytes });
        }
        Ok(String::new())
    }

    /// The etag of a large file is the SHA-256 of its content, that of another git's hash of it.
    fn verify(&self, entry: &Entry, path: &Path) -> Result<()> {
        let is_hash = entry.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let mut context = match entry.etag.len() {
            64 if is_hash => Context::new(&SHA256),
            40 if is_hash => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", entry.bytes).as_bytes());
                context
            }
            // Of another server, that names contents otherwise.
            _ => return Ok(()),
        };
        let mut file = File::open(path).map_err(Error::file("open", path))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match file.read(&mut buffer).map_err(Error::file("read", path))? {
                0 => break,
                count => context.update(&buffer[..count]),
            }
        }
        let hash: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if hash.eq_ignore_ascii_case(&entry.etag) {
            return Ok(());
        }
        Err(Error::Mismatch {
            repository: self.repository.to_string(),
            file: entry.name.clone(),
            problem: format!("its hash is {hash}, not {}", entry.etag),
        })
    }

    fn get(
        &self,
        url: &str,
        what: &str,
        with: impl Fn(
            ureq::RequestBuilder<ureq::typestate::WithoutBody>,
        ) -> ureq::RequestBuilder<ureq::typestate::WithoutBody>,
    ) -> Result<Answer> {
        let mut request = self.agent.get(url).header("Accept-Encoding", "identity");
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let answer = with(request).call().map_err(|error| self.unreachable(&error))?;
        match answer.status().is_success() {
            true => Ok(answer),
            false => Err(self.refused(what, &answer)),
        }
    }

    /// What an answer other than the one hoped for means. To strangers the hub tells of what is private and what is not
    /// there alike.
    fn refused(&self, file: &str, answer: &Answer) -> Error {
        let (repository, endpoint) = (self.repository.to_string(), self.endpoint.clone());
        match (answer.status().as_u16(), text(answer.headers(), "x-error-code")) {
            (_, Some("GatedRepo")) | (403, _) => Error::Forbidden { repository, endpoint },
            (_, Some("RevisionNotFound")) => Error::UnknownRevision { repository, endpoint },
            (401, _) | (404, _) => Error::Unknown { repository, endpoint },
            (status, _) => Error::Status { repository, endpoint, file: file.to_string(), status },
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        Error::Unreachable {
            repository: self.repository.to_string(),
            endpoint: self.endpoint.clone(),
            problem: error.to_string(),
        }
    }

    fn senseless(&self, file: &str, problem: String) -> Error {
        let (repository, endpoint) = (self.repository.to_string(), self.endpoint.clone());
        Error::Answer { repository, endpoint, file: file.to_string(), problem }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Empties a file that cannot be gone on with; its length.
fn restart(file: &File, path: &Path) -> Result<u64> {
    file.set_len(0).map_err(Error::file("empty", path))?;
    Ok(0)
}
