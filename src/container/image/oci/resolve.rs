//! [`resolve`]: from an index or a manifest to the parts of one image.

use std::io::Read;

use super::config::Configuration;
use super::manifest::{ImageManifest, IndexEntry, MAX_DOCUMENT, Manifest};
use super::{Descriptor, Digest, ImageConfig, ImageSource, Platform, Verified};
use crate::container::image::budget::PrepareDeadline;
use crate::error::{Context, Error, ErrorKind, Result};

/// Indexes and manifests that one image may be found by.
const MAX_DOCUMENTS: usize = 16;
/// Platforms that an error lists.
const MAX_SHOWN: usize = 20;

/// A checked document.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "registry"), allow(dead_code, reason = "pulls alone keep documents"))]
pub(in super::super) struct Blob {
    pub descriptor: Descriptor,
    pub bytes: Vec<u8>,
}

/// A layer: as it is stored or sent, and the digest of what is unpacked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Layer {
    pub blob: Descriptor,
    pub diff_id: Digest,
}

/// One image, whose documents were checked. Its layers were not read.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "registry"), allow(dead_code, reason = "pulls alone keep documents"))]
pub(in super::super) struct Resolved {
    pub manifest: Blob,
    pub config: Blob,
    pub image: ImageConfig,
    /// The lowest first.
    pub layers: Vec<Layer>,
}

impl Resolved {
    /// An image that has a configuration and no manifest.
    pub(in super::super) fn without_manifest(config: Vec<u8>, image: ImageConfig, layers: Vec<Layer>) -> Self {
        let descriptor = Descriptor::of(Digest::sha256(&config), config.len() as u64);
        let manifest = Blob { descriptor: descriptor.clone(), bytes: Vec::new() };
        Self { manifest, config: Blob { descriptor, bytes: config }, image, layers }
    }

    pub(in super::super) fn diff_ids(&self) -> Vec<Digest> {
        self.layers.iter().map(|layer| layer.diff_id.clone()).collect()
    }
}

/// Reads a document of at most 4 MiB, and checks its size and digest.
///
/// # Errors
/// `NotFound` when the source has none; `Corrupt` for one that is too large or not what the descriptor says.
pub(in super::super) fn read_document(
    source: &dyn ImageSource,
    descriptor: &Descriptor,
    deadline: &PrepareDeadline,
) -> Result<Blob> {
    let digest = &descriptor.digest;
    if descriptor.size > MAX_DOCUMENT {
        let what = format!("{digest} has {} bytes: a document has at most {} MiB", descriptor.size, MAX_DOCUMENT >> 20);
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    loop {
        let mut bytes = Vec::new();
        let mut reader = Verified::new(source.open(descriptor, deadline)?, digest, descriptor.size);
        let outcome = reader.read_to_end(&mut bytes).map_err(|e| from_reader(e, deadline));
        drop(reader);
        match outcome {
            Ok(_) => return Ok(Blob { descriptor: descriptor.clone(), bytes }),
            Err(error) if error.kind() == ErrorKind::Corrupt && source.distrust(descriptor) => {
                log::debug!("{digest} is asked of another server: {error}");
            }
            Err(error) => return Err(error).doing(|| format!("reading {digest}")),
        }
    }
}

/// The error that a reader gave, which may be one of ours.
pub(in super::super) fn from_reader(error: std::io::Error, deadline: &PrepareDeadline) -> Error {
    let error = error.downcast::<Error>().unwrap_or_else(Error::from);
    match deadline.check() {
        Err(over) if !matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Cancelled) => over,
        _ => error,
    }
}

/// Finds the image for `platform` behind `root`, which describes an index or a manifest. Its documents are read and checked.
///
/// # Errors
/// `NotFound` lists the platforms that are there where none fits. `Corrupt` and `Unsupported` name the document.
pub(in super::super) fn resolve(
    source: &dyn ImageSource,
    root: &Descriptor,
    platform: &Platform,
    deadline: &PrepareDeadline,
) -> Result<Resolved> {
    let (manifest, parsed) = find(source, root, platform, deadline)?;
    let config = read_document(source, &parsed.config, deadline)?;
    let (image, diff_ids) = resolve_config(&config.bytes, parsed.layers.len(), Some(platform))
        .doing(|| format!("configuration {}", parsed.config.digest))?;
    let layers = parsed.layers.into_iter().zip(diff_ids).map(|(blob, diff_id)| Layer { blob, diff_id }).collect();
    Ok(Resolved { manifest, config, image, layers })
}

