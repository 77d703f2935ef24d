//! `ts-derp-peer ADDRESS PORT`: logs in at the relay there (TLS, any certificate), prints its key as
//! `key HEX`, and sends every packet back to where it came from.

use std::error::Error;

use ts_derp::{Client, IpUsage, ServerConnInfo, TlsValidationConfig};
use ts_keys::NodeKeyPair;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, port] = &arguments[..] else {
        return Err("usage: ts-derp-peer ADDRESS PORT".into());
    };
    let relay = ServerConnInfo {
        hostname: address.clone(),
        ipv4: IpUsage::FixedAddr(address.parse()?),
        ipv6: IpUsage::Disable,
        tls_validation_config: TlsValidationConfig::InsecureForTests,
        https_port: port.parse()?,
        stun_port: None,
        stun_only: false,
        supports_port_80: false,
    };
    let key = NodeKeyPair::random();
    let client = Client::connect([&relay], &key).await?;
    // It prints as nodekey:HEX.
    let name = key.public.to_string();
    println!("key {}", name.trim_start_matches("nodekey:"));
    loop {
        let (from, packet) = client.recv_one().await?;
        client.send_one(from, packet.as_ref()).await?;
    }
}
