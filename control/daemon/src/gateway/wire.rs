//! Datagrams on the tunnel's own port that are not WireGuard's.

use std::net::SocketAddr;

use millrace_ebpf::class::{Class, classify};
use millrace_ebpf::link::Heard;
use millrace_path::Instant;
use millrace_path::finder::Input;
use millrace_path::path::{Pair, UplinkId};
use rand::TryRngCore;
use rand::rngs::OsRng;

use super::Gateway;
use super::twice::Way;
use crate::counters::Count;
use crate::limits::{SOURCES_MAX, TURN_MAX};
use crate::udp::Source;

impl Gateway {
    /// Takes datagrams from the port. Call when its descriptor is readable.
    pub fn handle_udp(&mut self, now: Instant) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..TURN_MAX {
            let Some(tools) = self.plane.as_mut().and_then(|plane| plane.tools.as_mut()) else {
                break;
            };
            let (from, to, len) = match tools.udp.receive() {
                Ok(Some(datagram)) => {
                    let len = datagram.bytes.len().min(buffer.len());
                    buffer[..len].copy_from_slice(&datagram.bytes[..len]);
                    (datagram.from, datagram.to, len)
                }
                Ok(None) => break,
                // An ICMP answer to something that we sent: pings find out by themselves.
                Err(_) => {
                    self.counters.add(Count::IcmpErrors, 1);
                    continue;
                }
            };
            self.datagram(now, Way::Socket, from, to, &mut buffer[..len]);
        }
        self.buffer = buffer;
    }

    /// A frame that the data plane saw before the host's firewall did.
    pub(super) fn heard(&mut self, now: Instant, heard: Heard) {
        let Heard { from, to, ifindex, mut frame } = heard;
        // Packets that the host only forwards are seen there, too.
        if !self.network.addresses.iter().any(|own| own.ip == to.ip()) {
            self.counters.add(Count::HeardForOthers, 1);
            return;
        }
        let to = Source { ip: Some(to.ip()), ifindex };
        self.datagram(now, Way::PastFirewall, from, to, &mut frame);
    }

    fn datagram(&mut self, now: Instant, way: Way, from: SocketAddr, to: Source, bytes: &mut [u8]) {
        let class = classify(bytes);
        if class == Class::Disco && self.twice.was_taken(way, from, bytes) {
            self.counters.add(Count::HeardTwice, 1);
            return;
        }
        let from = self.real_address(from);
        match class {
            // Of all else the firewall decides.
            _ if way == Way::PastFirewall && class != Class::Disco => {
                self.counters.add(Count::NotOurs, 1);
            }
            Class::Disco => {
                let pair = Pair { uplink: self.uplink(from, to), remote: from };
                self.disco(now, pair, to, bytes);
            }
            Class::Stun => match self.reflexive.handle(now, from, bytes) {
                Ok(_) => self.look_at_reflexive(now),
                Err(_) if self.kinds.driver.is_running() => self.stun_for_kinds(now, from, bytes),
                Err(_) => self.counters.add(Count::StunUnmatched, 1),
            },
            Class::Geneve => self.counters.add(Count::GeneveUnused, 1),
            Class::WgData | Class::WgHandshake | Class::Unknown => {
                self.counters.add(Count::NotOurs, 1);
            }
        }
    }

    fn disco(&mut self, now: Instant, from: Pair, to: Source, bytes: &mut [u8]) {
        let Some(finder) = &mut self.finder else { return };
        let input = Input::Datagram { from, bytes };
        // Strangers get no line here, and so push nobody's out.
        if finder.handle(now, input, &mut OsRng.unwrap_err()) {
            if self.sources.len() >= SOURCES_MAX {
                self.sources.clear();
            }
            self.sources.insert(from, to);
        }
        // Answers leave from the address that was spoken to.
        self.carry_out(now);
    }

    /// The way out that answers a datagram: the interface where it came in, if that is one of its
    /// own, else the kernel's choice.
    fn uplink(&self, from: SocketAddr, to: Source) -> UplinkId {
        let ipv6 = from.is_ipv6();
        let own = self.ways.iter().find(|(_, way)| way.ipv6 == ipv6 && way.ifindex == to.ifindex);
        own.map_or(UplinkId(u16::from(ipv6)), |(id, _)| *id)
    }

    /// Sends the STUN questions that are due.
    pub(super) fn ask_servers(&mut self, now: Instant) {
        let can_send = self.plane.as_ref().is_some_and(|plane| plane.tools.is_some());
        if !can_send {
            return;
        }
        while let Some((to, request)) = self.reflexive.poll_transmit(now, &mut OsRng.unwrap_err()) {
            self.kinds.wrote(now, to);
            if let Err(error) = self.send_datagram(to, Source::default(), &request, false) {
                self.counters.add(Count::of_send_error(&error), 1);
            }
        }
        self.look_at_reflexive(now);
    }

    fn look_at_reflexive(&mut self, now: Instant) {
        let seen = self.reflexive.seen(now);
        if seen != self.seen {
            tracing::info!(addresses = ?seen.addresses, varies = ?seen.varies, "seen by STUN");
            // The first answers are no change.
            let moved = self.seen.addresses.iter().any(|known| !seen.addresses.contains(known));
            self.seen = seen;
            self.compare_kinds(now);
            if moved {
                self.suspect_mappings(now);
                self.relays.network_changed(now, &self.network.addresses);
            }
            self.tell_finder(now, false);
        }
    }
}
