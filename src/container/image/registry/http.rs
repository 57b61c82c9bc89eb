//! [`HttpFetcher`]: requests by ureq, with TLS by rustls and graviola.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy};

use super::fetch::{Fetch, FetchRequest, FetchResponse};
use super::proxy::Proxies;
use super::url::Url;
use crate::error::{Error, Result};

/// How long a name may take to be resolved, a connection to be made, and a server to say nothing.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// All headers of one response together.
const MAX_HEADERS: usize = 64 << 10;
/// A file of certificates.
const MAX_CERTIFICATES: usize = 4 << 20;

/// One for each pull: what is open ends with it.
pub(super) struct HttpFetcher {
    agent: Agent,
    proxies: Proxies,
}

impl HttpFetcher {
    /// # Errors
    /// `InvalidConfig` for certificates that cannot be read.
    pub fn new(authorities: &[Vec<u8>], proxies: Proxies, idle: Duration) -> Result<Self> {
        let mut roots: Vec<Certificate<'static>> = Vec::new();
        for pem in authorities {
            roots.extend(certificates(pem)?);
        }
        let known = webpki_root_certs::TLS_SERVER_ROOT_CERTS;
        roots.extend(known.iter().map(|root| Certificate::from_der(root.as_ref())));
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::from(roots))
            .unversioned_rustls_crypto_provider(Arc::new(rustls_graviola::default_provider()))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("cofferdam/", env!("CARGO_PKG_VERSION")))
            .max_response_header_size(MAX_HEADERS)
            .timeout_resolve(Some(RESOLVE_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(idle))
            .timeout_per_write(Some(idle))
            .build();
        Ok(Self { agent: Agent::new_with_config(config), proxies })
    }

    /// Ends all its requests, also those that wait.
    pub fn shutdown(&self) {
        self.agent.clone().shutdown();
    }

    fn proxy(&self, url: &str) -> io::Result<Option<Proxy>> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let url = Url::parse(url)?;
        let Some(text) = self.proxies.of(&url) else { return Ok(None) };
        let variable = if url.secure { "HTTPS_PROXY" } else { "HTTP_PROXY" };
        let socks = text.get(..5).is_some_and(|begin| begin.eq_ignore_ascii_case("socks"));
        if socks {
            return Err(invalid(format!("{variable}: proxies of SOCKS are not supported, only those of HTTP")));
        }
        // What it is may have a password.
        Proxy::new(text).map(Some).map_err(|_| invalid(format!("{variable} is no address of a proxy")))
    }
}

impl Fetch for HttpFetcher {
    fn fetch(&self, request: &FetchRequest) -> io::Result<FetchResponse> {
        if request.url.starts_with("https:") && !graviola::util::is_cpu_supported() {
            let what =
                "this processor lacks instructions that the crate's own TLS needs: give `Registry::fetcher` a client";
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        let mut built = ureq::http::Request::builder().method(request.method).uri(&request.url);
        for (name, value) in request.headers() {
            built = built.header(name, value);
        }
        let built = built.body(request.body.clone());
        let built = built.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        let proxy = self.proxy(&request.url)?;
        let configured = self.agent.configure_request(built).timeout_global(Some(request.timeout)).proxy(proxy);
        let response = self.agent.run(configured.build()).map_err(as_io)?;
        let (head, body) = response.into_parts();
        let mut answer = FetchResponse::new(head.status.as_u16(), Body(body.into_reader()));
        for (name, value) in &head.headers {
            answer = answer.header(name.as_str(), String::from_utf8_lossy(value.as_bytes()));
        }
        Ok(answer)
    }
}

/// A body whose errors have kinds.
struct Body(ureq::BodyReader<'static>);

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.downcast::<ureq::Error>() {
            Ok(inner) => as_io(inner),
            Err(error) => error,
        })
    }
}

fn as_io(error: ureq::Error) -> io::Error {
    use io::ErrorKind::{InvalidData, InvalidInput, NotFound, TimedOut};
    let hinted = |text: String| {
        let hints = [
            ("invalid peer certificate", "see `Registry::ca_certificates` for authorities of your own"),
            ("InvalidContentType", "that is no TLS; where it is plain HTTP, `Registry::plain_http` allows it"),
        ];
        let hint = hints.iter().find(|(found, _)| text.contains(found));
        hint.map_or_else(|| text.clone(), |(_, hint)| format!("{text}: {hint}"))
    };
    match error {
        ureq::Error::Io(error) if error.get_ref().is_some() => {
            let kind = error.kind();
            io::Error::new(kind, hinted(error.to_string()))
        }
        ureq::Error::Io(error) => error,
        ureq::Error::Timeout(which) => io::Error::new(TimedOut, format!("no answer in time ({which})")),
        ureq::Error::HostNotFound => io::Error::new(NotFound, "there is no such host"),
        error @ (ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::InvalidProxyUrl) => {
            io::Error::new(InvalidInput, error.to_string())
        }
        error @ (ureq::Error::Protocol(_)
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::LargeResponseHeader(..)) => io::Error::new(InvalidData, hinted(error.to_string())),
        error => io::Error::other(error.to_string()),
    }
}

/// # Errors
/// `InvalidConfig` for what has no certificate, or one that cannot be read.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<Certificate<'static>>> {
    let invalid = |what: &str| Err(Error::invalid("Registry::ca_certificates", what));
    if pem.len() > MAX_CERTIFICATES {
        return invalid("more than 4 MiB");
    }
    let mut found = Vec::new();
    for item in parse_pem(pem) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(_) => return invalid("a certificate in it is not in the form PEM"),
        }
    }
    if found.is_empty() {
        return invalid("there is no certificate in the form PEM in it");
    }
    Ok(found)
}
