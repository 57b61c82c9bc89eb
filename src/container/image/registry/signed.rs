//! [`Signatures`]: a registry as the place where signatures of images are found.

use super::session::Document;
use super::source::RegistrySource;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::oci::{Descriptor, Digest, Reference, read_document};
use crate::container::image::signature::{self, SignaturePolicy, SignatureSource};
use crate::error::{ErrorKind, Result};

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
    let name = format!("{}/{}", reference.registry(), reference.repository());
    let manifest = read_document(source, root, deadline)?;
    signature::admit(policy, &name, &manifest.bytes, &root.digest, &Signatures { source, deadline })
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
        Ok(read_document(self.source, what, self.deadline)?.bytes)
    }
}
