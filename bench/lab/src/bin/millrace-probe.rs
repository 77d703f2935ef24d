//! The lab's probes as a program, for a guest that has no test process inside.
//!
//! ```text
//! millrace-probe echo ADDRESS:PORT              sends every datagram back, for ever
//! millrace-probe lengths ADDRESS:PORT FIRST LAST MARKER
//!                                               one datagram of each length there and back
//! millrace-probe send ADDRESS:PORT TEXT         one datagram, no answer awaited
//! millrace-probe uapi INTERFACE                 what the device's UAPI socket says, keys left out
//! ```

use std::{
    env,
    error::Error,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    process::ExitCode,
    thread,
};

use millrace_lab::{
    Marker, Namespace,
    probe::{Echo, every_length},
};

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millrace-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<(), Box<dyn Error>> {
    let here = Namespace::current()?;
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["echo", address] => {
            let _echo = Echo::start(&here, address.parse::<SocketAddr>()?)?;
            println!("echoing");
            loop {
                thread::park();
            }
        }
        ["lengths", address, first, last, marker] => {
            let marker = Marker(u64::from_str_radix(marker, 16)?.to_be_bytes());
            let lengths = first.parse()?..=last.parse()?;
            let outcome = every_length(&here, address.parse()?, lengths, marker)?;
            println!("passed {} retried {:?}", outcome.passed, outcome.retried);
            if !outcome.lost.is_empty() {
                return Err(format!("lost {:?}", outcome.lost).into());
            }
            Ok(())
        }
        ["send", address, text] => {
            let address: SocketAddr = address.parse()?;
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any)?.send_to(text.as_bytes(), address)?;
            Ok(())
        }
        ["uapi", interface] => {
            let mut socket = UnixStream::connect(format!("/run/wireguard/{interface}.sock"))?;
            socket.write_all(b"get=1\n\n")?;
            // The server would wait for another request.
            socket.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer)?;
            let secret = |line: &&str| !line.contains("private_key") && !line.contains("preshared");
            answer.lines().filter(secret).for_each(|line| println!("{line}"));
            Ok(())
        }
        _ => Err("usage: echo ADDRESS:PORT | lengths ADDRESS:PORT FIRST LAST MARKER | \
                  send ADDRESS:PORT TEXT | uapi INTERFACE"
            .into()),
    }
}
