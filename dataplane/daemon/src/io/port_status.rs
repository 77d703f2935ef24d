//! What runs on the port's device and why, for `status`.

/// Told by the port's thread, read by whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortStatus {
    pub device: String,
    /// `xdp-zerocopy`, `xdp-copy` or `socket`.
    pub receive: &'static str,
    pub receive_reason: String,
    /// Whether AF_XDP transmit runs.
    pub transmit_zero_copy: bool,
    pub transmit_reason: String,
    /// What runs is not what was asked for: a sentence for the operator.
    pub warning: Option<String>,
    /// Receive queues with a socket.
    pub queues: u32,
    /// Frames through AF_XDP since the start: received, sent.
    pub frames: [u64; 2],
}

impl PortStatus {
    /// Sockets both ways, for one reason.
    pub fn sockets(reason: &str) -> Self {
        Self {
            receive: "socket",
            receive_reason: reason.to_owned(),
            transmit_reason: reason.to_owned(),
            ..Self::default()
        }
    }
}
