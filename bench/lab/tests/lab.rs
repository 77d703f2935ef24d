//! The lab itself, with parties that nobody here wrote at both ends.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use millrace_lab::{
    Capture, Implementation, Lab, Marker, Site, SiteOptions, Tunnel, TunnelOptions,
    iperf::Iperf,
    ping::Ping,
    probe::{Echo, Sequence, every_length},
    tunnel::{Watch, connect},
};

/// Long enough for a first handshake on a loaded machine.
const CONNECT: Duration = Duration::from_secs(10);

#[test]
fn two_foreign_gateways_carry_every_length_and_leak_nothing() {
    let lab = Lab::new().unwrap();
    let site = Site::new(&lab, &SiteOptions::default()).unwrap();
    let watch = Watch::start(&lab, &site).unwrap();
    let pair = [Implementation::WireguardGo, Implementation::Gotatun];
    let tunnel = Tunnel::start(&lab, &site, pair, &TunnelOptions::default()).unwrap();
    connect(&site.a, &site.b, CONNECT).unwrap();

    let ping = Ping { marker: Some(watch.marker()), ..Ping::default() };
    assert!(ping.run(&site.a.host, site.b.host_v4).unwrap().complete());
    assert!(ping.run(&site.b.host, site.a.host_v6).unwrap().complete());

    let echo = Echo::start(&site.b.host, SocketAddr::new(site.b.host_v4.into(), 0)).unwrap();
    let lengths = every_length(&site.a.host, echo.address(), 0..=1500, watch.marker()).unwrap();
    assert_eq!((lengths.passed, lengths.lost.len()), (1501, 0), "{lengths:?}");
    echo.stop();

    let to = SocketAddr::new(site.a.host_v6.into(), 0);
    let every = Duration::from_millis(2);
    let sequence =
        Sequence::start(&site.b.host, &site.a.host, to, every, 400, watch.marker()).unwrap();
    let iperf = Iperf { seconds: 1, ..Iperf::default() };
    let report = iperf.run(lab.directory(), &site.b.host, site.b.host_v4, &site.a.host).unwrap();
    assert!(report.bits_per_second > 1e6, "{report:?}");
    let report = sequence.finish();
    assert!(report.received > 200 && report.damaged == 0, "{report:?}");

    let status = tunnel.a.peer().unwrap();
    assert!(status.last_handshake_s > 0 && status.received_bytes > 1_000_000, "{status:?}");
    let report = watch.finish().unwrap();
    assert!(report.packets > 3000, "{report:?}");
}

#[test]
fn a_leak_outside_is_found() {
    let lab = Lab::new().unwrap();
    let site = Site::new(&lab, &SiteOptions::default()).unwrap();
    let marker = Marker::random().unwrap();
    let ping = Ping { marker: Some(marker), count: 2, interval_ms: 10, ..Ping::default() };

    let capture = Capture::start(&lab, &site.router).unwrap();
    ping.run(&site.a.gateway, site.b.wan_v4).unwrap();
    let report = capture.finish(&[marker], &site.inner_addresses()).unwrap();
    assert!(report.leaks.iter().any(|(_, what)| what.contains("marker")), "{report:?}");
    assert!(report.check().is_err());

    // No tunnel: the gateway sends the inner packet to its default route as it is.
    for to in [IpAddr::from(site.b.host_v4), site.b.host_v6.into()] {
        let capture = Capture::start(&lab, &site.router).unwrap();
        let plain = Ping { marker: None, count: 1, ..Ping::default() };
        assert!(!plain.run(&site.a.host, to).unwrap().complete());
        let report = capture.finish(&[], &site.inner_addresses()).unwrap();
        assert!(report.leaks.iter().any(|(_, what)| what.contains("inner")), "{report:?}");
    }
}

#[test]
fn an_empty_capture_proves_nothing() {
    let lab = Lab::new().unwrap();
    let namespace = lab.namespace("quiet").unwrap();
    let report = Capture::start(&lab, &namespace).unwrap().finish(&[], &[]).unwrap();
    assert!(report.check().is_err(), "{report:?}");
}

/// The packet with the counter 0x77 to an index that ends in fd holds the prefix of fd77::1.
#[test]
fn a_prefix_that_headers_hold_is_refused() {
    let lab = Lab::new().unwrap();
    let namespace = lab.namespace("quiet").unwrap();
    let capture = Capture::start(&lab, &namespace).unwrap();
    let error = capture.finish(&[], &["fd77::1".parse().unwrap()]).unwrap_err();
    assert!(error.to_string().contains("use a random prefix"), "{error}");
}

#[test]
fn nothing_is_left_behind() {
    let (directory, pid, interface);
    {
        let lab = Lab::new().unwrap();
        directory = lab.directory().to_owned();
        let site = Site::new(&lab, &SiteOptions::default()).unwrap();
        let pair = [Implementation::Boringtun, Implementation::WireguardGo];
        let mut tunnel = Tunnel::start(&lab, &site, pair, &TunnelOptions::default()).unwrap();
        connect(&site.a, &site.b, CONNECT).unwrap();
        (pid, interface) = (tunnel.a.daemon().pid(), tunnel.a.interface().to_owned());
    }
    assert!(!directory.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(!std::path::Path::new(&format!("/run/wireguard/{interface}.sock")).exists());
}
