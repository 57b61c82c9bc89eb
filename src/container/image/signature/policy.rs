//! [`SignaturePolicy`]: which images are admitted, by whose signatures.

use super::PublicKey;
use crate::error::{Error, Result};

/// Says for each registry and repository which images may be pulled.
///
/// The rule with the longest prefix counts. A prefix is whole parts of a name: `registry.example/team` is for
/// `registry.example/team/app`, and not for `registry.example/teams`.
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

    /// The later of two rules for one prefix counts.
    fn rule(mut self, prefix: &str, rule: Rule) -> Self {
        // Names of hosts are the same in capitals.
        let prefix = prefix.trim_end_matches('/');
        let (host, path) = prefix.split_at(prefix.find('/').unwrap_or(prefix.len()));
        let prefix = format!("{}{path}", host.to_ascii_lowercase());
        self.rules.retain(|(known, _)| *known != prefix);
        self.rules.push((prefix, rule));
        self
    }

    /// What is asked of images of this name, without tag and digest.
    pub(super) fn of(&self, name: &str) -> &Rule {
        let fits =
            |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let longest = self.rules.iter().filter(|(prefix, _)| fits(prefix)).max_by_key(|(prefix, _)| prefix.len());
        longest.map_or(&self.otherwise, |(_, rule)| rule)
    }

    /// # Errors
    /// `InvalidConfig` for a prefix that no name begins with.
    pub(super) fn check(&self) -> Result<()> {
        for (prefix, _) in &self.rules {
            let host = prefix.split('/').next().unwrap_or_default();
            let is_host = host.contains(['.', ':']) || host == "localhost";
            if !is_host || prefix.contains(['@', ' ']) || prefix.split('/').any(str::is_empty) {
                let what = format!(
                    "{prefix:?} is no beginning of a name: registry.example/repository, or docker.io/library/debian"
                );
                return Err(Error::invalid("SignaturePolicy", what));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for prefix in ["", "debian", "library/debian", "a b/c", "registry.example//x", "registry.example/x@sha256:0"] {
            let policy = SignaturePolicy::accept_all().accept(prefix);
            assert_eq!(policy.check().unwrap_err().kind(), crate::ErrorKind::InvalidConfig, "{prefix:?}");
        }
    }
}
