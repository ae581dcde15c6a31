//! The door of the coordinator's listener.
//!
//! Whatever knocks is let in as far as its words allow: a connection that nobody has admitted is
//! cut after a while whatever it says meanwhile, and there are only so many of these. So a port
//! scan, a peer that says nothing, speaks slowly or speaks garbage costs a place at the door for
//! some seconds. The loop that accepts does not end before the run does.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use quintet_identity::{Member, member_of};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// What strangers may take.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// How long a connection may take until it is admitted: TLS handshake and hello, each.
    pub(crate) admission_timeout: Duration,
    /// Connections that nobody has admitted yet. More are closed at once; an honest worker tries again.
    pub(crate) strangers_max: usize,
}

/// Of a run's listener.
pub(crate) const LIMITS: Limits = Limits { admission_timeout: Duration::from_secs(10), strangers_max: 256 };

/// Pause after the system refused to accept, mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The connections of a listener, behind TLS where there is a configuration for it.
pub(crate) fn incoming(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    limits: Limits,
) -> ReceiverStream<io::Result<Guest>> {
    // Room for all that the semaphore lets in, so that no handshake waits for the server.
    let (let_in, guests) = mpsc::channel(limits.strangers_max);
    tokio::spawn(accept(listener, tls.map(TlsAcceptor::from), limits, let_in));
    ReceiverStream::new(guests)
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    limits: Limits,
    let_in: mpsc::Sender<io::Result<Guest>>,
) {
    let strangers = Arc::new(Semaphore::new(limits.strangers_max));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = let_in.closed() => return,
        };
        let Ok((socket, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&strangers).try_acquire_owned() else { continue };
        tokio::spawn(welcome(socket, tls.clone(), limits.admission_timeout, permit, let_in.clone()));
    }
}

async fn welcome(
    socket: TcpStream,
    tls: Option<TlsAcceptor>,
    timeout: Duration,
    permit: OwnedSemaphorePermit,
    let_in: mpsc::Sender<io::Result<Guest>>,
) {
    // Without it, answers are only slower.
    let _ = socket.set_nodelay(true);
    let (wire, member) = match tls {
        None => (Wire::Plain(socket), None),
        Some(acceptor) => {
            let Ok(Ok(stream)) = tokio::time::timeout(timeout, acceptor.accept(socket)).await else { return };
            let member = stream.get_ref().1.peer_certificates().and_then(|chain| member_of(chain.first()?));
            (Wire::Tls(Box::new(stream)), member)
        }
    };
    let standing = Arc::new(Standing { admitted: AtomicBool::new(false), permit: Mutex::new(Some(permit)) });
    let deadline = Box::pin(tokio::time::sleep(timeout));
    // An error means that the run is over.
    let _ = let_in.send(Ok(Guest { wire, member, standing, deadline })).await;
}

/// A connection, cut when its time is over unless it was admitted.
pub(crate) struct Guest {
    wire: Wire,
    member: Option<Member>,
    standing: Arc<Standing>,
    deadline: Pin<Box<Sleep>>,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Whether a connection was admitted; until then it holds one of the places at the door.
#[derive(Debug)]
struct Standing {
    admitted: AtomicBool,
    permit: Mutex<Option<OwnedSemaphorePermit>>,
}

/// Who is at the other end of a connection, in the extensions of its requests.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// By its certificate.
    pub(crate) member: Option<Member>,
    standing: Arc<Standing>,
}

impl Peer {
    /// Gives the connection all the time it wants.
    pub(crate) fn admit(&self) {
        self.standing.admitted.store(true, Ordering::Release);
        drop(self.standing.permit.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Connected for Guest {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer { member: self.member, standing: Arc::clone(&self.standing) }
    }
}

impl Guest {
    fn wire(&mut self) -> Pin<&mut (dyn ReadWrite + '_)> {
        match &mut self.wire {
            Wire::Plain(socket) => Pin::new(socket),
            Wire::Tls(stream) => Pin::new(stream),
        }
    }

    /// Whether a stranger's time is over. Wakes the reader then.
    fn is_late(&mut self, context: &mut Context<'_>) -> bool {
        !self.standing.admitted.load(Ordering::Acquire) && self.deadline.as_mut().poll(context).is_ready()
    }
}

/// What both kinds of wire are.
trait ReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ReadWrite for T {}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_late(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.wire().poll_read(context, buffer)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.wire().poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire().poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn strangers_have_so_much_time_and_so_many_places() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits { admission_timeout: Duration::from_millis(100), strangers_max: 2 };
        let mut guests = incoming(listener, None, limits);
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut slow = guests.next().await.unwrap().unwrap();
        let mut friend = TcpStream::connect(address).await.unwrap();
        let mut admitted = guests.next().await.unwrap().unwrap();
        // No place is left: this one is closed, and says so by its end.
        let mut third = TcpStream::connect(address).await.unwrap();
        assert_eq!(third.read(&mut [0]).await.unwrap(), 0);
        // An admission makes room, and lifts the deadline.
        admitted.connect_info().admit();
        let mut fourth = TcpStream::connect(address).await.unwrap();
        drop(guests.next().await.unwrap().unwrap());
        let error = slow.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(slow);
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(fourth.read(&mut [0]).await.unwrap(), 0);
        friend.write_all(b"hello").await.unwrap();
        admitted.read_exact(&mut [0; 5]).await.unwrap();
    }
}
