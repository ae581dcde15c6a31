//! A member's key and certificate, and the TLS configurations made of them.

use std::fmt;
use std::sync::Arc;

use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig};

use crate::role::Role;
use crate::tls::{self, PinnedAuthority};
use crate::token::{FINGERPRINT_BYTES, fingerprint};
use crate::{Error, Member, Result, member_of};

/// What TLS connections to the coordinator speak: HTTP/2.
pub const COORDINATOR_PROTOCOL: &[u8] = b"h2";
/// What TLS connections between workers speak, so that nobody takes one for the other.
pub const MESH_PROTOCOL: &[u8] = b"quintet-mesh/1";

/// A key pair on the curve P-256, of which only the public half ever leaves the process.
pub struct MemberKey(KeyPair);

impl MemberKey {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::Certificate`] where the system has no random numbers.
    pub fn generate() -> Result<Self> {
        Ok(Self(KeyPair::generate()?))
    }

    /// The uncompressed point, for [`crate::Authority`] to certify.
    pub fn public_key(&self) -> &[u8] {
        self.0.public_key_raw()
    }

    pub(crate) fn private(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()))
    }
}

impl fmt::Debug for MemberKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("MemberKey(…)")
    }
}

/// How to reach a coordinator of whom only the authority's fingerprint is known.
#[derive(Clone, Copy, Debug)]
pub struct Pinned {
    /// From a join token.
    pub fingerprint: [u8; FINGERPRINT_BYTES],
}

impl Pinned {
    /// For a client without a certificate.
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub fn client(self) -> Result<Arc<ClientConfig>> {
        let verifier = Arc::new(PinnedAuthority { fingerprint: self.fingerprint });
        Ok(tls::finish_client(tls::client_builder(verifier)?.with_no_client_auth(), COORDINATOR_PROTOCOL))
    }
}

/// An admitted member's identity.
#[derive(Debug)]
pub struct Credentials {
    key: MemberKey,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
    member: Member,
}

impl Credentials {
    /// Of what an authority answered.
    ///
    /// # Errors
    /// [`Error::WrongAuthority`] unless the authority has this fingerprint; [`Error::Tls`] if the certificate is none.
    pub fn new(
        key: MemberKey,
        certificate: Vec<u8>,
        authority: Vec<u8>,
        expected: &[u8; FINGERPRINT_BYTES],
    ) -> Result<Self> {
        if fingerprint(&authority) != *expected {
            return Err(Error::WrongAuthority);
        }
        let certificate = CertificateDer::from(certificate);
        let member = member_of(&certificate).ok_or_else(|| Error::tls("a certificate without a member's name"))?;
        Ok(Self { key, certificate, authority: CertificateDer::from(authority), member })
    }

    /// Who this is.
    pub fn member(&self) -> Member {
        self.member
    }

    /// Of the run's authority.
    pub fn fingerprint(&self) -> [u8; FINGERPRINT_BYTES] {
        fingerprint(&self.authority)
    }

    /// For connections to the coordinator.
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub fn coordinator_client(&self) -> Result<Arc<ClientConfig>> {
        self.client(COORDINATOR_PROTOCOL)
    }

    /// For connections to other workers; verify the server by [`worker_name`].
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub fn mesh_client(&self) -> Result<Arc<ClientConfig>> {
        self.client(MESH_PROTOCOL)
    }

    /// For connections from other workers, who must present certificates.
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub fn mesh_server(&self) -> Result<Arc<ServerConfig>> {
        let builder = tls::server_builder(tls::roots(&self.authority)?, false)?;
        let config = builder.with_single_cert(vec![self.certificate.clone()], self.key.private());
        Ok(tls::finish_server(config.map_err(Error::tls)?, MESH_PROTOCOL))
    }

    fn client(&self, protocol: &[u8]) -> Result<Arc<ClientConfig>> {
        let verifier = tls::server_verifier(tls::roots(&self.authority)?)?;
        let config =
            tls::client_builder(verifier)?.with_client_auth_cert(vec![self.certificate.clone()], self.key.private());
        Ok(tls::finish_client(config.map_err(Error::tls)?, protocol))
    }
}

/// The name by which TLS verifies the coordinator.
pub fn coordinator_name() -> ServerName<'static> {
    Role::Coordinator.server_name()
}

/// The name by which TLS verifies a worker that accepts connections.
pub fn worker_name() -> ServerName<'static> {
    Role::Worker.server_name()
}
