//! The test vectors of RFC 8439 that fit WireGuard's use, against every back-end.
//!
//! What fits: nonces that begin with 32 zero bits, no associated data, block counters from 1. Those
//! of block counter 0 are one-time keys of Poly1305, seen through tags. The rest cannot be asked
//! for, because no interface of this crate takes it: sections 2.3.2 and 2.8.2 have other nonces,
//! and the tags of sections 2.8.2 and A.5 cover associated data (the ciphertext of A.5 is here).
//! The keys and edge cases of A.3 are in `src/wide/tests.rs`: r and s cannot be chosen from outside.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{CROWDS, backends, counter, hex, open_in_crowd, seal_in_crowd, text};
use millrace_aead::TAG_LEN;
use poly1305::Poly1305;
use poly1305::universal_hash::{KeyInit, UniversalHash};

struct Vector {
    name: &'static str,
    key: &'static str,
    nonce: &'static str,
    /// Of the first block of `plain`, at least 1.
    first_block: usize,
    plain: &'static [u8],
    cipher: &'static str,
}

const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
const ONE: &str = "0000000000000000000000000000000000000000000000000000000000000001";
const NONCE_2: &str = "000000000000000000000002";
const JABBERWOCKY_KEY: &str = "1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0";

const VECTORS: [Vector; 7] = [
    Vector {
        name: "section 2.4.2",
        key: "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
        nonce: "000000000000004a00000000",
        first_block: 1,
        plain: b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for \
                 the future, sunscreen would be it.",
        cipher: "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b
            f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8
            07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736
            5af90bbf74a35be6b40b8eedf2785e42874d",
    },
    Vector {
        name: "A.1 #2",
        key: ZEROS,
        nonce: "000000000000000000000000",
        first_block: 1,
        plain: &[0; 64],
        cipher: "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed
            29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    },
    Vector {
        name: "A.1 #3",
        key: ONE,
        nonce: "000000000000000000000000",
        first_block: 1,
        plain: &[0; 64],
        cipher: "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a
            8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    },
    Vector {
        name: "A.1 #4",
        key: "00ff000000000000000000000000000000000000000000000000000000000000",
        nonce: "000000000000000000000000",
        first_block: 2,
        plain: &[0; 64],
        cipher: "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca
            13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    },
    Vector {
        name: "A.2 #2",
        key: ONE,
        nonce: NONCE_2,
        first_block: 1,
        plain: b"Any submission to the IETF intended by the Contributor for publication as all or \
                 part of an IETF Internet-Draft or RFC and any statement made within the context \
                 of an IETF activity is considered an \"IETF Contribution\". Such statements \
                 include oral statements in IETF sessions, as well as written and electronic \
                 communications made at any time or place, which are addressed to",
        cipher: "a3fbf07df3fa2fde4f376ca23e82737041605d9f4f4f57bd8cff2c1d4b7955ec
            2a97948bd3722915c8f3d337f7d370050e9e96d647b7c39f56e031ca5eb6250d
            4042e02785ececfa4b4bb5e8ead0440e20b6e8db09d881a7c6132f420e527950
            42bdfa7773d8a9051447b3291ce1411c680465552aa6c405b7764d5e87bea85a
            d00f8449ed8f72d0d662ab052691ca66424bc86d2df80ea41f43abf937d3259d
            c4b2d0dfb48a6c9139ddd7f76966e928e635553ba76c5c879d7b35d49eb2e62b
            0871cdac638939e25e8a1e0ef9d5280fa8ca328b351c3c765989cbcf3daa8b6c
            cc3aaf9f3979c92b3720fc88dc95ed84a1be059c6499b9fda236e7e818b04b0b
            c39c1e876b193bfe5569753f88128cc08aaa9b63d1a16f80ef2554d7189c411f
            5869ca52c5b83fa36ff216b9c1d30062bebcfd2dc5bce0911934fda79a86f6e6
            98ced759c3ff9b6477338f3da4f9cd8514ea9982ccafb341b2384dd902f3d1ab
            7ac61dd29c6f21ba5b862f3730e37cfdc4fd806c22f221",
    },
    Vector {
        name: "A.2 #3",
        key: JABBERWOCKY_KEY,
        nonce: NONCE_2,
        first_block: 42,
        plain: b"'Twas brillig, and the slithy toves\nDid gyre and gimble in the wabe:\n\
                 All mimsy were the borogoves,\nAnd the mome raths outgrabe.",
        cipher: "62e6347f95ed87a45ffae7426f27a1df5fb69110044c0d73118effa95b01e5cf
            166d3df2d721caf9b21e5fb14c616871fd84c54f9d65b283196c7fe4f60553eb
            f39c6402c42234e32a356b3e764312a61a5532055716ead6962568f87d3f3f77
            04c6a8d1bcd1bf4d50d6154b6da731b187b58dfd728afa36757a797ac188d1",
    },
    Vector {
        name: "A.5, its ciphertext",
        key: JABBERWOCKY_KEY,
        nonce: "000000000102030405060708",
        first_block: 1,
        plain: b"Internet-Drafts are draft documents valid for a maximum of six months and may be \
                 updated, replaced, or obsoleted by other documents at any time. It is \
                 inappropriate to use Internet-Drafts as reference material or to cite them other \
                 than as /\xe2\x80\x9cwork in progress./\xe2\x80\x9d",
        cipher: "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb2
            4c6cfc18755d43eea09ee94e382d26b0bdb7b73c321b0100d4f03b7f355894cf
            332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c855
            9797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4
            b9166c767b804d46a59b5216cde7a4e99040c5a40433225ee282a1b0a06c523e
            af4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a
            0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a6727627097a10
            49e617d91d361094fa68f0ff77987130305beaba2eda04df997b714d6c6f2c29
            a6ad5cb4022b02709b",
    },
];

