//! The TLS handshake between two ranks, on a blocking socket, with a deadline.
//!
//! TLS is fed record by record, so that it takes nothing off the socket that comes after it.

use std::io::{self, Write};
use std::sync::Arc;

use quintet_identity::{Credentials, RecordKey, Role, member_of, worker_name};
use tokio_rustls::rustls::{self, ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use super::stream::Stream;
use super::wire::{Ciphers, Opener, Sealer};

/// Of a TLS record: type, version, length.
const HEADER_BYTES: usize = 5;
/// What TLS 1.3 allows: 16 KiB and what encryption adds.
const RECORD_BYTES_MAX: usize = (16 << 10) + 256;

/// The purposes of the keys that are taken from a handshake, by who seals with them.
const DIALER_LABEL: &[u8] = b"EXPORTER-quintet-mesh-dialer";
const LISTENER_LABEL: &[u8] = b"EXPORTER-quintet-mesh-listener";

/// What a rank proves itself to others with, where they do not share a machine.
#[derive(Clone)]
pub struct MeshIdentity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl MeshIdentity {
    /// # Errors
    /// Credentials that do not serve for TLS.
    pub fn new(credentials: &Credentials) -> quintet_identity::Result<Self> {
        Ok(Self { client: credentials.mesh_client()?, server: credentials.mesh_server()? })
    }

    /// As the rank that dialled. `read` fills a buffer from `stream` or fails, in time.
    pub(super) fn dial(&self, stream: &Stream, read: Fill) -> io::Result<Ciphers> {
        let tls = ClientConnection::new(Arc::clone(&self.client), worker_name()).map_err(io::Error::other)?;
        let mut tls = Connection::Client(tls);
        shake(&mut tls, stream, read)?;
        let [dialer, listener] = keys(&tls)?;
        Ok(Ciphers { sealer: Sealer::new(dialer), opener: Opener::new(listener) })
    }

    /// As the rank that listens.
    pub(super) fn answer(&self, stream: &Stream, read: Fill) -> io::Result<Ciphers> {
        let tls = ServerConnection::new(Arc::clone(&self.server)).map_err(io::Error::other)?;
        let mut tls = Connection::Server(tls);
        shake(&mut tls, stream, read)?;
        // TLS knows that the peer is of this run; dialers also verify the listener's role, as its name.
        let member = tls.peer_certificates().and_then(|chain| member_of(chain.first()?));
        if member.is_none_or(|member| member.role != Role::Worker) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let [dialer, listener] = keys(&tls)?;
        Ok(Ciphers { sealer: Sealer::new(listener), opener: Opener::new(dialer) })
    }
}

type Fill<'a> = &'a dyn Fn(&Stream, &mut [u8]) -> io::Result<()>;

/// Exchanges records until both ends have proved themselves.
fn shake(tls: &mut Connection, mut stream: &Stream, read: Fill) -> io::Result<()> {
    loop {
        while tls.wants_write() {
            // A handshake fits the socket's buffer, so that this does not block.
            tls.write_tls(&mut stream)?;
        }
        if !tls.is_handshaking() {
            break;
        }
        let mut record = vec![0; HEADER_BYTES];
        read(stream, &mut record)?;
        let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
        if length > RECORD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        record.resize(HEADER_BYTES + length, 0);
        read(stream, &mut record[HEADER_BYTES..])?;
        let mut unread = record.as_slice();
        while !unread.is_empty() {
            tls.read_tls(&mut unread)?;
        }
        if let Err(error) = tls.process_new_packets() {
            // Best effort: what TLS has to say about it, then the connection's end.
            let _ = tls.write_tls(&mut stream);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    stream.flush()
}

/// The dialer's key and the listener's.
fn keys(tls: &Connection) -> io::Result<[RecordKey; 2]> {
    let export = |label| -> Result<RecordKey, rustls::Error> {
        tls.export_keying_material([0; RecordKey::KEY_BYTES], label, None).map(|key| RecordKey::new(&key))
    };
    let keys = export(DIALER_LABEL).and_then(|dialer| Ok([dialer, export(LISTENER_LABEL)?]));
    keys.map_err(io::Error::other)
}
