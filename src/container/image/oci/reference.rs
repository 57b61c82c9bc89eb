//! [`Reference`]: an image's name at a registry, read as Docker reads it.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use super::Digest;
use crate::container::image::path::shown;
use crate::error::{Error, ErrorKind, Result};

/// The registry of names that have none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Another name of it, as older Dockers had it.
const OLD_REGISTRY: &str = "index.docker.io";
/// Where it has images that belong to no user.
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";

/// As long as a name of the domain name system, and as Docker has a repository and a tag.
const MAX_HOST: usize = 253;
const MAX_REPOSITORY: usize = 255;
const MAX_TAG: usize = 128;

/// The name of an image at a registry: `docker.io/library/debian:12`.
///
/// It is read as Docker reads it. The first part is a registry if it has a dot, a colon or an upper-case letter, or is `localhost`.
/// Otherwise the registry is `docker.io`, where a name of one part is below `library/`. The tag is `latest` unless a tag or a digest is
/// given. Where both are given, the digest decides.
///
/// It is displayed in full, and what is displayed is read as the same.
///
/// ```
/// use cofferdam::image::Reference;
///
/// let debian: Reference = "debian:12".parse()?;
/// assert_eq!(debian.to_string(), "docker.io/library/debian:12");
/// assert_eq!((debian.registry(), debian.repository(), debian.tag()), ("docker.io", "library/debian", Some("12")));
/// # Ok::<(), cofferdam::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: Box<str>,
    repository: Box<str>,
    tag: Option<Box<str>>,
    digest: Option<Digest>,
}

impl Reference {
    /// Returns the registry: a host, and a port where one was given.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the repository within the registry: `library/debian`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the tag. It is absent where only a digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest of the manifest, where one was given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

impl FromStr for Reference {
    type Err = Error;

    /// # Errors
    /// `InvalidConfig` says what is wrong with the name.
    fn from_str(text: &str) -> Result<Self> {
        parse(text).map_err(|problem| {
            let shown = shown(text.as_bytes());
            Error::new(ErrorKind::InvalidConfig, format!("{shown} is no name of an image: {problem}"))
        })
    }
}

fn parse(text: &str) -> std::result::Result<Reference, String> {
    if text.is_empty() {
        return Err("it is empty".into());
    }
    let scheme = ["http://", "https://", "docker://", "oci://"].into_iter().find(|scheme| text.starts_with(scheme));
    if let Some(scheme) = scheme {
        return Err(format!("leave out {scheme}"));
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>().map_err(|error| error.to_string())?)),
        None => (text, None),
    };
    // A colon before the last slash is that of a port.
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match name.get(last..).and_then(|part| part.find(':')) {
        Some(colon) => (name.get(..last + colon).unwrap_or_default(), name.get(last + colon + 1..)),
        None => (name, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((first, rest)) if is_registry(first) => (first, rest),
        _ => (DEFAULT_REGISTRY, name),
    };
    check_registry(registry)?;
    let registry = if registry == OLD_REGISTRY { DEFAULT_REGISTRY } else { registry };
    let official = registry == DEFAULT_REGISTRY && !path.contains('/');
    let repository = if official { format!("{DEFAULT_NAMESPACE}{path}") } else { path.to_owned() };
    check_repository(path, &repository)?;
    let tag = match (tag, &digest) {
        (None, None) => Some(DEFAULT_TAG),
        (tag, _) => tag,
    };
    Ok(Reference { registry: registry.into(), repository: repository.into(), tag: tag.map(Into::into), digest })
}

/// Whether the first part of a name is a registry's rather than a repository's.
fn is_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.contains(|c: char| c.is_uppercase())
}

