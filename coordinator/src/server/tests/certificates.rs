//! Over TLS: whom certificates let in.

use quintet_identity::{Authority, Credentials, MemberKey, Pinned, coordinator_name};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tonic::Code;
use tonic::transport::{Endpoint, Uri};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

async fn dial(
    served: &Served,
    tls: Arc<ClientConfig>,
) -> std::result::Result<CoordinatorClient<Channel>, tonic::transport::Error> {
    let address = served.url.trim_start_matches("http://").to_owned();
    let dial = move |_: Uri| {
        let (connector, address) = (TlsConnector::from(Arc::clone(&tls)), address.clone());
        async move {
            let socket = tokio::net::TcpStream::connect(address).await?;
            let stream = connector.connect(coordinator_name(), socket).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    };
    let endpoint = Endpoint::from_static("http://coordinator");
    Ok(CoordinatorClient::new(endpoint.connect_with_connector(tower::service_fn(dial)).await?))
}

/// Credentials that were made at `since` for an hour.
fn credentials(authority: &Authority, role: Role, since: SystemTime) -> Credentials {
    let token = authority.issue_token(role, since, HOUR).unwrap().to_text();
    let key = MemberKey::generate().unwrap();
    let admitted = authority.redeem(&token, key.public_key(), since, HOUR).unwrap().unwrap();
    let own = authority.certificate().to_vec();
    Credentials::new(key, admitted.certificate, own, &authority.fingerprint()).unwrap()
}

fn authority() -> (tempfile::TempDir, Arc<Authority>) {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::open(directory.path(), directory.path()).unwrap();
    (directory, Arc::new(authority))
}

fn hello() -> Hello {
    Hello { run_token: Vec::new(), ..super::hello() }
}

#[tokio::test]
async fn a_token_gets_a_certificate_and_a_certificate_gets_work() {
    let ((_directory, authority), run) = (authority(), tempfile::tempdir().unwrap());
    let settings = settings(1, 3);
    let schedule = settings.schedule.clone();
    let served = start_with(settings, run.path(), Admission::Authority(Arc::clone(&authority))).await;
    let token = authority.issue_token(Role::Worker, SystemTime::now(), HOUR).unwrap();
    let mut stranger = dial(&served, Pinned { fingerprint: token.fingerprint }.client().unwrap()).await.unwrap();
    let key = MemberKey::generate().unwrap();
    let request = JoinRequest { token: token.to_text(), public_key: key.public_key().to_vec() };
    let reply = stranger.join(request).await.unwrap().into_inner();
    let own = Credentials::new(key, reply.certificate, reply.authority, &token.fingerprint).unwrap();
    assert_eq!(own.member().id, token.id);
    // Renews by its certificate alone, under the same name.
    let key = MemberKey::generate().unwrap();
    let request = JoinRequest { token: String::new(), public_key: key.public_key().to_vec() };
    let mut member = dial(&served, own.coordinator_client().unwrap()).await.unwrap();
    let reply = member.join(request).await.unwrap().into_inner();
    let renewed = Credentials::new(key, reply.certificate, reply.authority, &token.fingerprint).unwrap();
    assert_eq!(renewed.member(), own.member());
    let client = dial(&served, renewed.coordinator_client().unwrap()).await.unwrap();
    let worker = Worker::join_by(client, hello(), Ready::default()).await.unwrap();
    assert_eq!(worker.work(schedule).await.exit_code, exit_code::DONE);
    served.outcome.await.unwrap().unwrap();
}

#[tokio::test]
async fn who_has_no_certificate_or_another_gets_no_work() {
    let ((_directory, authority), (_other_directory, other)) = (authority(), authority());
    let run = tempfile::tempdir().unwrap();
    let served = start_with(settings(1, 3), run.path(), Admission::Authority(Arc::clone(&authority))).await;
    let now = SystemTime::now();
    let pinned = Pinned { fingerprint: authority.fingerprint() }.client().unwrap();
    let refused = async |tls| {
        let client = dial(&served, tls).await.unwrap();
        Worker::join_by(client, hello(), Ready::default()).await.map(|_| ()).unwrap_err()
    };
    let status = refused(Arc::clone(&pinned)).await;
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "this takes a certificate: join first"));
    let reader = credentials(&authority, Role::Reader, now);
    let status = refused(reader.coordinator_client().unwrap()).await;
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().ends_with("does not permit what takes a worker"), "{status}");

    // Nor files.
    for (tls, code) in
        [(Arc::clone(&pinned), Code::Unauthenticated), (reader.coordinator_client().unwrap(), Code::PermissionDenied)]
    {
        assert_eq!(calls_for_files(&mut dial(&served, tls).await.unwrap(), &[]).await, [code; 4]);
    }
    let worker = credentials(&authority, Role::Worker, now).coordinator_client().unwrap();
    assert_eq!(calls_for_files(&mut dial(&served, worker).await.unwrap(), &[]).await, NOTHING_THERE);

    // TLS itself refuses these: the connection is over before a request is heard.
    let expired = credentials(&authority, Role::Worker, now - 3 * HOUR);
    let stranger = credentials(&other, Role::Worker, now);
    let fingerprint = authority.fingerprint();
    let own_authority = authority.certificate().to_vec();
    let forged = {
        let (key, name) = (MemberKey::generate().unwrap(), stranger.member());
        let admitted = other.renew(name, key.public_key(), now, HOUR).unwrap().unwrap();
        Credentials::new(key, admitted.certificate, own_authority, &fingerprint).unwrap()
    };
    for credentials in [expired, forged] {
        if let Ok(client) = dial(&served, credentials.coordinator_client().unwrap()).await {
            let status = Worker::join_by(client, hello(), Ready::default()).await.map(|_| ()).unwrap_err();
            assert_eq!(status.code(), Code::Unknown, "{status}");
        }
    }
    // And this end refuses a coordinator that is another's.
    assert!(dial(&served, stranger.coordinator_client().unwrap()).await.is_err());

    let join = async |token: String| {
        let request = JoinRequest { token, public_key: MemberKey::generate().unwrap().public_key().to_vec() };
        dial(&served, Arc::clone(&pinned)).await.unwrap().join(request).await.map(|_| ()).unwrap_err()
    };
    assert_eq!(join(String::new()).await.code(), Code::Unauthenticated);
    assert_eq!(join("x".repeat(1 << 20)).await.code(), Code::Unauthenticated);
    let old = authority.issue_token(Role::Worker, now - 3 * HOUR, HOUR).unwrap().to_text();
    assert_eq!(join(old).await.code(), Code::AlreadyExists);
    let elsewhere = other.issue_token(Role::Worker, now, HOUR).unwrap().to_text();
    assert_eq!(join(elsewhere).await.message(), "unknown join token: it belongs to another run, or was changed");
}
