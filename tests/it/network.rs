//! Hosts that are network namespaces, and a switch between them that this process plays packet by packet: every link can
//! be cut, lossy or slow, in each direction by itself. The kernel needs nothing for that but TUN devices, and nothing of it
//! outlives the test: a namespace goes with the last that is in it.

use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::harness::{Process, announce, quintet, run};
use crate::jobs::{Workspace, words};
use crate::random::Random;

/// The switch looks this often whether it is still wanted.
const LOOK_UP: Duration = Duration::from_millis(50);
const PACKET_BYTES_MAX: usize = 64 << 10;
/// Of every host's address.
const NETWORK: [u8; 3] = [10, 77, 0];

/// One direction of the line between two hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) cut: bool,
    /// So many packets of a hundred are lost.
    pub(crate) loss_percent: u64,
    /// A packet is under way for between half and one and a half of this time, so that some overtake others.
    pub(crate) delay: Duration,
}

/// By sender and receiver.
type Links = Arc<Mutex<Vec<Vec<Link>>>>;

/// The host of a run's coordinator.
pub(crate) const COORDINATOR: usize = 0;

/// Hosts on one network, `10.77.0.1` and so on; the first is number 0.
pub(crate) struct Network {
    hosts: Vec<Host>,
    links: Links,
    over: Arc<AtomicBool>,
    switch: Option<JoinHandle<()>>,
}

impl Network {
    /// None, said aloud, where that is not permitted or the tools are missing.
    pub(crate) fn new(hosts: usize, seed: u64) -> Option<Self> {
        let made: io::Result<Vec<(Host, File)>> = (0..hosts).map(Host::new).collect();
        let (hosts, wires): (Vec<Host>, Vec<File>) = match made {
            Ok(made) => made.into_iter().unzip(),
            Err(error) => {
                announce(&format!(
                    "SKIPPED: a test on hosts that are network namespaces, which cannot be made here: {error}"
                ));
                return None;
            }
        };
        let links = Arc::new(Mutex::new(vec![vec![Link::default(); hosts.len()]; hosts.len()]));
        let over = Arc::new(AtomicBool::new(false));
        let switch = Switch { wires, links: links.clone(), random: Random(seed), held: BinaryHeap::new(), sent: 0 };
        let ended = over.clone();
        let switch = Some(std::thread::spawn(move || switch.run(&ended)));
        Some(Network { hosts, links, over, switch })
    }

    /// A coordinator on its host, for a run in the folder `run`, or to go on with it.
    pub(crate) fn coordinator(&self, workspace: &Workspace, settings: &str) -> Process {
        let host = &self.hosts[COORDINATOR];
        let mut command = quintet(workspace.path());
        command.args(["coordinator", "job.toml", "--resume", "--output", "run"]);
        command.args(["--listen", &format!("{}:4700", host.address)]).args(words(settings));
        host.start(&mut command)
    }

    /// A worker of that run.
    pub(crate) fn worker(&self, host: usize, workspace: &Workspace, token: &str) -> Process {
        let url = format!("https://{}:4700", self.hosts[COORDINATOR].address);
        let mut command = quintet(workspace.path());
        command.args(["worker", "--coordinator", &url, "--threads", "1", "--wait-seconds", "30"]);
        self.hosts[host].start(command.env("QUINTET_JOIN_TOKEN", token))
    }

    /// Changes both directions of the links between `host` and each of `others`.
    pub(crate) fn change(&self, host: usize, others: &[usize], link: Link) {
        for &other in others {
            self.change_one_way(host, other, link);
            self.change_one_way(other, host, link);
        }
    }

    pub(crate) fn change_one_way(&self, from: usize, to: usize, link: Link) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)[from][to] = link;
    }

    /// All hosts but this one.
    pub(crate) fn others(&self, host: usize) -> Vec<usize> {
        (0..self.hosts.len()).filter(|&other| other != host).collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(switch) = self.switch.take() {
            let _ = switch.join();
        }
    }
}

/// A network namespace with a host name.
struct Host {
    namespaces: [File; 2],
    address: String,
}

impl Host {
    /// And the end of its wire.
    fn new(number: usize) -> io::Result<(Self, File)> {
        let address = format!("10.77.0.{}", number + 1);
        let make = || {
            // SAFETY: tables of files and memory stay shared; this thread alone is somewhere else, and about to end.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWUTS) }?;
            rustix::system::sethostname(format!("host{number}").as_bytes())?;
            let wire = open_wire("wire")?;
            configure(&format!("link set lo up\naddr add {address}/24 dev wire\nlink set wire up\n"))?;
            let namespaces = [File::open("/proc/thread-self/ns/net")?, File::open("/proc/thread-self/ns/uts")?];
            Ok((Host { namespaces, address: address.clone() }, wire))
        };
        std::thread::scope(|scope| scope.spawn(make).join()).unwrap()
    }

