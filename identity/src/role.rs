//! What members may do, as names in their certificates.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::{CertificateDer, ServerName};

use crate::token::MemberId;

/// What a certificate permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// To be the coordinator. No token gives it.
    Coordinator,
    /// To compute, and to exchange gradients with other workers.
    Worker,
    /// To look at the run and to stop it. There is no call for it yet: refused everywhere.
    Operator,
    /// To look at the run. There is no call for it yet: refused everywhere.
    Reader,
}

/// All of them.
const ROLES: [Role; 4] = [Role::Coordinator, Role::Worker, Role::Operator, Role::Reader];

impl Role {
    /// In tokens and names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Operator => "operator",
            Self::Reader => "reader",
        }
    }

    /// The name that all certificates of the role carry, in a top-level domain that is nobody's.
    pub(crate) fn domain(self) -> String {
        format!("{}.quintet.internal", self.name())
    }

    pub(crate) fn server_name(self) -> ServerName<'static> {
        ServerName::try_from(self.domain()).expect("a role's domain is a DNS name") // why: fixed ASCII labels
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        ROLES.into_iter().find(|role| role.name() == text).ok_or(())
    }
}

/// Whom a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// What it may do.
    pub role: Role,
    /// Which of them it is: the number of the token that admitted it.
    pub id: MemberId,
}

impl Member {
    pub(crate) fn domain(self) -> String {
        format!("{}.{}", self.id, self.role.domain())
    }
}

impl fmt::Display for Member {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.role.name(), self.id)
    }
}

/// Whom a certificate is for, that TLS has verified to be of the run's authority; `None` if no member's.
pub fn member_of(certificate: &CertificateDer<'_>) -> Option<Member> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut members = certificate.valid_dns_names().filter_map(|name| {
        let (id, domain) = name.split_once('.')?;
        let role = ROLES.into_iter().find(|role| role.domain() == domain)?;
        Some(Member { role, id: id.parse().ok()? })
    });
    members.next()
}
