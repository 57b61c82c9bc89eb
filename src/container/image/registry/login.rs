//! [`Logins`]: the credentials that the user's own files have, as `docker login` and `podman login` write them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::credentials::{Credentials, Secret, decode};
use crate::error::{Context, Error, ErrorKind, Result};

/// A larger file is refused.
const MAX_FILE: u64 = 1 << 20;

/// Names of Docker Hub, any of which its credentials may be kept by.
const HUB: [&str; 4] = ["docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"];

/// The name that credentials for a registry are given by: one for all names of Docker Hub.
pub(super) fn known_name(registry: &str) -> String {
    let name = registry.to_ascii_lowercase();
    if HUB.contains(&name.as_str()) { "docker.io".into() } else { name }
}

/// What a file says of one registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Login {
    Credentials(Credentials),
    /// A program has them: `docker-credential-` and this name, asked for this server.
    Helper {
        program: String,
        server: String,
    },
}

/// A file of credentials, checked but for what it says of single registries.
#[derive(Default)]
pub(super) struct Logins {
    file: ConfigFile,
    path: PathBuf,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl Logins {
    /// Reads the file that the environment names, or else Docker's own where there is one.
    ///
    /// # Errors
    /// What opening fails with, for any reason but that Docker's own is not there. `Corrupt` for one that cannot be read. No error has
    /// content of the file.
    pub fn of_user(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|path| !path.as_os_str().is_empty());
        if let Some(path) = set("REGISTRY_AUTH_FILE") {
            return Self::open(&path).doing(|| format!("REGISTRY_AUTH_FILE: {}", path.display()));
        }
        let folder = set("DOCKER_CONFIG").or_else(|| set("HOME").map(|home| home.join(".docker")));
        let Some(path) = folder.map(|folder| folder.join("config.json")) else { return Ok(Self::default()) };
        match Self::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            found => found.doing(|| format!("credentials in {}", path.display())),
        }
    }

    fn open(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(Error::new(ErrorKind::Corrupt, "it has more than 1 MiB"));
        }
        Ok(Self { file: parse(&bytes)?, path: path.to_path_buf() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says of a repository: the most exact entry, as in `containers-auth.json`.
    ///
    /// # Errors
    /// `Corrupt` for credentials that cannot be read.
    pub fn find(&self, registry: &str, repository: &str) -> Result<Option<Login>> {
        let registry = registry.to_ascii_lowercase();
        let aliases: Vec<&str> = if HUB.contains(&registry.as_str()) { HUB.to_vec() } else { vec![&registry] };
        if let Some((server, program)) =
            self.file.cred_helpers.iter().find(|(key, _)| aliases.contains(&host_of(key).as_str()))
        {
            return Ok(Some(Login::Helper { program: program.clone(), server: server.clone() }));
        }
        let mut repository = Some(repository);
        while let Some(path) = repository {
            let fits =
                |key: &str| key.split_once('/').is_some_and(|(host, rest)| aliases.contains(&host) && rest == path);
            if let Some(login) = self.auth(fits)? {
                return Ok(Some(login));
            }
            repository = path.rsplit_once('/').map(|(shorter, _)| shorter);
        }
        if let Some(login) = self.auth(|key| aliases.contains(&host_of(key).as_str()))? {
            return Ok(Some(login));
        }
        let Some(program) = self.file.creds_store.clone().filter(|program| !program.is_empty()) else {
            return Ok(None);
        };
        let hub = aliases.len() > 1;
        let server = if hub { "https://index.docker.io/v1/".to_owned() } else { registry.clone() };
        Ok(Some(Login::Helper { program, server }))
    }

    fn auth(&self, fits: impl Fn(&str) -> bool) -> Result<Option<Login>> {
        for (key, auth) in self.file.auths.iter().filter(|(key, _)| fits(key)) {
            let found = auth.credentials().map_err(|()| {
                let what = format!("the credentials for {key:?} cannot be read: log in again");
                Error::new(ErrorKind::Corrupt, what).doing(format!("{}", self.path.display()))
            })?;
            if let Some(credentials) = found {
                return Ok(Some(Login::Credentials(credentials)));
            }
        }
        Ok(None)
    }
}

impl Auth {
    /// Those of an entry. Where a program has them, it is empty.
    fn credentials(&self) -> std::result::Result<Option<Credentials>, ()> {
        let set = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credentials::identity_token(token)));
        }
        if let Some(token) = set(&self.registrytoken) {
            return Ok(Some(Credentials::registry_token(token)));
        }
        let (user, password) = match (set(&self.auth), set(&self.username), set(&self.password)) {
            (Some(auth), ..) => decode(&auth).ok_or(())?,
            (None, Some(user), Some(password)) => (user, password),
            _ => return Ok(None),
        };
        Ok(Some(of_user(user, password)))
    }
}

