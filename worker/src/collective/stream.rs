//! A connection between two ranks: TCP, or between processes of one machine a Unix socket, which moves bytes at less
//! than half the cost: nothing is cut into segments, and nothing waits for acknowledgements.
//!
//! A rank that listens on an address also listens on a socket of that name in Linux's abstract namespace. Such names
//! belong to a network namespace, as addresses do: who finds the name shares the address's machine. The handshake is the
//! same as over TCP, and only processes of the same user are talked to at all, because anybody may take a name.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// What a Unix socket may hold that was not read yet.
#[cfg(target_os = "linux")]
const BUFFER_BYTES: usize = 1 << 20;

pub(super) enum Stream {
    Tcp(TcpStream),
    Local(UnixStream),
}

impl Stream {
    /// Connects by TCP, within `timeout`.
    pub(super) fn dial(address: &SocketAddr, timeout: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(address, timeout)?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Local(stream) => Self::Local(stream.try_clone()?),
        })
    }

    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Local(stream) => stream.set_read_timeout(timeout),
        }
    }

    pub(super) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
            Self::Local(stream) => stream.set_write_timeout(timeout),
        }
    }

    /// Ends both directions, for all that hold the connection.
    pub(super) fn shut(&self) {
        // An error means that the connection is already gone, which is what is wanted.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Local(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match *self {
            Stream::Tcp(stream) => (&*stream).read(buffer),
            Stream::Local(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match *self {
            Stream::Tcp(stream) => (&*stream).write(bytes),
            Stream::Local(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // Neither holds anything back.
        Ok(())
    }
}

/// Where a rank waits for others.
pub(super) struct Door {
    tcp: TcpListener,
    /// Where there is such a thing, and the name was free.
    local: Option<UnixListener>,
}

impl Door {
    /// `local`: also for processes of the same machine.
    pub(super) fn open(address: SocketAddr, local: bool) -> io::Result<(Self, SocketAddr)> {
        let tcp = TcpListener::bind(address)?;
        tcp.set_nonblocking(true)?;
        let address = tcp.local_addr()?;
        let local = if local { listen_locally(address) } else { None };
        Ok((Self { tcp, local }, address))
    }

    /// Somebody who has come, if anybody has.
    pub(super) fn accept(&self) -> Option<Stream> {
        let locally = || {
            let (stream, _) = self.local.as_ref()?.accept().ok()?;
            prepare(stream).ok()
        };
        let by_tcp = || {
            let (stream, _) = self.tcp.accept().ok()?;
            stream.set_nonblocking(false).ok()?;
            stream.set_nodelay(true).ok()?;
            Some(Stream::Tcp(stream))
        };
        locally().or_else(by_tcp)
    }
}

#[cfg(target_os = "linux")]
fn name_of(address: SocketAddr) -> String {
    format!("quintet/{address}")
}

#[cfg(target_os = "linux")]
fn listen_locally(address: SocketAddr) -> Option<UnixListener> {
    use std::os::linux::net::SocketAddrExt;

    let name = std::os::unix::net::SocketAddr::from_abstract_name(name_of(address)).ok()?;
    let listener = UnixListener::bind_addr(&name).ok()?;
    listener.set_nonblocking(true).ok()?;
    Some(listener)
}

/// A connection to the rank that listens on `address`, if it is on this machine and has room for one.
#[cfg(target_os = "linux")]
pub(super) fn dial_locally(address: SocketAddr) -> Option<Stream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

    // A listener that is not served would otherwise hold whoever connects.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    connect(&socket, &SocketAddrUnix::new_abstract_name(name_of(address).as_bytes()).ok()?).ok()?;
    prepare(UnixStream::from(socket)).ok()
}

/// Refuses other users.
#[cfg(target_os = "linux")]
fn prepare(stream: UnixStream) -> io::Result<Stream> {
    use rustix::net::sockopt::{set_socket_send_buffer_size, socket_peercred};

    if socket_peercred(&stream)?.uid != rustix::process::geteuid() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.set_nonblocking(false)?;
    set_socket_send_buffer_size(&stream, BUFFER_BYTES)?;
    Ok(Stream::Local(stream))
}

#[cfg(not(target_os = "linux"))]
fn listen_locally(_: SocketAddr) -> Option<UnixListener> {
    None
}

#[cfg(not(target_os = "linux"))]
pub(super) fn dial_locally(_: SocketAddr) -> Option<Stream> {
    None
}

#[cfg(not(target_os = "linux"))]
fn prepare(_: UnixStream) -> io::Result<Stream> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn inside_the_machine_ranks_come_by_the_name_of_the_address() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (door, address) = Door::open(any, true).unwrap();
        let dialled = dial_locally(address).unwrap();
        let accepted = door.accept().unwrap();
        assert!(matches!((&dialled, &accepted), (Stream::Local(_), Stream::Local(_))));
        (&dialled).write_all(b"hello").unwrap();
        let mut received = [0; 5];
        (&accepted).read_exact(&mut received).unwrap();
        assert_eq!(&received, b"hello");
        dialled.shut();
        assert_eq!((&accepted).read(&mut received).unwrap(), 0);
        // By TCP too; a name goes with its door.
        let dialled = Stream::dial(&address, Duration::from_secs(60)).unwrap();
        let accepted = std::iter::repeat_with(|| door.accept()).flatten().next().unwrap();
        assert!(matches!((dialled, accepted), (Stream::Tcp(_), Stream::Tcp(_))));
        drop(door);
        assert!(dial_locally(address).is_none());
    }

    #[test]
    fn a_name_that_somebody_has_taken_leaves_tcp() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (door, address) = Door::open(any, false).unwrap();
        assert!(dial_locally(address).is_none());
        drop(door);
        let _squatter = listen_locally(address).unwrap();
        let (door, _) = Door::open(address, true).unwrap();
        assert!(door.local.is_none());
    }
}
