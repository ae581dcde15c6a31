//! Ranks with certificates, and whoever else comes to their ports.

use std::time::SystemTime;

use quintet_identity::{Authority, Credentials, MemberKey, Role};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> (tempfile::TempDir, Authority) {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::open(directory.path(), directory.path()).unwrap();
    (directory, authority)
}

/// An identity whose certificate was made at `since` for an hour.
fn identity(authority: &Authority, role: Role, since: SystemTime) -> MeshIdentity {
    let token = authority.issue_token(role, since, HOUR).unwrap().to_text();
    let key = MemberKey::generate().unwrap();
    let admitted = authority.redeem(&token, key.public_key(), since, HOUR).unwrap().unwrap();
    let own = authority.certificate().to_vec();
    let credentials = Credentials::new(key, admitted.certificate, own, &authority.fingerprint()).unwrap();
    MeshIdentity::new(&credentials).unwrap()
}

fn worker(authority: &Authority) -> MeshIdentity {
    identity(authority, Role::Worker, SystemTime::now())
}

#[test]
fn sealed_ranks_give_the_bits_of_one() {
    let (_directory, authority) = authority();
    let listeners = [0, 1, 2].map(listener_of);
    let members: Vec<(u32, SocketAddr)> = (0..).zip(&listeners).map(|(rank, l)| (rank, l.local_addr())).collect();
    let (leaves, elements) = (7, 150_003);
    let mut expected = Device::cpu().zeros(DType::F32, 1, elements).unwrap();
    let whole = 0..leaves;
    let mut sum = partial(whole.clone(), leaves, elements);
    Collective::local()
        .reduce_tree(0, &mut sum, std::slice::from_ref(&whole), &Shards::replicated(elements, 1), &mut expected)
        .unwrap();
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let (authority, listeners, members, expected) = (&authority, &listeners, &members, &expected);
            scope.spawn(move || {
                // Each with a key of its own.
                let identity = worker(authority);
                let listener = &listeners[rank as usize];
                let mesh = connect_as(Some(&identity), listener, rank, members, 1).unwrap();
                let mut collective = Collective::tcp(mesh);
                for step in 0..3 {
                    let ranges = ranges(3, leaves, step);
                    let mut sum = partial(ranges[rank as usize].clone(), leaves, elements);
                    let mut total = Device::cpu().zeros(DType::F32, 1, elements).unwrap();
                    collective
                        .reduce_tree(step, &mut sum, &ranges, &Shards::replicated(elements, 3), &mut total)
                        .unwrap();
                    assert!(total.as_slice::<f32>() == expected.as_slice::<f32>());
                    let gathered = collective.all_gather_bytes(step, &[rank as u8; 300_000]).unwrap();
                    assert!((0..3).zip(gathered).all(|(rank, bytes)| bytes == [rank; 300_000]));
                }
            });
        }
    });
}

#[test]
fn strangers_are_left_outside_a_sealed_mesh() {
    let (_directory, authority) = authority();
    let (_other_directory, other) = self::authority();
    let listeners = [loopback(), loopback()];
    let members = [(0, listeners[0].local_addr()), (1, listeners[1].local_addr())];
    let garbage = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(members[0].1).unwrap();
        // The other end may have hung up already.
        let _ = stream.write_all(bytes);
        stream
    };
    let in_plain_text = Membership { rank: 1, members: &members, token: &TOKEN, identity: None, generation: 5 };
    // In the backlog before the honest rank.
    let strangers = [
        garbage(&[]),
        garbage(&[b'G'; 70_000]),
        garbage(b"GET / HTTP/1.1\r\n\r\n"),
        // The head of a TLS record that is longer than any.
        garbage(&[22, 3, 3, 0xff, 0xff]),
        garbage(&[22, 3, 3, 0x3f, 0xff, 1]),
        // Knows the token, but has no certificate.
        garbage(&super::super::rendezvous::hello(in_plain_text, 1, 0)),
    ];
    let impostors = [
        (worker(&other), 5),
        (identity(&authority, Role::Worker, SystemTime::now() - 3 * HOUR), 5),
        (identity(&authority, Role::Reader, SystemTime::now()), 5),
        // Of an old generation.
        (worker(&authority), 4),
    ];
    std::thread::scope(|scope| {
        let impostors: Vec<_> = impostors
            .iter()
            .map(|(identity, generation)| {
                let members = &members;
                // Rank 1 only dials, and would have to be believed by rank 0.
                scope.spawn(move || {
                    let own = loopback();
                    let identity = Some(identity);
                    let membership = Membership { rank: 1, members, token: &TOKEN, identity, generation: *generation };
                    let deadline = Instant::now() + Duration::from_millis(300);
                    Mesh::connect(&own, membership, deadline, PATIENCE, Interrupter::new()).err()
                })
            })
            .collect();
        let zero = scope.spawn(|| {
            let mut mesh = connect_as(Some(&worker(&authority)), &listeners[0], 0, &members, 5).unwrap();
            mesh.all_gather_bytes(0, &[0]).unwrap()
        });
        for impostor in impostors {
            let error = impostor.join().unwrap();
            assert!(matches!(error, Some(Error::Rendezvous { rank: 0, .. })), "{error:?}");
        }
        let mut mesh = connect_as(Some(&worker(&authority)), &listeners[1], 1, &members, 5).unwrap();
        assert_eq!(mesh.all_gather_bytes(0, &[1]).unwrap(), [[0], [1]]);
        assert_eq!(zero.join().unwrap(), [[0], [1]]);
    });
    drop(strangers);
}

#[test]
fn a_rank_without_certificates_meets_nobody_who_has_one() {
    let (_directory, authority) = authority();
    let listeners = [loopback(), loopback()];
    let members = [(0, listeners[0].local_addr()), (1, listeners[1].local_addr())];
    let identity = worker(&authority);
    std::thread::scope(|scope| {
        for (rank, identity) in [(0, Some(&identity)), (1, None)] {
            let (members, listener) = (&members, &listeners[rank as usize]);
            scope.spawn(move || {
                let membership = Membership { rank, members, token: &TOKEN, identity, generation: 1 };
                let deadline = Instant::now() + Duration::from_millis(200);
                let error = Mesh::connect(listener, membership, deadline, PATIENCE, Interrupter::new()).err();
                assert!(matches!(error, Some(Error::Rendezvous { .. })), "{error:?}");
            });
        }
    });
}
