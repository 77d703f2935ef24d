//! News from relays, and the packets that they bring.

use millrace_ebpf::class::{Class, classify};
use millrace_path::Instant;
use millrace_path::finder::Input;
use millrace_path::introduce;
use millrace_path::sealed::PublicKey;

use super::{For, Gateway};
use crate::counters::Count;
use crate::limits::RELAYED_LOOKS;
use crate::relay_client::RelayEvent;
use crate::relays::State;

impl Gateway {
    /// Lets a relay's client work. Call when its descriptor is readable or its deadline passed.
    pub fn handle_relay(&mut self, now: Instant, at: usize) {
        // Apart for a moment: packets go on to the finder and the data plane while their bytes lie
        // in the client.
        let mut relays = std::mem::take(&mut self.relays);
        let (mut signals, mut gone, mut came_up) = (Vec::new(), Vec::new(), false);
        let only = relays.list.len() == 1;
        if let Some(relay) = relays.list.get_mut(at) {
            relay.client.handle(now);
            while let Some(event) = relay.client.next_event() {
                match event {
                    RelayEvent::Connecting(stage) => {
                        relay.state = State::Connecting { stage: stage.to_string() };
                    }
                    RelayEvent::NeedBoxKey { relay_key } => {
                        self.want_box_key(For::Relay(relay_key));
                    }
                    RelayEvent::Up(up) => {
                        let ms = up.connect_time.as_millis() as u64;
                        tracing::info!(url = relay.url, connect_ms = ms, "relay is up");
                        relay.state = State::Up { since: now, up: Box::new(up) };
                        relay.told = None;
                        came_up = true;
                    }
                    RelayEvent::Packets(packets) => {
                        for (from, packet) in packets {
                            self.relayed(at, from, packet, &mut signals);
                        }
                    }
                    RelayEvent::PeerGone { peer, .. } => {
                        let Some(known) = self.peers.get_mut(&peer) else { continue };
                        // Who never was at this relay is not gone because it is not there.
                        if only
                            || known.heard_at == Some(at)
                            || known.home_url() == Some(&relay.url)
                        {
                            gone.push(peer);
                        }
                        known.heard_at = known.heard_at.filter(|heard_at| *heard_at != at);
                    }
                    RelayEvent::Health(text) => {
                        if !text.is_empty() {
                            tracing::warn!(url = relay.url, "the relay says: {text}");
                        }
                        relay.health = text;
                    }
                    RelayEvent::Restarting { reconnect_in, .. } => {
                        let ms = reconnect_in.as_millis() as u64;
                        tracing::info!(url = relay.url, reconnect_in_ms = ms, "relay restarts");
                    }
                    RelayEvent::Note(note) => tracing::warn!(url = relay.url, "{note}"),
                    RelayEvent::Down { failure, retry_at } => {
                        let why = failure.to_string();
                        if relay.told.as_ref() != Some(&why) {
                            tracing::warn!(url = relay.url, "relay is down: {why}");
                            relay.told = Some(why.clone());
                        }
                        relay.state = State::Down { why, retry_at };
                    }
                }
            }
        }
        self.flush_inbound();
        self.relays = relays;
        if self.relays.choose_home(now) {
            self.tell_finder(now, false);
        }
        if came_up {
            self.input(now, Input::RelayUp);
        }
        for peer in gone {
            self.input(now, Input::PeerGone { peer });
        }
        for (peer, mut packet) in signals {
            self.input(now, Input::Relayed { peer, bytes: &mut packet });
        }
    }

    fn relayed(
        &mut self,
        at: usize,
        from: PublicKey,
        packet: &[u8],
        signals: &mut Vec<(PublicKey, Vec<u8>)>,
    ) {
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.heard_at = Some(at);
            peer.relayed_looks = RELAYED_LOOKS;
        }
        match classify(packet) {
            class @ (Class::WgData | Class::WgHandshake) => self.pass_on(from, class, packet),
            Class::Disco => signals.push((from, packet.to_vec())),
            _ if introduce::is_introduction(packet) => signals.push((from, packet.to_vec())),
            _ => self.counters.add(Count::RelayedUnknown, 1),
        }
    }
}
