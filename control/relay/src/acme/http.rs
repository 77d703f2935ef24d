//! The way to the ACME server: requests one after the other, each waited for.

use std::future::Future;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use ureq::http::{Request, Response};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use crate::files;
use crate::limits;
use millrace_host::failure::Failure;

/// A blocking client behind an asynchronous interface: its futures are ready when they are polled.
#[derive(Debug)]
pub struct Blocking(ureq::Agent);

impl Blocking {
    /// Trusts the certificates of a PEM file, else those of the system.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, Failure> {
        let roots = files::trusted(ca_file, "acme.ca_file")?;
        let roots: Vec<_> =
            roots.iter().map(|root| Certificate::from_der(root.as_ref()).to_owned()).collect();
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::new_with_certs(&roots))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = ureq::Agent::config_builder()
            .https_only(true)
            .http_status_as_error(false)
            .timeout_global(Some(limits::ACME_REQUEST_LIMIT))
            .tls_config(tls.build());
        Ok(Self(config.build().new_agent()))
    }
}

impl HttpClient for Blocking {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let agent = self.0.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            // The crate lends a way to the bytes of an answer's body alone: so it is made one.
            let mut body = BytesResponse::from(Response::new(body)).body;
            let body = body.into_bytes().await.map_err(Error::Other)?;
            let answer = if body.is_empty() {
                agent.run(Request::from_parts(parts, ()))
            } else {
                agent.run(Request::from_parts(parts, &body[..]))
            };
            let (parts, mut body) = answer.map_err(|e| Error::Other(Box::new(e)))?.into_parts();
            let body = body.with_config().limit(limits::ACME_ANSWER_BYTES_MAX).read_to_vec();
            let body = Bytes::from(body.map_err(|e| Error::Other(Box::new(e)))?);
            Ok(BytesResponse { parts, body: Box::new(body) })
        })
    }
}

/// The value of a future that waits for nothing but [`Blocking`].
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}
