//! [`Authorization`]: who asks a registry, and how its token service is asked for a token.
//!
//! Specifications: distribution, token.md and oauth.md.

use std::time::{Duration, Instant};

use serde::Deserialize;

use super::challenge::{Challenge, challenges};
use super::credentials::{Credentials, Secret, basic};
use super::fetch::FetchResponse;
use super::url::{Url, encode};
use crate::error::{Error, ErrorKind, Result};

/// How long a token holds where its service does not say so, and at most.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
const MAX_LIFE: Duration = Duration::from_secs(3600);
/// Tokens are renewed so long before their end.
const MARGIN: Duration = Duration::from_secs(5);

/// An answer of a token service, and a token.
pub(super) const MAX_ANSWER: u64 = 256 << 10;
const MAX_TOKEN: usize = 64 << 10;

/// How this client is called where a service asks for it.
const CLIENT: &str = "cofferdam";

/// The value of the header, and until when it holds.
#[derive(Clone)]
pub(super) struct Authorization {
    pub value: String,
    pub expires: Option<Instant>,
}

impl Authorization {
    /// One that does not end.
    pub fn lasting(value: String) -> Self {
        Self { value, expires: None }
    }

    pub fn holds(&self) -> bool {
        self.expires.is_none_or(|end| Instant::now() < end)
    }
}

/// A request to a token service.
pub(super) struct TokenRequest {
    pub url: Url,
    pub authorization: Option<String>,
    /// Of a form to send; without it the service is asked by `GET`.
    pub form: Option<String>,
}

/// How a registry wants to be asked, of what it offers.
pub(super) enum Demand {
    Basic,
    Bearer(TokenService),
}

/// A service that gives tokens for a registry.
#[derive(Clone)]
pub(super) struct TokenService {
    realm: Url,
    service: Option<String>,
}

impl Demand {
    /// The best of what a response with status 401 offers.
    ///
    /// # Errors
    /// `Unsupported` names what there is where none is known; `Corrupt` for a token service without a place.
    pub fn of(response: &FetchResponse, from: &Url) -> Result<Self> {
        let offered: Vec<Challenge> = response.values("www-authenticate").take(8).flat_map(challenges).collect();
        if let Some(bearer) = offered.iter().find(|it| it.scheme == "bearer" && it.parameter("realm").is_some()) {
            let realm = from.join(bearer.parameter("realm").unwrap_or_default())?;
            return Ok(Self::Bearer(TokenService { realm, service: bearer.parameter("service").map(str::to_owned) }));
        }
        if offered.iter().any(|it| it.scheme == "basic") {
            return Ok(Self::Basic);
        }
        let schemes: Vec<String> = offered.iter().map(|it| it.scheme.chars().take(30).collect()).collect();
        let what = match schemes.is_empty() {
            true => "it refuses the request and does not say how to authenticate".to_owned(),
            false => format!("it wants to be asked by {}: basic and bearer are known", schemes.join(", ")),
        };
        Err(Error::new(ErrorKind::Unsupported, what))
    }
}

impl TokenService {
    pub fn realm(&self) -> &Url {
        &self.realm
    }

    /// What to ask it for a token for `scope`. It is asked once more by a form where it does not know the first way.
    pub fn request(&self, scope: &str, credentials: Option<&Credentials>, by_form: bool) -> TokenRequest {
        let mut url = self.realm.clone();
        let service = self.service.as_deref();
        let form = match credentials.map(|it| &it.0) {
            Some(Secret::IdentityToken(token)) => Some(vec![("grant_type", "refresh_token"), ("refresh_token", token)]),
            Some(Secret::Basic { user, password }) if by_form => {
                Some(vec![("grant_type", "password"), ("username", user), ("password", password)])
            }
            _ => None,
        };
        let common = [Some(("scope", scope)), service.map(|service| ("service", service))];
        if let Some(mut form) = form {
            form.push(("client_id", CLIENT));
            form.extend(common.into_iter().flatten());
            return TokenRequest { url, authorization: None, form: Some(query(&form)) };
        }
        let mut asked: Vec<(&str, &str)> = common.into_iter().flatten().collect();
        let mut authorization = None;
        if let Some(Secret::Basic { user, password }) = credentials.map(|it| &it.0) {
            asked.push(("account", user));
            authorization = Some(basic(user, password));
        }
        url.path.push(if url.path.contains('?') { '&' } else { '?' });
        url.path.push_str(&query(&asked));
        TokenRequest { url, authorization, form: None }
    }
}

fn query(pairs: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
    pairs.join("&")
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<f64>,
}

