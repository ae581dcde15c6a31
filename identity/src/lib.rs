//! Who is who in a run that leaves its machine.
//!
//! - [`Authority`]: the run's own certificate authority, made by its coordinator.
//! - [`JoinToken`]: what admits a worker once, and tells it which authority to believe.
//! - [`Credentials`]: a member's key and certificate, and what TLS needs of them.
//! - [`Role`]: what a certificate permits, by the names in it.
//!
//! A member is known by its role and number and not by its address: the authority signs for
//! members of one run and nobody else, so that names say all there is to know, behind whatever
//! address translation or service name the member is reached.
//!
//! Deliberately absent: sockets, messages, a clock (times are arguments), the environment.

mod authority;
mod credentials;
mod error;
mod records;
mod role;
mod tls;
mod token;

pub use authority::{Admitted, Authority};
pub use credentials::{
    COORDINATOR_PROTOCOL, Credentials, MESH_PROTOCOL, MemberKey, Pinned, coordinator_name, worker_name,
};
pub use error::{Error, Refusal, Result};
pub use records::RecordKey;
pub use role::{Member, Role, member_of};
pub use token::{FINGERPRINT_BYTES, JoinToken, MemberId, TOKEN_TEXT_BYTES_MAX, fingerprint};

/// Whether what is sent from or to an address stays between processes of one machine and needs no encryption: it is
/// 127.0.0.1 or ::1. The other loopback addresses are treated as any address, so that encryption can be tried with them.
pub fn is_private(address: std::net::IpAddr) -> bool {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    matches!(address, IpAddr::V4(Ipv4Addr::LOCALHOST) | IpAddr::V6(Ipv6Addr::LOCALHOST))
}
