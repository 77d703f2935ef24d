//! All 325 cases of Project Wycheproof's chacha20_poly1305_test.json (`tests/data/wycheproof`).
//!
//! Not one of them fits WireGuard's use, which has no associated data and nonces that begin with 32
//! zero bits; a test below counts that. So each case is used three times: as it is, by `ring` and
//! by RustCrypto, which proves the data and both oracles; with its key and text under a counter, by
//! every back-end, compared with RustCrypto; and forged as the invalid ones are.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::path::Path;

use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, KeyInit};
use common::{CROWDS, backends, counter, hex, open_in_crowd, seal_in_crowd};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    algorithm: String,
    number_of_tests: usize,
    test_groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    iv_size: usize,
    key_size: usize,
    tag_size: usize,
    tests: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    tc_id: usize,
    flags: Vec<String>,
    #[serde(deserialize_with = "from_hex")]
    key: Vec<u8>,
    #[serde(deserialize_with = "from_hex")]
    iv: Vec<u8>,
    #[serde(deserialize_with = "from_hex")]
    aad: Vec<u8>,
    #[serde(deserialize_with = "from_hex")]
    msg: Vec<u8>,
    #[serde(deserialize_with = "from_hex")]
    ct: Vec<u8>,
    #[serde(deserialize_with = "from_hex")]
    tag: Vec<u8>,
    result: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Valid,
    Invalid,
}

fn from_hex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    Ok(hex(&String::deserialize(deserializer)?))
}

impl Case {
    fn key(&self) -> [u8; 32] {
        self.key[..].try_into().unwrap()
    }

    fn is_modified(&self) -> bool {
        self.flags.iter().any(|flag| flag == "ModifiedTag")
    }

    /// A counter for this case: the end of its nonce, or, if that is too short, its number.
    fn counter(&self) -> u64 {
        let end = self.iv.last_chunk().map(|end| u64::from_le_bytes(*end));
        end.unwrap_or(self.tc_id as u64)
    }

    /// Under WireGuard's nonce of [`Case::counter`], by RustCrypto.
    fn sealed_by_oracle(&self) -> Vec<u8> {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.counter().to_le_bytes());
        let mut text = self.msg.clone();
        let cipher = ChaCha20Poly1305::new(&self.key().into());
        let tag = cipher.encrypt_in_place_detached(&nonce.into(), &[], &mut text).unwrap();
        [&text[..], &tag].concat()
    }
}

/// Every case, checked to be all there are.
fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/wycheproof/chacha20_poly1305_test.json");
    let file: File = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(file.algorithm, "CHACHA20-POLY1305");
    let mut cases = Vec::new();
    for group in file.test_groups {
        for case in &group.tests {
            assert_eq!(case.iv.len() * 8, group.iv_size, "case {}", case.tc_id);
            assert_eq!(case.key.len() * 8, group.key_size, "case {}", case.tc_id);
            // Cases of other nonces have neither text nor tag.
            let tag_size = if case.iv.len() == 12 { group.tag_size } else { 0 };
            assert_eq!(case.tag.len() * 8, tag_size, "case {}", case.tc_id);
        }
        cases.extend(group.tests);
    }
    assert_eq!((file.number_of_tests, cases.len()), (325, 325));
    let valid = cases.iter().filter(|case| case.result == Outcome::Valid).count();
    assert_eq!((valid, cases.len() - valid), (256, 69));
    cases
}

#[test]
fn both_oracles_agree_with_every_case_as_it_is() {
    let mut of_other_nonce_sizes = 0;
    for case in cases() {
        let Ok(nonce) = <[u8; 12]>::try_from(&case.iv[..]) else {
            // Neither takes such a nonce at all, and nor do we.
            assert_eq!(case.result, Outcome::Invalid, "case {}", case.tc_id);
            of_other_nonce_sizes += 1;
            continue;
        };
        let key = ring::aead::UnboundKey::new(&ring::aead::CHACHA20_POLY1305, &case.key).unwrap();
        let ring_key = ring::aead::LessSafeKey::new(key);
        let rust_crypto = ChaCha20Poly1305::new(&case.key().into());
        let mut sealed = [&case.ct[..], &case.tag].concat();
        let by_ring = ring_key
            .open_in_place(
                ring::aead::Nonce::assume_unique_for_key(nonce),
                ring::aead::Aad::from(&case.aad),
                &mut sealed,
            )
            .is_ok_and(|plain| *plain == case.msg[..]);
        let mut text = case.ct.clone();
        let tag = case.tag[..].into();
        let by_rust_crypto = rust_crypto
            .decrypt_in_place_detached(&nonce.into(), &case.aad, &mut text, tag)
            .is_ok_and(|()| text == case.msg);
        let is_valid = case.result == Outcome::Valid;
        assert_eq!((by_ring, by_rust_crypto), (is_valid, is_valid), "case {}", case.tc_id);
    }
    assert_eq!(of_other_nonce_sizes, 9);
}

