//! [`Registry`]: images of registries, as Docker has them (distribution-spec 1.1).
//!
//! A pull asks the registry, or a mirror of it, for the manifest that a name stands for. The server that answers for a tag is trusted
//! with what it stands for, unless a signature policy asks for a key or an identity. Content that is asked for by digest is checked here, so mirrors
//! and redirects need no trust for it. Layers that the store has are not asked for.

mod auth;
mod blob;
mod challenge;
mod credentials;
mod endpoint;
mod failure;
mod fetch;
mod helper;
mod http;
mod keyring;
mod login;
mod proxy;
mod pull;
mod retry;
mod servers;
mod session;
#[cfg(feature = "signatures")]
mod signed;
mod source;
#[cfg(test)]
mod tests;
mod url;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::limits::ImageLimits;
use super::oci::{LayerObserver, LayerProgress, Platform};
#[cfg(feature = "signatures")]
use super::signature::SignaturePolicy;
use crate::container::CancelToken;
use crate::size::Size;
#[cfg(any(test, feature = "internals"))]
pub(crate) use challenge::fuzz as fuzz_challenge;
pub use credentials::Credentials;
pub use fetch::{Fetch, FetchRequest, FetchResponse};
use keyring::Keyring;

/// How long a pull may take.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1800);

/// Pulls images from registries, into the store that all images are prepared in.
///
/// Each setting has a default, by which public images are pulled as Docker pulls them. A registry is not trusted: what it sends is
/// checked against digests, and bounded in size and time.
///
/// # Credentials
///
/// They are looked for once a registry asks for them: first those given here, then those of the user's files. The file is the one that
/// `REGISTRY_AUTH_FILE` names, or `config.json` in `DOCKER_CONFIG` or `~/.docker`. They are sent to the registry itself and to the
/// token service that it names, and to no host that it redirects to.
///
/// ```no_run
/// use cofferdam::image::{Credentials, Registry};
///
/// let registry = Registry::new().credentials("ghcr.io", Credentials::basic("me", "token"));
/// let image = registry.pull("ghcr.io/me/app:1")?;
/// # Ok::<(), cofferdam::Error>(())
/// ```
#[derive(Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Registry {
    keyring: Keyring,
    mirrors: BTreeMap<String, Vec<String>>,
    plain_http: Vec<String>,
    authorities: Vec<Vec<u8>>,
    platform: Option<Platform>,
    progress: Option<Arc<LayerObserver<'static>>>,
    #[cfg(feature = "signatures")]
    policy: Option<SignaturePolicy>,
    fetcher: Option<Arc<dyn Fetch>>,
    cache: Option<PathBuf>,
    limits: ImageLimits,
    max_size: Size,
    timeout: Duration,
    idle: Duration,
    cancel: Option<CancelToken>,
}

impl Default for Registry {
    fn default() -> Self {
        let keyring = Keyring { given: BTreeMap::new(), callback: None, user_files: true, helpers: false };
        Self {
            keyring,
            mirrors: BTreeMap::new(),
            plain_http: Vec::new(),
            authorities: Vec::new(),
            platform: None,
            progress: None,
            #[cfg(feature = "signatures")]
            policy: None,
            fetcher: None,
            cache: None,
            limits: ImageLimits::default(),
            max_size: Size::gib(16),
            timeout: DEFAULT_TIMEOUT,
            idle: http::IDLE_TIMEOUT,
            cancel: None,
        }
    }
}

impl Registry {
    /// Creates the settings by which public images are pulled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the credentials for a registry, named as in references: `docker.io`, `localhost:5000`.
    pub fn credentials(mut self, registry: &str, credentials: Credentials) -> Self {
        self.keyring.given.insert(login::known_name(registry), credentials);
        self
    }

    /// Asks `find` for the credentials for a registry or mirror that has none of [`Registry::credentials`].
    ///
    /// It is called with the name on a thread of the pull, which waits for it.
    pub fn credentials_with(
        mut self,
        find: impl Fn(&str) -> io::Result<Option<Credentials>> + Send + Sync + 'static,
    ) -> Self {
        self.keyring.callback = Some(Arc::new(find));
        self
    }

