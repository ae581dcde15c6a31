//! Models from the hub, which is here a server on the loopback interface that speaks the hub's protocol and can be told to
//! fail.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use quintet_hub::{Error, Repository, Settings, model};
use tempfile::TempDir;

use crate::harness::{Ended, Process, quintet, references};
use crate::jobs::Workspace;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPOSITORY: &str = "somebody/some-t5";
const TOKEN: &str = "hf_secret";

/// A file of the hub. Large ones are redirected to another path, as to another server.
#[derive(Clone)]
struct Content {
    bytes: Vec<u8>,
    etag: String,
    is_large: bool,
}

/// What the server is to do.
#[derive(Clone, Default)]
struct Behaviour {
    /// Answer everything with this, and this error code.
    status: Option<(u16, &'static str)>,
    /// Only those may read who have the token.
    private: bool,
    /// Break off an answer's body after so many bytes; that many times.
    cut: Option<(usize, u32)>,
    /// Say another size than there is.
    lie_about_size: bool,
    /// Give other bytes than those that were announced.
    corrupt: bool,
}

struct State {
    files: BTreeMap<String, Content>,
    behaviour: Behaviour,
    /// `GET /path bytes=5-`, as they came.
    requests: Vec<String>,
}

#[derive(Clone)]
struct Hub {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
}

impl Hub {
    fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let content = |(name, bytes): &(&str, Vec<u8>)| {
            let is_large = name.ends_with(".safetensors");
            (name.to_string(), Content { etag: hash(bytes, is_large), bytes: bytes.clone(), is_large })
        };
        let files = files.iter().map(content).collect();
        let state = State { files, behaviour: Behaviour::default(), requests: Vec::new() };
        let hub = Hub { state: Arc::new(Mutex::new(state)), address: listener.local_addr().unwrap() };
        let serving = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let hub = serving.clone();
                // A client that hangs up is its own affair.
                std::thread::spawn(move || hub.serve(stream?));
            }
        });
        hub
    }

    fn behave(&self, behaviour: Behaviour) {
        self.state.lock().unwrap().behaviour = behaviour;
    }

    /// Another content of a small file.
    fn put(&self, name: &str, bytes: &[u8]) {
        let content = Content { bytes: bytes.to_vec(), etag: hash(bytes, false), is_large: false };
        self.state.lock().unwrap().files.insert(name.to_string(), content);
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn settings(&self, cache: &Path) -> Settings {
        Settings { endpoint: format!("http://{}", self.address), cache: cache.into(), token: None, offline: false }
    }

    /// One request a connection.
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap_or(Ok(String::new()))?;
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_string());
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().to_string());
        let range = headers.get("range").cloned();
        let mut state = self.state.lock().unwrap();
        state.requests.push([method, &path, range.as_deref().unwrap_or("")].join(" ").trim_end().to_string());
        let behaviour = state.behaviour.clone();
        if let Some((status, code)) = behaviour.status {
            return write!(
                stream,
                "HTTP/1.1 {status} No\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        if behaviour.private && headers.get("authorization").is_none_or(|value| *value != format!("Bearer {TOKEN}")) {
            return write!(
                stream,
                "HTTP/1.1 401 No\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        if path == format!("/api/models/{REPOSITORY}/revision/main") {
            let files: Vec<_> = state.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
            let body = serde_json::json!({"sha": COMMIT, "siblings": files}).to_string();
            return write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
        let (name, elsewhere) = match path.strip_prefix(&format!("/{REPOSITORY}/resolve/{COMMIT}/")) {
            Some(name) => (name, false),
            None => (path.strip_prefix("/elsewhere/").unwrap_or_default(), true),
        };
        let Some(content) = state.files.get(name).cloned() else {
            return write!(
                stream,
                "HTTP/1.1 404 No\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        };
        let size = content.bytes.len() + usize::from(behaviour.lie_about_size);
        if content.is_large && !elsewhere {
            let (etag, address) = (&content.etag, self.address);
            return write!(
                stream,
                "HTTP/1.1 302 Found\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nETag: \"other\"\r\n\
                 Location: http://{address}/elsewhere/{name}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        let mut bytes = content.bytes.clone();
        if behaviour.corrupt {
            bytes[0] ^= 1;
        }
        let first = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        let body = &bytes[first.unwrap_or(0)..];
        let status = if first.is_some() { "206 Partial Content" } else { "200 OK" };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nETag: \"{}\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            content.etag,
            body.len()
        )?;
        if method == "HEAD" {
            return Ok(());
        }
        match behaviour.cut {
            Some((limit, times)) if times > 0 && body.len() > limit => {
                state.behaviour.cut = Some((limit, times - 1));
                stream.write_all(&body[..limit])
            }
            _ => stream.write_all(body),
        }
    }
}

/// What the hub takes for a file's etag.
fn hash(bytes: &[u8], is_large: bool) -> String {
    use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
    let mut context = Context::new(if is_large { &SHA256 } else { &SHA1_FOR_LEGACY_USE_ONLY });
    if !is_large {
        context.update(format!("blob {}\0", bytes.len()).as_bytes());
    }
    context.update(bytes);
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A small model, some files that nobody needs, and a cache to download into.
fn hub() -> (Hub, TempDir) {
    let read = |name: &str| fs::read(references().join("byt5").join(name)).unwrap();
    let hub = Hub::start(&[
        ("README.md", b"# A model".to_vec()),
        ("config.json", read("config.json")),
        ("flax_model.msgpack", vec![0; 100]),
        ("generation_config.json", read("generation_config.json")),
        ("model.safetensors", read("model.safetensors")),
        ("pytorch_model.bin", vec![0; 100]),
    ]);
    (hub, tempfile::tempdir().unwrap())
}

fn download(settings: &Settings) -> quintet_hub::Result<std::path::PathBuf> {
    model(settings, &Repository::parse(REPOSITORY).unwrap(), &mut |_| ())
}

#[test]
fn a_model_is_downloaded_once_into_the_cache_that_python_uses() {
    let (hub, cache) = hub();
    let settings = hub.settings(cache.path());
    let folder = download(&settings).unwrap();
    let repository = cache.path().join("models--somebody--some-t5");
    assert_eq!(folder, repository.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    let mut names: Vec<String> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors"]);
    for name in names {
        let state = hub.state.lock().unwrap();
        let content = &state.files[&name];
        assert_eq!(fs::read(folder.join(&name)).unwrap(), content.bytes, "{name}");
        assert_eq!(fs::read_link(folder.join(&name)).unwrap(), Path::new("../../blobs").join(&content.etag));
    }
    hub.requests();
    // Again: only whether it is still the same; offline, or of a commit, not even that.
    download(&settings).unwrap();
    assert_eq!(hub.requests(), [format!("GET /api/models/{REPOSITORY}/revision/main")]);
    assert_eq!(download(&Settings { offline: true, ..settings.clone() }).unwrap(), folder);
    let commit = Repository::parse(&format!("{REPOSITORY}@{COMMIT}")).unwrap();
    assert_eq!(model(&settings, &commit, &mut |_| ()).unwrap(), folder);
    assert_eq!(hub.requests(), [] as [String; 0]);
    // A hub that is gone is no reason to stop.
    let gone = Settings { endpoint: "http://127.0.0.1:1".into(), ..settings };
    assert_eq!(download(&gone).unwrap(), folder);
}

#[test]
fn a_download_that_breaks_goes_on_from_there() {
    let (hub, cache) = hub();
    let settings = hub.settings(cache.path());
    // Within a run.
    hub.behave(Behaviour { cut: Some((10_000, 2)), ..Behaviour::default() });
    let mut last = 0;
    let mut report = |progress: quintet_hub::Progress| {
        if progress.file == "model.safetensors" {
            assert!(progress.bytes > last && progress.bytes <= progress.total_bytes);
            last = progress.bytes;
        }
    };
    let folder = model(&settings, &Repository::parse(REPOSITORY).unwrap(), &mut report).unwrap();
    let ranges: Vec<String> = hub.requests().into_iter().filter(|request| request.contains("bytes=")).collect();
    assert!(ranges.iter().any(|request| request.ends_with("bytes=10000-")), "{ranges:?}");
    assert!(ranges.iter().any(|request| request.ends_with("bytes=20000-")), "{ranges:?}");
    assert!(folder.join("model.safetensors").is_file());

    // Over runs: the hub fails for good after half the file, and is well when asked again.
    let cache = tempfile::tempdir().unwrap();
    let settings = hub.settings(cache.path());
    let half = hub.state.lock().unwrap().files["model.safetensors"].bytes.len() / 2;
    let blobs = cache.path().join("models--somebody--some-t5/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let (etag, bytes) = {
        let state = hub.state.lock().unwrap();
        (state.files["model.safetensors"].etag.clone(), state.files["model.safetensors"].bytes[..half].to_vec())
    };
    fs::write(blobs.join(format!("{etag}.incomplete")), bytes).unwrap();
    hub.behave(Behaviour { cut: Some((0, u32::MAX)), ..Behaviour::default() });
    let error = download(&settings).unwrap_err();
    assert!(matches!(error, Error::Interrupted { .. }) && !error.is_user_error(), "{error}");
    hub.behave(Behaviour::default());
    hub.requests();
    let folder = download(&settings).unwrap();
    let range = format!("bytes={half}-");
    assert!(hub.requests().iter().any(|request| request.ends_with(&range)));
    let whole = hub.state.lock().unwrap().files["model.safetensors"].bytes.clone();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == whole);
}

#[test]
fn what_arrives_damaged_is_not_kept() {
    let (hub, cache) = hub();
    let settings = hub.settings(cache.path());
    hub.behave(Behaviour { corrupt: true, ..Behaviour::default() });
    let error = download(&settings).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    hub.behave(Behaviour { lie_about_size: true, ..Behaviour::default() });
    let error = download(&settings).unwrap_err();
    assert!(matches!(error, Error::Interrupted { .. }), "{error}");
    hub.behave(Behaviour::default());
    download(&settings).unwrap();
}

#[test]
fn a_private_repository_wants_the_token() {
    let (hub, cache) = hub();
    hub.behave(Behaviour { private: true, ..Behaviour::default() });
    let settings = hub.settings(cache.path());
    let error = download(&settings).unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }) && error.to_string().contains("HF_TOKEN"), "{error}");
    download(&Settings { token: Some(TOKEN.into()), ..settings }).unwrap();
}

/// `quintet generate` with a model of the hub.
fn generate(hub: &Hub, home: &Path, name: &str, more: &[(&str, &str)]) -> Ended {
    let mut command = quintet(home);
    command.args(["generate", "--model", name, "--tokenizer", "byt5", "--input", "a", "--max-new-tokens", "2"]);
    command.env("HF_HOME", home).env("HF_ENDPOINT", format!("http://{}", hub.address)).env_remove("HF_HUB_OFFLINE");
    command.env_remove("HF_TOKEN").envs(more.iter().copied());
    Process::start(&mut command).wait()
}

#[test]
fn whatever_the_hub_answers_is_one_line() {
    let (hub, home) = hub();
    let offline = generate(&hub, home.path(), REPOSITORY, &[("HF_HUB_OFFLINE", "1")]).expect(2);
    assert!(offline.error().contains("not in the cache"), "{}", offline.error());
    for (status, code, needle) in [
        (401, "RepoNotFound", "no such repository"),
        (401, "GatedRepo", "access is restricted"),
        (403, "GatedRepo", "access is restricted"),
        (404, "RepoNotFound", "no such repository"),
        (404, "RevisionNotFound", "no such revision"),
        (500, "", "status 500"),
    ] {
        hub.behave(Behaviour { status: Some((status, code)), ..Behaviour::default() });
        // What may be well again tomorrow is no bad input.
        let exit_code = if status < 500 { 2 } else { 1 };
        let ended = generate(&hub, home.path(), REPOSITORY, &[]).expect(exit_code);
        assert!(ended.error().contains(REPOSITORY) && ended.error().contains(needle), "{status}: {}", ended.error());
    }
    hub.behave(Behaviour { cut: Some((0, u32::MAX)), ..Behaviour::default() });
    let ended = generate(&hub, home.path(), REPOSITORY, &[]).expect(1);
    assert!(ended.error().contains("run the same again"), "{}", ended.error());
    hub.behave(Behaviour::default());
    generate(&hub, home.path(), REPOSITORY, &[]).expect(0);
    // The token of the home, and then without a network.
    generate(&hub, home.path(), REPOSITORY, &[("HF_HUB_OFFLINE", "1")]).expect(0);
    let ended = generate(&hub, home.path(), "nobody/nothing", &[]).expect(2);
    assert!(ended.error().contains("nobody/nothing"), "{}", ended.error());
}

#[test]
fn pickles_are_named_and_not_read() {
    let hub = Hub::start(&[("config.json", b"{}".to_vec()), ("pytorch_model.bin", vec![0; 10])]);
    let home = tempfile::tempdir().unwrap();
    let ended = generate(&hub, home.path(), REPOSITORY, &[]).expect(2);
    assert!(ended.error().contains("save_pretrained"), "{}", ended.error());
    assert!(!hub.requests().iter().any(|request| request.contains("resolve")), "nothing is downloaded in vain");
}

/// A workspace whose job begins with the hub's model.
fn workspace() -> Workspace {
    Workspace::fine_tuning(Path::new(REPOSITORY), "")
}

/// `quintet COMMAND …` in a workspace, with the hub.
fn run_with(hub: &Hub, workspace: &Workspace, arguments: &str) -> Ended {
    let mut command = quintet(workspace.path());
    command.args(arguments.split_whitespace());
    command.env("HF_HOME", workspace.path()).env("HF_ENDPOINT", format!("http://{}", hub.address));
    Process::start(command.env_remove("HF_HUB_OFFLINE")).wait()
}

#[test]
fn a_job_may_name_a_model_of_the_hub() {
    let (hub, _) = hub();
    let workspace = workspace();
    let train = "train job.toml --workers 2 --set training.max_steps=2";
    run_with(&hub, &workspace, train).expect(0);
    let lists = hub.requests().iter().filter(|request| request.contains("/api/")).count();
    assert_eq!(lists, 1, "workers take the commit that the coordinator chose");
    run_with(&hub, &workspace, &format!("{train} --resume")).expect(0);
}

#[test]
fn an_adapter_names_its_model_of_the_hub() {
    let (hub, _) = hub();
    let workspace = workspace();
    run_with(&hub, &workspace, "train job.toml --set training.max_steps=2 --set lora.r=2").expect(0);
    let config = fs::read_to_string(workspace.path().join("run/adapter/adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["base_model_name_or_path"], REPOSITORY, "neither a folder of the cache nor a commit");
    // Its generation_config.json, too.
    let generated = "generate --model run/adapter --input a --max-new-tokens 2 --json";
    let outputs = |ended: Ended| -> usize {
        serde_json::from_str::<serde_json::Value>(&ended.expect(0).stdout).unwrap()["outputs"].as_array().unwrap().len()
    };
    assert_eq!(outputs(run_with(&hub, &workspace, generated)), 1);
    hub.put("generation_config.json", br#"{"num_beams": 3, "num_return_sequences": 3}"#);
    fs::remove_dir_all(workspace.path().join("hub")).unwrap();
    assert_eq!(outputs(run_with(&hub, &workspace, generated)), 3);
}