/// Reads the answer of a token service, which came just now.
///
/// # Errors
/// `Corrupt` for one without a token. It has nothing of the answer.
pub(super) fn token(answer: &[u8]) -> Result<Authorization> {
    let corrupt = |what: &str| Error::new(ErrorKind::Corrupt, what.to_owned());
    let answer: Answer = serde_json::from_slice(answer).map_err(|_| corrupt("its token service's answer is none"))?;
    let token = answer.token.filter(|token| !token.is_empty()).or(answer.access_token).unwrap_or_default();
    if token.is_empty() || token.len() > MAX_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(corrupt("its token service gave no token that a header can have"));
    }
    let life = answer
        .expires_in
        .filter(|seconds| *seconds > 0.0)
        .map_or(DEFAULT_LIFE, |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(MAX_LIFE).min(MAX_LIFE));
    let expires = Instant::now() + life.saturating_sub(MARGIN.min(life / 4));
    Ok(Authorization { value: format!("Bearer {token}"), expires: Some(expires) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(headers: &[&str]) -> Result<Demand> {
        let response = FetchResponse::new(401, std::io::empty());
        let response = headers.iter().fold(response, |all, header| all.header("WWW-Authenticate", *header));
        Demand::of(&response, &Url::parse("https://r.example/v2/a/manifests/b").unwrap())
    }

    fn service(header: &str) -> TokenService {
        match demand(&[header]) {
            Ok(Demand::Bearer(service)) => service,
            _ => panic!("no token service"),
        }
    }

    #[test]
    fn token_service_comes_before_basic() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="s""#;
        assert!(matches!(demand(&["Basic realm=x", bearer]), Ok(Demand::Bearer(_))));
        assert!(matches!(demand(&["Bearer error=x", "basic realm=x"]), Ok(Demand::Basic)));
        for (headers, what) in [(&["Negotiate"][..], "negotiate"), (&[], "does not say")] {
            let error = demand(headers).map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(what), "{error}");
        }
        assert!(demand(&[r#"Bearer realm="file:///x""#]).is_err());
    }

    #[test]
    fn token_services_are_asked_as_they_know_it() {
        let service = service(r#"Bearer realm="https://auth.example/token?x=1",service="a b""#);
        let anonymous = service.request("repository:a/b:pull", None, false);
        let asked = "https://auth.example/token?x=1&scope=repository%3Aa%2Fb%3Apull&service=a%20b";
        assert_eq!((anonymous.url.to_string().as_str(), anonymous.authorization, anonymous.form), (asked, None, None));
        let user = Credentials::basic("u", "p&q");
        let get = service.request("s", Some(&user), false);
        assert_eq!(get.url.path, "/token?x=1&scope=s&service=a%20b&account=u");
        assert_eq!((get.authorization.as_deref(), get.form), (Some("Basic dTpwJnE="), None));
        let post = service.request("s", Some(&user), true);
        let form = "grant_type=password&username=u&password=p%26q&client_id=cofferdam&scope=s&service=a%20b";
        assert_eq!((post.authorization, post.form.as_deref()), (None, Some(form)));
        let identity = service.request("s", Some(&Credentials::identity_token("t")), false);
        assert!(identity.form.unwrap().starts_with("grant_type=refresh_token&refresh_token=t&"));
        assert_eq!(identity.url.path, "/token?x=1");
    }

    #[test]
    fn tokens_hold_as_long_as_they_say() {
        let life = |answer: &str| token(answer.as_bytes()).unwrap().expires.unwrap().duration_since(Instant::now());
        let between = |life: Duration, low, high| (low..=high).contains(&life.as_secs_f64());
        assert!(between(life(r#"{"token":"t"}"#), 50.0, 55.0));
        assert!(between(life(r#"{"access_token":"t","expires_in":300}"#), 290.0, 295.0));
        assert!(between(life(r#"{"token":"t","expires_in":1}"#), 0.0, 0.75));
        assert!(between(life(r#"{"token":"t","expires_in":1e300}"#), 3500.0, 3595.0));
        assert!(between(life(r#"{"token":"t","expires_in":-1}"#), 50.0, 55.0));
        assert_eq!(token(br#"{"token":"","access_token":"t"}"#).unwrap().value, "Bearer t");
        for wrong in ["", "{}", r#"{"token":"a\r\nX: y"}"#, r#"{"token":"a b"}"#, r#"{"token":1}"#] {
            assert_eq!(token(wrong.as_bytes()).map(drop).unwrap_err().kind(), ErrorKind::Corrupt, "{wrong}");
        }
    }
}
