//! The run's certificate authority.
//!
//! Its key lies in the run's folder, readable by its owner alone, so that a coordinator that was
//! restarted is the same to its workers. Tokens that were used are written down before they admit
//! anybody, so that they stay used.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm,
};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::credentials::{COORDINATOR_PROTOCOL, MemberKey};
use crate::role::{Member, Role};
use crate::token::{FINGERPRINT_BYTES, JoinToken, MemberId, fingerprint, from_hex, to_hex};
use crate::{Error, Refusal, Result, tls};

const KEY_FILE: &str = "authority.key";
const CERTIFICATE_FILE: &str = "authority.der";
const SPENT_FILE: &str = "spent-tokens";

/// A run may be resumed late.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);
/// A coordinator makes itself a new certificate whenever it starts.
const COORDINATOR_LIFETIME: Duration = Duration::from_secs(2 * 365 * 86_400);
/// Clocks may differ by so much.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(3600);
/// An uncompressed point on P-256.
const PUBLIC_KEY_BYTES: usize = 65;

/// Makes tokens, redeems them, and certifies members.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    token_key: hmac::Key,
    spent: Mutex<Spent>,
}

/// What an admitted member gets.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// Who it is from now on.
    pub member: Member,
    /// Its certificate, DER.
    pub certificate: Vec<u8>,
}

impl Authority {
    /// The authority whose key lies in `directory`, or a new one there; tokens that are redeemed are written
    /// down in `spent_directory`, mostly the same.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Damaged`], or no random numbers.
    pub fn open(directory: &Path, spent_directory: &Path) -> Result<Self> {
        let key_file = directory.join(KEY_FILE);
        if !key_file.exists() {
            create(directory)?;
        }
        let damaged = |problem: &str| Error::Damaged { path: key_file.clone(), problem: problem.to_owned() };
        let der = fs::read(&key_file).map_err(Error::file("read", &key_file))?;
        let certificate_file = directory.join(CERTIFICATE_FILE);
        let certificate = fs::read(&certificate_file).map_err(Error::file("read", &certificate_file))?;
        let token_key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &der), b"quintet join tokens, version 1");
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(der), &PKCS_ECDSA_P256_SHA256);
        let key = key.map_err(|_| damaged("this is no private key"))?;
        Ok(Self {
            issuer: Issuer::new(authority_params(), key),
            certificate: CertificateDer::from(certificate),
            token_key: hmac::Key::new(hmac::HMAC_SHA256, token_key.as_ref()),
            spent: Mutex::new(Spent::open(spent_directory)?),
        })
    }

    /// The certificate that members believe, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// By which tokens name this authority.
    pub fn fingerprint(&self) -> [u8; FINGERPRINT_BYTES] {
        fingerprint(&self.certificate)
    }

    /// A token that admits one member until `now + lifetime`.
    ///
    /// # Errors
    /// [`Error::Random`].
    pub fn issue_token(&self, role: Role, now: SystemTime, lifetime: Duration) -> Result<JoinToken> {
        assert!(role != Role::Coordinator, "no token makes a coordinator");
        let mut id = [0; 8];
        SystemRandom::new().fill(&mut id).map_err(|_| Error::Random)?;
        let (id, expires_at, fingerprint) = (MemberId(id), seconds(now + lifetime), self.fingerprint());
        let claim = JoinToken::claim(role, expires_at, id, &fingerprint);
        let mut proof = [0; 32];
        proof.copy_from_slice(hmac::sign(&self.token_key, claim.as_bytes()).as_ref());
        Ok(JoinToken { role, expires_at, id, fingerprint, proof })
    }

    /// Admits the holder of `token` with `public_key`, for `lifetime`. The same holder may ask again, for the answer
    /// may have been lost on its way; nobody else can use the token from then on.
    ///
    /// # Errors
    /// A [`Refusal`] inside; outside it, trouble of the authority's own.
    pub fn redeem(
        &self,
        token: &str,
        public_key: &[u8],
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<std::result::Result<Admitted, Refusal>> {
        let checked = self.check(token, now).and_then(|token| match public_key {
            [4, ..] if public_key.len() == PUBLIC_KEY_BYTES => Ok(token),
            _ => Err(Refusal::Key),
        });
        let token = match checked {
            Ok(token) => token,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if !spent.spend(token.id, fingerprint(public_key))? {
            return Ok(Err(Refusal::Spent));
        }
        drop(spent);
        self.certify(Member { role: token.role, id: token.id }, public_key, now, lifetime).map(Ok)
    }

    /// Certifies a member, whose certificate TLS has just verified, for another `lifetime`.
    ///
    /// # Errors
    /// [`Refusal::Key`] inside; outside, [`Error::Certificate`].
    pub fn renew(
        &self,
        member: Member,
        public_key: &[u8],
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<std::result::Result<Admitted, Refusal>> {
        match public_key {
            [4, ..] if public_key.len() == PUBLIC_KEY_BYTES => self.certify(member, public_key, now, lifetime).map(Ok),
            _ => Ok(Err(Refusal::Key)),
        }
    }

    /// For the coordinator's listener: it proves to be this run's, knows members by their certificates, and speaks
    /// to others too, who may want to join. `address` goes into its certificate, for programs other than ours.
    ///
    /// # Errors
    /// [`Error::Certificate`], [`Error::Tls`].
    pub fn coordinator_server(&self, address: IpAddr, now: SystemTime) -> Result<Arc<ServerConfig>> {
        let key = MemberKey::generate()?;
        let mut names = vec![Role::Coordinator.domain()];
        if !address.is_unspecified() {
            names.push(address.to_string());
        }
        let mut params = member_params(names, now, COORDINATOR_LIFETIME)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&CertifiedPoint(key.public_key().to_vec()), &self.issuer)?;
        let chain = vec![certificate.into(), self.certificate.clone()];
        let builder = tls::server_builder(tls::roots(&self.certificate)?, true)?;
        let config = builder.with_single_cert(chain, key.private()).map_err(Error::tls)?;
        Ok(tls::finish_server(config, COORDINATOR_PROTOCOL))
    }

    /// Whether `token` is ours and in time.
    fn check(&self, token: &str, now: SystemTime) -> std::result::Result<JoinToken, Refusal> {
        let token: JoinToken = token.parse()?;
        let claim = JoinToken::claim(token.role, token.expires_at, token.id, &token.fingerprint);
        // Compares in constant time.
        hmac::verify(&self.token_key, claim.as_bytes(), &token.proof).map_err(|_| Refusal::Unknown)?;
        match seconds(now).checked_sub(token.expires_at) {
            Some(seconds) => Err(Refusal::Expired { seconds }),
            None => Ok(token),
        }
    }

    fn certify(&self, member: Member, public_key: &[u8], now: SystemTime, lifetime: Duration) -> Result<Admitted> {
        // The first tells which member, the second lets TLS verify the role.
        let mut params = member_params(vec![member.domain(), member.role.domain()], now, lifetime)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if member.role == Role::Worker {
            // Workers accept connections from each other.
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let certificate = params.signed_by(&CertifiedPoint(public_key.to_vec()), &self.issuer)?;
        Ok(Admitted { member, certificate: certificate.der().to_vec() })
    }
}

/// Never shows a key.
impl std::fmt::Debug for Authority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Authority({})", to_hex(&self.fingerprint()))
    }
}

