//! [`SignaturePolicy`]: which images are admitted, by whose signatures.

use super::PublicKey;
#[cfg(feature = "keyless")]
use super::keyless::{CertificateIdentity, Signers, TrustRoot};
use crate::error::{Error, Result};

/// Says for each registry and repository which images may be pulled.
///
/// The rule with the longest prefix counts. A prefix is whole parts of a name: `registry.example/team` is for
/// `registry.example/team/app`, and not for `registry.example/teams`.
///
/// A signature is for a manifest, wherever that lies. So a registry can serve any image of the key under any name that asks for the
/// key. That may be another one of the team's, or an old one. Pull by digest, or have a key for each repository, where that matters.
/// The name that a signature gives its image, `docker-reference`, is not compared: mirrors have other names, and cosign does not compare it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignaturePolicy {
    /// For names that no prefix is for.
    otherwise: Rule,
    rules: Vec<(String, Rule)>,
}

/// What is asked of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rule {
    Accept,
    Refuse,
    /// A signature by one of these.
    Require(Vec<PublicKey>),
    /// A signature by one whose certificate names one of these.
    #[cfg(feature = "keyless")]
    RequireIdentity(Signers),
}

impl SignaturePolicy {
    /// Returns a policy that admits every image, but for prefixes that say otherwise.
    pub fn accept_all() -> Self {
        Self { otherwise: Rule::Accept, rules: Vec::new() }
    }

    /// Returns a policy that admits no image, but for prefixes that say otherwise.
    pub fn refuse_all() -> Self {
        Self { otherwise: Rule::Refuse, rules: Vec::new() }
    }

    /// Admits images whose name begins with `prefix`, such as `docker.io/library`.
    pub fn accept(self, prefix: &str) -> Self {
        self.rule(prefix, Rule::Accept)
    }

    /// Refuses images whose name begins with `prefix`.
    pub fn refuse(self, prefix: &str) -> Self {
        self.rule(prefix, Rule::Refuse)
    }

    /// Admits images whose name begins with `prefix` when one of `keys` has signed them.
    ///
    /// Without a key none is admitted.
    pub fn require(self, prefix: &str, keys: impl IntoIterator<Item = PublicKey>) -> Self {
        self.rule(prefix, Rule::Require(keys.into_iter().collect()))
    }

    /// Admits images whose name begins with `prefix` when one of `identities` has signed them.
    ///
    /// Such a signer has no lasting key. Its certificate, and the log that has the signature, must be those of `root`. What is verified is
    /// listed in the guide. Without an identity none is admitted.
    #[cfg(feature = "keyless")]
    pub fn require_identity(
        self,
        prefix: &str,
        root: &TrustRoot,
        identities: impl IntoIterator<Item = CertificateIdentity>,
    ) -> Self {
        let signers = Signers { root: root.clone(), identities: identities.into_iter().collect() };
        self.rule(prefix, Rule::RequireIdentity(signers))
    }

    /// The later of two rules for one prefix counts.
    fn rule(mut self, prefix: &str, rule: Rule) -> Self {
        let prefix = canonical(prefix.trim_end_matches('/'));
        // What Docker calls `debian` is `library/debian`, and is meant by either.
        let short = prefix.strip_prefix("docker.io/").filter(|path| !path.contains('/') && *path != "library");
        let official = short.map(|path| format!("docker.io/library/{path}"));
        for prefix in [Some(prefix), official].into_iter().flatten() {
            self.rules.retain(|(known, _)| *known != prefix);
            self.rules.push((prefix, rule.clone()));
        }
        self
    }

    /// What is asked of images of this name, without tag and digest.
    pub(super) fn of(&self, name: &str) -> &Rule {
        let name = canonical(name);
        let fits =
            |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let longest = self.rules.iter().filter(|(prefix, _)| fits(prefix)).max_by_key(|(prefix, _)| prefix.len());
        longest.map_or(&self.otherwise, |(_, rule)| rule)
    }

