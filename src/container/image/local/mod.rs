//! Images in layers on this host.
//!
//! They are OCI image layouts, and what `docker save` writes, each as a directory or an archive.

mod docker;
mod files;
mod layout;

use super::budget::{Budget, PrepareDeadline};
use super::oci::{Digest, ImageSource, Platform, Reference, Resolved};
use crate::error::{Error, ErrorKind, Result};
use docker::DockerArchive;
pub(super) use files::ImageFiles;
use layout::Layout;

/// Names that an error lists.
const MAX_SHOWN: usize = 20;

/// Several images, or one, of which one is chosen.
pub(super) trait LocalImages: ImageSource {
    /// Finds an image by name or digest, or the only one. Its documents are read and checked.
    ///
    /// # Errors
    /// `InvalidConfig` and `NotFound` list what is there.
    fn find(&self, select: Option<&str>, platform: &Platform, deadline: &PrepareDeadline) -> Result<Resolved>;
}

/// The images in these files. None where they are no image in layers.
///
/// # Errors
/// `Corrupt` and `Unsupported` for images that cannot be read.
pub(super) fn images(files: ImageFiles, budget: &Budget) -> Result<Option<Box<dyn LocalImages>>> {
    if files.has(b"oci-layout") && files.has(b"index.json") {
        return Ok(Some(Box::new(Layout::open(files, budget)?)));
    }
    if files.has(b"manifest.json") {
        return Ok(Some(Box::new(DockerArchive::open(files, budget)?)));
    }
    Ok(None)
}

/// What one image is called.
#[derive(Debug)]
struct Named<T> {
    names: Vec<String>,
    digests: Vec<Digest>,
    image: T,
}

/// Chooses one of them.
fn choose<'a, T>(images: &'a [Named<T>], select: Option<&str>) -> Result<&'a T> {
    let list = || {
        let shown = images.iter().map(|image| match image.names.first() {
            Some(name) => name.chars().take(200).flat_map(char::escape_default).collect(),
            None => image.digests.first().map(Digest::to_string).unwrap_or_default(),
        });
        let shown: Vec<String> = shown.take(MAX_SHOWN).collect();
        let more = images.len().saturating_sub(MAX_SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{more}", shown.join(", "))
    };
    match (select, images) {
        (_, []) => Err(Error::new(ErrorKind::NotFound, "there is no image in it")),
        (None, [only]) => Ok(&only.image),
        (None, _) => Err(Error::invalid("select", format!("one of several images is to be chosen: {}", list()))),
        (Some(wanted), _) => {
            let whole = full_name(wanted);
            let is = |image: &&Named<T>| {
                image.names.iter().any(|name| name == wanted || full_name(name) == whole)
                    || image.digests.iter().any(|digest| digest.to_string() == wanted)
            };
            let found = images.iter().find(is).map(|image| &image.image);
            found.ok_or_else(|| {
                let what = format!("Image::select: no image {wanted:?}; there is: {}", list());
                Error::new(ErrorKind::NotFound, what)
            })
        }
    }
}

/// A name as Docker writes it out: with its registry and its tag. A text that is no such name stays unchanged.
fn full_name(name: &str) -> String {
    name.parse().map_or_else(|_| name.to_owned(), |reference: Reference| reference.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_as_docker_writes_them_out() {
        for (short, long) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("user/app", "docker.io/user/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("host:5000/app", "host:5000/app:latest"),
            ("ghcr.io/a/b:1", "ghcr.io/a/b:1"),
            ("index.docker.io/user/app", "docker.io/user/app:latest"),
            ("No Name", "No Name"),
        ] {
            assert_eq!(full_name(short), long);
        }
    }

    #[test]
    fn ambiguous_choice_lists_what_is_there() {
        let named = |name: &str| Named {
            names: vec![name.into()],
            digests: vec![Digest::sha256(name.as_bytes())],
            image: name.to_owned(),
        };
        let images: Vec<_> = (0..30).map(|n| named(&format!("app:{n}"))).collect();
        assert_eq!(choose(&images[..1], None).unwrap(), "app:0");
        assert_eq!(choose(&images, Some("docker.io/library/app:7")).unwrap(), "app:7");
        assert_eq!(choose(&images, Some(&images[3].digests[0].to_string())).unwrap(), "app:3");
        let error = choose(&images, None).unwrap_err();
        assert!(
            error.kind() == ErrorKind::InvalidConfig && error.to_string().ends_with("app:19 and 10 more"),
            "{error}"
        );
        let error = choose(&images[..2], Some("other")).unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().ends_with("app:0, app:1"), "{error}");
        assert_eq!(choose::<String>(&[], None).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
