//! How the ranks of a generation find each other: between each pair the higher rank dials
//! and the lower accepts, both prove that they know the job's token, and whatever else
//! connects is dropped. Where ranks have certificates, all of that, and all that follows,
//! is encrypted for a peer with a certificate of the same authority.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::handshake::MeshIdentity;
use super::stream::{self, Door, Stream};
use super::tcp::{Link, Mesh};
use super::wire::Ciphers;
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"QUINTET\0";
const PROTOCOL_VERSION: u32 = 1;
/// magic, version, generation, sender's rank, receiver's rank, keyed hash of what precedes.
const HELLO_BYTES: usize = 8 + 4 + 8 + 4 + 4 + 32;

/// How long a stranger may hold a handshake open.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Handshakes under way at once; more are closed at once, and an honest rank dials again.
const HANDSHAKES_MAX: usize = 64;
/// A rank whose machine has not answered, or has refused, for so long is given up: the coordinator may know better. (One
/// that is busy answers all the same, as its system does it.)
const UNREACHABLE_LIMIT: Duration = Duration::from_secs(4);
/// Pause of the accept loop, of a dialer between attempts, and between looks at the flags.
const ACCEPT_PAUSE: Duration = Duration::from_millis(1);
const DIAL_PAUSE: Duration = Duration::from_millis(20);
const LOOK_UP: Duration = Duration::from_millis(50);

/// The port on which a worker accepts the other ranks; outlives generations.
pub struct Listener {
    door: Door,
    address: SocketAddr,
}

impl Listener {
    /// Binds `address`; port 0 takes a free one, see [`Listener::local_addr`]. Ranks on the same machine come by a Unix
    /// socket.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        Self::open(address, true)
    }

    /// [`Listener::bind`] for TCP alone: what is measured or tried is then what machines do between each other.
    pub fn bind_tcp(address: SocketAddr) -> Result<Self> {
        Self::open(address, false)
    }

    fn open(address: SocketAddr, local: bool) -> Result<Self> {
        let opened = Door::open(address, local).map_err(|source| Error::Listen { address, source });
        opened.map(|(door, address)| Self { door, address })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }
}

/// What every rank of a generation agrees on, and its own place in it.
#[derive(Clone, Copy)]
pub struct Membership<'a> {
    pub rank: u32,
    /// Rank and address of every member, one's own included: ranks `0..world`, each once.
    pub members: &'a [(u32, SocketAddr)],
    /// The job's secret; never sent, only hashed with.
    pub token: &'a [u8; 32],
    /// For ranks that do not share a machine; all of a generation have one or none has.
    pub identity: Option<&'a MeshIdentity>,
    pub generation: u64,
}

/// Breaks off whatever a mesh is waiting for, from any thread, for good.
#[derive(Clone, Default)]
pub struct Interrupter {
    state: Arc<InterruptState>,
}

#[derive(Default)]
struct InterruptState {
    interrupted: AtomicBool,
    sockets: Mutex<Vec<Stream>>,
}

impl Interrupter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every present and future call on the mesh return [`Error::Interrupted`].
    pub fn interrupt(&self) {
        self.state.interrupted.store(true, Ordering::SeqCst);
        self.shut_sockets();
    }

    pub fn is_interrupted(&self) -> bool {
        self.state.interrupted.load(Ordering::SeqCst)
    }

    /// Shuts every connection, which releases the threads blocked on them.
    pub(super) fn shut_sockets(&self) {
        for socket in self.state.sockets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            socket.shut();
        }
    }

    fn watch(&self, sockets: Vec<Stream>) {
        *self.state.sockets.lock().unwrap_or_else(PoisonError::into_inner) = sockets;
        // An interrupt between its flag and this registration found no sockets to shut.
        if self.is_interrupted() {
            self.shut_sockets();
        }
    }
}

