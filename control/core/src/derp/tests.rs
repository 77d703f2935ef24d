use std::net::SocketAddr;

use proptest::prelude::*;

use super::frame::{INFO_MAX, deliver_forwarded, readdress};
use super::*;
use crate::sealed::{BoxKey, PublicKey, SecretKey};

const KEY: PublicKey = PublicKey([0xab; 32]);
const OTHER: PublicKey = PublicKey([0xcd; 32]);

fn printed(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    frame.write(&mut out);
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every kind, from the table of the protocol: type, length of four bytes, payload.
#[test]
fn frames_have_the_bytes_of_the_protocol() {
    let (k, o) = ("ab".repeat(32), "cd".repeat(32));
    let at: SocketAddr = "2.3.4.5:1234".parse().unwrap();
    let nonce = [0x11; 24];
    let n = "11".repeat(24);
    let s = "22".repeat(16);
    let sealed = &[0x22; 16][..];
    let golden = [
        (Frame::ServerKey(KEY), format!("010000002844455250f09f9491{k}")),
        (Frame::ClientInfo { from: KEY, nonce, sealed }, format!("0200000048{k}{n}{s}")),
        (Frame::ServerInfo { nonce, sealed }, format!("0300000028{n}{s}")),
        (Frame::SendPacket { to: KEY, packet: b"hi" }, format!("0400000022{k}6869")),
        (Frame::RecvPacket { from: KEY, packet: b"hi" }, format!("0500000022{k}6869")),
        (Frame::KeepAlive, "0600000000".into()),
        (Frame::NotePreferred(true), "070000000101".into()),
        (Frame::PeerGone { peer: KEY, why: Gone::Disconnected }, format!("0800000021{k}00")),
        (Frame::PeerGone { peer: KEY, why: Gone::NotHere }, format!("0800000021{k}01")),
        (
            Frame::PeerPresent { peer: KEY, at: Some(at), flags: 1 },
            format!("0900000033{k}{}ffff0203040504d201", "00".repeat(10)),
        ),
        (
            Frame::ForwardPacket { from: KEY, to: OTHER, packet: b"hi" },
            format!("0a00000042{k}{o}6869"),
        ),
        (Frame::WatchConns, "1000000000".into()),
        (Frame::ClosePeer(KEY), format!("1100000020{k}")),
        (Frame::Ping(*b"12345678"), "12000000083132333435363738".into()),
        (Frame::Pong(*b"12345678"), "13000000083132333435363738".into()),
        (Frame::Health("bad"), "1400000003626164".into()),
        (
            Frame::Restarting { reconnect_in_ms: 1000, try_for_ms: 60_000 },
            "1500000008000003e80000ea60".into(),
        ),
    ];
    for kind in Kind::ALL {
        assert!(golden.iter().any(|(frame, _)| frame.kind() == kind), "{kind:?} has no bytes");
        assert_eq!(Kind::from_byte(kind as u8), Some(kind));
    }
    for (frame, expected) in golden {
        let bytes = printed(&frame);
        assert_eq!(hex(&bytes), expected, "{frame:?}");
        let raw = Cutter::default().next(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!(Frame::parse(raw.kind, raw.payload), Ok(frame));
    }
}

#[test]
fn early_and_late_versions_of_a_frame_are_read() {
    let mut long = KEY.0.to_vec();
    let disconnected = Frame::PeerGone { peer: KEY, why: Gone::Disconnected };
    assert_eq!(Frame::parse(Kind::PeerGone, &long), Ok(disconnected));
    let present = Frame::PeerPresent { peer: KEY, at: None, flags: 0 };
    assert_eq!(Frame::parse(Kind::PeerPresent, &long), Ok(present));
    long.extend([0; 40]);
    assert_eq!(Frame::parse(Kind::PeerPresent, &long), Ok(present));
    assert_eq!(Frame::parse(Kind::Ping, b"12345678more"), Ok(Frame::Ping(*b"12345678")));
}

#[test]
fn unknown_frames_are_skipped_however_they_arrive() {
    let mut stream = vec![0x77, 0, 0, 0, 3, 1, 2, 3];
    Frame::KeepAlive.write(&mut stream);
    for at in 0..stream.len() {
        let mut cutter = Cutter::default();
        let (mut first, mut kinds) = (&stream[..at], Vec::new());
        while let Some(raw) = cutter.next(&mut first).unwrap() {
            kinds.push(raw.kind);
        }
        let rest = [first, &stream[at..]].concat();
        let mut rest = &rest[..];
        while let Some(raw) = cutter.next(&mut rest).unwrap() {
            kinds.push(raw.kind);
        }
        assert_eq!(kinds, [Kind::KeepAlive], "cut at {at}");
        assert!(rest.is_empty());
    }
}

/// One byte more or less than the bounds, by the header alone.
#[test]
fn lengths_out_of_bounds_are_refused_by_name() {
    for kind in Kind::ALL {
        let (min, max) = kind.bounds().into_inner();
        let header = |length: usize| {
            let [a, b, c, d] = (length as u32).to_be_bytes();
            [kind as u8, a, b, c, d]
        };
        for seen in [min.wrapping_sub(1), max + 1, u32::MAX as usize] {
            if seen > u32::MAX as usize {
                continue;
            }
            let bytes = header(seen);
            let refused = Cutter::default().next(&mut &bytes[..]);
            assert_eq!(refused, Err(FrameError::Length { kind, seen, min, max }));
        }
        for seen in [min, max] {
            let mut bytes = header(seen).to_vec();
            bytes.resize(HEADER_LEN + seen, 0);
            assert_eq!(Cutter::needed(&bytes), bytes.len());
            let raw = Cutter::default().next(&mut &bytes[..]).unwrap().unwrap();
            assert_eq!((raw.kind, raw.payload.len()), (kind, seen));
            assert_eq!(
                Cutter::default().next(&mut &bytes[..bytes.len() - 1]),
                Ok(None),
                "{kind:?}"
            );
        }
    }
    let unknown = Cutter::default().next(&mut &[0x77, 0, 0x10, 0, 1][..]);
    assert_eq!(unknown, Err(FrameError::UnknownLength { kind: 0x77, seen: INFO_MAX + 1 }));
    assert_eq!(Frame::parse(Kind::ServerKey, &[0; 40]), Err(FrameError::Magic));
    assert_eq!(Frame::parse(Kind::Health, &[0xff]), Err(FrameError::Text));
}

#[test]
fn a_sent_packet_becomes_a_received_one_in_place() {
    let mut frame = printed(&Frame::SendPacket { to: KEY, packet: b"hi" });
    readdress(&mut frame, OTHER);
    assert_eq!(frame, printed(&Frame::RecvPacket { from: OTHER, packet: b"hi" }));
}

/// The two sides of a login agree, and neither opens what another key sealed.
#[test]
fn a_login_proves_both_keys() {
    let (client, relay) = (SecretKey::from_bytes([1; 32]), SecretKey::from_bytes([2; 32]));
    let ours = BoxKey::agree(&client, relay.public_key()).unwrap();
    let theirs = BoxKey::agree(&relay, client.public_key()).unwrap();
    let mut stream = Vec::new();
    ClientInfo::default().write(client.public_key(), &ours, [3; 24], &mut stream);
    let raw = Cutter::default().next(&mut &stream[..]).unwrap().unwrap();
    let Ok(Frame::ClientInfo { from, nonce, sealed }) = Frame::parse(raw.kind, raw.payload) else {
        panic!("{raw:?}")
    };
    assert_eq!(from, client.public_key());
    assert_eq!(ClientInfo::open(&theirs, &nonce, sealed), Ok(ClientInfo::default()));
    let stranger = BoxKey::agree(&relay, SecretKey::from_bytes([9; 32]).public_key()).unwrap();
    let refused = ClientInfo::open(&stranger, &nonce, sealed);
    assert_eq!(refused, Err(LoginError::Proof(Kind::ClientInfo)));

    let info = ServerInfo { bytes_per_second: 1000, burst_bytes: 70_000, ..Default::default() };
    stream.clear();
    info.write(&theirs, [4; 24], &mut stream);
    let raw = Cutter::default().next(&mut &stream[..]).unwrap().unwrap();
    let Ok(Frame::ServerInfo { nonce, sealed }) = Frame::parse(raw.kind, raw.payload) else {
        panic!("{raw:?}")
    };
    assert_eq!(ServerInfo::open(&ours, &nonce, sealed), Ok(info));
    let mut box_of_text = vec![0; 16];
    box_of_text.extend(b"no json");
    ours.seal(&nonce, &mut box_of_text);
    let refused = ServerInfo::open(&ours, &nonce, &box_of_text);
    assert_eq!(refused, Err(LoginError::Content(Kind::ServerInfo)));
}

/// The words of the protocol, as its reference implementation spells them.
#[test]
fn infos_are_the_json_that_others_write() {
    let json = r#"{"meshKey":"","version":2,"CanAckPings":true,"IsProber":true,"AppName":"x"}"#;
    let info: ClientInfo = serde_json::from_str(json).unwrap();
    assert_eq!(info, ClientInfo { is_prober: true, ..ClientInfo::default() });
    let digits = "0123456789abcdef".repeat(4);
    let json = format!(r#"{{"version":2,"CanAckPings":true,"meshKey":"{digits}"}}"#);
    let mate = ClientInfo { mesh_key: MeshKey::from_hex(&digits), ..ClientInfo::default() };
    assert_eq!(serde_json::to_string(&mate).unwrap(), json);
    assert_eq!(serde_json::from_str::<ClientInfo>(&json).unwrap(), mate);
    assert!(serde_json::from_str::<ClientInfo>(&json.replace("0123", "012")).is_err());
    let text = serde_json::to_string(&ClientInfo::default()).unwrap();
    assert_eq!(text, r#"{"version":2,"CanAckPings":true}"#);
    let info = ServerInfo { version: 2, bytes_per_second: 5, burst_bytes: 6 };
    let text = serde_json::to_string(&info).unwrap();
    let expected = r#"{"version":2,"TokenBucketBytesPerSecond":5,"TokenBucketBytesBurst":6}"#;
    assert_eq!(text, expected);
    assert_eq!(serde_json::from_str::<ServerInfo>("{}").unwrap().version, 0);
}

/// Streams that are nearly right: headers of known and unknown kinds with plausible lengths.
fn streams() -> impl Strategy<Value = Vec<u8>> {
    let piece = (0_u8..0x18, 0_usize..120, any::<bool>(), any::<u8>()).prop_map(
        |(kind, length, honest, fill)| {
            let mut piece = vec![kind, 0, 0, 0, length as u8];
            piece.resize(HEADER_LEN + if honest { length } else { length / 2 }, fill);
            piece
        },
    );
    let frames = prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat());
    prop_oneof![frames, prop::collection::vec(any::<u8>(), 0..200)]
}

proptest! {
    #[test]
    fn any_stream_is_cut_alike_at_any_place(at: u8, stream in streams()) {
        crate::fuzz::derp(&[&[at][..], &stream].concat());
    }

    #[test]
    fn a_forwarded_packet_is_delivered_in_place(packet in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = printed(&Frame::ForwardPacket { from: KEY, to: OTHER, packet: &packet });
        let (from, to, start) = deliver_forwarded(&mut bytes);
        prop_assert_eq!((from, to), (KEY, OTHER));
        prop_assert_eq!(&bytes[start..], printed(&Frame::RecvPacket { from: KEY, packet: &packet }));
    }

    #[test]
    fn packets_of_any_length_pass(packet in prop::collection::vec(any::<u8>(), 0..3000)) {
        let bytes = printed(&Frame::RecvPacket { from: KEY, packet: &packet });
        let raw = Cutter::default().next(&mut &bytes[..]).unwrap().unwrap();
        let frame = Frame::RecvPacket { from: KEY, packet: &packet };
        prop_assert_eq!(Frame::parse(raw.kind, raw.payload), Ok(frame));
    }
}
