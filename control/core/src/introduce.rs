//! The introduction: how two WireGuard peers that know nothing but each other's public key begin
//! to talk about paths. It travels through a relay, which sees neither content nor candidates.
//!
//! ```text
//! magic       8   "millrace"
//! version     1   1
//! nonce      24   random
//! box             sealed with the NaCl box key of the two WireGuard keys:
//!   sender   32   WireGuard public key of who wrote it
//!   number    8   above every earlier one of this sender (see below)
//!   answers   8   newest number that the sender took from the receiver; 0: none
//!   disco    32   the sender's disco public key, new at each start
//!   flags     1   1: the sender may have a session with the receiver; the others are ignored
//!   region    2   the sender's home relay: region of a DERP map, 0: none
//!   url       1   bytes of the URL that follow, at most 255
//!                 the home relay's URL, printable ASCII; empty: none
//!   count     1   candidates that follow, at most 100
//!     kind    1   as in `CandidateKind`
//!     address 18  IPv6 or IPv4-mapped address 16, port 2
//!   nat       4   what is known of the sender's NAT, as `Nat::to_wire` has it: mapping, filtering
//!                 IPv4, filtering IPv6, port preserved. Absent: an older sender, or no room
//! ```
//!
//! Integers are big-endian. Bytes after these belong to a later minor form and are ignored, as `nat`
//! is by older readers; what an old reader must not misread gets a new version.
//!
//! **Replay.** A box has one key for both directions, so the sender's key stands inside: a message
//! sent back to its author is seen. `number` is the time in nanoseconds since 1970, raised above
//! the last one used, and must grow. A sender whose clock went back while it restarted would be
//! locked out by that rule alone; therefore a message is also fresh that `answers` the newest
//! number of its receiver, which nobody could know before. See [`Freshness`].

use crate::candidate::{Candidate, CandidateKind};
use crate::limits::{ANSWER_TIME_MAX, CANDIDATES_MAX, RELAY_URL_LEN_MAX};
use crate::nat::Nat;
use crate::sealed::{BoxKey, NONCE_LEN, PublicKey, TAG_LEN};
use crate::wire_address::{self, ADDRESS_LEN};

/// What every introduction begins with. No datagram of WireGuard, STUN or disco does.
pub const MAGIC: [u8; 8] = *b"millrace";
/// Bytes of the longest introduction that any version of us reads.
pub const LEN_MAX: usize =
    OVERHEAD + FIXED_LEN + RELAY_URL_LEN_MAX + CANDIDATES_MAX * CANDIDATE_LEN;

const VERSION: u8 = 1;
const KEY_LEN: usize = 32;
/// Bytes around the content.
const OVERHEAD: usize = MAGIC.len() + 1 + NONCE_LEN + TAG_LEN;
/// Bytes of the content without URL and candidates.
const FIXED_LEN: usize = KEY_LEN + 8 + 8 + KEY_LEN + 1 + 2 + 1 + 1;
const HAS_SESSION: u8 = 1;
const CANDIDATE_LEN: usize = 1 + ADDRESS_LEN;

/// What a peer says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// The sender's WireGuard key.
    pub sender: PublicKey,
    /// See the module's "Replay"; never 0.
    pub number: u64,
    /// Newest number that the sender has of us; 0: none.
    pub answers: u64,
    pub disco_key: PublicKey,
    /// The tunnel had packets within a session's life: its data plane may send with a session that
    /// ours has lost.
    pub has_session: bool,
    pub home: Home,
    /// At most [`CANDIDATES_MAX`].
    pub candidates: Vec<Candidate>,
    /// What the sender's NAT does; none: it does not say.
    pub nat: Option<Nat>,
}

/// The relay at which a peer listens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Home {
    /// Region of a DERP map that both have; 0: none.
    pub region: u16,
    /// At most [`RELAY_URL_LEN_MAX`] bytes of printable ASCII; empty: none. Whether to go there is
    /// for the configuration to say: a peer must not send us anywhere it likes.
    pub url: String,
}

