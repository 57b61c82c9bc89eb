//! [`Fetch`]: how requests are sent, by our own client or by the embedder's.

use std::fmt;
use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Sends requests of HTTP instead of the client that comes with the crate: see [`Registry::fetcher`](super::Registry::fetcher).
pub trait Fetch: Send + Sync {
    /// Sends a request, and returns its response once the headers are there.
    ///
    /// It follows no redirect and repeats nothing: the crate does both. Any status is a response. Neither this call nor a read of the
    /// body should block for longer than [`FetchRequest::timeout`].
    ///
    /// # Errors
    /// Those of the connection. `InvalidData`, `InvalidInput`, `NotFound`, `PermissionDenied` and `Unsupported` are final; after others
    /// it is tried again.
    fn fetch(&self, request: &FetchRequest) -> io::Result<FetchResponse>;
}

/// A request to send. Its `Debug` shows no credentials.
pub struct FetchRequest {
    pub(super) method: &'static str,
    pub(super) url: String,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    pub(super) timeout: Duration,
}

impl FetchRequest {
    /// Returns the method: `GET` or `POST`.
    pub fn method(&self) -> &str {
        self.method
    }

    /// Returns the whole address, `http://` or `https://`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the names and values of its headers. `Host` and those about the body's length are left to the fetcher.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.headers.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// Returns the body, which only `POST` has.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Returns how long the request may take, its response's body included.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }
}

impl fmt::Debug for FetchRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url.split('?').next().unwrap_or_default();
        write!(f, "FetchRequest({} {url})", self.method)
    }
}

/// What a server answered: its status, headers and body.
pub struct FetchResponse {
    pub(super) status: u16,
    headers: Vec<(String, String)>,
    /// Shared by no threads; the lock makes the response fit for any.
    body: Mutex<Box<dyn Read + Send>>,
}

impl FetchResponse {
    /// Creates a response with this status and body. Its body fails with `UnexpectedEof` where it is cut off.
    pub fn new(status: u16, body: impl Read + Send + 'static) -> Self {
        Self { status, headers: Vec::new(), body: Mutex::new(Box::new(body)) }
    }

    /// Adds a header. One that is sent several times is added as often.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The values of a header, in the order that they were sent in.
    pub(super) fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(super) fn value<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.values(name).next()
    }

    pub(super) fn into_body(self) -> Box<dyn Read + Send> {
        self.body.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// The body's length as it was announced.
    pub(super) fn content_length(&self) -> Option<u64> {
        self.value("content-length").and_then(|value| value.trim().parse().ok())
    }
}

impl fmt::Debug for FetchResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FetchResponse({})", self.status)
    }
}
