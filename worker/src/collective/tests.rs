mod secure;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use quintet_kernels::{DType, Device};

use super::*;
use crate::Error;

const TOKEN: [u8; 32] = [7; 32];
const PATIENCE: Duration = Duration::from_secs(60);

fn loopback() -> Listener {
    Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap()
}

/// By TCP to rank 0, as between machines, and inside the machine among the others.
fn listener_of(rank: u32) -> Listener {
    if rank == 0 { Listener::bind_tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap() } else { loopback() }
}

fn connect(listener: &Listener, rank: u32, members: &[(u32, SocketAddr)], generation: u64) -> Result<Mesh> {
    connect_as(None, listener, rank, members, generation)
}

fn connect_as(
    identity: Option<&MeshIdentity>,
    listener: &Listener,
    rank: u32,
    members: &[(u32, SocketAddr)],
    generation: u64,
) -> Result<Mesh> {
    let membership = Membership { rank, members, token: &TOKEN, identity, generation };
    Mesh::connect(listener, membership, Instant::now() + PATIENCE, PATIENCE, Interrupter::new())
}

/// Runs `body` as every rank of a mesh, each on its own thread.
pub(crate) fn on_mesh<T: Send>(world: u32, body: impl Fn(u32, Collective) -> T + Sync) -> Vec<T> {
    let listeners: Vec<Listener> = (0..world).map(listener_of).collect();
    let members: Vec<(u32, SocketAddr)> = (0..world).zip(&listeners).map(|(rank, l)| (rank, l.local_addr())).collect();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .zip(&listeners)
            .map(|(rank, listener)| {
                let (members, body) = (&members, &body);
                scope.spawn(move || body(rank, Collective::tcp(connect(listener, rank, members, 1).unwrap())))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn gradient(leaf: u32, element: usize) -> f32 {
    let mixed = (u64::from(leaf) << 32 | element as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let scale = 10f32.powi((mixed >> 61) as i32 - 4);
    ((mixed >> 20 & 0xffff) as f32 - 32768.0) * scale
}

fn partial(range: Range<u32>, leaves: u32, elements: usize) -> TreeSum {
    let mut sum = TreeSum::new(&Device::cpu(), elements);
    sum.begin(range.clone(), leaves);
    for leaf in range {
        let mut buffer = sum.lend().unwrap();
        (0..).zip(buffer.as_mut_slice()).for_each(|(element, sum)| *sum = gradient(leaf, element));
        sum.push(buffer);
    }
    sum
}

/// An uneven contiguous partition, different for every step.
fn ranges(world: u32, leaves: u32, step: u64) -> Vec<Range<u32>> {
    let mut bounds: Vec<u32> =
        (1..world).map(|r| (u64::from(r) * (step * 5 + 3) % u64::from(leaves + 1)) as u32).collect();
    bounds.sort_unstable();
    bounds.insert(0, 0);
    bounds.push(leaves);
    bounds.windows(2).map(|b| b[0]..b[1]).collect()
}

#[test]
fn any_number_of_ranks_gives_the_bits_of_one() {
    let cases: Vec<(u32, usize)> = vec![(1, 1), (2, 5), (3, 37), (4, 1000), (5, 16_384), (7, 70_001), (13, 150_003)];
    let expected: Vec<Vec<u32>> = cases
        .iter()
        .map(|&(leaves, elements)| {
            let mut total = Device::cpu().zeros(DType::F32, 1, elements).unwrap();
            let mut sum = partial(0..leaves, leaves, elements);
            let whole = 0..leaves;
            let mut local = Collective::local();
            local
                .reduce_tree(0, &mut sum, std::slice::from_ref(&whole), &Shards::replicated(elements, 1), &mut total)
                .unwrap();
            total.as_slice::<f32>().iter().map(|x| x.to_bits()).collect()
        })
        .collect();
    for world in 2..=4 {
        on_mesh(world, |rank, mut collective| {
            for (step, (&(leaves, elements), expected)) in (0u64..).zip(cases.iter().zip(&expected)) {
                let ranges = ranges(world, leaves, step);
                let mut sum = partial(ranges[rank as usize].clone(), leaves, elements);
                let mut total = Device::cpu().upload(&vec![f32::NAN; elements], 1, elements).unwrap();
                collective
                    .reduce_tree(step, &mut sum, &ranges, &Shards::replicated(elements, world), &mut total)
                    .unwrap();
                let bits: Vec<u32> = total.as_slice::<f32>().iter().map(|x| x.to_bits()).collect();
                assert!(bits == *expected, "world {world} rank {rank} {ranges:?} × {elements}");
            }
        });
    }
}

#[test]
fn ranks_get_the_sums_of_what_they_hold_and_then_all_of_it() {
    let (leaves, elements) = (5, 7 * 32_768 + 100);
    let mut expected = Device::cpu().zeros(DType::F32, 1, elements).unwrap();
    let whole = 0..leaves;
    let mut sum = partial(whole.clone(), leaves, elements);
    let shards = Shards::replicated(elements, 1);
    Collective::local().reduce_tree(0, &mut sum, std::slice::from_ref(&whole), &shards, &mut expected).unwrap();
    let expected = expected.as_slice::<f32>();
    for world in [2, 3, 4, 9] {
        on_mesh(world, |rank, mut collective| {
            let shards = Shards::sharded(elements, world);
            let ranges = ranges(world, leaves, 3);
            let mut sum = partial(ranges[rank as usize].clone(), leaves, elements);
            let mut total = Device::cpu().upload(&vec![0.5; elements], 1, elements).unwrap();
            collective.reduce_tree(1, &mut sum, &ranges, &shards, &mut total).unwrap();
            let held = shards.parts(rank);
            let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|x| x.to_bits()).collect() };
            for part in &held {
                let total = &total.as_slice::<f32>()[part.clone()];
                assert!(bits(total) == bits(&expected[part.clone()]), "rank {rank} of {world}");
            }
            let got: usize = held.iter().map(ExactSizeIterator::len).sum();
            let untouched = total.as_slice::<f32>().iter().filter(|&&x| x == 0.5).count();
            assert!(untouched >= elements - got, "rank {rank} of {world} was sent what it does not hold");
            collective.gather_slices(1, &shards, total.view_mut()).unwrap();
            assert!(bits(total.as_slice()) == bits(expected), "rank {rank} of {world}");
        });
    }
}

#[test]
fn bytes_are_gathered_by_rank() {
    for world in [1, 3] {
        on_mesh(world, |rank, mut collective| {
            let message = |rank: u32| vec![rank as u8; rank as usize * 1000];
            let all: Vec<Vec<u8>> = (0..world).map(message).collect();
            assert_eq!(collective.all_gather_bytes(1, &message(rank)).unwrap(), all);
            let root = world - 1;
            let gathered = collective.gather_bytes(2, root, &message(rank)).unwrap();
            assert_eq!(gathered, (rank == root).then_some(all));
        });
    }
}

#[test]
fn an_interrupt_releases_a_blocked_rank() {
    let barrier = Barrier::new(2);
    on_mesh(2, |rank, mut collective| {
        if rank == 1 {
            // Keeps this rank's connection open until the other was released.
            barrier.wait();
            return;
        }
        let Collective::Tcp(mesh) = &collective else { unreachable!() };
        let interrupter = mesh.interrupter();
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| interrupter.interrupt());
            let error = collective.all_gather_bytes(0, b"hello").unwrap_err();
            assert!(matches!(error, Error::Interrupted), "{error}");
        });
        assert!(matches!(collective.all_gather_bytes(0, b""), Err(Error::Interrupted)));
        assert!(began.elapsed() < PATIENCE / 2);
        barrier.wait();
    });
}

