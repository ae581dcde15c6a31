//! What members send each other: messages of the contract, join tokens, certificates.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use quintet_identity::{Credentials, JoinToken, MemberKey, fingerprint};
use quintet_proto::v1::{
    FromWorker, JoinReply, JoinRequest, LeavesReply, ListReply, Part, Piece, ReadRequest, ToWorker,
};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = FromWorker::decode(bytes) {
        assert!(message.encoded_len() <= 2 * bytes.len() + 16, "it grew");
    }
    let _ = ToWorker::decode(bytes);
    let _ = (Part::decode(bytes), Piece::decode(bytes), ReadRequest::decode(bytes));
    let _ = (LeavesReply::decode(bytes), ListReply::decode(bytes));
    if let Ok(request) = JoinRequest::decode(bytes) {
        let _ = request.token.parse::<JoinToken>();
    }
    if let Ok(JoinReply { certificate, authority, .. }) = JoinReply::decode(bytes) {
        let expected = fingerprint(&authority);
        let key = MemberKey::generate().expect("random numbers");
        if let Ok(credentials) = Credentials::new(key, certificate, authority, &expected) {
            let _ = credentials.coordinator_client();
            let _ = credentials.mesh_server();
        }
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(token) = text.parse::<JoinToken>()
    {
        assert_eq!(token.to_text(), text.trim());
    }
});