    /// Starts a process on this host.
    fn start(&self, command: &mut Command) -> Process {
        let start = || {
            let kinds = [LinkNameSpaceType::Network, LinkNameSpaceType::HostNameAndNISDomainName];
            for (namespace, kind) in self.namespaces.iter().zip(kinds) {
                move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
            }
            Process::start(command)
        };
        std::thread::scope(|scope| scope.spawn(start).join()).unwrap()
    }
}

/// A new network device of this thread's namespace, whose packets are read from and written to the file.
fn open_wire(name: &str) -> io::Result<File> {
    /// `struct ifreq` of `linux/if.h`, as far as this call reads it.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    const IFF_TUN: u16 = 1;
    const IFF_NO_PI: u16 = 0x1000;
    const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
    let wire = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open("/dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the call reads and writes one `struct ifreq`, for which the request has its size and layout.
    unsafe { ioctl(&wire, Setter::<TUNSETIFF, Request>::new(request)) }?;
    Ok(wire)
}

/// Has `ip` of iproute2 carry out commands in this thread's namespace.
fn configure(commands: &str) -> io::Result<()> {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().unwrap().write_all(commands.as_bytes())?;
    match child.wait()?.success() {
        true => Ok(()),
        false => Err(io::Error::other("ip failed")),
    }
}

/// A packet under way. The greatest is the one that is due first.
#[derive(PartialEq, Eq)]
struct Packet {
    due: Instant,
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Carries packets from wire to wire.
struct Switch {
    wires: Vec<File>,
    links: Links,
    random: Random,
    held: BinaryHeap<Packet>,
    sent: u64,
}

impl Switch {
    fn run(mut self, over: &AtomicBool) {
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        while !over.load(Ordering::Relaxed) {
            self.wait();
            for from in 0..self.wires.len() {
                while let Ok(bytes) = (&self.wires[from]).read(&mut buffer) {
                    self.take(from, &buffer[..bytes]);
                }
            }
            self.deliver();
        }
    }

    /// Until a packet comes or is due.
    fn wait(&self) {
        let now = Instant::now();
        let longest = self.held.peek().map_or(LOOK_UP, |packet| packet.due.saturating_duration_since(now).min(LOOK_UP));
        let timeout = Timespec { tv_sec: 0, tv_nsec: longest.subsec_nanos().into() };
        let mut events: Vec<PollFd> = self.wires.iter().map(|wire| PollFd::new(wire, PollFlags::IN)).collect();
        match poll(&mut events, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the switch cannot wait: {error}"),
        }
    }

    fn take(&mut self, from: usize, packet: &[u8]) {
        // IPv4 to a neighbour; there is nobody for anything else.
        if packet.len() < 20 || packet[0] >> 4 != 4 || packet[16..19] != NETWORK {
            return;
        }
        let to = usize::from(packet[19]).wrapping_sub(1);
        if to >= self.wires.len() {
            return;
        }
        let link = self.links.lock().unwrap_or_else(PoisonError::into_inner)[from][to];
        if link.cut || self.random.below(100) < link.loss_percent {
            return;
        }
        let delay = link.delay / 2 + link.delay * self.random.below(1000) as u32 / 1000;
        self.sent += 1;
        self.held.push(Packet { due: Instant::now() + delay, number: self.sent, to, bytes: packet.to_vec() });
    }

    fn deliver(&mut self) {
        while self.held.peek().is_some_and(|packet| packet.due <= Instant::now()) {
            let Some(Packet { to, bytes, .. }) = self.held.pop() else { return };
            // A host whose queue is full loses it, as everywhere.
            let _ = (&self.wires[to]).write(&bytes);
        }
    }
}

/// Join tokens of the run in the folder `run`.
pub(crate) fn join_tokens(workspace: &Workspace, count: u32) -> Vec<String> {
    let made = run(workspace.path(), ["tokens", "run/security", "--count", &count.to_string()]).expect(0);
    made.stdout.lines().map(str::to_owned).collect()
}

/// Runs a test on a thread that has mounts of its own, on which [`mount_small_disk`] works. Says aloud where that is not
/// permitted.
pub(crate) fn with_own_mounts(test: impl FnOnce() + Send) {
    let run = || {
        // SAFETY: tables of files and memory stay shared; this thread and those that it starts see other mounts.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        match unshared.and_then(|()| mount_change("/", private)) {
            Ok(()) => test(),
            Err(error) => {
                announce(&format!("SKIPPED: a test with mounts of its own, which cannot be made here: {error}"))
            }
        }
    };
    let ended = std::thread::scope(|scope| scope.spawn(run).join());
    // The test's own words, not those of a thread that failed.
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// A file system of so many bytes at `path`, gone with the test.
pub(crate) fn mount_small_disk(path: &Path, bytes: u64) {
    std::fs::create_dir_all(path).unwrap();
    let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(options.as_c_str())).unwrap();
}

/// Takes all room that is left where `ballast` is.
pub(crate) fn fill_disk(ballast: &Path) {
    let mut file = File::create(ballast).unwrap();
    let block = [0; 4096];
    loop {
        match file.write_all(&block) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => return,
            Err(error) => panic!("{}: {error}", ballast.display()),
        }
    }
}