/// Why an introduction is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntroduceError {
    #[error("version {seen} of the introduction, this is for version {VERSION}")]
    Version { seen: u8 },
    #[error("{seen} bytes, an introduction has at most {LEN_MAX}")]
    Long { seen: usize },
    #[error("the box was not sealed with the key of this peer and us")]
    Sealed,
    #[error("the introduction is cut off or one of its fields has no meaning")]
    Malformed,
    #[error("written by another than the peer that it is said to be from")]
    Sender,
    #[error("number {seen} is not above {newest} and answers nothing that we asked: a replay")]
    Replayed { seen: u64, newest: u64 },
}

/// Whether this is an introduction, or of a version that is none yet: nothing else is.
pub fn is_introduction(packet: &[u8]) -> bool {
    packet.starts_with(&MAGIC)
}

/// The packet that carries `introduction`; what goes over the bounds is left out. `nonce` is random.
pub fn seal(introduction: &Introduction, nonce: [u8; NONCE_LEN], key: &BoxKey) -> Vec<u8> {
    let mut packet = Vec::with_capacity(LEN_MAX);
    packet.extend(MAGIC);
    packet.push(VERSION);
    packet.extend(nonce);
    let sealed_at = packet.len();
    packet.extend([0; TAG_LEN]);
    introduction.write(&mut packet);
    key.seal(&nonce, &mut packet[sealed_at..]);
    packet
}

/// Opens what the relay says `peer` sent, in place. Whether it is fresh, [`Freshness`] says.
pub fn open(
    packet: &mut [u8],
    peer: PublicKey,
    key: &BoxKey,
) -> Result<Introduction, IntroduceError> {
    if packet.len() > LEN_MAX {
        return Err(IntroduceError::Long { seen: packet.len() });
    }
    let (clear, sealed) = packet
        .split_first_chunk_mut::<{ MAGIC.len() + 1 + NONCE_LEN }>()
        .ok_or(IntroduceError::Malformed)?;
    let mut clear = Reader(clear);
    if clear.take() != Some(MAGIC) {
        return Err(IntroduceError::Malformed);
    }
    match clear.take() {
        Some([VERSION]) => {}
        Some([seen]) => return Err(IntroduceError::Version { seen }),
        None => return Err(IntroduceError::Malformed),
    }
    let nonce = clear.take().ok_or(IntroduceError::Malformed)?;
    let content = key.open(&nonce, sealed).ok_or(IntroduceError::Sealed)?;
    let introduction = Introduction::parse(content).ok_or(IntroduceError::Malformed)?;
    if introduction.sender != peer {
        return Err(IntroduceError::Sender);
    }
    Ok(introduction)
}

impl Introduction {
    pub(crate) fn parse(content: &[u8]) -> Option<Self> {
        let mut reader = Reader(content);
        let sender = PublicKey(reader.take()?);
        let number = u64::from_be_bytes(reader.take()?);
        let answers = u64::from_be_bytes(reader.take()?);
        let disco_key = PublicKey(reader.take()?);
        let [flags] = reader.take()?;
        let has_session = flags & HAS_SESSION != 0;
        let region = u16::from_be_bytes(reader.take()?);
        let [url_len] = reader.take()?;
        let url = reader.take_slice(url_len.into())?;
        if number == 0 || !url.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        let url = str::from_utf8(url).ok()?.to_owned();
        let [count] = reader.take()?;
        if usize::from(count) > CANDIDATES_MAX {
            return None;
        }
        let candidates = (0..count).map(|_| {
            let [kind] = reader.take()?;
            let address = wire_address::from_bytes(&reader.take()?);
            Some(Candidate { kind: CandidateKind::from_wire(kind), address })
        });
        let candidates = candidates.collect::<Option<Vec<_>>>()?;
        let nat = reader.take().map(Nat::from_wire);
        let home = Home { region, url };
        Some(Self { sender, number, answers, disco_key, has_session, home, candidates, nat })
    }