#[test]
fn an_interrupt_ends_a_rendezvous() {
    let (listener, absent) = (loopback(), loopback());
    let members = [(0, listener.local_addr()), (1, absent.local_addr())];
    let interrupter = Interrupter::new();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let membership = Membership { rank: 0, members: &members, token: &TOKEN, identity: None, generation: 1 };
            let deadline = Instant::now() + PATIENCE;
            Mesh::connect(&listener, membership, deadline, PATIENCE, interrupter.clone())
        });
        interrupter.interrupt();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Interrupted)));
    });
}

#[test]
fn a_dead_rank_is_named() {
    on_mesh(2, |rank, mut collective| {
        if rank == 1 {
            return;
        }
        let error = collective.all_gather_bytes(0, b"").unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error}");
    });
}

#[test]
fn a_death_in_the_middle_of_a_reduction_frees_all_others() {
    let (leaves, elements) = (6, 3_000_000);
    let ranges = [0..2, 2..4, 4..6];
    let began = Instant::now();
    on_mesh(3, |rank, mut collective| {
        collective.all_gather_bytes(0, b"").unwrap();
        if rank == 2 {
            return;
        }
        // More than the sockets hold, so that the senders are blocked when rank 2 is gone.
        let mut sum = partial(ranges[rank as usize].clone(), leaves, elements);
        let mut total = Device::cpu().zeros(DType::F32, 1, elements).unwrap();
        let error =
            collective.reduce_tree(1, &mut sum, &ranges, &Shards::replicated(elements, 3), &mut total).unwrap_err();
        assert!(matches!(error, Error::PeerLost { .. }), "{error}");
    });
    assert!(began.elapsed() < PATIENCE / 2, "waited for a time limit");
}

#[test]
fn ranks_out_of_step_notice() {
    on_mesh(2, |rank, mut collective| {
        let error = collective.all_gather_bytes(u64::from(rank), b"").unwrap_err();
        let expected = matches!(error, Error::Protocol { .. } | Error::PeerLost { .. });
        assert!(expected, "{error}");
    });
}

