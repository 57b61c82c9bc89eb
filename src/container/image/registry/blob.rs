//! [`BlobReader`]: the bytes of a blob, read on from where a connection broke.

use std::io::{self, Read};
use std::sync::Arc;

use super::failure::Failure;
use super::fetch::FetchResponse;
use super::retry;
use super::servers::BlobServers;
use super::session::Session;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::oci::{Descriptor, Digest};
use crate::error::{Context, Error, ErrorKind, Result};

/// Failures without this progress between them count together.
const PROGRESS: u64 = 1 << 20;
/// All failures of one blob, so that what is sent again in vain is bounded.
const MAX_FAILURES: u32 = 20;

/// Gives the bytes in order. Nothing is checked but lengths; a caller checks the digest.
pub(super) struct BlobReader<'a> {
    session: &'a Session,
    deadline: PrepareDeadline,
    digest: Digest,
    size: u64,
    position: u64,
    body: Option<Box<dyn Read + Send>>,
    server: usize,
    servers: Arc<BlobServers>,
    failures: Failures,
}

/// How often it failed.
#[derive(Default)]
struct Failures {
    all: u32,
    /// Since the last progress.
    recent: u32,
    /// Where the last one was.
    position: u64,
}

impl<'a> BlobReader<'a> {
    /// # Errors
    /// `NotFound` where no server has it; what else asking for it fails with.
    pub fn open(session: &'a Session, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Self> {
        let servers = session.servers_of(&blob.digest);
        let mut reader = Self {
            session,
            deadline: deadline.clone(),
            digest: blob.digest.clone(),
            size: blob.size,
            position: 0,
            body: None,
            server: servers.next(session.preferred()),
            servers,
            failures: Failures::default(),
        };
        while reader.body.is_none() {
            match reader.connect() {
                Ok(()) => session.prefer(reader.server),
                Err(failure) => reader.failed(failure).doing(|| format!("blob {}", blob.digest))?,
            }
        }
        Ok(reader)
    }

    /// Opens the body at the position where reading is.
    fn connect(&mut self) -> std::result::Result<(), Failure> {
        let range = (self.position > 0).then(|| format!("bytes={}-", self.position));
        let asked = self.session.blob(self.server, &self.digest, range.clone(), &self.deadline);
        let response = match asked {
            Err(failure) if range.is_some() && !failure.transient && failure.error.kind() == ErrorKind::Corrupt => {
                self.session.blob(self.server, &self.digest, None, &self.deadline)?
            }
            asked => asked?,
        };
        let from = match response.status {
            206 if range.is_some() && self.is_rest(&response) => self.position,
            // What was not asked for is not believed. Without a range it is sent from its beginning.
            206 => {
                drop(response);
                let whole = self.session.blob(self.server, &self.digest, None, &self.deadline)?;
                return self.begin(whole, 0);
            }
            _ => 0,
        };
        self.begin(response, from)
    }

    /// Whether it is just what is missing.
    fn is_rest(&self, response: &FetchResponse) -> bool {
        let range = response.value("content-range").and_then(|value| value.trim().strip_prefix("bytes "));
        let Some((place, whole)) = range.and_then(|range| range.split_once('/')) else { return false };
        let Some((first, last)) = place.split_once('-') else { return false };
        let known = whole == "*" || whole.parse() == Ok(self.size);
        known && first.parse() == Ok(self.position) && last.parse() == Ok(self.size.saturating_sub(1))
    }

    /// Takes a body that begins at `from`, and reads what is known already.
    fn begin(&mut self, response: FetchResponse, from: u64) -> std::result::Result<(), Failure> {
        let expected = self.size.saturating_sub(from);
        if let Some(length) = response.content_length().filter(|length| *length != expected) {
            let what = format!("{} is sent with {length} bytes, and its manifest says {expected}", self.digest);
            return Err(Failure::last(Error::new(ErrorKind::Corrupt, what)));
        }
        let mut body = response.into_body();
        let (mut skip, mut buffer) = (self.position.saturating_sub(from), vec![0; 64 << 10]);
        while skip > 0 {
            self.deadline.check().map_err(Failure::last)?;
            let most = usize::try_from(skip).unwrap_or(usize::MAX).min(buffer.len());
            let n = body.read(buffer.get_mut(..most).unwrap_or_default()).map_err(|error| broken(&error))?;
            if n == 0 {
                return Err(broken(&io::ErrorKind::UnexpectedEof.into()));
            }
            skip = skip.saturating_sub(n as u64);
        }
        self.servers.used(self.server);
        self.body = Some(body);
        Ok(())
    }

    /// Waits before the next try, or turns to another server at once where this one will not do.
    ///
    /// # Errors
    /// The failure, when there is none; `TimedOut` and `Cancelled`.
    fn failed(&mut self, failure: Failure) -> Result<()> {
        self.body = None;
        self.deadline.check()?;
        let patient = failure.after.is_none_or(|after| after <= retry::MAX_RETRY_AFTER);
        if (!failure.transient || !patient) && self.servers.exclude(self.server) {
            log::debug!("blob {} is asked of another server: {}", self.digest, failure.error);
            self.server = self.servers.next(self.server);
            return Ok(());
        }
        let failures = &mut self.failures;
        if self.position >= failures.position.saturating_add(PROGRESS) {
            failures.recent = 0;
        }
        failures.position = self.position;
        failures.recent += 1;
        failures.all += 1;
        if !failure.transient || !patient || failures.recent >= retry::MAX_ATTEMPTS || failures.all >= MAX_FAILURES {
            let all = failures.all;
            return Err(failure.error).doing(|| format!("reading it from byte {} (failure {all})", self.position));
        }
        log::debug!("blob {} is read on from byte {}: {}", self.digest, self.position, failure.error);
        let next = self.servers.next(self.server.wrapping_add(1));
        // A pause that a server asks for concerns that server alone.
        let asked = failure.after.filter(|_| next == self.server).unwrap_or_default();
        retry::wait(asked.max(retry::pause(failures.recent)), &self.deadline)?;
        self.server = next;
        Ok(())
    }
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            self.deadline.check()?;
            let Some(body) = &mut self.body else {
                if let Err(failure) = self.connect() {
                    self.failed(failure)?;
                }
                continue;
            };
            match body.read(buffer) {
                Ok(0) if self.position < self.size => self.failed(broken(&io::ErrorKind::UnexpectedEof.into()))?,
                Ok(n) => {
                    self.position = self.position.saturating_add(n as u64);
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.failed(broken(&error))?,
            }
        }
    }
}

/// A connection that ended too early, or said nothing for too long.
fn broken(error: &io::Error) -> Failure {
    let what = match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection ended early".to_owned(),
        _ => error.to_string(),
    };
    let kind = Error::from(io::Error::from(error.kind())).kind();
    Failure::transient(Error::new(kind, what))
}
