//! Tokens and certificates against clocks, copies and other authorities.

use std::io::Cursor;

use rustls::{ClientConnection, ServerConnection};

use super::*;
use crate::{Credentials, Pinned, coordinator_name, member_of, worker_name};

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> (tempfile::TempDir, Authority) {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::open(directory.path(), directory.path()).unwrap();
    (directory, authority)
}

fn worker(authority: &Authority, now: SystemTime, lifetime: Duration) -> Credentials {
    let token = authority.issue_token(Role::Worker, now, HOUR).unwrap();
    let key = MemberKey::generate().unwrap();
    let admitted = authority.redeem(&token.to_text(), key.public_key(), now, lifetime).unwrap().unwrap();
    assert_eq!(admitted.member, Member { role: Role::Worker, id: token.id });
    let own = authority.certificate().to_vec();
    Credentials::new(key, admitted.certificate, own, &authority.fingerprint()).unwrap()
}

/// Carries bytes between two ends until neither has any; the first error, of either end.
fn shake(client: &mut ClientConnection, server: &mut ServerConnection) -> std::result::Result<(), rustls::Error> {
    while client.wants_write() || server.wants_write() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut Cursor::new(wire)).unwrap();
        server.process_new_packets()?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut Cursor::new(wire)).unwrap();
        client.process_new_packets()?;
    }
    Ok(())
}

fn coordinator(authority: &Authority) -> ServerConnection {
    let address = IpAddr::from([10, 0, 0, 1]);
    ServerConnection::new(authority.coordinator_server(address, SystemTime::now()).unwrap()).unwrap()
}

#[test]
fn a_token_admits_its_first_holder_and_nobody_else() {
    let (directory, authority) = authority();
    let now = SystemTime::now();
    let token = authority.issue_token(Role::Worker, now, HOUR).unwrap();
    let (holder, thief) = (MemberKey::generate().unwrap(), MemberKey::generate().unwrap());
    let redeem = |authority: &Authority, key: &MemberKey, now| {
        authority.redeem(&token.to_text(), key.public_key(), now, HOUR).unwrap().map(|admitted| admitted.member)
    };
    let admitted = Ok(Member { role: Role::Worker, id: token.id });
    assert_eq!(redeem(&authority, &holder, now + HOUR + Duration::from_secs(7)), Err(Refusal::Expired { seconds: 7 }));
    assert_eq!(redeem(&authority, &holder, now), admitted);
    assert_eq!(redeem(&authority, &thief, now), Err(Refusal::Spent));
    assert_eq!(redeem(&authority, &holder, now), admitted);
    drop(authority);
    // The coordinator was killed in the middle of a line, and is back.
    let path = directory.path().join(SPENT_FILE);
    OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\n0011").unwrap();
    let again = Authority::open(directory.path(), directory.path()).unwrap();
    assert_eq!(redeem(&again, &thief, now), Err(Refusal::Spent));
    assert_eq!(redeem(&again, &holder, now), admitted);
    let other = again.issue_token(Role::Reader, now, HOUR).unwrap();
    assert!(again.redeem(&other.to_text(), thief.public_key(), now, HOUR).unwrap().is_ok());
    let third = Authority::open(directory.path(), directory.path()).unwrap();
    assert_eq!(third.redeem(&other.to_text(), holder.public_key(), now, HOUR).unwrap().unwrap_err(), Refusal::Spent);
}

#[test]
fn what_is_no_token_of_ours_is_refused_and_spends_nothing() {
    let (_directory, authority) = authority();
    let (_other_directory, other) = self::authority();
    let now = SystemTime::now();
    let key = MemberKey::generate().unwrap();
    let refusal = |text: &str| authority.redeem(text, key.public_key(), now, HOUR).unwrap().map(|_| ()).unwrap_err();
    let text = authority.issue_token(Role::Worker, now, HOUR).unwrap().to_text();
    assert_eq!(refusal(&other.issue_token(Role::Worker, now, HOUR).unwrap().to_text()), Refusal::Unknown);
    assert_eq!(refusal(&text.replace(".worker.", ".operator.")), Refusal::Unknown);
    let later = text.replace(&seconds(now + HOUR).to_string(), &seconds(now + 2 * HOUR).to_string());
    assert_eq!(refusal(&later), Refusal::Unknown);
    for garbled in
        ["", "secret", "quintet1.", &text[1..], &text[..text.len() - 1], &text.to_uppercase(), &text.repeat(9)]
    {
        assert_eq!(refusal(garbled), Refusal::Unreadable, "{garbled}");
    }
    // A coordinator is nobody that a token makes.
    assert_eq!(refusal(&text.replace(".worker.", ".coordinator.")), Refusal::Unknown);
    for key in [&[4; 64][..], &[3; 65], &[]] {
        assert_eq!(authority.redeem(&text, key, now, HOUR).unwrap().map(|_| ()).unwrap_err(), Refusal::Key);
    }
    assert!(authority.redeem(&text, key.public_key(), now, HOUR).unwrap().is_ok());
}