    /// # Errors
    /// `InvalidConfig` for a prefix that no name begins with, and for an identity that none has.
    pub(super) fn check(&self) -> Result<()> {
        #[cfg(feature = "keyless")]
        for (_, rule) in &self.rules {
            if let Rule::RequireIdentity(signers) = rule {
                signers.identities.iter().try_for_each(CertificateIdentity::check)?;
            }
        }
        for (prefix, _) in &self.rules {
            let host = prefix.split('/').next().unwrap_or_default();
            let is_host = host.contains(['.', ':']) || host == "localhost";
            // A tag or a digest is no part of what rules are for.
            let is_more = prefix.contains(['@', ' ']) || prefix.split('/').skip(1).any(|part| part.contains(':'));
            if !is_host || is_more || prefix.split('/').any(str::is_empty) {
                let what = format!(
                    "{prefix:?} is no beginning of a name: registry.example/repository, or docker.io/library/debian"
                );
                return Err(Error::invalid("SignaturePolicy", what));
            }
        }
        Ok(())
    }
}

/// The names by which Docker Hub is known.
const HUB: [&str; 4] = ["docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"];

/// One spelling for all of a name: no other one evades a rule, and no rule is for none.
fn canonical(name: &str) -> String {
    let (host, path) = name.split_at(name.find('/').unwrap_or(name.len()));
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix(":443").or_else(|| host.strip_suffix(":80")).unwrap_or(&host);
    let host = if HUB.contains(&host) { "docker.io" } else { host };
    format!("{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_spellings_of_a_name_have_the_same_rule() {
        let registries = ["r.example", "R.Example", "r.example:443", "R.example:80"];
        let hubs = ["docker.io", "registry-1.docker.io:443", "INDEX.docker.io"];
        for (names, path) in [(&registries[..], "team/app"), (&hubs, "library/debian"), (&hubs, "user/app")] {
            for rule in names {
                let policy = SignaturePolicy::accept_all().refuse(&format!("{rule}/{path}"));
                assert!(policy.check().is_ok());
                for name in names {
                    assert_eq!(policy.of(&format!("{name}/{path}")), &Rule::Refuse, "{rule} {name}");
                    assert_eq!(policy.of(&format!("{name}/{path}s")), &Rule::Accept, "{rule} {name}");
                }
            }
        }
        let official = SignaturePolicy::accept_all().accept("docker.io/library").refuse("docker.io/debian");
        assert_eq!(official.of("docker.io/library/debian"), &Rule::Refuse);
        assert_eq!(official.of("docker.io/debian/app"), &Rule::Refuse);
        assert_eq!(official.of("docker.io/library/nginx"), &Rule::Accept);
        assert_eq!(official.of("r.example:5000/x"), &Rule::Accept);
    }

    #[test]
    fn rule_with_the_longest_prefix_counts() {
        let policy = SignaturePolicy::refuse_all()
            .accept("docker.io/library")
            .require("docker.io/library/debian", [])
            .refuse("docker.io/library/debian/old/")
            .accept("Registry.Example:5000");
        let of = |name: &str| policy.of(name).clone();
        assert_eq!(of("docker.io/library/nginx"), Rule::Accept);
        assert_eq!(of("docker.io/library"), Rule::Accept);
        assert_eq!(of("docker.io/libraryx/nginx"), Rule::Refuse);
        assert_eq!(of("docker.io/library/debian"), Rule::Require(Vec::new()));
        assert_eq!(of("docker.io/library/debian/slim"), Rule::Require(Vec::new()));
        assert_eq!(of("docker.io/library/debian/old/x"), Rule::Refuse);
        assert_eq!(of("registry.example:5000/a/b"), Rule::Accept);
        assert_eq!(of("registry.example/a/b"), Rule::Refuse);
        assert_eq!(SignaturePolicy::accept_all().of("x/y"), &Rule::Accept);
        // The later one of the same prefix.
        assert_eq!(policy.clone().refuse("docker.io/library").of("docker.io/library/nginx"), &Rule::Refuse);
        assert!(policy.check().is_ok());
    }

    #[test]
    fn prefixes_that_fit_no_name_are_refused() {
        for prefix in [
            "registry.example/app:1",
            "",
            "debian",
            "library/debian",
            "a b/c",
            "registry.example//x",
            "registry.example/x@sha256:0",
        ] {
            let policy = SignaturePolicy::accept_all().accept(prefix);
            assert_eq!(policy.check().unwrap_err().kind(), crate::ErrorKind::InvalidConfig, "{prefix:?}");
        }
    }
}