#[test]
fn a_silent_rank_is_named() {
    let listeners = [loopback(), loopback()];
    let members = [(0, listeners[0].local_addr()), (1, listeners[1].local_addr())];
    let barrier = Barrier::new(2);
    let rank = |rank: u32, silence_limit| {
        let membership = Membership { rank, members: &members, token: &TOKEN, identity: None, generation: 1 };
        let deadline = Instant::now() + PATIENCE;
        let listener = &listeners[rank as usize];
        Mesh::connect(listener, membership, deadline, silence_limit, Interrupter::new()).unwrap()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _mesh = rank(1, PATIENCE);
            barrier.wait();
        });
        let mut mesh = rank(0, Duration::from_millis(20));
        let error = mesh.all_gather_bytes(0, b"").unwrap_err();
        assert!(matches!(error, Error::PeerSilent { rank: 1, .. }), "{error}");
        barrier.wait();
    });
}

#[test]
fn strangers_do_not_keep_the_mesh_from_forming() {
    let listeners = [loopback(), loopback()];
    let members = [(0, listeners[0].local_addr()), (1, listeners[1].local_addr())];
    // In the backlog before the honest rank: silent, garbage, gone, another job, an older generation.
    let dial = || TcpStream::connect(members[0].1).unwrap();
    let silent = dial();
    let mut garbage = dial();
    garbage.write_all(&[b'G'; 4096]).unwrap();
    drop(dial());
    let other_token = [8; 32];
    let hello = |token, generation| {
        let membership = Membership { rank: 1, members: &members, token, identity: None, generation };
        let mut stream = dial();
        stream.write_all(&super::rendezvous::hello(membership, 1, 0)).unwrap();
        stream
    };
    let refused = [hello(&other_token, 5), hello(&TOKEN, 4)];
    std::thread::scope(|scope| {
        let ranks: Vec<_> = [0, 1]
            .map(|rank| {
                let (listener, members) = (&listeners[rank as usize], &members);
                scope.spawn(move || {
                    let mut mesh = connect(listener, rank, members, 5).unwrap();
                    mesh.all_gather_bytes(0, &[rank as u8]).unwrap()
                })
            })
            .into();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), [[0], [1]]);
        }
    });
    for mut stream in refused {
        let mut answer = Vec::new();
        // A reset is as good a refusal as an orderly end; an answer would be none.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty());
    }
    drop(silent);
}

#[test]
fn the_listener_serves_one_generation_after_another() {
    let listeners = [loopback(), loopback()];
    let members = [(0, listeners[0].local_addr()), (1, listeners[1].local_addr())];
    std::thread::scope(|scope| {
        for rank in [0, 1] {
            let (listeners, members) = (&listeners, &members);
            scope.spawn(move || {
                for generation in 1..=3 {
                    let listener = &listeners[rank as usize];
                    let mut mesh = connect(listener, rank, members, generation).unwrap();
                    mesh.all_gather_bytes(0, &[rank as u8]).unwrap();
                }
            });
        }
    });
}

#[test]
fn a_missing_rank_is_named_at_the_deadline() {
    let (listener, absent) = (loopback(), loopback());
    let members = [(0, listener.local_addr()), (1, absent.local_addr())];
    let membership = Membership { rank: 0, members: &members, token: &TOKEN, identity: None, generation: 9 };
    let deadline = Instant::now() + Duration::from_millis(30);
    let error = Mesh::connect(&listener, membership, deadline, PATIENCE, Interrupter::new()).err();
    assert!(matches!(error, Some(Error::Rendezvous { rank: 1, generation: 9, .. })), "{error:?}");
}

#[test]
fn a_rank_whose_machine_does_not_answer_is_told_apart_from_one_that_is_late() {
    let (listener, late) = (loopback(), loopback());
    // Whoever asks here is refused.
    let gone = loopback().local_addr();
    let members = [(0, late.local_addr()), (1, gone), (2, listener.local_addr())];
    let membership = Membership { rank: 2, members: &members, token: &TOKEN, identity: None, generation: 9 };
    let began = Instant::now();
    let deadline = began + Duration::from_secs(60);
    let error = Mesh::connect(&listener, membership, deadline, PATIENCE, Interrupter::new()).err().unwrap();
    assert_eq!(error.unreachable(), [1], "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "nobody waits for the deadline");
}

#[test]
fn a_broadcast_reaches_those_it_is_for() {
    let copies = on_mesh(4, |rank, mut collective| {
        let mut bytes = vec![rank as u8; 100_000];
        for round in 0..3 {
            if rank != 2 {
                collective.broadcast(7, 1, &[0, 3], &mut bytes).unwrap();
            }
            if rank == 1 {
                bytes[round] += 1;
            }
        }
        // What follows is not disturbed.
        let ranks = collective.all_gather_bytes(7, &[rank as u8]).unwrap();
        assert_eq!(ranks, [[0], [1], [2], [3]]);
        bytes
    });
    let mut expected = vec![1; 100_000];
    expected[..2].fill(2);
    assert_eq!((&copies[0], &copies[3]), (&expected, &expected));
    assert_eq!(copies[2], vec![2; 100_000]);
}
