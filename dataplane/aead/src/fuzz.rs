//! Fuzz entry point: an ordinary function from bytes to assertions. libFuzzer calls it (see
//! `bench/fuzz`), and so does a test that replays the committed corpus.

use crate::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN};

/// Packets and bytes of one input, so that each ends in time.
const PACKETS_MAX: usize = 256;
const BYTES_MAX: usize = 1 << 17;
/// Room behind each packet, which must stay as it is.
const BEHIND: usize = 64;
/// Keys that packets choose from.
const KEYS: u8 = 3;

/// One packet as the input describes it.
struct Packet {
    key: usize,
    counter: u64,
    /// Where it begins in its buffer.
    offset: usize,
    /// With the tag; possibly too short for one.
    len: usize,
    /// Its text begins with this and goes on from there.
    first_byte: u8,
    /// The bit that is changed between sealing and opening, modulo the packet's bits.
    damage: Option<usize>,
}

/// A batch through every back-end that this CPU has.
///
/// Must hold: all seal to the same bytes as `ring` and touch nothing around the packets; what was
/// not changed opens to its text; what was changed is refused and becomes zeros; what is too short
/// for a tag stays as it is.
pub fn batch(input: &[u8]) {
    let packets = packets(input);
    let (sealing, opening): (Vec<_>, Vec<_>) = (0..KEYS)
        .map(|key| [key.wrapping_mul(0x3b); 32])
        .map(|key| (SealingKey::new(key), OpeningKey::new(key)))
        .unzip();
    let plain: Vec<Vec<u8>> = packets.iter().map(Packet::buffer).collect();
    let mut expected = None;
    for backend in Backend::ALL.into_iter().filter(|backend| backend.is_available()) {
        let mut buffers = plain.clone();
        let mut jobs: Vec<SealJob<'_>> = buffers
            .iter_mut()
            .zip(&packets)
            .map(|(buffer, packet)| SealJob {
                key: &sealing[packet.key],
                counter: packet.counter,
                packet: &mut buffer[packet.offset..][..packet.len],
            })
            .collect();
        backend.seal_batch(&mut jobs);
        let sealed = expected.get_or_insert_with(|| buffers.clone());
        assert!(buffers == *sealed, "{backend} seals differently");

        for (buffer, packet) in buffers.iter_mut().zip(&packets) {
            packet.damage(buffer);
        }
        let mut jobs: Vec<OpenJob<'_>> = buffers
            .iter_mut()
            .zip(&packets)
            .map(|(buffer, packet)| OpenJob {
                key: &opening[packet.key],
                counter: packet.counter,
                packet: &mut buffer[packet.offset..][..packet.len],
                verified: true,
            })
            .collect();
        backend.open_batch(&mut jobs);
        let verdicts: Vec<bool> = jobs.iter().map(|job| job.verified).collect();
        for (nth, packet) in packets.iter().enumerate() {
            packet.check(backend, verdicts[nth], &buffers[nth], &plain[nth], &sealed[nth]);
        }
    }
}

impl Packet {
    /// Of an input's eight bytes, one for each field and two for the length.
    fn new([key, low, high, len, len_high, offset, first_byte, damage]: [u8; 8]) -> Self {
        Self {
            key: usize::from(key % KEYS),
            // Around the carry between both halves.
            counter: (u64::from(high) << 32 | u64::from(low)).wrapping_sub(2),
            offset: usize::from(offset % 64),
            len: usize::from(u16::from_le_bytes([len, len_high])),
            first_byte,
            damage: (damage & 1 == 1).then_some(usize::from(damage) * 0x0101_0101),
        }
    }

    fn buffer(&self) -> Vec<u8> {
        let len = self.offset + self.len + BEHIND;
        (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(self.first_byte)).collect()
    }

    fn damage(&self, buffer: &mut [u8]) {
        if let Some(bit) = self.damage.and_then(|damage| damage.checked_rem(self.len * 8)) {
            buffer[self.offset + bit / 8] ^= 1 << (bit % 8);
        }
    }

    fn check(&self, backend: Backend, verdict: bool, seen: &[u8], plain: &[u8], sealed: &[u8]) {
        let (before, seen) = seen.split_at(self.offset);
        let (seen, behind) = seen.split_at(self.len);
        assert!(before == &plain[..before.len()], "{backend} touches what is before a packet");
        assert!(plain.ends_with(behind), "{backend} touches what is behind a packet");
        let Some(text_len) = self.len.checked_sub(TAG_LEN) else {
            assert!(!verdict, "{backend} opens {} bytes", self.len);
            return;
        };
        if self.damage.is_some() {
            assert!(!verdict, "{backend} opens a forged packet");
            assert!(seen.iter().all(|&byte| byte == 0), "{backend} leaves something of it");
        } else {
            assert!(verdict, "{backend} refuses what was sealed");
            let (text, tag) = seen.split_at(text_len);
            assert!(text == &plain[self.offset..][..text_len], "{backend} gives another text");
            assert!(tag == &sealed[self.offset + text_len..][..TAG_LEN], "{backend}: spent tag");
        }
    }
}

/// Each nine bytes are a packet, and how often it is repeated with the next counters.
fn packets(input: &[u8]) -> Vec<Packet> {
    let mut packets = Vec::new();
    let mut bytes = 0;
    for [repeat, fields @ ..] in input.as_chunks::<9>().0 {
        for nth in 0..=repeat % 64 {
            let mut packet = Packet::new(*fields);
            packet.counter = packet.counter.wrapping_add(nth.into());
            bytes += packet.len;
            if packets.len() == PACKETS_MAX || bytes > BYTES_MAX {
                return packets;
            }
            packets.push(packet);
        }
    }
    packets
}