/// A user of this name has an identity token for a password, as Docker's helpers have it.
pub(super) fn of_user(user: String, password: String) -> Credentials {
    match user.as_str() {
        "<token>" => Credentials(Secret::IdentityToken(password)),
        _ => Credentials(Secret::Basic { user, password }),
    }
}

fn parse(bytes: &[u8]) -> Result<ConfigFile> {
    // What the parser says may have content in it.
    serde_json::from_slice(bytes).map_err(|error| {
        let what = format!("it is no file of credentials: line {}, column {}", error.line(), error.column());
        Error::new(ErrorKind::Corrupt, what)
    })
}

/// The host of a key, which may be an address: `https://index.docker.io/v1/`.
fn host_of(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    match bare {
        Some(rest) => rest.split('/').next().unwrap_or_default().to_ascii_lowercase(),
        None => key.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2").to_ascii_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(json: &str, registry: &str, repository: &str) -> Option<Login> {
        let logins = Logins { file: parse(json.as_bytes()).unwrap(), path: "f".into() };
        logins.find(registry, repository).unwrap()
    }

    fn basic(user: &str, password: &str) -> Option<Login> {
        Some(Login::Credentials(Credentials::basic(user, password)))
    }

    #[test]
    fn hub_has_its_aliases() {
        // u:p
        for key in ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "https://registry-1.docker.io"] {
            let json = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpw"}},"ghcr.io":{{}}}}}}"#);
            assert!(found(&json, "docker.io", "library/debian") == basic("u", "p"), "{key}");
            assert!(found(&json, "ghcr.io", "a").is_none());
            assert!(found(&json, "example.org", "a").is_none());
        }
    }

    #[test]
    fn most_exact_key_counts() {
        let json = r#"{"auths":{"R.example:5000":{"username":"all","password":"1"},"r.example:5000/team":{"username":"team","password":"2"},
            "r.example:5000/team/app":{"username":"app","password":"3"}}}"#;
        let user = |repository| found(json, "r.example:5000", repository);
        assert!(user("other") == basic("all", "1"));
        assert!(user("team/tool") == basic("team", "2") && user("team/app") == basic("app", "3"));
        assert!(user("team/app/part") == basic("app", "3") && user("teams") == basic("all", "1"));
        assert!(found(json, "r.example", "team").is_none());
    }

    #[test]
    fn tokens_and_helpers_are_found() {
        let json = r#"{"auths":{"a":{"identitytoken":"i","auth":"dTpw"},"b":{"registrytoken":"r"},"c":{"username":"<token>","password":"i"}},
            "credHelpers":{"d":"pass"},"credsStore":"secretservice"}"#;
        let is = |registry, credentials| found(json, registry, "x") == Some(Login::Credentials(credentials));
        assert!(is("a", Credentials::identity_token("i")) && is("b", Credentials::registry_token("r")));
        assert!(is("c", Credentials::identity_token("i")));
        let helper =
            |program: &str, server: &str| Some(Login::Helper { program: program.into(), server: server.into() });
        assert!(found(json, "d", "x") == helper("pass", "d"));
        assert!(found(json, "docker.io", "x") == helper("secretservice", "https://index.docker.io/v1/"));
    }

    #[test]
    fn no_error_has_content_of_the_file() {
        let dir = std::env::temp_dir().join(format!("cofferdam-logins-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("config.json");
        let open = |variable: &'static str, to: &Path| {
            let to = to.to_path_buf();
            Logins::of_user(move |name| (name == variable).then(|| to.clone()))
        };
        assert!(open("DOCKER_CONFIG", &dir).unwrap().find("docker.io", "x").unwrap().is_none());
        assert_eq!(open("REGISTRY_AUTH_FILE", &file).map(drop).unwrap_err().kind(), ErrorKind::NotFound);
        for content in [r#"{"auths":"hunter2"}"#, "hunter2", r#"{"auths":{"docker.io":{"auth":["hunter2"]}}}"#] {
            std::fs::write(&file, content).unwrap();
            let error = open("REGISTRY_AUTH_FILE", &file).map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::Corrupt && !error.to_string().contains("hunter2"), "{error}");
            assert!(error.to_string().contains("config.json"), "{error}");
        }
        std::fs::write(&file, r#"{"auths":{"docker.io":{"auth":"hunter2!"}}}"#).unwrap();
        let error = open("DOCKER_CONFIG", &dir).unwrap().find("docker.io", "x").map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && !error.to_string().contains("hunter2"), "{error}");
        // One that no user can read.
        let error = open("REGISTRY_AUTH_FILE", &dir).map(drop).unwrap_err();
        assert!(error.to_string().contains("REGISTRY_AUTH_FILE: ") && error.os_error().is_some(), "{error}");
        std::fs::write(&file, vec![b' '; (MAX_FILE + 1) as usize]).unwrap();
        assert!(open("DOCKER_CONFIG", &dir).map(drop).unwrap_err().to_string().contains("1 MiB"));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
