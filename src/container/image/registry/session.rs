//! [`Session`]: requests to one repository: redirects, authentication, and what its answers mean (distribution-spec 1.1).

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::auth::{self, Authorization, Demand, TokenService};
use super::credentials::{Secret, basic};
use super::endpoint::{Endpoint, PlainHosts};
use super::failure::{Failure, Reply, Words};
use super::fetch::{Fetch, FetchRequest, FetchResponse};
use super::keyring::{Found, Keyring};
use super::retry;
use super::servers::BlobServers;
use super::url::Url;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::oci::{Digest, Hasher, MAX_DOCUMENT, accepted};
use crate::error::{Context, Error, ErrorKind, Result};

/// As clients of Docker have it.
const MAX_REDIRECTS: usize = 10;
/// How often a server that is not the last that could be asked is asked again.
const MIRROR_ATTEMPTS: u32 = 2;
/// A document, a token, or an error's text.
const SMALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A longer one is none that a clock can show.
const MAX_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// All that is asked while one image is pulled. Threads share it.
pub(super) struct Session {
    fetcher: Arc<dyn Fetch>,
    /// Mirrors first, and the registry itself last.
    endpoints: Vec<Member>,
    repository: String,
    keyring: Keyring,
    plain: PlainHosts,
    /// The one that answered last.
    preferred: AtomicUsize,
    /// For each blob that was asked for.
    blobs: Mutex<BTreeMap<Digest, Arc<BlobServers>>>,
}

struct Member {
    endpoint: Endpoint,
    access: Mutex<Access>,
}

/// What is known of how to be let in.
#[derive(Default)]
struct Access {
    current: Option<Authorization>,
    /// Looked for once it is asked for.
    found: Option<Found>,
}

/// A document and the type that the server says it has.
pub(super) struct Document {
    pub bytes: Vec<u8>,
    pub media_type: String,
}

impl Session {
    pub fn new(
        fetcher: Arc<dyn Fetch>,
        endpoints: Vec<Endpoint>,
        repository: &str,
        keyring: Keyring,
        plain: PlainHosts,
    ) -> Self {
        let member = |endpoint| Member { endpoint, access: Mutex::default() };
        let endpoints = endpoints.into_iter().map(member).collect();
        let repository = repository.into();
        Self { fetcher, endpoints, repository, keyring, plain, preferred: AtomicUsize::new(0), blobs: Mutex::default() }
    }

    /// The names of all servers.
    pub fn origin(&self) -> String {
        self.endpoints.iter().map(|member| format!("{}\n", member.endpoint.shown())).collect()
    }

    /// Returns which servers may be asked for a blob.
    pub fn servers_of(&self, digest: &Digest) -> Arc<BlobServers> {
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        blobs.entry(digest.clone()).or_insert_with(|| Arc::new(BlobServers::new(self.servers()))).clone()
    }

    /// The manifest or index of a tag or a digest, of at most 4 MiB. Where a digest is given, the document has it.
    pub fn manifest(&self, of: &str, digest: Option<&Digest>, deadline: &PrepareDeadline) -> Result<Document> {
        let path = format!("{}/manifests/{of}", self.repository);
        let accept = accepted().collect::<Vec<_>>().join(", ");
        self.anywhere(deadline, |member| {
            let (reply, from) = self.exchange(member, &path, &[("accept", accept.clone())], SMALL_TIMEOUT, deadline)?;
            let document = read_document(reply.0, deadline)?;
            if let Some(digest) = digest {
                let mut hasher = Hasher::like(digest);
                hasher.update(&document.bytes);
                let found = hasher.finish();
                if found != *digest {
                    let what = format!("{} gives a document whose digest is {found} instead of {digest}", from.shown());
                    return Err(Failure::last(Error::new(ErrorKind::Corrupt, what)));
                }
            }
            Ok(document)
        })
    }

    /// The list of what refers to a manifest (distribution-spec 1.1, Listing Referrers).
    #[cfg(feature = "signatures")]
    pub fn referrers(&self, digest: &Digest, deadline: &PrepareDeadline) -> Result<Document> {
        let path = format!("{}/referrers/{digest}", self.repository);
        let accept = "application/vnd.oci.image.index.v1+json".to_owned();
        self.anywhere(deadline, |member| {
            let (reply, _) = self.exchange(member, &path, &[("accept", accept.clone())], SMALL_TIMEOUT, deadline)?;
            read_document(reply.0, deadline)
        })
    }

    /// Opens a blob at a position, at the server of that number.
    pub fn blob(
        &self,
        server: usize,
        digest: &Digest,
        range: Option<String>,
        deadline: &PrepareDeadline,
    ) -> std::result::Result<FetchResponse, Failure> {
        let path = format!("{}/blobs/{digest}", self.repository);
        let headers: Vec<_> = range.map(|range| ("range", range)).into_iter().collect();
        let Some(member) = self.endpoints.get(server) else {
            return Err(Failure::last(Error::new(ErrorKind::InvalidConfig, "no registry is there to be asked")));
        };
        let (reply, _) = self.exchange(member, &path, &headers, deadline.left(), deadline)?;
        Ok(reply.0)
    }

