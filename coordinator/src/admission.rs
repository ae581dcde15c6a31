//! Who may do what at the coordinator.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quintet_identity::{Authority, Refusal, Role};
use quintet_proto::v1::{JoinReply, JoinRequest};
use tonic::{Request, Status};

use crate::gate::Peer;
use crate::secret::Secret;

/// How long a certificate is good. Its holder renews it in time; one that was stolen is of no use for long.
const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The environment variable by which a worker gets the run's secret: argument vectors are public to everybody on a
/// machine, environments are not.
pub const RUN_TOKEN_VARIABLE: &str = "QUINTET_RUN_TOKEN";
/// The environment variable by which a worker gets a join token.
pub const JOIN_TOKEN_VARIABLE: &str = "QUINTET_JOIN_TOKEN";
/// How long join tokens are good unless somebody says otherwise: a job may wait for a while in a queue.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// How a run tells its workers from strangers.
#[derive(Clone, Debug)]
pub enum Admission {
    /// In plain text, by a secret that all workers know: on one machine, or where somebody takes the risk.
    Secret(Secret),
    /// Over TLS, by certificates of the run's authority.
    Authority(Arc<Authority>),
}

impl Admission {
    /// What lets one worker in: an environment variable and its value.
    ///
    /// # Errors
    /// No random numbers.
    pub fn ticket(&self) -> crate::Result<(&'static str, String)> {
        Ok(match self {
            Self::Secret(secret) => (RUN_TOKEN_VARIABLE, secret.to_hex()),
            Self::Authority(authority) => {
                let token = authority.issue_token(Role::Worker, SystemTime::now(), TOKEN_LIFETIME)?;
                (JOIN_TOKEN_VARIABLE, token.to_text())
            }
        })
    }

    /// How URLs of this run's coordinator begin.
    pub fn scheme(&self) -> &'static str {
        match self {
            Self::Secret(_) => "http",
            Self::Authority(_) => "https",
        }
    }

    /// Answers a request to join or to renew.
    ///
    /// # Errors
    /// A refusal in one line: `already_exists` where another token may do, `unauthenticated` else.
    pub(crate) fn join(&self, request: Request<JoinRequest>, now: SystemTime) -> Result<JoinReply, Status> {
        let Self::Authority(authority) = self else {
            return Err(Status::unimplemented("this run has no certificates: join by its token in plain text"));
        };
        let member = peer(&request)?.member;
        let JoinRequest { token, public_key } = request.into_inner();
        let outcome = match member {
            Some(member) if token.is_empty() => authority.renew(member, &public_key, now, CERTIFICATE_LIFETIME),
            _ => authority.redeem(&token, &public_key, now, CERTIFICATE_LIFETIME),
        };
        let admitted =
            outcome.map_err(|error| Status::internal(error.to_string()))?.map_err(|refusal| match refusal {
                Refusal::Spent | Refusal::Expired { .. } => Status::already_exists(refusal.to_string()),
                _ => Status::unauthenticated(refusal.to_string()),
            })?;
        Ok(JoinReply {
            certificate: admitted.certificate,
            authority: authority.certificate().to_vec(),
            lifetime_seconds: CERTIFICATE_LIFETIME.as_secs(),
        })
    }

    /// Checks, before a stream is read, that its certificate allows it.
    ///
    /// # Errors
    /// `unauthenticated`, `permission_denied`.
    pub(crate) fn check_certificate<T>(&self, request: &Request<T>, role: Role) -> Result<(), Status> {
        match (self, peer(request)?.member) {
            (Self::Secret(_), _) => Ok(()),
            (Self::Authority(_), Some(member)) if member.role == role => Ok(()),
            (Self::Authority(_), Some(member)) => {
                let problem = format!("a certificate of {member} does not permit what takes a {}", role.name());
                Err(Status::permission_denied(problem))
            }
            (Self::Authority(_), None) => Err(Status::unauthenticated("this takes a certificate: join first")),
        }
    }

    /// Checks the secret in a hello, where certificates do not stand for it.
    ///
    /// # Errors
    /// `unauthenticated`.
    pub(crate) fn check_secret(&self, presented: &[u8]) -> Result<(), Status> {
        match self {
            Self::Secret(secret) if !secret.matches(presented) => {
                Err(Status::unauthenticated("wrong run token: this worker belongs to another run"))
            }
            Self::Secret(_) | Self::Authority(_) => Ok(()),
        }
    }
}

/// The other end of a request's connection.
pub(crate) fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(|| Status::internal("a connection that did not come through the gate"))
}