fn check_registry(registry: &str) -> std::result::Result<(), String> {
    let wrong = |what: &str| Err(format!("registry {registry:?} {what}"));
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return wrong("has no closing bracket") };
            if address.parse::<Ipv6Addr>().is_err() {
                return wrong("has no IPv6 address in its brackets");
            }
            match (port.is_empty(), port.strip_prefix(':')) {
                (true, _) => ("ipv6", None),
                (false, Some(port)) => ("ipv6", Some(port)),
                (false, None) => return wrong("has something behind its bracket that is no port"),
            }
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, None),
        },
    };
    if host.len() > MAX_HOST {
        return Err(format!("the name of its registry is longer than {MAX_HOST} bytes"));
    }
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if !host.split('.').all(part) {
        return wrong("is no host: letters, digits and hyphens in parts that dots separate");
    }
    let number = |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|n| n > 0);
    if port.is_some_and(|port| !number(port)) {
        return wrong("has a port that is no number from 1 to 65535");
    }
    Ok(())
}

fn check_repository(given: &str, repository: &str) -> std::result::Result<(), String> {
    if given.is_empty() {
        return Err("it names no repository".into());
    }
    if repository.len() > MAX_REPOSITORY {
        return Err(format!("its repository is longer than {MAX_REPOSITORY} bytes"));
    }
    if repository.contains(|c: char| c.is_uppercase()) {
        return Err(format!("repository {given:?} has upper-case letters, which repositories have not"));
    }
    if let Some(wrong) = repository.split('/').find(|part| !is_repository_part(part)) {
        return Err(format!(
            "{wrong:?} in its repository: each part has lower-case letters and digits, separated by a dot, one or two underscores, \
             or hyphens"
        ));
    }
    // Docker takes such for an image's identity.
    if given.len() == 64 && given.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("64 hexadecimal digits are no repository".into());
    }
    Ok(())
}

fn is_repository_part(part: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut separators = part.split(|c: char| c.is_ascii() && word(c as u8)).filter(|between| !between.is_empty());
    let known = |between: &str| matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-');
    separators.all(known) && part.bytes().next().is_some_and(word) && part.bytes().next_back().is_some_and(word)
}

