//! The words of the keys that choose one of a few.

use crate::config::{Aead, Receive, Transmit};

pub(super) const RECEIVE: [(&str, Receive); 4] = [
    ("auto", Receive::Auto),
    ("xdp-zerocopy", Receive::XdpZerocopy),
    ("xdp-copy", Receive::XdpCopy),
    ("socket", Receive::Socket),
];

pub(super) const TRANSMIT: [(&str, Transmit); 3] =
    [("auto", Transmit::Auto), ("xdp-zerocopy", Transmit::XdpZerocopy), ("gso", Transmit::Gso)];

pub(super) const AEAD: [(&str, Aead); 4] =
    [("auto", Aead::Auto), ("ring", Aead::Ring), ("avx2", Aead::Avx2), ("avx512", Aead::Avx512)];

impl Aead {
    /// The word of the file.
    pub fn word(self) -> &'static str {
        word_of(&AEAD, self)
    }
}

impl Receive {
    /// The word of the file.
    pub fn word(self) -> &'static str {
        word_of(&RECEIVE, self)
    }
}

impl Transmit {
    /// The word of the file.
    pub fn word(self) -> &'static str {
        word_of(&TRANSMIT, self)
    }
}

fn word_of<T: PartialEq>(words: &[(&'static str, T)], value: T) -> &'static str {
    words.iter().find(|(_, known)| *known == value).map_or("auto", |&(word, _)| word)
}