/// Makes a key and a certificate in `directory`. The key comes last, so that where there is one all is there.
fn create(directory: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(Error::file("create", directory))?;
    let key = KeyPair::generate()?;
    let mut params = authority_params();
    (params.not_before, params.not_after) = validity(SystemTime::now(), AUTHORITY_LIFETIME);
    let certificate = params.self_signed(&key)?;
    write_private(&directory.join(CERTIFICATE_FILE), certificate.der())?;
    write_private(&directory.join(KEY_FILE), &key.serialize_der())
}

/// What issuing needs to know of the authority's own certificate; the same at every start.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name("authority of a quintet run");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn member_params(names: Vec<String>, now: SystemTime, lifetime: Duration) -> Result<CertificateParams> {
    let common_name = name(&names[0]);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = common_name;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    (params.not_before, params.not_after) = validity(now, lifetime);
    Ok(params)
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn validity<T: From<SystemTime>>(now: SystemTime, lifetime: Duration) -> (T, T) {
    ((now - CLOCK_TOLERANCE).into(), (now + lifetime).into())
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Writes a file that only its owner reads, whole or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension("tmp");
    let write = || {
        // One that an earlier attempt left may have other permissions.
        let _ = fs::remove_file(&beside);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(Error::file("write", path))
}

/// Somebody's public key, to be certified. Whether it is a point of the curve shows when TLS uses it.
struct CertifiedPoint(Vec<u8>);

impl PublicKeyData for CertifiedPoint {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// Which tokens were used, and by whom: a line each.
struct Spent {
    path: PathBuf,
    file: Option<File>,
    tokens: HashMap<MemberId, [u8; FINGERPRINT_BYTES]>,
}

impl Spent {
    fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(SPENT_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::file("read", &path)(error)),
        };
        // A last line that was cut off admitted nobody.
        let line = |line: &str| {
            let (id, holder) = line.split_once(' ')?;
            Some((id.parse().ok()?, from_hex(holder)?))
        };
        Ok(Self { tokens: text.lines().filter_map(line).collect(), path, file: None })
    }

    /// Whether the holder of a key may use a token: it is the first, or was.
    fn spend(&mut self, token: MemberId, holder: [u8; FINGERPRINT_BYTES]) -> Result<bool> {
        if let Some(earlier) = self.tokens.get(&token) {
            return Ok(*earlier == holder);
        }
        self.append(&format!("\n{token} {}", to_hex(&holder))).map_err(Error::file("append to", &self.path))?;
        self.tokens.insert(token, holder);
        Ok(true)
    }

    /// Each line is begun anew, so that one that was cut off spoils no other.
    fn append(&mut self, line: &str) -> std::io::Result<()> {
        if self.file.is_none() {
            if let Some(directory) = self.path.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
            }
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
            self.file = Some(file);
        }
        let file = self.file.as_mut().expect("opened above"); // why: the branch before
        file.write_all(line.as_bytes())?;
        file.sync_data()
    }
}

#[cfg(test)]
mod tests;