/// Reads the configuration of an image of so many layers, for `platform` where one is asked for.
///
/// # Errors
/// `NotFound` where it is for another platform; `Corrupt` for what does not fit.
pub(in super::super) fn resolve_config(
    bytes: &[u8],
    layers: usize,
    platform: Option<&Platform>,
) -> Result<(ImageConfig, Vec<Digest>)> {
    let Configuration { image, platform: own, diff_ids } = Configuration::parse(bytes)?;
    if let Some(wanted) = platform
        && !own.os().is_empty()
        && !own.architecture().is_empty()
        && wanted.distance(&own).is_none()
    {
        return Err(no_such_platform(wanted, &[own]));
    }
    if diff_ids.len() != layers {
        let what = format!("it has digests of {} layers, and the manifest has {layers}", diff_ids.len());
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    Ok((image, diff_ids))
}

/// Goes down from index to index.
fn find(
    source: &dyn ImageSource,
    root: &Descriptor,
    platform: &Platform,
    deadline: &PrepareDeadline,
) -> Result<(Blob, ImageManifest)> {
    let mut waiting = vec![root.clone()];
    let mut seen = Vec::new();
    for _ in 0..MAX_DOCUMENTS {
        let Some(next) = waiting.pop() else {
            return Err(no_such_platform(platform, &seen));
        };
        deadline.check()?;
        let blob = read_document(source, &next, deadline)?;
        let parsed = Manifest::parse(&blob.bytes, &next.media_type).doing(|| format!("manifest {}", next.digest))?;
        let entries = match parsed {
            Manifest::Image(image) => return Ok((blob, image)),
            Manifest::Index(entries) => entries,
        };
        if let Some(entry) = choose(&entries, platform) {
            waiting = vec![entry.descriptor.clone()];
            continue;
        }
        seen.extend(entries.iter().filter_map(|entry| entry.platform.clone()));
        let nested = entries.into_iter().rev().filter(|entry| entry.is_index() && entry.platform.is_none());
        waiting.extend(nested.map(|entry| entry.descriptor));
        // More are never looked at.
        waiting.drain(..waiting.len().saturating_sub(MAX_DOCUMENTS));
    }
    let what = format!("more than {MAX_DOCUMENTS} indexes lead to the image");
    Err(Error::new(ErrorKind::Corrupt, what))
}

/// The entry that fits best, the first of equals. One that names no platform fits where it is alone.
fn choose<'a>(entries: &'a [IndexEntry], platform: &Platform) -> Option<&'a IndexEntry> {
    let fitting = entries.iter().filter_map(|entry| Some((platform.distance(entry.platform.as_ref()?)?, entry)));
    let best = fitting.min_by_key(|(distance, _)| *distance).map(|(_, entry)| entry);
    best.or(match entries {
        [only] if only.platform.is_none() => Some(only),
        _ => None,
    })
}

/// The entry that fits `platform` best.
///
/// # Errors
/// `NotFound` lists the platforms that are there.
pub(in super::super) fn for_platform<'a>(entries: &'a [IndexEntry], platform: &Platform) -> Result<&'a IndexEntry> {
    choose(entries, platform).ok_or_else(|| {
        let there: Vec<_> = entries.iter().filter_map(|entry| entry.platform.clone()).collect();
        no_such_platform(platform, &there)
    })
}

