//! A machine that sleeps, for real: our data plane in a QEMU guest that is suspended to memory (ACPI
//! S3) and woken by its clock, beside that kernel's own WireGuard.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::time::Duration;

use millrace_lab::{Card, Guest, GuestOptions, Lab, Result, Wire, keys::KeyPair};

/// For things that happen at once, on a slow guest on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// Sessions live for three minutes, so nothing but the sleep can end one here.
#[test]
fn keys_of_before_a_sleep_are_not_used_after_it() -> Result<()> {
    let lab = Lab::new()?;
    let outside = lab.namespace("outside")?;
    let options = GuestOptions::new(Card::Virtio, vec![Wire::Hub(0)])
        .program("millrace-probe")?
        .program("millrace-dataplane")?;
    let mut guest = Guest::boot(&lab, &outside, "guest", &options)?;
    let (ours, peers) = (KeyPair::generate()?, KeyPair::generate()?);
    guest.run(&setup(&ours, &peers))?;
    guest.run("millrace-dataplane --config /etc/millrace.toml >> /tmp/millrace.log 2>&1 &")?;
    guest.wait_until("the data plane", SOON, "grep -q ready /tmp/millrace.log")?;
    let ping = "ping -c 1 -W 1 10.77.0.2";
    guest.wait_until("a ping", SOON, ping)?;
    let session = |state: &str| format!("millrace-probe uapi mr0 | grep -q '^mr_session={state}$'");
    assert!(guest.succeeds(&session("up"))?);

    // The wall clock jumps, and nobody slept. Context switches show that it was noticed.
    let woken = "grep -h ^voluntary /proc/$(cat /run/millrace/mr0.pid)/task/*/status";
    let before = guest.run(woken)?;
    guest.run("date -s @$(( $(date +%s) + 3600 ))")?;
    guest.wait_until(
        "the data plane to wake up",
        SOON,
        &format!("[ \"$({woken})\" != \"{before}\" ]"),
    )?;
    assert!(guest.succeeds(&session("up"))?, "{}", guest.run("cat /tmp/millrace.log")?);

    let slept = guest.run(
        "up() { cut -d ' ' -f 1 /proc/uptime | cut -d . -f 1; }
         before=$(up)
         echo +4 > /sys/class/rtc/rtc0/wakealarm
         echo mem > /sys/power/state
         echo $(( $(up) - before ))",
    )?;
    assert!(slept.parse::<u32>().unwrap() >= 2, "slept {slept} s");
    guest.wait_until("the session to go", SOON, &session("none"))?;
    let log = guest.run("cat /tmp/millrace.log")?;
    assert_eq!(log.matches("was suspended").count(), 1, "{log}");
    guest.wait_until("a ping", SOON, ping)?;
    assert!(guest.succeeds(&session("up"))?);
    Ok(())
}

fn setup(ours: &KeyPair, peers: &KeyPair) -> String {
    let (own_private, own_public) = (&ours.private, &ours.public);
    let (private, public) = (&peers.private, &peers.public);
    format!(
        "load virtio_net veth wireguard tun
         ip link set lo up
         ip netns add peer
         ip link add veth0 type veth peer name veth1 netns peer
         ip addr add 10.9.0.1/24 dev veth0
         ip link set veth0 up
         ip -n peer addr add 10.9.0.2/24 dev veth1
         ip -n peer link set veth1 up
         umask 077; echo {own_private} > /etc/millrace.key; echo {private} > /etc/peer.key
         ip -n peer link add wg0 type wireguard
         ip netns exec peer wg set wg0 private-key /etc/peer.key listen-port 51820 \
            peer {own_public} allowed-ips 10.77.0.1/32
         ip -n peer addr add 10.77.0.2/24 dev wg0
         ip -n peer link set wg0 up
         cat > /etc/millrace.toml <<'END'
schema = 1
[interface]
name = \"mr0\"
private_key_file = \"/etc/millrace.key\"
listen_port = 51820
address = [\"10.77.0.1/24\"]
[dataplane]
receive = \"socket\"
[[peer]]
public_key = \"{public}\"
endpoint = \"10.9.0.2:51820\"
allowed_ips = [\"10.77.0.2/32\"]
END"
    )
}
