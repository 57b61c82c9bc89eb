//! [`Keyring`]: which credentials there are for a registry.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::credentials::Credentials;
use super::helper;
use super::login::{Login, Logins, known_name};
use crate::container::image::budget::PrepareDeadline;
use crate::error::{Context, Error, Result};

/// The embedder's own credentials for a registry.
pub(super) type CredentialsFn = dyn Fn(&str) -> io::Result<Option<Credentials>> + Send + Sync;

/// Credentials given by value, by callback, and those of the user's files, asked in this order.
#[derive(Clone)]
pub(super) struct Keyring {
    pub given: BTreeMap<String, Credentials>,
    pub callback: Option<Arc<CredentialsFn>>,
    pub user_files: bool,
    pub helpers: bool,
}

/// What was found, and where it was looked for, for errors.
#[derive(Default)]
pub(super) struct Found {
    pub credentials: Option<Credentials>,
    /// Where they come from, or what to do to have some.
    pub hint: String,
}

impl Keyring {
    /// # Errors
    /// What the callback, a file or a program fails with.
    pub fn find(&self, registry: &str, repository: &str, deadline: &PrepareDeadline) -> Result<Found> {
        let found = |credentials, hint: &str| Ok(Found { credentials: Some(credentials), hint: hint.into() });
        let none = |hint: String| Ok(Found { credentials: None, hint });
        if let Some(given) = self.given.get(&known_name(registry)) {
            return found(given.clone(), "those of `Registry::credentials`");
        }
        if let Some(callback) = &self.callback
            && let Some(given) = callback(registry).map_err(Error::from).doing(|| "Registry::credentials_with")?
        {
            return found(given, "those of `Registry::credentials_with`");
        }
        if !self.user_files {
            return none("give some by `Registry::credentials`".into());
        }
        let variable = |name: &str| std::env::var_os(name).map(|value: OsString| PathBuf::from(value));
        let logins = Logins::of_user(variable)?;
        match logins.find(registry, repository)? {
            Some(Login::Credentials(credentials)) => {
                found(credentials, &format!("those of {}", logins.path().display()))
            }
            Some(Login::Helper { program, server }) if self.helpers => {
                match helper::ask(&program, &server, deadline)? {
                    Some(credentials) => found(credentials, &format!("those of docker-credential-{program}")),
                    None => none(format!("docker-credential-{program} has none for it: log in")),
                }
            }
            Some(Login::Helper { program, .. }) => none(format!(
                "{} names the program docker-credential-{program}, which `Registry::credential_helpers` must allow",
                logins.path().display()
            )),
            None => none("log in with `docker login`, or give some by `Registry::credentials`".into()),
        }
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("given", &self.given).finish_non_exhaustive()
    }
}