/// Name, key, nonce, and the one-time key that they give.
const ONE_TIME_KEYS: [[&str; 4]; 6] = [
    [
        "section 2.6.2",
        "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
        "000000000001020304050607",
        "8ad5a08b905f81cc815040274ab29471a833b637e3fd0da508dbb8e2fdd1a646",
    ],
    [
        "A.1 #1, A.2 #1 and A.4 #1",
        ZEROS,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7",
    ],
    ["A.1 #5", ZEROS, NONCE_2, "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"],
    ["A.4 #2", ONE, NONCE_2, "ecfa254f845f647473d3cb140da9e87606cb33066c447b87bc2666dde3fbb739"],
    [
        "A.4 #3",
        JABBERWOCKY_KEY,
        NONCE_2,
        "965e3bc6f9ec7ed9560808f4d229f94b137ff275ca9b3fcbdd59deaad23310ae",
    ],
    [
        "A.5",
        JABBERWOCKY_KEY,
        "000000000102030405060708",
        "bdf04aa95ce4de8995b14bb6a18fecaf26478f50c054f563dbc0a21e261572aa",
    ],
];

fn key(digits: &str) -> [u8; 32] {
    hex(digits).try_into().unwrap()
}

fn nonce(digits: &str) -> u64 {
    counter(&hex(digits)).unwrap()
}

/// The tag of a ciphertext without associated data (RFC 8439 section 2.8), by RustCrypto.
fn tag(one_time_key: &str, cipher: &[u8]) -> [u8; TAG_LEN] {
    let mut poly = Poly1305::new(&key(one_time_key).into());
    poly.update_padded(cipher);
    let mut lengths = [0; 16];
    lengths[8..].copy_from_slice(&(cipher.len() as u64).to_le_bytes());
    poly.update_padded(&lengths);
    poly.finalize().into()
}

#[test]
fn texts_are_encrypted_as_the_rfc_says() {
    for backend in backends() {
        for Vector { name, key: digits, nonce: nonce_digits, first_block, plain, cipher } in VECTORS
        {
            let (key, counter) = (key(digits), nonce(nonce_digits));
            // Blocks before the first one are those of other text.
            let from = (first_block - 1) * 64;
            let whole = [&text(from, 1), plain].concat();
            for crowd in CROWDS {
                let sealed = seal_in_crowd(backend, key, counter, &whole, crowd);
                let seen = &sealed[from..whole.len()];
                assert_eq!(seen, hex(cipher), "{backend}, {name}, {crowd:?}");
                let (verdict, opened) = open_in_crowd(backend, key, counter, &sealed, crowd);
                assert!(verdict, "{backend}, {name}, {crowd:?}");
                assert_eq!(&opened[..whole.len()], whole, "{backend}, {name}, {crowd:?}");
            }
        }
    }
}

#[test]
fn tags_come_of_the_one_time_keys_of_the_rfc() {
    for backend in backends() {
        for [name, digits, nonce_digits, one_time_key] in ONE_TIME_KEYS {
            let (key, counter) = (key(digits), nonce(nonce_digits));
            for len in [0, 1, 16, 64, 300, 1424, 5000] {
                for crowd in CROWDS {
                    let sealed = seal_in_crowd(backend, key, counter, &text(len, 9), crowd);
                    let (cipher, seen) = sealed.split_at(len);
                    let expected = tag(one_time_key, cipher);
                    assert_eq!(seen, expected, "{backend}, {name}, {len} bytes, {crowd:?}");
                }
            }
        }
    }
}