    fn write(&self, content: &mut Vec<u8>) {
        let begin = content.len();
        content.extend(self.sender.0);
        content.extend(self.number.to_be_bytes());
        content.extend(self.answers.to_be_bytes());
        content.extend(self.disco_key.0);
        content.push(if self.has_session { HAS_SESSION } else { 0 });
        content.extend(self.home.region.to_be_bytes());
        // Half a URL leads nowhere.
        let url = Some(self.home.url.as_bytes()).filter(|url| url.len() <= RELAY_URL_LEN_MAX);
        let url = url.unwrap_or_default();
        content.push(url.len() as u8);
        content.extend(url);
        let candidates = &self.candidates[..self.candidates.len().min(CANDIDATES_MAX)];
        content.push(candidates.len() as u8);
        for candidate in candidates {
            content.push(candidate.kind.to_wire());
            content.extend(wire_address::to_bytes(candidate.address));
        }
        // Who does not know of this field refuses what is longer than without it.
        let left = (LEN_MAX - OVERHEAD).saturating_sub(content.len() - begin);
        if let Some(nat) = self.nat.filter(|_| left >= Nat::WIRE_LEN) {
            content.extend(nat.to_wire());
        }
    }
}

/// Fields from the front of a slice.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take<const LEN: usize>(&mut self) -> Option<[u8; LEN]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn take_slice(&mut self, len: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }
}

/// What of one peer's introductions was seen, and what of ours it has.
///
/// A message is fresh if its number is above all that were taken, or, from a process that was not
/// heard yet, if it answers a number that we wrote lately and after the last answer: it was made
/// after that one. (Only the newest would not do: over a slow relay another is on its way each
/// time.) Numbers of one process (one disco key) always grow. After our own restart nothing is
/// remembered, and an old message passes once; the next real one, which has a higher number,
/// replaces it.
#[derive(Clone, Copy, Debug)]
pub struct Freshness {
    /// Highest number taken from any process of the peer.
    newest_ever: u64,
    /// The process heard last, and the highest number taken from it.
    process: Option<(PublicKey, u64)>,
    /// The first number that we wrote since an answer, or another process, was taken.
    unanswered_from: Option<u64>,
    /// Highest number that we wrote.
    written: u64,
    /// First number that we wrote with what we have to say now; `u64::MAX`: none yet.
    current: u64,
}

impl Default for Freshness {
    fn default() -> Self {
        Self { newest_ever: 0, process: None, unanswered_from: None, written: 0, current: u64::MAX }
    }
}

impl Freshness {
    /// What we have to say has changed: whoever has an older introduction wants the next one.
    pub fn outdated(&mut self) {
        self.current = u64::MAX;
    }

    /// The number of our next introduction. `wall_nanos` is the time since 1970.
    pub fn next_number(&mut self, wall_nanos: u64) -> u64 {
        self.written = wall_nanos.max(self.written.saturating_add(1));
        self.current = self.current.min(self.written);
        self.unanswered_from.get_or_insert(self.written);
        self.written
    }

    /// What goes into our `answers`.
    pub fn answers(&self) -> u64 {
        self.process.map_or(0, |(_, number)| number)
    }

