//! How a worker gets into a run: by the run's secret in plain text, or by a certificate over TLS.
//!
//! A certificate is got with a join token, from a coordinator that the worker recognizes by the
//! token before it says anything. It is good for a day and renewed by a thread of its own as long
//! as somebody holds the [`Pass`]; a worker that lost its connection comes back with it.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use quintet_identity::{Credentials, JoinToken, MemberKey, Pinned, coordinator_name, is_private};
use quintet_proto::v1::coordinator_client::CoordinatorClient;
use quintet_proto::v1::{JoinReply, JoinRequest};
use quintet_proto::{FROM_WORKER_BYTES_MAX, TO_WORKER_BYTES_MAX, TOKEN_BYTES};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{self, ClientConfig};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

use crate::collective::MeshIdentity;
use crate::session::{CONNECT_TIMEOUT, KEEP_ALIVE_TIMEOUT, SessionError, resolve};

type Result<T> = std::result::Result<T, SessionError>;

/// Renewals that fail are tried again after this part of the certificate's time.
const RENEWAL_ATTEMPTS: u32 = 20;

/// What lets a worker into a run.
#[derive(Clone, Debug)]
pub enum Access {
    /// The run's secret, in plain text.
    Plain {
        /// What the coordinator printed.
        run_token: [u8; TOKEN_BYTES],
        /// Also beyond this machine.
        insecure: bool,
    },
    /// A certificate of the run's authority, over TLS.
    Certificate(Arc<Pass>),
}

impl Access {
    /// What a hello carries.
    pub(crate) fn run_token(&self) -> Vec<u8> {
        match self {
            Self::Plain { run_token, .. } => run_token.to_vec(),
            Self::Certificate(_) => Vec::new(),
        }
    }

    /// The address of a URL that this access is for.
    ///
    /// # Errors
    /// [`SessionError::Url`]; [`SessionError::NotLoopback`] where plain text would leave the machine.
    pub fn address(&self, url: &str) -> Result<SocketAddr> {
        match self {
            Self::Certificate(_) => resolve(url, "https"),
            Self::Plain { insecure, .. } => {
                let address = resolve(url, "http")?;
                match is_private(address.ip()) || *insecure {
                    true => Ok(address),
                    false => Err(SessionError::NotLoopback(address)),
                }
            }
        }
    }

    /// What this worker proves itself to other ranks with; none where they are on one machine, or somebody takes the
    /// risk. Newer certificates serve newer generations.
    pub(crate) fn mesh_identity(&self) -> Result<Option<MeshIdentity>> {
        match self {
            Self::Plain { .. } => Ok(None),
            Self::Certificate(pass) => MeshIdentity::new(&pass.credentials()).map(Some).map_err(identity_failed),
        }
    }

    pub(crate) async fn open(&self, address: SocketAddr) -> Result<CoordinatorClient<Channel>> {
        let tls = match self {
            Self::Plain { .. } => None,
            Self::Certificate(pass) => Some(pass.credentials().coordinator_client().map_err(identity_failed)?),
        };
        open(address, tls).await
    }
}

/// An admitted worker's credentials, kept good.
#[derive(Debug)]
pub struct Pass {
    address: SocketAddr,
    credentials: RwLock<Arc<Credentials>>,
}

impl Pass {
    /// Joins the run at `url`, `https://ADDRESS:PORT`, with the first of `tokens` that nobody has used.
    ///
    /// # Errors
    /// [`SessionError::Refused`] where no token admits; [`SessionError::Untrusted`] where another than the tokens'
    /// coordinator answers; whatever keeps a connection from being made.
    pub fn join(url: &str, tokens: &[String]) -> Result<Arc<Self>> {
        let address = resolve(url, "https")?;
        let (credentials, lifetime) = block_on(async {
            let mut refusal = SessionError::Refused("there is no join token".to_owned());
            for text in tokens {
                match redeem(address, text).await {
                    Err(error @ SessionError::Refused(_)) => refusal = error,
                    outcome => return outcome,
                }
            }
            Err(refusal)
        })??;
        let pass = Arc::new(Self { address, credentials: RwLock::new(Arc::new(credentials)) });
        let kept = Arc::downgrade(&pass);
        let keeper = std::thread::Builder::new().name("certificate".to_owned());
        keeper.spawn(move || keep(&kept, lifetime)).map_err(|error| SessionError::Thread(error.to_string()))?;
        Ok(pass)
    }

