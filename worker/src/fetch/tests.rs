//! A coordinator that hands out one file, not always as it should.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use quintet_proto::TOKEN_BYTES;
use quintet_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use quintet_proto::v1::{FromWorker, JoinReply, JoinRequest, LeavesReply, LeavesRequest, ListReply, ListRequest};
use quintet_proto::v1::{Part, Piece, Published, ReadRequest, ToWorker};
use tokio_stream::iter;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::access::Access;
use crate::session::Ended;

type Answer<T> = std::result::Result<T, Status>;

/// What it hands out.
#[derive(Default)]
struct Shop {
    listed: Vec<v1::File>,
    content: Vec<u8>,
    /// Breaks off the first answer after so many bytes.
    breaks_after: Option<usize>,
    asked: AtomicUsize,
    sent: AtomicUsize,
}

#[derive(Clone)]
struct Service(Arc<Shop>);

#[tonic::async_trait]
impl Coordinator for Service {
    type WorkStream = tokio_stream::Empty<Answer<ToWorker>>;
    type ReadStream = tokio_stream::Iter<std::vec::IntoIter<Answer<Piece>>>;

    async fn join(&self, _: Request<JoinRequest>) -> Answer<Response<JoinReply>> {
        Err(Status::unimplemented(""))
    }

    async fn work(&self, _: Request<Streaming<FromWorker>>) -> Answer<Response<Self::WorkStream>> {
        Err(Status::unimplemented(""))
    }

    async fn leaves(&self, _: Request<LeavesRequest>) -> Answer<Response<LeavesReply>> {
        Err(Status::unimplemented(""))
    }

    async fn publish(&self, _: Request<Streaming<Part>>) -> Answer<Response<Published>> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<ListRequest>) -> Answer<Response<ListReply>> {
        Ok(Response::new(ListReply { files: self.0.listed.clone() }))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Answer<Response<Self::ReadStream>> {
        let shop = &self.0;
        let data = &shop.content[request.get_ref().offset as usize..];
        let is_first = shop.asked.fetch_add(1, Ordering::Relaxed) == 0;
        let breaks_after = shop.breaks_after.filter(|_| is_first);
        let data = &data[..breaks_after.unwrap_or(data.len())];
        shop.sent.fetch_add(data.len(), Ordering::Relaxed);
        let mut pieces: Vec<Answer<Piece>> = data.chunks(3).map(|data| Ok(Piece { data: data.to_vec() })).collect();
        if breaks_after.is_some() {
            pieces.push(Err(Status::unavailable("broken")));
        }
        Ok(Response::new(iter(pieces)))
    }
}

/// Serves a shop, and the way there.
fn open(shop: Shop) -> (Arc<Shop>, Remote, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let (address, shop) = (listener.local_addr().unwrap(), Arc::new(shop));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let service = CoordinatorServer::new(Service(Arc::clone(&shop)));
    runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let access = Access::Plain { run_token: [1; TOKEN_BYTES], insecure: false };
    (shop, Remote::new(address, access, Duration::from_secs(60), Ended::default()), runtime)
}

fn listed(name: &str, content: &[u8]) -> v1::File {
    let digest = blake3::hash(content).as_bytes().to_vec();
    v1::File { name: name.to_owned(), bytes: content.len() as u64, digest }
}

const CONTENT: &[u8] = b"the weights of a model";

#[test]
fn what_breaks_off_goes_on_and_is_there_once_for_all() {
    let shop = Shop {
        listed: vec![listed("a", CONTENT)],
        content: CONTENT.to_vec(),
        breaks_after: Some(7),
        ..Shop::default()
    };
    let (shop, remote, _runtime) = open(shop);
    let cache = tempfile::tempdir().unwrap();
    let all = std::thread::scope(|scope| {
        let threads = [0; 3].map(|_| scope.spawn(|| fetch(&remote, "model", cache.path()).unwrap()));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(fs::read(all[0].directory.join("a")).unwrap(), CONTENT);
    assert_eq!(all.iter().map(|fetched| fetched.bytes).sum::<u64>(), CONTENT.len() as u64);
    assert_eq!((shop.asked.load(Ordering::Relaxed), shop.sent.load(Ordering::Relaxed)), (2, CONTENT.len()));
    // The last that uses it removes it.
    let directory = all[0].directory.clone();
    for (number, fetched) in all.into_iter().enumerate() {
        assert!(directory.exists(), "{number}");
        fetched.remove().unwrap();
    }
    assert!(!directory.exists());
}

#[test]
fn what_a_process_that_was_killed_had_is_not_fetched_again() {
    let shop = Shop { listed: vec![listed("a", CONTENT)], content: CONTENT.to_vec(), ..Shop::default() };
    let (shop, remote, _runtime) = open(shop);
    let cache = tempfile::tempdir().unwrap();
    let fetched = fetch(&remote, "model", cache.path()).unwrap();
    let part = fetched.directory.with_extension("part");
    fs::rename(&fetched.directory, &part).unwrap();
    fs::write(part.join("a"), &CONTENT[..9]).unwrap();
    let again = fetch(&remote, "model", cache.path()).unwrap();
    assert_eq!(
        (again.bytes, fs::read(again.directory.join("a")).unwrap()),
        (CONTENT.len() as u64 - 9, CONTENT.to_vec())
    );
    assert_eq!(shop.sent.load(Ordering::Relaxed), 2 * CONTENT.len() - 9);
}

#[test]
fn other_bytes_than_were_listed_are_refused() {
    let longer = [CONTENT, b"!"].concat();
    let mut other = CONTENT.to_vec();
    other[4] ^= 1;
    for content in [&other, &longer, &CONTENT[1..].to_vec(), &Vec::new()] {
        let shop = Shop { listed: vec![listed("a", CONTENT)], content: content.clone(), ..Shop::default() };
        let (_shop, remote, _runtime) = open(shop);
        let cache = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let error = fetch(&remote, "model", cache.path()).unwrap_err();
            assert!(error.to_string().contains("does not match its digest"), "{error}");
        }
        let names = fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(names.into_iter().all(|name| name.ends_with(".part") || name.ends_with(".lock")));
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in ["", "..", "../a", "/tmp/a", "a/b", ".a", "a\0"] {
        let (shop, remote, _runtime) = open(Shop { listed: vec![listed(name, CONTENT)], ..Shop::default() });
        let cache = tempfile::tempdir().unwrap();
        let error = fetch(&remote, "model", cache.path()).unwrap_err();
        assert!(error.to_string().contains("no file that could be kept here"), "{name:?}: {error}");
        assert_eq!((fs::read_dir(cache.path()).unwrap().count(), shop.asked.load(Ordering::Relaxed)), (0, 0));
    }
}
