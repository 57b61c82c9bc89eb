//! Requests to servers that are played: what is sent to them, and what they answer.

#![allow(clippy::indexing_slicing, reason = "a failure here is the test's")]

mod access;
mod broken;
mod pull;
mod server;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::credentials::Credentials;
use super::endpoint::{Endpoint, PlainHosts};
use super::http::HttpFetcher;
use super::keyring::Keyring;
use super::proxy::Proxies;
use super::session::Session;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::oci::{Descriptor, Digest, Verified, from_reader};
use crate::error::Result;
use crate::size::Size;
use server::{Answer, Asked, End, Server};

const LONG: Duration = Duration::from_secs(60);

fn deadline() -> PrepareDeadline {
    PrepareDeadline::new(LONG, None)
}

/// Credentials given by value for these registries.
fn keyring(given: &[(&str, Credentials)]) -> Keyring {
    let given = given.iter().map(|(name, credentials)| ((*name).to_owned(), credentials.clone())).collect();
    Keyring { given, callback: None, user_files: false, helpers: false }
}

/// A session with these servers, of which the last is the registry.
fn session_of(servers: &[&Server], keyring: Keyring, idle: Duration) -> Session {
    let plain = PlainHosts(servers.iter().map(|server| server.name()).collect());
    let (registry, mirrors) = servers.split_last().unwrap();
    let mut endpoints: Vec<_> = mirrors.iter().map(|it| Endpoint::mirror(&it.name(), &plain).unwrap()).collect();
    endpoints.push(Endpoint::of(&format!("{}/a/b:1", registry.name()).parse().unwrap(), &plain).unwrap());
    let client = HttpFetcher::new(&[], Proxies::default(), idle).unwrap();
    Session::new(Arc::new(client), endpoints, "a/b", keyring, plain)
}

fn session(server: &Server, keyring: Keyring) -> Session {
    session_of(&[server], keyring, Duration::from_secs(20))
}

fn blob_of(bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: String::new(),
        digest: Digest::sha256(bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::new(),
    }
}

/// Reads a blob as a layer is read: its digest counts.
fn read(session: &Session, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Vec<u8>> {
    let reader = super::blob::BlobReader::open(session, blob, deadline)?;
    let mut bytes = Vec::new();
    let outcome = Verified::new(reader, &blob.digest, blob.size).read_to_end(&mut bytes);
    outcome.map_err(|error| from_reader(error, deadline)).map(|_| bytes)
}

/// Answers by turns: the last one again and again.
fn by_turns(answers: Vec<Answer>) -> impl Fn(&Asked) -> Answer + Send + Sync {
    let turn = AtomicU32::new(0);
    move |_| {
        let n = turn.fetch_add(1, Ordering::Relaxed) as usize;
        answers[n.min(answers.len() - 1)].clone()
    }
}

struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-registry-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
