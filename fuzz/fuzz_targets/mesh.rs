//! What ranks hear from each other, over real sockets; the first byte chooses: a stranger at a rank's port, in plain text
//! or where TLS is expected, or a peer that was let in and sends frames.
#![no_main]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

use libfuzzer_sys::fuzz_target;
use quintet_identity::{Authority, Credentials, MemberKey, Role};
use quintet_worker::collective::{Collective, Interrupter, Listener, Membership, Mesh, MeshIdentity};

const TOKEN: [u8; 32] = [7; 32];
const GENERATION: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(5);
/// Long enough for a stranger's bytes to be read.
const VISIT: Duration = Duration::from_millis(5);

static IDENTITY: LazyLock<MeshIdentity> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let authority = Authority::open(directory.path(), directory.path()).expect("an authority");
    let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
    let token = authority.issue_token(Role::Worker, now, day).expect("a token").to_text();
    let key = MemberKey::generate().expect("random numbers");
    let admitted = authority.redeem(&token, key.public_key(), now, day).expect("written").expect("a good token");
    let own = authority.certificate().to_vec();
    let credentials = Credentials::new(key, admitted.certificate, own, &authority.fingerprint()).expect("credentials");
    MeshIdentity::new(&credentials).expect("an identity")
});

fuzz_target!(|bytes: &[u8]| {
    let Some((way, bytes)) = bytes.split_first() else { return };
    match way % 3 {
        0 => visit(None, bytes),
        1 => visit(Some(&IDENTITY), bytes),
        _ => answer(bytes),
    }
});

fn any_port() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

/// Says `bytes` to rank 0, which waits for rank 1 and must not take this for it.
fn visit(identity: Option<&MeshIdentity>, bytes: &[u8]) {
    let listener = Listener::bind_tcp(any_port()).expect("a port");
    let members = [(0, listener.local_addr()), (1, any_port())];
    let mut stranger = TcpStream::connect(listener.local_addr()).expect("a listener");
    // It may hang up at any byte.
    let _ = stranger.write_all(bytes).and_then(|()| stranger.shutdown(Shutdown::Write));
    let membership = Membership { rank: 0, members: &members, token: &TOKEN, identity, generation: GENERATION };
    let met = Mesh::connect(&listener, membership, Instant::now() + VISIT, PATIENCE, Interrupter::new());
    assert!(met.is_err(), "a stranger is a rank");
}

/// As rank 0, lets rank 1 in and then says `bytes` where frames are due.
fn answer(bytes: &[u8]) {
    let zero = TcpListener::bind(any_port()).expect("a port");
    let listener = Listener::bind_tcp(any_port()).expect("a port");
    let members = [(0, zero.local_addr().expect("bound")), (1, listener.local_addr())];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut peer, _) = zero.accept().expect("rank 1");
            let mut hello = [0; 60];
            peer.read_exact(&mut hello).expect("a hello");
            // The same with the ranks the other way round, and the proof of that.
            hello[20..28].rotate_left(4);
            let proof = blake3::keyed_hash(&TOKEN, &hello[..28]);
            hello[28..].copy_from_slice(proof.as_bytes());
            let _ = peer.write_all(&hello).and_then(|()| peer.write_all(bytes));
            let _ = peer.shutdown(Shutdown::Write);
            // Until the other end is done.
            let _ = peer.read_to_end(&mut Vec::new());
        });
        let membership =
            Membership { rank: 1, members: &members, token: &TOKEN, identity: None, generation: GENERATION };
        let mesh = Mesh::connect(&listener, membership, Instant::now() + PATIENCE, PATIENCE, Interrupter::new());
        let mut collective = Collective::tcp(mesh.expect("a handshake"));
        for step in 0..3 {
            if collective.all_gather_bytes(step, b"one").is_err() {
                break;
            }
        }
    });
}
