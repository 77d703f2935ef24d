//! The two boxes at the start of a connection: what each side says of itself, and the proof that
//! it holds its key. Both are JSON, so that versions can add to them.

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::frame::{FrameError, Kind, check};
use super::mesh_key::{self, MeshKey};
use super::{Frame, VERSION};
use crate::sealed::{BoxKey, NONCE_LEN, PublicKey, TAG_LEN};

/// More than what we write as JSON.
const JSON_MAX: usize = 256;

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientInfo {
    #[serde(default)]
    pub version: u32,
    /// It answers `Ping`.
    #[serde(default, rename = "CanAckPings", skip_serializing_if = "is_false")]
    pub can_ack_pings: bool,
    /// It is a monitor, no node.
    #[serde(default, rename = "IsProber", skip_serializing_if = "is_false")]
    pub is_prober: bool,
    /// It is another relay of the mesh.
    #[serde(
        default,
        rename = "meshKey",
        skip_serializing_if = "Option::is_none",
        deserialize_with = "mesh_key::optional"
    )]
    pub mesh_key: Option<MeshKey>,
}

/// What a relay says. A client keeps below the rate, or its packets are dropped; 0 is no limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerInfo {
    #[serde(default)]
    pub version: u32,
    #[serde(default, rename = "TokenBucketBytesPerSecond", skip_serializing_if = "is_zero")]
    pub bytes_per_second: u64,
    #[serde(default, rename = "TokenBucketBytesBurst", skip_serializing_if = "is_zero")]
    pub burst_bytes: u64,
}

/// Why an opening is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a {0:?} frame whose box does not open: the sender does not hold the key it names")]
    Proof(Kind),
    #[error("a {0:?} frame whose content is not the expected JSON")]
    Content(Kind),
}

impl Default for ClientInfo {
    fn default() -> Self {
        Self { version: VERSION, can_ack_pings: true, is_prober: false, mesh_key: None }
    }
}

impl ClientInfo {
    /// Appends the frame of the client `from`. `key` is of its node key and the relay's.
    pub fn write(&self, from: PublicKey, key: &BoxKey, nonce: [u8; NONCE_LEN], out: &mut Vec<u8>) {
        Frame::ClientInfo { from, nonce, sealed: &seal(self, key, &nonce) }.write(out);
    }

    /// The relay's side: opens the box of a `ClientInfo` frame, which it needs to copy.
    pub fn open(key: &BoxKey, nonce: &[u8; NONCE_LEN], sealed: &[u8]) -> Result<Self, LoginError> {
        open(Kind::ClientInfo, key, nonce, sealed)
    }
}

impl Default for ServerInfo {
    fn default() -> Self {
        Self { version: VERSION, bytes_per_second: 0, burst_bytes: 0 }
    }
}

impl ServerInfo {
    /// Appends the relay's frame.
    pub fn write(&self, key: &BoxKey, nonce: [u8; NONCE_LEN], out: &mut Vec<u8>) {
        Frame::ServerInfo { nonce, sealed: &seal(self, key, &nonce) }.write(out);
    }

    /// The client's side: opens the box of a `ServerInfo` frame. Only then has the relay proven
    /// that it holds the key of its `ServerKey` frame.
    pub fn open(key: &BoxKey, nonce: &[u8; NONCE_LEN], sealed: &[u8]) -> Result<Self, LoginError> {
        open(Kind::ServerInfo, key, nonce, sealed)
    }
}

fn seal(info: &impl Serialize, key: &BoxKey, nonce: &[u8; NONCE_LEN]) -> Vec<u8> {
    // Sealed in place. Room for all of it at once: a growing buffer would leave a mesh key behind.
    let mut buffer = Vec::with_capacity(TAG_LEN + JSON_MAX);
    buffer.resize(TAG_LEN, 0);
    // These structs always print.
    serde_json::to_writer(&mut buffer, info).unwrap_or_default();
    key.seal(nonce, &mut buffer);
    buffer
}

fn open<T: for<'d> Deserialize<'d>>(
    kind: Kind,
    key: &BoxKey,
    nonce: &[u8; NONCE_LEN],
    sealed: &[u8],
) -> Result<T, LoginError> {
    let named = if kind == Kind::ClientInfo { 32 } else { 0 };
    check(kind, named + NONCE_LEN + sealed.len())?;
    // It may hold a mesh key.
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let content = key.open(nonce, &mut buffer).ok_or(LoginError::Proof(kind))?;
    serde_json::from_slice(content).map_err(|_| LoginError::Content(kind))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
fn is_false(flag: &bool) -> bool {
    !flag
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}