/// Connects every pair of members. `silence_limit` bounds every later wait for a peer.
///
/// # Errors
/// [`Error::Rendezvous`] names the first rank that is missing at `deadline`, or when one cannot be reached for long;
/// [`Error::Interrupted`] if `interrupter` fires first.
pub(super) fn connect(
    listener: &Listener,
    membership: Membership,
    deadline: Instant,
    silence_limit: Duration,
    interrupter: Interrupter,
) -> Result<Mesh> {
    let Membership { rank, members, generation, .. } = membership;
    let world = members.len();
    for peer in 0..world as u32 {
        assert_eq!(members.iter().filter(|m| m.0 == peer).count(), 1, "rank {peer} in {members:?}");
    }
    assert!((rank as usize) < world, "rank {rank} of {world}");

    let began = Instant::now();
    let Met { lines, unreachable } = meet(listener, membership, deadline, &interrupter);
    if interrupter.is_interrupted() {
        return Err(Error::Interrupted);
    }
    let mut links = Vec::with_capacity(world);
    let mut watched = Vec::with_capacity(world);
    for (peer, line) in (0u32..).zip(lines) {
        let lost = |source| Error::PeerLost { rank: peer, source };
        match line {
            Some(Line { stream, ciphers }) => {
                watched.push(stream.try_clone().map_err(lost)?);
                links.push(Some(Link::new(peer, stream, ciphers, silence_limit).map_err(lost)?));
            }
            None if peer == rank => links.push(None),
            None => {
                let address = address_of(peer, members);
                let seconds = began.elapsed().as_secs_f64();
                return Err(Error::Rendezvous { rank: peer, address, generation, seconds, unreachable });
            }
        }
    }
    interrupter.watch(watched);
    Ok(Mesh::new(rank, generation, links, interrupter))
}

fn address_of(rank: u32, members: &[(u32, SocketAddr)]) -> SocketAddr {
    members.iter().find(|m| m.0 == rank).expect("checked on entry: every rank is a member").1
}

/// A connection to a peer that has proved itself.
struct Line {
    stream: Stream,
    ciphers: Option<Ciphers>,
}

impl Line {
    fn send(&mut self, hello: &[u8; HELLO_BYTES]) -> io::Result<()> {
        match &mut self.ciphers {
            None => (&self.stream).write_all(hello),
            Some(ciphers) => ciphers.sealer.write(&mut &self.stream, hello).map(|_| ()),
        }
    }

    fn receive(&mut self, patience: Patience) -> io::Result<[u8; HELLO_BYTES]> {
        let mut hello = [0; HELLO_BYTES];
        let mut patient = Patient { stream: &self.stream, patience };
        match &mut self.ciphers {
            None => patient.read_exact(&mut hello)?,
            Some(ciphers) => {
                let mut filled = 0;
                while filled < HELLO_BYTES {
                    filled += ciphers.opener.read(&mut patient, &mut hello[filled..])?;
                }
            }
        }
        Ok(hello)
    }
}

/// What a rendezvous came to.
struct Met {
    /// One a rank, `None` for oneself and the missing.
    lines: Vec<Option<Line>>,
    /// Ranks that do not answer.
    unreachable: Vec<u32>,
}