#[test]
fn no_case_fits_as_it_is() {
    // If a later file has some, this fails: then they belong to what every back-end runs.
    let fits =
        |case: &&Case| case.iv.len() == 12 && case.aad.is_empty() && counter(&case.iv).is_some();
    assert_eq!(cases().iter().filter(fits).count(), 0);
}

#[test]
fn every_key_and_text_seals_and_opens_as_rustcrypto_says() {
    let cases = cases();
    for backend in backends() {
        for case in &cases {
            let expected = case.sealed_by_oracle();
            let (key, counter) = (case.key(), case.counter());
            for crowd in CROWDS {
                let seen = seal_in_crowd(backend, key, counter, &case.msg, crowd);
                assert_eq!(seen, expected, "{backend}, case {}, {crowd:?}", case.tc_id);
                let (verdict, opened) = open_in_crowd(backend, key, counter, &expected, crowd);
                assert!(verdict, "{backend}, case {}, {crowd:?}", case.tc_id);
                assert_eq!(opened[..case.msg.len()], case.msg, "{backend}, case {}", case.tc_id);
            }
        }
    }
}

/// An invalid case has the tag of a valid one (same key, nonce and text) with some bits changed:
/// the same bits are changed in ours.
#[test]
fn every_tag_modified_as_in_the_invalid_cases_is_refused() {
    let (backends, cases) = (backends(), cases());
    let mut count = 0;
    for case in cases.iter().filter(|case| case.is_modified()) {
        assert_eq!(case.result, Outcome::Invalid, "case {}", case.tc_id);
        let mut right = case.msg.clone();
        let nonce = <[u8; 12]>::try_from(&case.iv[..]).unwrap();
        let tag = ChaCha20Poly1305::new(&case.key().into())
            .encrypt_in_place_detached(&nonce.into(), &case.aad, &mut right)
            .unwrap();
        let change: Vec<u8> = tag.iter().zip(&case.tag).map(|(a, b)| a ^ b).collect();
        assert!(change.iter().any(|&byte| byte != 0), "case {}", case.tc_id);
        let mut forged = case.sealed_by_oracle();
        for (byte, change) in forged[case.msg.len()..].iter_mut().zip(change) {
            *byte ^= change;
        }
        for &backend in &backends {
            for crowd in CROWDS {
                let (verdict, left) =
                    open_in_crowd(backend, case.key(), case.counter(), &forged, crowd);
                assert!(!verdict, "{backend} opens case {} in {crowd:?}", case.tc_id);
                assert!(left.iter().all(|&byte| byte == 0), "{backend}, case {}", case.tc_id);
            }
        }
        count += 1;
    }
    let others = cases.iter().filter(|case| case.result == Outcome::Invalid).count() - count;
    assert_eq!((count, others), (60, 9), "the others have nonces of sizes that we cannot take");
}

/// Tags and texts of the file, valid there, are not valid without their associated data or under
/// other nonces.
#[test]
fn what_is_valid_with_other_nonces_or_data_is_refused() {
    let backends = backends();
    for case in cases() {
        let as_it_is = [&case.ct[..], &case.tag].concat();
        for &backend in &backends {
            let (verdict, left) =
                open_in_crowd(backend, case.key(), case.counter(), &as_it_is, (9, 4));
            assert!(!verdict, "{backend} opens case {}", case.tc_id);
            assert!(left.iter().all(|&byte| byte == 0), "{backend}, case {}", case.tc_id);
        }
    }
}
