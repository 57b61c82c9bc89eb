//! [`CertificateIdentity`]: by whom images are admitted whose signers have certificates and no lasting keys.

use std::fmt;

use sigstore_verify::SubjectAltName;

use crate::container::image::path::shown;
use crate::error::{Error, Result};

/// A signer as its certificate names it: a person or a workflow, and the issuer.
///
/// The issuer is the OpenID Connect provider that has identified the signer. An identity says nothing without its issuer. So both are compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateIdentity {
    name: IdentityPattern,
    issuer: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum IdentityPattern {
    Exact(String),
    UriPrefix(String),
    EmailDomain(String),
}

/// What a verified certificate says.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Signer {
    name: SignerName,
    issuer: String,
}

#[derive(Debug, PartialEq, Eq)]
enum SignerName {
    Email(String),
    Uri(String),
}

impl CertificateIdentity {
    /// Returns the identity of exactly this name, as `cosign verify --certificate-identity` takes it.
    ///
    /// A person's name is an e-mail address, a workflow's a URI. `issuer` is the URL of the OpenID Connect provider, such as
    /// `https://token.actions.githubusercontent.com`.
    pub fn new(identity: &str, issuer: &str) -> Self {
        Self { name: IdentityPattern::Exact(identity.to_owned()), issuer: issuer.to_owned() }
    }

    /// Returns the identities whose URI begins so: the workflows of a repository, for instance.
    ///
    /// The prefix ends with `/` or `@`, so that it is whole parts: `https://github.com/acme/app/` is not for
    /// `https://github.com/acme/app-of-others/`. All branches and tags of the repository are meant, and requests by others may run workflows there.
    pub fn uri_prefix(prefix: &str, issuer: &str) -> Self {
        Self { name: IdentityPattern::UriPrefix(prefix.to_owned()), issuer: issuer.to_owned() }
    }

    /// Returns the identities of all e-mail addresses of a domain.
    ///
    /// Domains below it are others.
    pub fn email_domain(domain: &str, issuer: &str) -> Self {
        Self { name: IdentityPattern::EmailDomain(domain.to_owned()), issuer: issuer.to_owned() }
    }

    /// # Errors
    /// `InvalidConfig` for one that no signer has, and for one of more than it seems.
    pub(in super::super) fn check(&self) -> Result<()> {
        let invalid = |what: &str| Err(Error::invalid("SignaturePolicy::require_identity", format!("{self}: {what}")));
        match &self.name {
            _ if self.issuer.is_empty() => invalid("without an issuer"),
            IdentityPattern::Exact(name) if name.is_empty() => invalid("without a name"),
            IdentityPattern::UriPrefix(prefix)
                if !prefix.ends_with(['/', '@']) || !prefix.contains("://") || prefix.ends_with("://") =>
            {
                invalid("a prefix of URIs has a scheme and a host, and ends with / or @")
            }
            IdentityPattern::EmailDomain(domain) if domain.is_empty() || domain.contains('@') => {
                invalid("a domain is what follows the @")
            }
            _ => Ok(()),
        }
    }

    pub(in super::super) fn is_of(&self, signer: &Signer) -> bool {
        let name = match (&self.name, &signer.name) {
            (IdentityPattern::Exact(expected), SignerName::Email(found) | SignerName::Uri(found)) => expected == found,
            (IdentityPattern::UriPrefix(prefix), SignerName::Uri(found)) => found.starts_with(prefix),
            (IdentityPattern::EmailDomain(domain), SignerName::Email(found)) => {
                found.rsplit_once('@').is_some_and(|(_, found)| found.eq_ignore_ascii_case(domain))
            }
            _ => false,
        };
        name && self.issuer == signer.issuer
    }
}

impl fmt::Display for CertificateIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            IdentityPattern::Exact(name) => write!(f, "{name:?}")?,
            IdentityPattern::UriPrefix(prefix) => write!(f, "URIs that begin with {prefix:?}")?,
            IdentityPattern::EmailDomain(domain) => write!(f, "e-mail addresses of {domain:?}")?,
        }
        write!(f, " of the issuer {:?}", self.issuer)
    }
}

impl Signer {
    /// None for a certificate that lacks one of the two.
    pub(super) fn new(name: Option<&SubjectAltName>, issuer: Option<&str>) -> Option<Self> {
        let name = match name? {
            SubjectAltName::Email(email) => SignerName::Email(email.clone()),
            SubjectAltName::Uri(uri) => SignerName::Uri(uri.clone()),
            _ => return None,
        };
        Some(Self { name, issuer: issuer?.to_owned() })
    }
}

impl fmt::Display for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (SignerName::Email(name) | SignerName::Uri(name)) = &self.name;
        write!(f, "{} of the issuer {}", shown(name.as_bytes()), shown(self.issuer.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISSUER: &str = "https://issuer.example";

    fn signer(name: &str) -> Signer {
        let name = match name.contains("://") {
            true => SubjectAltName::Uri(name.into()),
            false => SubjectAltName::Email(name.into()),
        };
        Signer::new(Some(&name), Some(ISSUER)).unwrap()
    }

    #[test]
    fn identities_fit_their_signers_alone() {
        let exact = CertificateIdentity::new("dev@team.example", ISSUER);
        let prefix = CertificateIdentity::uri_prefix("https://git.example/team/app/", ISSUER);
        let domain = CertificateIdentity::email_domain("team.example", ISSUER);
        for (name, fits) in [
            ("dev@team.example", [true, false, true]),
            ("ops@Team.Example", [false, false, true]),
            ("dev@sub.team.example", [false; 3]),
            ("dev@evilteam.example", [false; 3]),
            ("dev@team.example@other.example", [false; 3]),
            ("Dev@team.example", [false, false, true]),
            ("https://git.example/team/app/ci.yml@refs/heads/main", [false, true, false]),
            ("https://git.example/team/app", [false; 3]),
            ("https://git.example/team/app-of-others/ci.yml", [false; 3]),
            ("https://other.example/?https://git.example/team/app/", [false; 3]),
            ("https://git.example/x@team.example", [false; 3]),
        ] {
            assert_eq!([&exact, &prefix, &domain].map(|it| it.is_of(&signer(name))), fits, "{name}");
        }
        let other = CertificateIdentity::new("dev@team.example", "https://issuer.example/");
        assert!(!other.is_of(&signer("dev@team.example")));
        let name = SubjectAltName::Email("dev@team.example".into());
        assert_eq!(Signer::new(Some(&name), None), None);
        assert_eq!(Signer::new(None, Some(ISSUER)), None);
    }

    #[test]
    fn identities_of_too_many_are_refused() {
        for identity in [
            CertificateIdentity::new("dev@team.example", ""),
            CertificateIdentity::new("", ISSUER),
            CertificateIdentity::uri_prefix("", ISSUER),
            CertificateIdentity::uri_prefix("https://git.example/team", ISSUER),
            CertificateIdentity::uri_prefix("https://", ISSUER),
            CertificateIdentity::uri_prefix("git.example/", ISSUER),
            CertificateIdentity::email_domain("", ISSUER),
            CertificateIdentity::email_domain("@team.example", ISSUER),
        ] {
            assert_eq!(identity.check().unwrap_err().kind(), crate::ErrorKind::InvalidConfig, "{identity}");
        }
        assert!(CertificateIdentity::uri_prefix("https://git.example/team/app/ci.yml@", ISSUER).check().is_ok());
    }
}
