//! A connection between two hosts as workers make it, and what it is worth.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quintet_identity::{Credentials, worker_name};
use rustls::{ClientConnection, ServerConfig, ServerConnection, StreamOwned};
use serde::{Deserialize, Serialize};

/// A host that does not answer for longer cannot be reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const SILENCE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long data is sent for.
const TRANSFER_TIME: Duration = Duration::from_millis(300);
const BLOCK_BYTES: usize = 64 * 1024;
const ROUND_TRIPS: usize = 8;
/// Connections that are served; one comes at a time.
const CONNECTIONS_MAX: usize = 4096;

/// What a link can do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) connect_ms: f64,
    pub(super) tls_ms: f64,
    /// The shortest of some.
    pub(super) round_trip_ms: f64,
    /// One encrypted stream, one way.
    pub(super) bytes_per_second: f64,
}

/// How far a connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Hop {
    Connect,
    Tls,
    Transfer,
}

/// Why a link is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Broken {
    pub(super) hop: Hop,
    pub(super) problem: String,
}

impl Hop {
    /// What to do about a connection that comes no further.
    pub(super) fn advice(self) -> &'static str {
        match self {
            Hop::Connect => {
                "let the hosts reach each other on all TCP ports above 1023 (firewall, security group, network policy), \
                 or say another interface with --listen"
            }
            Hop::Tls => {
                "something else answers there, or stands between: a proxy, a load balancer, address translation"
            }
            Hop::Transfer => "connections break under load: look at the MTU and at what counts packets in between",
        }
    }
}

/// Serves links until the process ends.
pub(super) fn serve(listener: TcpListener, config: Arc<ServerConfig>) {
    for stream in listener.incoming().take(CONNECTIONS_MAX) {
        let config = Arc::clone(&config);
        std::thread::spawn(move || {
            // The other end tells what went wrong.
            let _ = stream.and_then(|stream| answer(stream, config));
        });
    }
}

/// Answers bytes by themselves, then counts what comes until its end.
fn answer(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<()> {
    prepare(&stream)?;
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    let mut byte = [0];
    for _ in 0..ROUND_TRIPS {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
        stream.flush()?;
    }
    let mut block = vec![0; BLOCK_BYTES];
    let mut count = 0_u64;
    loop {
        match stream.read(&mut block)? {
            0 => break,
            bytes => count += bytes as u64,
        }
    }
    stream.write_all(&count.to_le_bytes())?;
    stream.flush()
}

/// Connects to a host and measures.
pub(super) fn measure(address: SocketAddr, credentials: &Credentials) -> Result<Measured, Broken> {
    let at = |hop| move |error: io::Error| Broken { hop, problem: error.to_string() };
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map_err(at(Hop::Connect))?;
    let connect_ms = milliseconds(start);
    prepare(&stream).map_err(at(Hop::Connect))?;
    let start = Instant::now();
    let mut stream = shake_hands(stream, credentials).map_err(at(Hop::Tls))?;
    // In TLS 1.3 the server's opinion of our certificate comes with its first answer.
    let mut round_trip_ms = round_trip(&mut stream).map_err(at(Hop::Tls))?;
    let tls_ms = milliseconds(start) - round_trip_ms;
    for _ in 1..ROUND_TRIPS {
        round_trip_ms = round_trip_ms.min(round_trip(&mut stream).map_err(at(Hop::Transfer))?);
    }
    let bytes_per_second = transfer(&mut stream).map_err(at(Hop::Transfer))?;
    Ok(Measured { connect_ms, tls_ms, round_trip_ms, bytes_per_second })
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

fn shake_hands(mut stream: TcpStream, credentials: &Credentials) -> io::Result<Stream> {
    let config = credentials.mesh_client().map_err(io::Error::other)?;
    let mut connection = ClientConnection::new(config, worker_name()).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(connection, stream))
}

fn round_trip(stream: &mut Stream) -> io::Result<f64> {
    let start = Instant::now();
    stream.write_all(&[7])?;
    stream.flush()?;
    stream.read_exact(&mut [0])?;
    Ok(milliseconds(start))
}

fn transfer(stream: &mut Stream) -> io::Result<f64> {
    let block = vec![7; BLOCK_BYTES];
    let start = Instant::now();
    let mut sent = 0_u64;
    while start.elapsed() < TRANSFER_TIME {
        stream.write_all(&block)?;
        sent += block.len() as u64;
    }
    stream.conn.send_close_notify();
    stream.flush()?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    match u64::from_le_bytes(count) {
        received if received == sent => Ok(received as f64 / start.elapsed().as_secs_f64()),
        received => Err(io::Error::other(format!("{received} of {sent} bytes arrived"))),
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_TIMEOUT))?;
    stream.set_write_timeout(Some(SILENCE_TIMEOUT))
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use quintet_identity::{Authority, MemberKey, Role};

    use super::*;

    fn credentials(authority: &Authority) -> Credentials {
        let now = SystemTime::now();
        let key = MemberKey::generate().unwrap();
        let token = authority.issue_token(Role::Worker, now, Duration::from_secs(60)).unwrap();
        let admitted = authority.redeem(&token.to_text(), key.public_key(), now, Duration::from_secs(60));
        let certificate = admitted.unwrap().unwrap().certificate;
        Credentials::new(key, certificate, authority.certificate().to_vec(), &authority.fingerprint()).unwrap()
    }

    fn authority() -> (tempfile::TempDir, Authority) {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(directory.path(), directory.path()).unwrap();
        (directory, authority)
    }

    #[test]
    fn a_link_is_measured() {
        let (_directory, authority) = authority();
        let (server, client) = (credentials(&authority), credentials(&authority));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = server.mesh_server().unwrap();
        std::thread::spawn(move || serve(listener, config));
        let measured = measure(address, &client).unwrap();
        assert!(measured.bytes_per_second > 1e5 && measured.round_trip_ms > 0.0, "{measured:?}");
    }

    #[test]
    fn what_breaks_is_named_by_how_far_it_came() {
        let (_directory, ours) = authority();
        let (_other_directory, theirs) = authority();
        let client = credentials(&ours);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = credentials(&theirs).mesh_server().unwrap();
        std::thread::spawn(move || serve(listener, config));
        let broken = measure(address, &client).unwrap_err();
        assert_eq!(broken.hop, Hop::Tls);
        // One that speaks no TLS.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let plain = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        });
        assert_eq!(measure(address, &client).unwrap_err().hop, Hop::Tls);
        plain.join().unwrap();
        assert_eq!(measure(address, &client).unwrap_err().hop, Hop::Connect, "nobody listens any more");
    }
}
