//! TLS towards one relay, without buffers of its own: what is read is decrypted where it lies, what
//! is written is sealed into the buffer that goes to the kernel.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};
use rustls::{ClientConfig, Error, ProtocolVersion};

/// A client's TLS connection.
pub struct Session(Box<UnbufferedClientConnection>);

/// Where the connection stands after bytes came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How many of the bytes are done with.
    pub taken: usize,
    /// The handshake is over: packets may be sealed.
    pub ready: bool,
    /// The relay will send no more.
    pub closed: bool,
}

impl Session {
    pub fn new(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        Ok(Self(Box::new(UnbufferedClientConnection::new(config, name)?)))
    }

    /// Takes what the relay sent; nothing of it starts the handshake. Appends what it said to
    /// `plain` and what TLS must answer to `answer`.
    pub fn receive(
        &mut self,
        cipher: &mut [u8],
        plain: &mut Vec<u8>,
        answer: &mut Vec<u8>,
    ) -> Result<Received, Error> {
        let mut received = Received { taken: 0, ready: false, closed: false };
        loop {
            let UnbufferedStatus { mut discard, state, .. } =
                self.0.process_tls_records(&mut cipher[received.taken..]);
            let mut more = true;
            match state? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                }
                ConnectionState::EncodeTlsData(mut data) => encode(answer, |out| data.encode(out))?,
                // The caller writes the answer before anything else.
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed | ConnectionState::Closed => received.closed = true,
                ConnectionState::WriteTraffic(_) => {
                    received.ready = true;
                    more = false;
                }
                // Blocked on bytes. There is no early data for a client.
                _ => more = false,
            }
            received.taken += discard;
            if received.closed || !more {
                return Ok(received);
            }
        }
    }

    /// Appends `plain`, sealed, to `out`. Only when [`Received::ready`].
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        let ConnectionState::WriteTraffic(mut traffic) =
            self.0.process_tls_records(&mut []).state?
        else {
            return Err(Error::HandshakeNotComplete);
        };
        let start = out.len();
        loop {
            match traffic.encrypt(plain, &mut out[start..]) {
                Ok(len) => {
                    out.truncate(start + len);
                    return Ok(());
                }
                Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size })) => {
                    out.resize(start + required_size, 0);
                }
                Err(EncryptError::EncryptExhausted) => return Err(Error::EncryptError),
            }
        }
    }

    /// What the relay showed; empty before the handshake is over.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        self.0.peer_certificates().unwrap_or_default()
    }

    pub fn version(&self) -> Option<ProtocolVersion> {
        self.0.protocol_version()
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session(..)")
    }
}

/// Appends what `write` writes.
fn encode(
    out: &mut Vec<u8>,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), Error> {
    let start = out.len();
    loop {
        match write(&mut out[start..]) {
            Ok(len) => {
                out.truncate(start + len);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                out.resize(start + required_size, 0);
            }
            Err(EncodeError::AlreadyEncoded) => return Ok(()),
        }
    }
}
