//! [`Signatures`]: a registry as the place where signatures of images are found.

use super::login::known_name;
use super::session::Document;
use super::source::RegistrySource;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::oci::{Descriptor, Digest, Reference, read_document};
use crate::container::image::signature::{self, MAX_STATEMENT, SignaturePolicy, SignatureSource};
use crate::error::{Error, ErrorKind, Result};

struct Signatures<'a> {
    source: &'a RegistrySource<'a>,
    deadline: &'a PrepareDeadline,
}

/// Looks whether a policy admits what a reference leads to.
///
/// # Errors
/// `PermissionDenied` when it does not; what else looking fails with.
pub(super) fn admit(
    policy: &SignaturePolicy,
    reference: &Reference,
    root: &Descriptor,
    source: &RegistrySource<'_>,
    deadline: &PrepareDeadline,
) -> Result<()> {
    let name = format!("{}/{}", policy_name(reference.registry()), reference.repository());
    let manifest = read_document(source, root, deadline)?;
    signature::admit(policy, &name, &manifest.bytes, &root.digest, &Signatures { source, deadline })
}

/// One name of a registry for all that it may be called by, so that no other spelling evades a rule.
fn policy_name(registry: &str) -> String {
    let name = known_name(registry);
    let bare = name.strip_suffix(":443").or_else(|| name.strip_suffix(":80")).unwrap_or(&name);
    known_name(bare)
}

/// What is not there is none. All else is an error, so that no image is admitted by a registry that fails.
fn if_there(found: Result<Document>) -> Result<Option<Vec<u8>>> {
    match found {
        Ok(document) => Ok(Some(document.bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl SignatureSource for Signatures<'_> {
    fn tagged(&self, tag: &str) -> Result<Option<Vec<u8>>> {
        if_there(self.source.session.manifest(tag, None, self.deadline))
    }

    fn referrers(&self, image: &Digest) -> Result<Option<Vec<u8>>> {
        if_there(self.source.session.referrers(image, self.deadline))
    }

    fn fetch(&self, what: &Descriptor) -> Result<Vec<u8>> {
        if what.size > MAX_STATEMENT {
            let text =
                format!("{} has {} bytes: a signature has at most {} KiB", what.digest, what.size, MAX_STATEMENT >> 10);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(read_document(self.source, what, self.deadline)?.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_spellings_of_a_registry_have_the_same_rules() {
        for name in ["R.Example", "r.example:443", "R.example:80"] {
            assert_eq!(policy_name(name), "r.example");
        }
        for name in ["docker.io", "registry-1.docker.io:443", "INDEX.docker.io"] {
            assert_eq!(policy_name(name), "docker.io");
        }
        assert_eq!(policy_name("r.example:5000"), "r.example:5000");
    }
}