    /// Takes a message or says that it is a replay. True if the sender has no introduction of ours
    /// that says what we have to say now, so that it wants one. (To ask for the newest would have
    /// two sides that write at the same time answer each other for ever.)
    pub fn take(&mut self, introduction: &Introduction) -> Result<bool, IntroduceError> {
        let Introduction { number: seen, answers, disco_key, .. } = *introduction;
        let answered = self.unanswered_from.is_some_and(|from| {
            let lately = self.written.saturating_sub(ANSWER_TIME_MAX.as_nanos() as u64);
            answers != 0 && (from.max(lately)..=self.written).contains(&answers)
        });
        let same_process = self.process.is_some_and(|(process, _)| process == disco_key);
        let newest = match self.process {
            Some((_, newest)) if same_process => newest,
            _ => self.newest_ever,
        };
        if seen <= newest && (same_process || !answered) {
            return Err(IntroduceError::Replayed { seen, newest });
        }
        self.newest_ever = self.newest_ever.max(seen);
        self.process = Some((disco_key, seen));
        // What was written before says nothing of who comes after this one.
        if answered || !same_process {
            self.unanswered_from = None;
        }
        Ok(!(self.current..=self.written).contains(&answers))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::nat::{Filtering, Mapping};

    const ALICE: PublicKey = PublicKey([0xa1; 32]);
    const BOB: PublicKey = PublicKey([0xb0; 32]);
    const FIRST_PROCESS: PublicKey = PublicKey([0xd1; 32]);
    const SECOND_PROCESS: PublicKey = PublicKey([0xd2; 32]);

    fn key() -> BoxKey {
        BoxKey::from_bytes([0x42; 32])
    }

    fn introduction() -> Introduction {
        Introduction {
            sender: ALICE,
            number: 0x0102_0304_0506_0708,
            answers: 9,
            disco_key: FIRST_PROCESS,
            has_session: true,
            home: Home { region: 900, url: "https://r.example".to_owned() },
            candidates: vec![
                Candidate {
                    kind: CandidateKind::Interface,
                    address: "192.0.2.1:51820".parse().unwrap(),
                },
                Candidate {
                    kind: CandidateKind::PortMapped,
                    address: "[2001:db8::1]:4242".parse().unwrap(),
                },
            ],
            nat: Some(Nat {
                mapping: Some(Mapping::EndpointIndependent),
                filtering: Some(Filtering::AddressAndPortDependent),
                filtering_ipv6: None,
                port_preserved: Some(true),
            }),
        }
    }

    fn golden_content() -> Vec<u8> {
        let mut content = vec![0xa1; 32];
        content.extend([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 9]);
        content.extend([0xd1; 32]);
        content.extend([1, 0x03, 0x84, 17]);
        content.extend(b"https://r.example");
        content.push(2);
        content.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 0xca, 0x6c]);
        content.extend([3, 0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        content.extend([0x10, 0x92]);
        content.extend([2, 3, 0, 2]);
        content
    }

    #[test]
    fn the_format_is_that_of_the_module_s_documentation() {
        let packet = seal(&introduction(), [7; NONCE_LEN], &key());
        assert_eq!(packet[..9], *b"millrace\x01");
        assert_eq!(packet[9..33], [7; 24]);
        // The box as another implementation makes it.
        use crypto_secretbox::aead::{Aead, KeyInit};
        let oracle = crypto_secretbox::XSalsa20Poly1305::new(&[0x42; 32].into());
        let sealed = oracle.encrypt(&[7; 24].into(), golden_content().as_slice()).unwrap();
        assert_eq!(packet[33..], sealed);
    }

    #[test]
    fn the_longest_introduction_has_the_length_that_is_promised() {
        let mut long = introduction();
        long.home.url = "u".repeat(RELAY_URL_LEN_MAX);
        long.candidates = vec![long.candidates[0]; CANDIDATES_MAX + 50];
        let mut packet = seal(&long, [7; NONCE_LEN], &key());
        assert_eq!(packet.len(), LEN_MAX);
        let opened = open(&mut packet, ALICE, &key()).unwrap();
        assert_eq!(opened.candidates.len(), CANDIDATES_MAX);
        assert_eq!(opened.nat, None, "there is no room");
        assert_eq!(opened.home, long.home);
        packet.push(0);
        let error = Err(IntroduceError::Long { seen: LEN_MAX + 1 });
        assert_eq!(open(&mut packet, ALICE, &key()), error);
    }

    #[test]
    fn an_older_sender_and_an_older_reader_are_understood() {
        let content = golden_content();
        let introduction = introduction();
        assert_eq!(Introduction::parse(&content), Some(introduction.clone()));
        let older = Introduction { nat: None, ..introduction.clone() };
        for cut in 1..=Nat::WIRE_LEN {
            let without = &content[..content.len() - cut];
            assert_eq!(Introduction::parse(without), Some(older.clone()), "{cut} bytes less");
        }
        let mut later = content;
        later.extend([1, 2, 3]);
        assert_eq!(Introduction::parse(&later), Some(introduction));
    }

    #[test]
    fn a_url_that_is_too_long_is_left_out_as_a_whole() {
        let mut long = introduction();
        long.home.url = "u".repeat(RELAY_URL_LEN_MAX + 1);
        let mut packet = seal(&long, [7; NONCE_LEN], &key());
        assert_eq!(open(&mut packet, ALICE, &key()).unwrap().home.url, "");
    }

    #[test]
    fn a_message_sent_back_to_its_author_is_not_the_peer_s() {
        let mut packet = seal(&introduction(), [7; NONCE_LEN], &key());
        assert_eq!(open(&mut packet, BOB, &key()), Err(IntroduceError::Sender));
    }

    #[test]
    fn other_versions_other_magics_and_other_keys_are_told_apart() {
        let packet = seal(&introduction(), [7; NONCE_LEN], &key());
        let mut version = packet.clone();
        version[8] = 2;
        let error = Err(IntroduceError::Version { seen: 2 });
        assert_eq!(open(&mut version, ALICE, &key()), error);
        let mut magic = packet.clone();
        magic[0] = b'M';
        assert!(!is_introduction(&magic) && is_introduction(&packet));
        assert_eq!(open(&mut magic, ALICE, &key()), Err(IntroduceError::Malformed));
        let other = BoxKey::from_bytes([0x43; 32]);
        assert_eq!(open(&mut packet.clone(), ALICE, &other), Err(IntroduceError::Sealed));
    }

    #[test]
    fn contents_are_read_whole_or_not_at_all() {
        let content = golden_content();
        for len in 0..content.len() - Nat::WIRE_LEN {
            assert_eq!(Introduction::parse(&content[..len]), None, "{len} bytes");
        }
        // Field by field: a number of zero, a line end in the URL, more candidates than allowed.
        let url_at = FIXED_LEN - 1;
        for (range, value) in [(32..40, 0), (url_at..url_at + 1, b'\n')] {
            let mut wrong = content.clone();
            wrong[range].fill(value);
            assert_eq!(Introduction::parse(&wrong), None);
        }
        let mut many = content.clone();
        many[url_at + 17] = CANDIDATES_MAX as u8 + 1;
        many.resize(many.len() + 200 * CANDIDATE_LEN, 0);
        assert_eq!(Introduction::parse(&many), None);
    }

    fn numbered(number: u64, answers: u64, disco_key: PublicKey) -> Introduction {
        Introduction { number, answers, disco_key, ..introduction() }
    }

    #[test]
    fn numbers_must_grow() {
        let mut freshness = Freshness::default();
        assert_eq!(freshness.take(&numbered(5, 0, FIRST_PROCESS)), Ok(true));
        for seen in [5, 4] {
            let error = Err(IntroduceError::Replayed { seen, newest: 5 });
            assert_eq!(freshness.take(&numbered(seen, 0, FIRST_PROCESS)), error);
        }
        assert_eq!(freshness.take(&numbered(6, 0, SECOND_PROCESS)), Ok(true));
        // The first process is over: what it said last cannot be said again.
        let error = Err(IntroduceError::Replayed { seen: 5, newest: 6 });
        assert_eq!(freshness.take(&numbered(5, 0, FIRST_PROCESS)), error);
        assert_eq!(freshness.answers(), 6);
    }

    #[test]
    fn who_has_not_what_we_have_to_say_now_wants_it() {
        let mut freshness = Freshness::default();
        let ours = freshness.next_number(1000);
        assert_eq!(freshness.take(&numbered(5, 0, FIRST_PROCESS)), Ok(true));
        assert_eq!(freshness.take(&numbered(6, ours, FIRST_PROCESS)), Ok(false));
        assert_eq!(freshness.next_number(900), 1001);
        assert_eq!(freshness.take(&numbered(7, ours, FIRST_PROCESS)), Ok(false));
        freshness.outdated();
        assert_eq!(freshness.take(&numbered(8, 1001, FIRST_PROCESS)), Ok(true));
        assert_eq!(freshness.next_number(900), 1002);
        assert_eq!(freshness.take(&numbered(9, 1001, FIRST_PROCESS)), Ok(true));
        assert_eq!(freshness.take(&numbered(10, 1002, FIRST_PROCESS)), Ok(false));
        // A number that we never wrote in this life.
        assert_eq!(freshness.take(&numbered(11, 5000, FIRST_PROCESS)), Ok(true));
    }

    #[test]
    fn a_peer_whose_clock_went_back_is_heard_once_it_answers_us() {
        let mut freshness = Freshness::default();
        freshness.take(&numbered(1000, 0, FIRST_PROCESS)).unwrap();
        let old = freshness.next_number(1);
        let stale = numbered(10, 0, SECOND_PROCESS);
        assert!(freshness.take(&stale).is_err());
        let half_a_minute = ANSWER_TIME_MAX.as_nanos() as u64;
        let ours = freshness.next_number(2 + half_a_minute);
        freshness.next_number(3 + half_a_minute);
        // An answer to what we wrote long ago proves nothing; it need not be to the newest.
        assert!(freshness.take(&numbered(11, old, SECOND_PROCESS)).is_err());
        let answer = numbered(12, ours, SECOND_PROCESS);
        assert_eq!(freshness.take(&answer), Ok(false));
        // Neither the answer again, nor what came before, nor the process from before the restart.
        let replays =
            [answer, stale, numbered(1000, 0, FIRST_PROCESS), numbered(999, ours, FIRST_PROCESS)];
        for replay in replays {
            assert!(freshness.take(&replay).is_err(), "{} was taken", replay.number);
        }
        assert_eq!(freshness.take(&numbered(13, ours, SECOND_PROCESS)), Ok(false));
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_to_the_same(
            number in 1_u64.., answers: u64, has_session: bool, region: u16, url in "[!-~]{0,255}",
            addresses in vec(any::<(std::net::IpAddr, u16, u8)>(), 0..CANDIDATES_MAX),
            nonce: [u8; 24], nat: Option<[u8; Nat::WIRE_LEN]>,
        ) {
            let candidates = addresses.into_iter().map(|(ip, port, kind)| Candidate {
                kind: CandidateKind::from_wire(kind),
                address: (ip.to_canonical(), port).into(),
            });
            let sent = Introduction {
                number, answers, has_session, home: Home { region, url },
                candidates: candidates.collect(), nat: nat.map(Nat::from_wire),
                ..introduction()
            };
            let mut packet = seal(&sent, nonce, &key());
            prop_assert_eq!(open(&mut packet, ALICE, &key()), Ok(sent));
        }

        #[test]
        fn a_changed_or_cut_packet_is_refused(at in 0_usize..180, bit in 0_u8..8) {
            let packet = seal(&introduction(), [7; NONCE_LEN], &key());
            prop_assume!(at < packet.len());
            prop_assert!(open(&mut packet[..at].to_vec(), ALICE, &key()).is_err());
            let mut changed = packet;
            changed[at] ^= 1 << bit;
            prop_assert!(open(&mut changed, ALICE, &key()).is_err());
        }

        /// Whatever is delivered in whatever order, and however often, is taken at most once.
        #[test]
        fn no_message_is_taken_twice(
            steps in vec((0_u8..4, any::<prop::sample::Index>(), 1_u64..20), 1..120)
        ) {
            let mut freshness = Freshness::default();
            // The peer's process and the last number it used. They only grow in one process.
            let (mut process, mut last) = (0, 0);
            let mut ours = vec![0];
            let mut made: Vec<(Introduction, bool)> = Vec::new();
            for (step, index, number) in steps {
                match step {
                    0 => ours.push(freshness.next_number(1)),
                    // What the peer may have heard of us when it wrote this.
                    1 => {
                        last += number;
                        if number > 15 {
                            // It starts again, with a clock of its own.
                            (process, last) = (process + 1, number);
                        }
                        let answers = ours[index.index(ours.len())];
                        let message = numbered(last, answers, PublicKey([process; 32]));
                        made.push((message, false));
                    }
                    _ if made.is_empty() => {}
                    _ => {
                        let at = index.index(made.len());
                        let message = made[at].0.clone();
                        if freshness.take(&message).is_ok() {
                            prop_assert!(!made[at].1, "{} was taken twice", message.number);
                            made[at].1 = true;
                        }
                    }
                }
            }
        }
    }
}