fn check_tag(tag: &str) -> std::result::Result<(), String> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    if tag.len() > MAX_TAG {
        return Err(format!("its tag is longer than {MAX_TAG} bytes"));
    }
    if !tag.bytes().next().is_some_and(word) || !tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-')) {
        return Err(format!(
            "tag {tag:?} is none: letters, digits, underscores, dots and hyphens, with no dot or hyphen first"
        ));
    }
    Ok(())
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Any text is a name that is displayed and read as the same, or an error.
#[cfg(any(test, feature = "internals"))]
pub(crate) fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(reference) = text.parse::<Reference>() else { return };
    let shown = reference.to_string();
    assert!(shown.parse::<Reference>().is_ok_and(|again| again == reference), "{text:?} is displayed as {shown:?}");
    assert!(reference.tag().is_some() || reference.digest().is_some());
    assert!(!shown.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#' | '%' | '\\')));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHA: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed_as_docker_does() {
        let cases = [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/me/app", "docker.io/me/app:latest"),
            ("me/app:v1.0_x-y", "docker.io/me/app:v1.0_x-y"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            // Without a slash it is a tag, as Docker has it.
            ("localhost:5000", "docker.io/library/localhost:5000"),
            ("host:5000/a/b/c:t", "host:5000/a/b/c:t"),
            ("ghcr.io/org/app", "ghcr.io/org/app:latest"),
            ("HOST/app", "HOST/app:latest"),
            ("Registry.Example/app", "Registry.Example/app:latest"),
            ("[::1]:5000/app:1", "[::1]:5000/app:1"),
            ("[2001:db8::1]/app", "[2001:db8::1]/app:latest"),
            ("127.0.0.1:1/a__b/c.d/e---f", "127.0.0.1:1/a__b/c.d/e---f:latest"),
            ("a:A_9.-", "docker.io/library/a:A_9.-"),
        ];
        for (text, full) in cases {
            let reference: Reference = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(reference.to_string(), full, "{text}");
        }
    }

    #[test]
    fn digest_needs_no_tag_and_both_are_kept() {
        let only: Reference = format!("debian@{SHA}").parse().unwrap();
        assert_eq!((only.tag(), only.digest().map(Digest::to_string)), (None, Some(SHA.into())));
        assert_eq!(only.to_string(), format!("docker.io/library/debian@{SHA}"));
        let both: Reference = format!("r.example/debian:12@{SHA}").parse().unwrap();
        assert_eq!((both.registry(), both.repository(), both.tag()), ("r.example", "debian", Some("12")));
        assert_eq!(both.to_string(), format!("r.example/debian:12@{SHA}"));
    }

    #[test]
    fn invalid_names_say_why() {
        let long_part = format!("host.example/{}", "a".repeat(256));
        let long_official = "a".repeat(248);
        let long_tag = format!("a:{}", "t".repeat(129));
        let long_host = format!("{}.example/a", "h".repeat(250));
        let identity = "0123456789abcdef".repeat(4);
        let cases = [
            ("", "empty"),
            ("https://docker.io/debian", "leave out https://"),
            ("Debian", "upper-case"),
            ("me/App", "upper-case"),
            ("host.example/", "no repository"),
            ("/debian", "\"\" in its repository"),
            ("host.example//a", "\"\" in its repository"),
            ("a/../b", "\"..\" in its repository"),
            ("a..b", "\"a..b\""),
            ("a___b", "\"a___b\""),
            ("a._b", "\"a._b\""),
            ("-a", "\"-a\""),
            ("a-", "\"a-\""),
            ("a b", "\"a b\""),
            ("a\n", "a\\n"),
            ("ä", "\"ä\""),
            ("a%2f", "a%2f"),
            ("a?x=y", "a?x=y"),
            ("a:", "tag \"\""),
            ("a:.x", "tag \".x\""),
            ("a:-x", "tag \"-x\""),
            ("a:b:c", "tag \"b:c\""),
            ("a:ü", "tag"),
            ("a@", "no digest"),
            ("a@sha256:12", "no digest"),
            ("a@md5:00", "no digest"),
            ("@", "no digest"),
            ("host:0/a", "port"),
            ("host:65536/a", "port"),
            ("host:/a", "port"),
            ("host:+1/a", "port"),
            ("host:80x/a", "port"),
            ("ho_st.example/a", "no host"),
            ("-h.example/a", "no host"),
            ("h-.example/a", "no host"),
            ("h..example/a", "no host"),
            ("h.example./a", "no host"),
            ("user@host.example/a", "no digest"),
            ("[::1/a", "bracket"),
            ("[::g]/a", "IPv6"),
            ("[::1]x/a", "bracket"),
            ("[::1]:99999/a", "port"),
            (&long_part, "longer than 255"),
            (&long_official, "longer than 255"),
            (&long_tag, "longer than 128"),
            (&long_host, "longer than 253"),
            (&identity, "64 hexadecimal digits"),
        ];
        for (text, why) in cases {
            let error = text.parse::<Reference>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().contains(why), "{text:?}: {error}");
            assert!(error.to_string().len() < 1000, "{error}");
        }
    }

    proptest! {
        #[test]
        fn displayed_name_is_read_as_the_same(
            registry in "(localhost|[a-z0-9]{1,9}(-[a-z0-9]{1,3})?\\.[A-Za-z]{2,5}|HOST|\\[::1\\])(:[1-9][0-9]{0,3})?",
            parts in prop::collection::vec("[a-z0-9]{1,5}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", 1..4),
            tag in prop::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in any::<bool>(),
        ) {
            let tag = tag.map(|tag| format!(":{tag}")).unwrap_or_default();
            let text = format!("{registry}/{}{tag}{}", parts.join("/"), if digest { format!("@{SHA}") } else { String::new() });
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(reference.registry(), &registry);
            let repository = parts.join("/");
            prop_assert_eq!(reference.repository(), &repository);
            fuzz(text.as_bytes());
        }

        #[test]
        fn any_text_is_a_name_or_an_error(text in "[a-zA-Z0-9@:/._\\-\\[\\] ]{0,40}", any in ".{0,20}") {
            fuzz(text.as_bytes());
            fuzz(any.as_bytes());
        }
    }
}
