//! What a datagram on our port is: the Rust twin of `bpf/classify.h`.
//!
//! Total on every input, allocates nothing; `tests/twins.rs` proves that both agree.

/// Protocols that share the port. Numbers equal `enum class` in C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Class {
    Unknown = 0,
    /// WireGuard type 4 of at least 32 bytes.
    WgData = 1,
    /// WireGuard types 1, 2, 3 of exactly 148, 92, 64 bytes.
    WgHandshake = 2,
    /// RFC 8489: two zero bits and the magic cookie.
    Stun = 3,
    /// Tailscale's discovery envelope.
    Disco = 4,
    /// Geneve (RFC 8926) with one of the peer relay's two protocol types.
    Geneve = 5,
}

/// Classifies a whole UDP payload.
pub fn classify(payload: &[u8]) -> Class {
    match payload.first_chunk() {
        Some(head) => classify_head(*head, payload.len()),
        None => Class::Unknown,
    }
}

/// Classifies by the first 8 bytes of a payload of `length` bytes.
pub fn classify_head(head: [u8; 8], length: usize) -> Class {
    let when = |enough: bool, class: Class| if enough { class } else { Class::Unknown };
    match head {
        // What claims to be WireGuard is WireGuard or nothing.
        [4, 0, 0, 0, ..] => when(length >= 32, Class::WgData),
        [1, 0, 0, 0, ..] => when(length == 148, Class::WgHandshake),
        [2, 0, 0, 0, ..] => when(length == 92, Class::WgHandshake),
        [3, 0, 0, 0, ..] => when(length == 64, Class::WgHandshake),
        [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac, ..] => when(length >= 62, Class::Disco),
        [0x40..=0xff, ..] => Class::Unknown,
        [.., 0x21, 0x12, 0xa4, 0x42] => when(length >= 20, Class::Stun),
        [_, _, 0x7a, 0x11 | 0x12, ..] => when(length >= 8, Class::Geneve),
        _ => Class::Unknown,
    }
}

/// The receiver index of a [`Class::WgData`] message.
pub fn receiver_index(head: [u8; 8]) -> u32 {
    u32::from_le_bytes([head[4], head[5], head[6], head[7]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wireguard_type_with_an_index_that_looks_like_the_stun_cookie_stays_wireguard() {
        let head = [4, 0, 0, 0, 0x21, 0x12, 0xa4, 0x42];
        assert_eq!(classify_head(head, 32), Class::WgData);
        assert_eq!(classify_head(head, 31), Class::Unknown);
        assert_eq!(receiver_index(head), 0x42a4_1221);
    }

    #[test]
    fn payloads_shorter_than_the_head_are_unknown() {
        for length in 0..8 {
            assert_eq!(classify(&[4, 0, 0, 0, 1, 2, 3][..length.min(7)]), Class::Unknown);
        }
    }
}