fn no_such_platform(wanted: &Platform, there: &[Platform]) -> Error {
    let mut names: Vec<String> = there.iter().map(Platform::to_string).collect();
    names.sort();
    names.dedup();
    let more = names.len().saturating_sub(MAX_SHOWN);
    names.truncate(MAX_SHOWN);
    let list = if names.is_empty() { "none that is named".to_owned() } else { names.join(", ") };
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let what = format!("no image for {wanted}, see `Image::platform`; there is: {list}{more}");
    Error::new(ErrorKind::NotFound, what)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;

    /// Documents in memory.
    #[derive(Default)]
    struct Documents(BTreeMap<String, Vec<u8>>);

    impl Documents {
        fn add(&mut self, media_type: &str, text: &str) -> String {
            let digest = Digest::sha256(text.as_bytes());
            self.0.insert(digest.to_string(), text.into());
            format!(r#""mediaType":"{media_type}","digest":"{digest}","size":{}"#, text.len())
        }

        /// An image of one layer, described.
        fn image(&mut self, platform: &str) -> String {
            let (os, architecture) = platform.split_once('/').unwrap();
            let (architecture, variant) = architecture.split_once('/').unwrap_or((architecture, ""));
            let digest = Digest::sha256(platform.as_bytes());
            let config = format!(
                r#"{{"os":"{os}","architecture":"{architecture}","variant":"{variant}","rootfs":{{"diff_ids":["{digest}"]}}}}"#
            );
            let config = self.add("application/vnd.oci.image.config.v1+json", &config);
            let manifest = format!(
                r#"{{"schemaVersion":2,"config":{{{config}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":3}}]}}"#
            );
            self.add("application/vnd.oci.image.manifest.v1+json", &manifest)
        }

        fn entry(&mut self, platform: &str) -> String {
            let (os, architecture) = platform.split_once('/').unwrap();
            let (architecture, variant) = architecture.split_once('/').unwrap_or((architecture, ""));
            let image = self.image(platform);
            format!(r#"{{{image},"platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}}}"#)
        }

        fn index(&mut self, entries: &[String]) -> String {
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
            self.add("application/vnd.oci.image.index.v1+json", &text)
        }
    }

    impl ImageSource for Documents {
        fn open(&self, blob: &Descriptor, _: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
            let bytes = self.0.get(&blob.digest.to_string());
            Ok(Box::new(&**bytes.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such blob"))?))
        }
    }

    fn resolved(source: &Documents, root: &str, platform: &str) -> Result<Resolved> {
        let root: Descriptor = serde_json::from_str(&format!("{{{root}}}")).unwrap();
        resolve(source, &root, &platform.parse().unwrap(), &PrepareDeadline::new(Duration::from_secs(60), None))
    }

    #[test]
    fn best_platform_of_an_index_is_chosen() {
        let mut all = Documents::default();
        let entries =
            ["linux/arm/v7", "unknown/unknown", "linux/arm64/v8", "linux/arm", "linux/amd64"].map(|it| all.entry(it));
        let index = all.index(&entries);
        for (wanted, found) in [
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/arm", "linux/arm"),
            ("linux/arm/v6", "linux/arm"),
            ("linux/arm64", "linux/arm64/v8"),
            ("linux/amd64/v2", "linux/amd64"),
        ] {
            let resolved = resolved(&all, &index, wanted).unwrap();
            assert_eq!(resolved.layers[0].diff_id, Digest::sha256(found.as_bytes()), "{wanted}");
        }
        let error = resolved(&all, &index, "linux/s390x").unwrap_err();
        let list = "there is: linux/amd64, linux/arm, linux/arm/v7, linux/arm64/v8, unknown/unknown";
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().ends_with(list), "{error}");
    }

    #[test]
    fn image_for_another_platform_is_refused() {
        let mut all = Documents::default();
        let image = all.image("linux/arm64");
        resolved(&all, &image, "linux/arm64").unwrap();
        let error = resolved(&all, &image, "linux/amd64").unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("linux/arm64"), "{error}");
    }

    #[test]
    fn nested_indexes_are_followed_to_a_limit() {
        let mut all = Documents::default();
        let entries = [all.entry("linux/amd64"), all.entry("linux/arm")];
        let mut index = all.index(&entries);
        // An index and the manifest are two documents.
        for documents in 2..=MAX_DOCUMENTS {
            resolved(&all, &index, "linux/amd64").unwrap_or_else(|error| panic!("{documents}: {error}"));
            let other = all.entry("linux/arm");
            index = all.index(&[format!("{{{index}}}"), other]);
        }
        assert_eq!(resolved(&all, &index, "linux/amd64").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn documents_are_checked_before_they_are_believed() {
        let mut all = Documents::default();
        let image = all.image("linux/amd64");
        for change in [r#""size":1"#, r#""size":9"#, &format!(r#""size":{}"#, MAX_DOCUMENT + 1)] {
            let (before, _) = image.split_once(r#""size":"#).unwrap();
            let error = resolved(&all, &format!("{before}{change}"), "linux/amd64").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
        all.0.values_mut().for_each(|bytes| *bytes.last_mut().unwrap() = b'!');
        let error = resolved(&all, &image, "linux/amd64").unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("its digest is"), "{error}");
    }

    #[test]
    fn layers_without_their_digests_are_refused() {
        let mut all = Documents::default();
        let config = all.add("application/vnd.oci.image.config.v1+json", r#"{"rootfs":{"diff_ids":[]}}"#);
        let layer = all.add("application/vnd.oci.image.layer.v1.tar", "abc");
        let manifest = format!(r#"{{"config":{{{config}}},"layers":[{{{layer}}}]}}"#);
        let manifest = all.add("", &manifest);
        let error = resolved(&all, &manifest, "linux/amd64").unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("0 layers"), "{error}");
    }
}