    /// How many servers can be asked.
    pub fn servers(&self) -> usize {
        self.endpoints.len()
    }

    pub fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed)
    }

    pub fn prefer(&self, server: usize) {
        self.preferred.store(server, Ordering::Relaxed);
    }

    /// Asks one server after the other, each again after failures that may pass.
    fn anywhere<T>(
        &self,
        deadline: &PrepareDeadline,
        ask: impl Fn(&Member) -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let (first, count) = (self.preferred(), self.servers());
        let mut outcome = Err(Error::new(ErrorKind::InvalidConfig, "no registry is there to be asked"));
        for (n, server) in (0..count).map(|n| (n, (first + n) % count)) {
            let Some(member) = self.endpoints.get(server) else { continue };
            let attempts = if n + 1 == count { retry::MAX_ATTEMPTS } else { MIRROR_ATTEMPTS };
            let doing = || format!("asking {}", member.endpoint.shown());
            match retry::repeat(attempts, deadline, || ask(member)) {
                Ok(found) => {
                    self.prefer(server);
                    return Ok(found);
                }
                Err(error) => {
                    deadline.check().doing(doing)?;
                    log::debug!("pulling {}: {}: {error}", self.repository, member.endpoint.shown());
                    outcome = Err(error.doing(doing()));
                }
            }
        }
        outcome
    }

    /// One request, with redirects, and once more with better credentials. Its answer has a status of success.
    fn exchange(
        &self,
        member: &Member,
        path: &str,
        headers: &[(&'static str, String)],
        most: Duration,
        deadline: &PrepareDeadline,
    ) -> std::result::Result<(Reply, Url), Failure> {
        let url = member.endpoint.url(path);
        let mut authorization = member.access().current.clone().filter(Authorization::holds).map(|it| it.value);
        let mut asked_again = false;
        loop {
            let (response, from) = self.follow(&url, headers, authorization.as_deref(), most, deadline)?;
            if response.status != 401 || !from.same_origin(&url) {
                let words = Words::of(response.status, authorization.is_some() || member.access().has_secrets());
                return Ok((words.judge(response, &self.repository)?, from));
            }
            if asked_again {
                return Err(Failure::last(self.refused(member)));
            }
            asked_again = true;
            authorization = Some(self.authorize(member, &response, authorization.as_deref(), deadline)?);
        }
    }

    /// Asks, and goes where the answers lead. Credentials are for the registry's own origin alone.
    fn follow(
        &self,
        origin: &Url,
        headers: &[(&'static str, String)],
        authorization: Option<&str>,
        most: Duration,
        deadline: &PrepareDeadline,
    ) -> std::result::Result<(FetchResponse, Url), Failure> {
        let mut url = origin.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = headers.to_vec();
            if let Some(value) = authorization.filter(|_| url.same_origin(origin)) {
                headers.push(("authorization", value.to_owned()));
            }
            let response = self.send("GET", &url, headers, Vec::new(), most, deadline)?;
            let leads = matches!(response.status, 301 | 302 | 303 | 307 | 308);
            match response.value("location").filter(|_| leads) {
                None => return Ok((response, url)),
                Some(location) => url = url.join(location).doing(|| "following a redirect").map_err(Failure::last)?,
            }
        }
        let what = format!("{} redirects more than {MAX_REDIRECTS} times", origin.shown());
        Err(Failure::last(Error::new(ErrorKind::Corrupt, what)))
    }

    fn send(
        &self,
        method: &'static str,
        url: &Url,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
        most: Duration,
        deadline: &PrepareDeadline,
    ) -> std::result::Result<FetchResponse, Failure> {
        deadline.check().map_err(Failure::last)?;
        if !url.secure && !self.plain.allow(&url.authority()) {
            let what = format!("{} would be asked by plain HTTP, which `Registry::plain_http` must allow", url.shown());
            return Err(Failure::last(Error::new(ErrorKind::PermissionDenied, what)));
        }
        let timeout = deadline.left().min(most).min(MAX_TIMEOUT);
        let request = FetchRequest { method, url: url.to_string(), headers, body, timeout };
        self.fetcher.fetch(&request).map_err(|error| {
            if let Err(over) = deadline.check() {
                return Failure::last(over.doing(format!("waiting for {}", url.shown())));
            }
            let transient = retry::is_transient(&error);
            Failure { error: Error::from(error).doing(url.shown()), transient, after: None }
        })
    }

    /// Gets what a registry that refused a request asks for.
    fn authorize(
        &self,
        member: &Member,
        response: &FetchResponse,
        used: Option<&str>,
        deadline: &PrepareDeadline,
    ) -> std::result::Result<String, Failure> {
        // One thread gets it for all.
        let mut access = member.access();
        if let Some(current) = &access.current
            && current.holds()
            && used != Some(&current.value)
        {
            return Ok(current.value.clone());
        }
        let endpoint = &member.endpoint;
        if access.found.is_none() {
            let found = self.keyring.find(&endpoint.name, &self.repository, deadline).map_err(Failure::last)?;
            access.found = Some(found);
        }
        let credentials = access.found.as_ref().and_then(|found| found.credentials.clone());
        let demand = Demand::of(response, &endpoint.url("")).map_err(Failure::last)?;
        let got = match (demand, credentials.as_ref().map(|it| &it.0)) {
            (Demand::Basic, Some(Secret::Basic { user, password })) => Authorization::lasting(basic(user, password)),
            (Demand::Bearer(_), Some(Secret::RegistryToken(token))) => {
                Authorization::lasting(format!("Bearer {token}"))
            }
            (Demand::Bearer(service), _) => match self.token(&service, &access, deadline)? {
                Some(token) => token,
                None => return Err(Failure::last(denied(endpoint, &access))),
            },
            (Demand::Basic, _) => return Err(Failure::last(denied(endpoint, &access))),
        };
        if used == Some(&got.value) {
            return Err(Failure::last(denied(endpoint, &access)));
        }
        access.current = Some(got.clone());
        Ok(got.value)
    }

    /// A token of a service, or nothing when it refuses to give one.
    fn token(
        &self,
        service: &TokenService,
        access: &Access,
        deadline: &PrepareDeadline,
    ) -> std::result::Result<Option<Authorization>, Failure> {
        let credentials = access.found.as_ref().and_then(|found| found.credentials.as_ref());
        let scope = format!("repository:{}:pull", self.repository);
        for by_form in [false, true] {
            let asked = service.request(&scope, credentials, by_form);
            let (method, body) = match asked.form {
                Some(form) => ("POST", form.into_bytes()),
                None => ("GET", Vec::new()),
            };
            let mut headers: Vec<_> = asked.authorization.map(|value| ("authorization", value)).into_iter().collect();
            if method == "POST" {
                headers.push(("content-type", "application/x-www-form-urlencoded".to_owned()));
            }
            let response = self.send(method, &asked.url, headers, body, SMALL_TIMEOUT, deadline)?;
            match response.status {
                200 => {
                    let answer = read_small(response, auth::MAX_ANSWER, deadline)?;
                    return auth::token(&answer).map(Some).map_err(Failure::last);
                }
                404 | 405 if method == "GET" && credentials.is_some() => {}
                400 | 401 | 403 => return Ok(None),
                status => {
                    let words = Words::of(status, access.has_secrets());
                    words.judge(response, &format!("token service {}", service.realm().shown()))?;
                    let what = format!("its token service {} answers with status {status}", service.realm().shown());
                    return Err(Failure::last(Error::new(ErrorKind::Corrupt, what)));
                }
            }
        }
        Ok(None)
    }

    fn refused(&self, member: &Member) -> Error {
        denied(&member.endpoint, &member.access())
    }
}

impl Member {
    fn access(&self) -> std::sync::MutexGuard<'_, Access> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Access {
    /// Whether there is something that no error may show, although a registry may say it.
    fn has_secrets(&self) -> bool {
        self.current.is_some() || self.found.as_ref().is_some_and(|found| found.credentials.is_some())
    }
}

fn denied(endpoint: &Endpoint, access: &Access) -> Error {
    let (with, hint) = match &access.found {
        Some(Found { credentials: Some(_), hint }) => ("the credentials were refused", hint.as_str()),
        Some(Found { credentials: None, hint }) => ("it wants credentials, and there are none", hint.as_str()),
        None => ("it refuses the request", ""),
    };
    let shown = endpoint.shown();
    let what = format!("{shown}: {with} ({hint}). Where they are right, the repository is not there or is not theirs");
    Error::new(ErrorKind::PermissionDenied, what)
}

fn read_document(response: FetchResponse, deadline: &PrepareDeadline) -> std::result::Result<Document, Failure> {
    let media_type = response.value("content-type").and_then(|it| it.split(';').next()).unwrap_or_default();
    let media_type = media_type.trim().to_owned();
    let bytes = read_small(response, MAX_DOCUMENT, deadline)?;
    Ok(Document { bytes, media_type })
}

/// Reads a body that may have so many bytes.
fn read_small(response: FetchResponse, most: u64, deadline: &PrepareDeadline) -> std::result::Result<Vec<u8>, Failure> {
    let too_large =
        || Failure::last(Error::new(ErrorKind::Corrupt, format!("its answer has more than {} KiB", most >> 10)));
    let announced = response.content_length();
    if announced.is_some_and(|length| length > most) {
        return Err(too_large());
    }
    let (mut body, mut bytes, mut buffer) = (response.into_body(), Vec::new(), vec![0; 16 << 10]);
    loop {
        deadline.check().map_err(Failure::last)?;
        match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                let transient = retry::is_transient(&error);
                let over = deadline.check().err();
                let transient = transient && over.is_none();
                return Err(Failure { error: over.unwrap_or_else(|| error.into()), transient, after: None });
            }
        }
        if bytes.len() as u64 > most {
            return Err(too_large());
        }
    }
    if announced.is_some_and(|length| length != bytes.len() as u64) {
        let what = format!("its answer has {} bytes and was announced with {announced:?}", bytes.len());
        return Err(Failure { error: Error::new(ErrorKind::Corrupt, what), transient: true, after: None });
    }
    Ok(bytes)
}
