//! The pull itself: from a name to layers in the store.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use super::Registry;
use super::endpoint::{Endpoint, PlainHosts};
use super::fetch::Fetch;
use super::http::{self, HttpFetcher};
use super::login::known_name;
use super::proxy::Proxies;
use super::session::Session;
use super::source::RegistrySource;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::layers::{self, Allowed};
use crate::container::image::oci::{self, Platform, Reference};
use crate::container::image::store::{NameRecord, Store};
use crate::container::image::{Image, worker};
use crate::error::{Context, Result};
use crate::sys;

/// How often it is looked whether a pull is to end.
const POLL: Duration = Duration::from_millis(20);
const STACK: usize = 128 << 10;

impl Image {
    /// Pulls an image from its registry: `debian:12`, `ghcr.io/me/app@sha256:..`.
    ///
    /// This is [`Registry::pull`] with all settings as they are by default.
    ///
    /// # Errors
    /// As [`Registry::pull`].
    pub fn pull(reference: impl fmt::Display) -> Result<Self> {
        Registry::new().pull(reference)
    }
}

impl Registry {
    /// Pulls an image, a [`Reference`] or a text that is one: `debian:12`.
    ///
    /// Its layers are unpacked into the store as they arrive, three at once. Those that are there are not asked for. The image that is
    /// returned is what the name stands for now, whatever it stands for later.
    ///
    /// Blocks for at most [`Registry::timeout`] and 4 s, and for 4 s once the token of [`Registry::cancel`] is cancelled. A broken
    /// connection is read on from where it broke. What may pass is tried five times, with growing pauses or those that the registry
    /// asks for, up to 60 s.
    ///
    /// # Errors
    /// - `InvalidConfig` for what is no name, and beyond a limit, naming its method.
    /// - `NotFound` where the registry has no such image, or none for the platform, naming what is there.
    /// - `PermissionDenied` for credentials that are missing or refused, and for plain HTTP with a host that is not allowed. So for an
    ///   image that a signature policy does not admit.
    /// - `ResourceExhausted` for a rate limit that is used up, with the registry's words, and without space.
    /// - `Corrupt` for what is not what its digest or its size says, and `Unsupported` for types that are not known.
    /// - `Unsupported` where the processor lacks what the crate's own TLS needs.
    /// - `TimedOut`; `Cancelled`; `Io` for other failures of connections.
    pub fn pull(&self, reference: impl fmt::Display) -> Result<Image> {
        let record = self.pulled(reference.to_string().parse()?)?;
        let mut image = Image::pulled(record).limits(self.limits.clone()).max_size(self.max_size);
        if let Some(platform) = &self.platform {
            image = image.platform(platform.clone());
        }
        Ok(match &self.cache {
            Some(dir) => image.cache_dir(dir),
            None => image,
        })
    }

    /// Brings an image into the store, and returns what its name stands for.
    pub(super) fn pulled(&self, reference: Reference) -> Result<NameRecord> {
        let registry = self.clone();
        let doing = format!("pulling {reference}");
        let deadline = PrepareDeadline::new(self.timeout, &self.cancel).late("Registry::timeout: not pulled");
        worker::run(&deadline, worker::GRACE, move |deadline| registry.pull_now(&reference, deadline)).doing(|| doing)
    }

    fn pull_now(&self, reference: &Reference, deadline: &PrepareDeadline) -> Result<NameRecord> {
        for pem in &self.authorities {
            http::certificates(pem)?;
        }
        let store = Store::open(self.cache.clone())?;
        let (fetcher, _watch) = self.started(deadline)?;
        let plain = PlainHosts(self.plain_http.clone());
        let mirrors = self.mirrors.get(&known_name(reference.registry())).into_iter().flatten();
        let mut endpoints = mirrors.map(|mirror| Endpoint::mirror(mirror, &plain)).collect::<Result<Vec<_>>>()?;
        endpoints.push(Endpoint::of(reference, &plain)?);
        let session = Session::new(fetcher, endpoints, reference.repository(), self.keyring.clone(), plain);
        let source = RegistrySource::new(&session, &store);
        let platform = self.platform.clone().unwrap_or_else(Platform::host);
        let root = source.root(reference, deadline)?;
        #[cfg(feature = "signatures")]
        if let Some(policy) = &self.policy {
            super::signed::admit(policy, reference, &root, &source, deadline)?;
        }
        let resolved = oci::resolve(&source, &root, &platform, deadline)?;
        let allowed = Allowed { limits: self.limits.clone(), max_size: self.max_size };
        let ignore = |_: &oci::LayerProgress| {};
        let observer = self.progress.as_deref().map_or(&ignore as &oci::LayerObserver<'_>, |progress| progress);
        layers::prepare_layers(&store, &source, &resolved, &allowed, deadline, observer)?;
        // The name comes last: what it stands for is there, whenever this process ends.
        if let Some(bytes) = source.kept(&root.digest) {
            store.put_blob(&root.digest, &bytes)?;
        }
        for document in [&resolved.manifest, &resolved.config] {
            store.put_blob(&document.descriptor.digest, &document.bytes)?;
        }
        let layers = resolved.diff_ids();
        let pinned = store.name(&reference.to_string())?.is_some_and(|before| before.pinned);
        let record = NameRecord {
            reference: reference.to_string(),
            root: root.digest,
            root_size: root.size,
            root_type: root.media_type,
            manifest: resolved.manifest.descriptor.digest,
            config: resolved.config.descriptor.digest,
            platform: platform.to_string(),
            layers,
            pinned,
        };
        store.set_name(&record)?;
        Ok(record)
    }

    /// The client, and what ends its requests when the pull is to end.
    fn started(&self, deadline: &PrepareDeadline) -> Result<(Arc<dyn Fetch>, Option<Watch>)> {
        if let Some(own) = &self.fetcher {
            return Ok((own.clone(), None));
        }
        let proxies = Proxies::new(|name| std::env::var(name).ok());
        let client = Arc::new(HttpFetcher::new(&self.authorities, proxies, self.idle)?);
        let watch = Watch::start(client.clone(), deadline)?;
        Ok((client, Some(watch)))
    }
}

/// Ends requests that wait when the pull is cancelled or late, and goes with the pull.
struct Watch {
    _done: mpsc::Sender<()>,
}

impl Watch {
    fn start(client: Arc<HttpFetcher>, deadline: &PrepareDeadline) -> Result<Self> {
        let (done, over) = mpsc::channel::<()>();
        let deadline = deadline.clone();
        let body = move || {
            while over.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                if deadline.check().is_err() {
                    return client.shutdown();
                }
            }
        };
        sys::spawn("pull".into(), STACK, body).doing(|| "starting a thread")?;
        Ok(Self { _done: done })
    }
}
