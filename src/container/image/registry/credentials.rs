//! [`Credentials`]: who asks a registry.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What a registry, or its token service, is given to say who asks. `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(pub(super) Secret);

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secret {
    Basic {
        user: String,
        password: String,
    },
    /// For a token service, which gives tokens for it (OAuth 2.0, refresh token).
    IdentityToken(String),
    /// For the registry itself.
    RegistryToken(String),
}

impl Credentials {
    /// Creates those of a user with a password, or an access token in its place.
    pub fn basic(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self(Secret::Basic { user: user.into(), password: password.into() })
    }

    /// Creates those of an identity token, as `docker login` gets it from some registries.
    pub fn identity_token(token: impl Into<String>) -> Self {
        Self(Secret::IdentityToken(token.into()))
    }

    /// Creates those of a token that the registry itself takes, as `Bearer`.
    pub fn registry_token(token: impl Into<String>) -> Self {
        Self(Secret::RegistryToken(token.into()))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// The value of `Authorization` for a user with a password (RFC 7617).
pub(super) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// A user and a password of one `auth` of a configuration file.
pub(super) fn decode(auth: &str) -> Option<(String, String)> {
    let bytes = STANDARD.decode(auth.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    // Docker cuts such bytes off.
    let (user, password) = text.trim_end_matches('\0').split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}