    /// The newest.
    pub fn credentials(&self) -> Arc<Credentials> {
        // Nobody panics between lock and unlock.
        Arc::clone(&self.credentials.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new certificate for a new key, by the one at hand.
    fn renew(&self) -> Result<Duration> {
        let old = self.credentials();
        let tls = old.coordinator_client().map_err(identity_failed)?;
        let exchange = exchange(self.address, tls, String::new(), old.fingerprint());
        let (credentials, lifetime) = block_on(exchange)??;
        *self.credentials.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(credentials);
        Ok(lifetime)
    }
}

/// Renews at half of a certificate's time, as long as somebody wants it. Ends with its process, or a while after the
/// pass.
fn keep(pass: &Weak<Pass>, mut lifetime: Duration) {
    loop {
        std::thread::sleep(lifetime / 2);
        loop {
            let Some(pass) = pass.upgrade() else { return };
            // While the coordinator is away, the session says so.
            if let Ok(renewed) = pass.renew() {
                lifetime = renewed;
                break;
            }
            drop(pass);
            std::thread::sleep(lifetime / RENEWAL_ATTEMPTS);
        }
    }
}

/// Joins with one token.
async fn redeem(address: SocketAddr, text: &str) -> Result<(Credentials, Duration)> {
    let token: JoinToken = text.parse().map_err(|refusal| SessionError::Refused(format!("{refusal}")))?;
    let tls = Pinned { fingerprint: token.fingerprint }.client().map_err(identity_failed)?;
    exchange(address, tls, token.to_text(), token.fingerprint).await
}

/// A certificate for a new key, by a token or by the certificate in `tls`.
async fn exchange(
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    token: String,
    fingerprint: [u8; quintet_identity::FINGERPRINT_BYTES],
) -> Result<(Credentials, Duration)> {
    let key = MemberKey::generate().map_err(identity_failed)?;
    let mut client = open(address, Some(tls)).await?;
    let request = JoinRequest { token, public_key: key.public_key().to_vec() };
    let reply = tokio::time::timeout(CONNECT_TIMEOUT, client.join(request)).await.map_err(|_| no_answer(address))?;
    let JoinReply { certificate, authority, lifetime_seconds } =
        reply.map_err(|status| refusal(address, &status))?.into_inner();
    let credentials = Credentials::new(key, certificate, authority, &fingerprint);
    let credentials = credentials.map_err(|_| SessionError::Protocol("its certificate is not what was asked for"))?;
    Ok((credentials, Duration::from_secs(lifetime_seconds.clamp(1, 1 << 32))))
}

/// A connection to the coordinator, in plain text or to nobody else.
async fn open(address: SocketAddr, tls: Option<Arc<ClientConfig>>) -> Result<CoordinatorClient<Channel>> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| unreachable(address, error.to_string()))?
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_TIMEOUT / 4)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    let channel = match tls {
        None => endpoint.connect().await,
        Some(config) => {
            let connector = TlsConnector::from(config);
            let dial = move |_: Uri| {
                let connector = connector.clone();
                async move {
                    let socket = TcpStream::connect(address).await?;
                    socket.set_nodelay(true)?;
                    let stream = connector.connect(coordinator_name(), socket).await?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
                }
            };
            endpoint.connect_with_connector(tower::service_fn(dial)).await
        }
    };
    let channel = channel.map_err(|error| not_opened(address, &error))?;
    Ok(CoordinatorClient::new(channel)
        .max_decoding_message_size(TO_WORKER_BYTES_MAX)
        .max_encoding_message_size(FROM_WORKER_BYTES_MAX))
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|error| SessionError::Thread(error.to_string()))?.block_on(work))
}

fn unreachable(address: SocketAddr, problem: String) -> SessionError {
    SessionError::Unreachable { address, problem }
}

fn no_answer(address: SocketAddr) -> SessionError {
    unreachable(address, format!("no answer within {} seconds", CONNECT_TIMEOUT.as_secs()))
}

fn identity_failed(error: quintet_identity::Error) -> SessionError {
    SessionError::Identity(error.to_string())
}

/// Why a connection was not made: nobody there, or somebody else.
fn not_opened(address: SocketAddr, error: &tonic::transport::Error) -> SessionError {
    match root_cause(error) {
        Cause::Certificate(problem) => SessionError::Untrusted { address, problem },
        Cause::Other(problem) => unreachable(address, problem),
    }
}

/// What the coordinator's answer to hello or to a request to join means.
pub(crate) fn refusal(address: SocketAddr, status: &Status) -> SessionError {
    let message = status.message().to_owned();
    match status.code() {
        Code::Unauthenticated
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::InvalidArgument => SessionError::Refused(message),
        _ => match root_cause(status) {
            // TLS 1.3 lets a server judge a certificate when the client believes that all is well.
            Cause::Certificate(problem) => SessionError::Refused(problem),
            Cause::Other(problem) if std::error::Error::source(status).is_some() => unreachable(address, problem),
            Cause::Other(_) => unreachable(address, message),
        },
    }
}

enum Cause {
    Certificate(String),
    Other(String),
}

/// Tonic says "transport error"; what happened is at the bottom.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> Cause {
    let mut cause = error;
    loop {
        let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()).or_else(|| cause.downcast_ref());
        if let Some(error @ (rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_))) = tls {
            return Cause::Certificate(error.to_string());
        }
        match cause.source() {
            Some(source) => cause = source,
            None => return Cause::Other(cause.to_string()),
        }
    }
}