#[test]
fn the_authority_survives_its_process_and_keeps_its_key_to_its_owner() {
    use std::os::unix::fs::PermissionsExt;

    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("security");
    let first = Authority::open(&directory, &directory).unwrap();
    let second = Authority::open(&directory, &directory).unwrap();
    assert_eq!(first.fingerprint(), second.fingerprint());
    let member = worker(&first, SystemTime::now(), HOUR);
    let mut client = ClientConnection::new(member.coordinator_client().unwrap(), coordinator_name()).unwrap();
    shake(&mut client, &mut coordinator(&second)).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    for name in [KEY_FILE, CERTIFICATE_FILE, SPENT_FILE] {
        assert_eq!(mode(&directory.join(name)), 0o600, "{name}");
    }
    fs::write(directory.join(KEY_FILE), "not a key").unwrap();
    assert!(matches!(Authority::open(&directory, &directory), Err(Error::Damaged { .. })));
}

#[test]
fn strangers_recognize_the_coordinator_by_its_fingerprint() {
    let (_directory, authority) = authority();
    let (_other_directory, other) = self::authority();
    let dial = |fingerprint, server: &mut ServerConnection| {
        let config = Pinned { fingerprint }.client().unwrap();
        shake(&mut ClientConnection::new(config, coordinator_name()).unwrap(), server)
    };
    dial(authority.fingerprint(), &mut coordinator(&authority)).unwrap();
    dial(authority.fingerprint(), &mut coordinator(&other)).unwrap_err();
    dial([0; 32], &mut coordinator(&authority)).unwrap_err();
    // A worker is no coordinator, though it has a certificate of the same authority.
    let mut impostor =
        ServerConnection::new(worker(&authority, SystemTime::now(), HOUR).mesh_server().unwrap()).unwrap();
    dial(authority.fingerprint(), &mut impostor).unwrap_err();
}

#[test]
fn the_coordinator_knows_members_by_their_certificates() {
    let (_directory, authority) = authority();
    let (_other_directory, other) = self::authority();
    let now = SystemTime::now();
    let connect = |member: &Credentials, server: &Authority| {
        let mut server = coordinator(server);
        let mut client = ClientConnection::new(member.coordinator_client().unwrap(), coordinator_name()).unwrap();
        shake(&mut client, &mut server)?;
        Ok::<_, rustls::Error>(server.peer_certificates().and_then(|chain| member_of(&chain[0])))
    };
    let member = worker(&authority, now, HOUR);
    assert_eq!(connect(&member, &authority), Ok(Some(member.member())));
    let renewed = authority.renew(member.member(), MemberKey::generate().unwrap().public_key(), now, HOUR);
    assert_eq!(renewed.unwrap().unwrap().member, member.member());
    connect(&worker(&other, now, HOUR), &authority).unwrap_err();
    let expired = connect(&worker(&authority, now - 2 * HOUR, HOUR), &authority).unwrap_err();
    assert!(expired.to_string().contains("xpired"), "{expired}");
}

#[test]
fn workers_know_each_other() {
    let (_directory, authority) = authority();
    let (_other_directory, other) = self::authority();
    let now = SystemTime::now();
    let connect = |client: &Credentials, server: &Credentials| {
        let mut server = ServerConnection::new(server.mesh_server().unwrap()).unwrap();
        shake(&mut ClientConnection::new(client.mesh_client().unwrap(), worker_name()).unwrap(), &mut server)
    };
    let (a, b) = (worker(&authority, now, HOUR), worker(&authority, now, HOUR));
    connect(&a, &b).unwrap();
    let stranger = worker(&other, now, HOUR);
    connect(&a, &stranger).unwrap_err();
    connect(&stranger, &a).unwrap_err();
    connect(&worker(&authority, now - 2 * HOUR, HOUR), &a).unwrap_err();
    // The coordinator's protocol is none of the mesh's.
    let mut server = ServerConnection::new(b.mesh_server().unwrap()).unwrap();
    shake(&mut ClientConnection::new(a.coordinator_client().unwrap(), worker_name()).unwrap(), &mut server)
        .unwrap_err();
}

#[test]
fn nothing_secret_is_shown() {
    let (_directory, authority) = authority();
    let token = authority.issue_token(Role::Operator, SystemTime::now(), HOUR).unwrap();
    let text = token.to_text();
    let (_, proof) = text.rsplit_once('.').unwrap();
    assert!(!format!("{token:?} {authority:?}").contains(&proof[..8]));
    assert_eq!(text.parse::<JoinToken>().unwrap(), token);
    assert!(text.len() < crate::TOKEN_TEXT_BYTES_MAX);
}