    /// Sets whether the user's own files are looked into for credentials: yes unless set.
    pub fn user_credentials(mut self, on: bool) -> Self {
        self.keyring.user_files = on;
        self
    }

    /// Allows programs to run that the user's file names for credentials; no by default.
    ///
    /// In Docker's file they are `credHelpers` and `credsStore`.
    /// A program has 60 s, and is killed then.
    pub fn credential_helpers(mut self, on: bool) -> Self {
        self.keyring.helpers = on;
        self
    }

    /// Adds a mirror of a registry: a host, or an address with a path. Mirrors are asked in order, before the registry itself.
    ///
    /// A blob that one lacks, or sends with wrong bytes, is fetched from the next.
    /// A mirror says what a tag stands for, so it is trusted as the registry is. It need not be for images by digest, and for those that
    /// a signature policy asks a key or an identity for.
    pub fn mirror(mut self, registry: &str, mirror: impl Into<String>) -> Self {
        self.mirrors.entry(login::known_name(registry)).or_default().push(mirror.into());
        self
    }

    /// Allows plain HTTP with a host, named as in references: `localhost:5000`. All others are asked by TLS only.
    pub fn plain_http(mut self, host: &str) -> Self {
        self.plain_http.push(host.to_ascii_lowercase());
        self
    }

    /// Adds authorities that certificates of registries are trusted by, in the form PEM.
    ///
    /// Those of Mozilla's list are trusted too. Files of the host are not.
    pub fn ca_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.authorities.push(pem.into());
        self
    }

    /// Sends requests by `fetcher` instead of the client that comes with the crate.
    ///
    /// [`Registry::ca_certificates`] and proxies of the environment are then left to it.
    pub fn fetcher(mut self, fetcher: impl Fetch + 'static) -> Self {
        self.fetcher = Some(Arc::new(fetcher));
        self
    }

    /// Pulls the image for this platform; [`Platform::host`] by default.
    ///
    /// Where its variant is missing, an image for a lower one is taken.
    pub fn platform(mut self, platform: Platform) -> Self {
        self.platform = Some(platform);
        self
    }

    /// Pulls what `policy` admits only; everything unless set.
    ///
    /// What is not admitted gets no name in the store, and no layer of it is asked for. The policy is for pulls: an image that is in
    /// the store already stays there.
    #[cfg(feature = "signatures")]
    pub fn signature_policy(mut self, policy: SignaturePolicy) -> Self {
        self.policy = Some(policy);
        self
    }

    /// Calls `progress` as layers arrive, on several threads, which wait for it.
    pub fn progress(mut self, progress: impl Fn(&LayerProgress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Keeps images in this directory instead of the user's cache: see [`Image::cache_dir`](crate::Image::cache_dir).
    ///
    /// Documents and layers that are there are not asked for, also where another pull brought them. So an image whose manifest names the layers of another has
    /// them without credentials for it. Tenants that must not have each other's images need a directory each.
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache = Some(dir.into());
        self
    }

    /// Limits what an image may contain, as [`Image::limits`](crate::Image::limits) does.
    pub fn limits(mut self, limits: ImageLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Limits how large the image and each layer may be, unpacked; 16 GiB by default.
    pub fn max_size(mut self, size: Size) -> Self {
        self.max_size = size;
        self
    }

    /// Sets how long a pull may take; 30 minutes by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long a server may say nothing before it is asked anew.
    ///
    /// That is 30 s by default, at least 1 ms and at most 1 h. A fetcher of the embedder's has its own limit.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle = timeout.clamp(Duration::from_millis(1), Duration::from_secs(3600));
        self
    }

    /// Lets another thread cancel the pull by `token`. It then fails with `Cancelled` within 4 s.
    pub fn cancel(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Registry");
        shown.field("keyring", &self.keyring).field("plain_http", &self.plain_http);
        shown.field("platform", &self.platform).field("timeout", &self.timeout).finish_non_exhaustive()
    }
}