/// Dials the lower ranks and accepts the higher ones until all are there or one is given up, the
/// deadline passes or an interrupt comes.
fn meet(listener: &Listener, membership: Membership, deadline: Instant, interrupter: &Interrupter) -> Met {
    let Membership { rank, members, .. } = membership;
    let mut lines: Vec<Option<Line>> = members.iter().map(|_| None).collect();
    let reached: Vec<Reached> = members.iter().map(|_| Reached::default()).collect();
    let over = AtomicBool::new(false);
    let keep_going = || !over.load(Ordering::SeqCst) && !interrupter.is_interrupted();
    let handshakes = AtomicUsize::new(0);
    let (arrived, arrivals) = mpsc::channel::<(u32, Line)>();

    std::thread::scope(|scope| {
        for (peer, reached) in (0..rank).zip(&reached) {
            let (arrived, keep_going) = (arrived.clone(), &keep_going);
            scope.spawn(move || dial(membership, peer, deadline, keep_going, &arrived, reached));
        }
        while lines.iter().filter(|s| s.is_some()).count() + 1 < members.len()
            && Instant::now() < deadline
            && keep_going()
            && !reached.iter().any(|reached| reached.failing() > UNREACHABLE_LIMIT)
        {
            while let Some(stream) = listener.door.accept() {
                if handshakes.fetch_add(1, Ordering::SeqCst) >= HANDSHAKES_MAX {
                    handshakes.fetch_sub(1, Ordering::SeqCst);
                    continue;
                }
                let (arrived, keep_going, handshakes) = (arrived.clone(), &keep_going, &handshakes);
                let limit = deadline.min(Instant::now() + HANDSHAKE_LIMIT);
                scope.spawn(move || {
                    if let Ok(met) = welcome(stream, membership, limit, keep_going) {
                        // The receiver outlives the scope, so this cannot fail.
                        let _ = arrived.send(met);
                    }
                    handshakes.fetch_sub(1, Ordering::SeqCst);
                });
            }
            match arrivals.recv_timeout(ACCEPT_PAUSE) {
                // A rank that dials twice has given its first connection up.
                Ok((peer, line)) => lines[peer as usize] = Some(line),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
        over.store(true, Ordering::SeqCst);
    });
    // Who is given up because of one tells of all that it does not reach.
    let unreachable = (0..).zip(&reached).filter(|(_, reached)| reached.failing() > UNREACHABLE_LIMIT / 2);
    let unreachable = unreachable.map(|(peer, _)| peer).collect();
    Met { lines, unreachable }
}

/// Whether a machine answers.
#[derive(Default)]
struct Reached {
    /// Since when it has not.
    failing_since: Mutex<Option<Instant>>,
}

impl Reached {
    fn note(&self, answers: bool) {
        let mut since = self.failing_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = if answers { None } else { Some(since.unwrap_or_else(Instant::now)) };
    }

    fn failing(&self) -> Duration {
        let since = *self.failing_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// Dials `peer` until it welcomes us: it may not listen yet, or still serve an older generation.
fn dial(
    membership: Membership,
    peer: u32,
    deadline: Instant,
    keep_going: &dyn Fn() -> bool,
    arrived: &Sender<(u32, Line)>,
    reached: &Reached,
) {
    let address = address_of(peer, membership.members);
    let patience = Patience { deadline, keep_going };
    let attempt = |local: bool| -> io::Result<Line> {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.clamp(Duration::from_millis(1), Duration::from_secs(1));
        let inside = if local { stream::dial_locally(address) } else { None };
        let stream = inside.map_or_else(|| Stream::dial(&address, limit), Ok).inspect_err(|_| reached.note(false))?;
        reached.note(true);
        let ciphers = membership.identity.map(|identity| identity.dial(&stream, &|s, b| patience.fill(s, b)));
        let mut line = Line { ciphers: ciphers.transpose()?, stream };
        line.send(&hello(membership, membership.rank, peer))?;
        if !same_hello(&line.receive(patience)?, &hello(membership, peer, membership.rank)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(line)
    };
    // In turns, so that whoever else has taken the name inside the machine does not keep ranks apart.
    for local in [true, false].into_iter().cycle() {
        if !keep_going() || Instant::now() >= deadline {
            return;
        }
        match attempt(local) {
            Ok(line) => {
                // The receiver outlives this thread, so this cannot fail.
                let _ = arrived.send((peer, line));
                return;
            }
            Err(_) => std::thread::sleep(DIAL_PAUSE),
        }
    }
}

/// Reads a hello, and answers it if it is from a higher rank of this job and generation.
fn welcome(
    stream: Stream,
    membership: Membership,
    deadline: Instant,
    keep_going: &dyn Fn() -> bool,
) -> io::Result<(u32, Line)> {
    let rank = membership.rank;
    let patience = Patience { deadline, keep_going };
    let ciphers = membership.identity.map(|identity| identity.answer(&stream, &|s, b| patience.fill(s, b)));
    let mut line = Line { ciphers: ciphers.transpose()?, stream };
    let received = line.receive(patience)?;
    for peer in rank + 1..membership.members.len() as u32 {
        if same_hello(&received, &hello(membership, peer, rank)) {
            line.send(&hello(membership, rank, peer))?;
            return Ok((peer, line));
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

pub(super) fn hello(membership: Membership, from: u32, to: u32) -> [u8; HELLO_BYTES] {
    let mut frame = [0; HELLO_BYTES];
    frame[..8].copy_from_slice(&MAGIC);
    frame[8..12].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    frame[12..20].copy_from_slice(&membership.generation.to_le_bytes());
    frame[20..24].copy_from_slice(&from.to_le_bytes());
    frame[24..28].copy_from_slice(&to.to_le_bytes());
    let proof = blake3::keyed_hash(membership.token, &frame[..28]);
    frame[28..].copy_from_slice(proof.as_bytes());
    frame
}

/// Compares in constant time what depends on the token.
fn same_hello(a: &[u8; HELLO_BYTES], b: &[u8; HELLO_BYTES]) -> bool {
    let proof = |frame: &[u8; HELLO_BYTES]| {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&frame[28..]);
        blake3::Hash::from_bytes(bytes)
    };
    a[..28] == b[..28] && proof(a) == proof(b)
}

/// How long to wait: until `deadline`, or until `keep_going` says no.
#[derive(Clone, Copy)]
struct Patience<'a> {
    deadline: Instant,
    keep_going: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    fn fill(self, stream: &Stream, buffer: &mut [u8]) -> io::Result<()> {
        Patient { stream, patience: self }.read_exact(buffer)
    }
}

/// A stream that gives up.
struct Patient<'a> {
    stream: &'a Stream,
    patience: Patience<'a>,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.patience.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !(self.patience.keep_going)() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left.min(LOOK_UP)))?;
            match self.stream.read(buffer) {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                outcome => return outcome,
            }
        }
    }
}
