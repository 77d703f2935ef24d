//! The TLS side of one connection, without buffers of its own: what is read is decrypted where it
//! lies, what is written is sealed into a buffer that all connections of a worker share.

use std::sync::Arc;

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};
use rustls::{Error, ServerConfig};

/// A server's TLS connection.
pub struct Session(Box<UnbufferedServerConnection>);

/// Where the connection stands after bytes came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How many of the bytes are done with.
    pub taken: usize,
    /// The client will send no more.
    pub closed: bool,
}

impl Session {
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self(Box::new(UnbufferedServerConnection::new(config)?)))
    }

    /// Takes what the client sent. Appends what it said to `plain` and what TLS must answer to
    /// `answer`.
    pub fn receive(
        &mut self,
        cipher: &mut [u8],
        plain: &mut Vec<u8>,
        answer: &mut Vec<u8>,
    ) -> Result<Received, Error> {
        let mut taken = 0;
        loop {
            let UnbufferedStatus { mut discard, state, .. } =
                self.0.process_tls_records(&mut cipher[taken..]);
            let mut closed = false;
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
                ConnectionState::PeerClosed | ConnectionState::Closed => closed = true,
                // Blocked on bytes, or ready for more of them. Early data is off.
                _ => more = false,
            }
            taken += discard;
            if closed || !more {
                return Ok(Received { taken, closed });
            }
        }
    }

    /// Seals `plain` into `out`, which grows as needed, and returns its length there. Only after
    /// the client said something in the session.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<usize, Error> {
        match self.0.process_tls_records(&mut []).state? {
            ConnectionState::WriteTraffic(mut traffic) => loop {
                match traffic.encrypt(plain, out) {
                    Ok(len) => return Ok(len),
                    Err(EncryptError::InsufficientSize(InsufficientSizeError {
                        required_size,
                    })) => out.resize(required_size, 0),
                    Err(EncryptError::EncryptExhausted) => return Err(Error::EncryptError),
                }
            },
            _ => Err(Error::HandshakeNotComplete),
        }
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
