//! [`Manifest`]: the index or the manifest behind a descriptor.
//!
//! Both have a form of OCI (image-spec, image-index.md and manifest.md) and one of Docker (distribution, manifest-v2-2.md).

use serde::Deserialize;

use super::{Descriptor, Platform};
use crate::container::image::path::shown;
use crate::error::{Error, ErrorKind, Result};

/// The largest index, manifest or configuration.
pub(in super::super) const MAX_DOCUMENT: u64 = 4 << 20;

/// Layers that one image may have. Each takes a descriptor of every container's, and Docker allows no more than 127.
pub(in super::super) const MAX_LAYERS: usize = 128;

/// Types of indexes: OCI's, and Docker's.
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// Types of manifests of one image.
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
/// Types of configurations.
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Types of layers. What they are compressed with, their first bytes say.
const LAYERS: [&str; 5] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
];
/// How types of layers begin that are not to be passed on, so that their bytes lie elsewhere.
const FOREIGN: [&str; 2] =
    ["application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign."];

/// All types of documents, as they are asked for.
#[cfg(feature = "registry")]
pub(in super::super) fn accepted() -> impl Iterator<Item = &'static str> {
    MANIFESTS.into_iter().chain(INDEXES)
}

/// What a descriptor's document is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Manifest {
    Index(Vec<IndexEntry>),
    Image(ImageManifest),
}

/// One image, or one more index, of an index.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(in super::super) struct IndexEntry {
    #[serde(flatten)]
    pub descriptor: Descriptor,
    #[serde(default)]
    pub platform: Option<Platform>,
}

impl IndexEntry {
    pub(in super::super) fn is_index(&self) -> bool {
        INDEXES.contains(&self.descriptor.media_type.as_str())
    }
}

/// The parts of one image: its configuration, and its layers, the lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<IndexEntry>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// Parses a document whose descriptor says that it is of `media_type`, which may be empty.
    ///
    /// # Errors
    /// `Corrupt` for what is neither an index nor a manifest, or claims to be both. `Unsupported` names a type that is not known.
    pub(in super::super) fn parse(bytes: &[u8], media_type: &str) -> Result<Self> {
        let document: Document = json(bytes)?;
        if document.schema_version.is_some_and(|version| version != 2) {
            return Err(unsupported(
                "a manifest of schema 1, which has no digests of its content: save the image anew",
            ));
        }
        let own = document.media_type.as_deref().unwrap_or_default();
        if !own.is_empty() && !media_type.is_empty() && own != media_type {
            return Err(corrupt(format!("it says that it is of type {}", shown(own.as_bytes()))));
        }
        let media_type = if media_type.is_empty() { own } else { media_type };
        let (index, image) = (document.manifests, document.config.zip(document.layers));
        let (may_be_index, may_be_image) = match media_type {
            "" => (true, true),
            it if INDEXES.contains(&it) => (true, false),
            it if MANIFESTS.contains(&it) => (false, true),
            it => return Err(unsupported(format!("a document of type {}", shown(it.as_bytes())))),
        };
        match (index, image) {
            (Some(entries), None) if may_be_index => Ok(Self::Index(entries)),
            (None, Some((config, layers))) if may_be_image => Ok(Self::Image(ImageManifest::checked(config, layers)?)),
            (Some(_), Some(_)) => Err(corrupt("it is an index and a manifest at once")),
            _ => Err(corrupt("it is neither an index of images nor the manifest of one")),
        }
    }
}

impl ImageManifest {
    fn checked(config: Descriptor, layers: Vec<Descriptor>) -> Result<Self> {
        let type_of = |descriptor: &Descriptor| shown(descriptor.media_type.as_bytes());
        if !CONFIGS.contains(&config.media_type.as_str()) {
            return Err(unsupported(format!(
                "its configuration is of type {}, so it is no image to run",
                type_of(&config)
            )));
        }
        if layers.len() > MAX_LAYERS {
            return Err(unsupported(format!("an image of {} layers: at most {MAX_LAYERS} are possible", layers.len())));
        }
        for (n, layer) in layers.iter().enumerate() {
            if FOREIGN.iter().any(|foreign| layer.media_type.starts_with(foreign)) {
                return Err(unsupported(format!(
                    "layer {n} is of type {}: its content lies elsewhere",
                    type_of(layer)
                )));
            }
            if !LAYERS.contains(&layer.media_type.as_str()) {
                return Err(unsupported(format!("layer {n} is of type {}", type_of(layer))));
            }
        }
        Ok(Self { config, layers })
    }
}

/// Parses a document.
///
/// # Errors
/// `Corrupt` says where it is not as it should be.
pub(in super::super) fn json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))
}

fn corrupt(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn blob(media_type: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{EMPTY}","size":0}}"#)
    }

    fn image(config: &str, layers: &[&str]) -> String {
        let layers: Vec<_> = layers.iter().map(|it| blob(it)).collect();
        format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, blob(config), layers.join(","))
    }

    #[test]
    fn documents_of_both_kinds_are_parsed() {
        for (media_type, config, layer) in
            [(MANIFESTS[0], CONFIGS[0], LAYERS[2]), (MANIFESTS[1], CONFIGS[1], LAYERS[4])]
        {
            for said in [media_type, ""] {
                let parsed = Manifest::parse(image(config, &[layer, layer]).as_bytes(), said).unwrap();
                assert!(matches!(parsed, Manifest::Image(it) if it.layers.len() == 2), "{media_type}");
            }
        }
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{EMPTY}","size":7,
                "platform":{{"os":"linux","architecture":"arm","variant":"v7"}}}}, {}]}}"#,
            MANIFESTS[0],
            blob(INDEXES[0])
        );
        let Manifest::Index(entries) = Manifest::parse(index.as_bytes(), INDEXES[0]).unwrap() else {
            panic!("an index")
        };
        assert_eq!(entries[0].platform.as_ref().unwrap().to_string(), "linux/arm/v7");
        assert!(entries[1].is_index() && entries[1].platform.is_none());
    }

    #[test]
    fn unknown_types_are_refused_by_name() {
        let (config, layer) = (CONFIGS[0], LAYERS[0]);
        let cases = [
            (image("application/vnd.cncf.helm.config.v1+json", &[layer]), "", "helm"),
            (image(config, &["application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"]), "", "elsewhere"),
            (image(config, &["application/vnd.oci.image.layer.nondistributable.v1.tar"]), "", "elsewhere"),
            (image(config, &[layer, "application/vnd.oci.image.layer.v1.tar+encrypted"]), "", "layer 1"),
            (image(config, &[layer]), "application/vnd.docker.distribution.manifest.v1+prettyjws", "prettyjws"),
            (image(config, &[layer; 129]), "", "129 layers"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.into(), "", "schema 1"),
        ];
        for (document, media_type, word) in cases {
            let error = Manifest::parse(document.as_bytes(), media_type).unwrap_err();
            assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(word), "{error}");
        }
        Manifest::parse(image(config, &[layer; 128]).as_bytes(), "").unwrap();
    }

    /// What one program takes for an index and another for a manifest, no two programs see alike.
    #[test]
    fn ambiguous_document_is_refused() {
        let both = image(CONFIGS[0], &[]).replacen('{', r#"{"manifests":[],"#, 1);
        let lying = image(CONFIGS[0], &[]).replacen('{', &format!(r#"{{"mediaType":"{}","#, INDEXES[0]), 1);
        let cases = [
            (both.clone(), ""),
            (both.clone(), MANIFESTS[0]),
            (both, INDEXES[0]),
            (lying.clone(), MANIFESTS[0]),
            (lying, ""),
            (image(CONFIGS[0], &[]), INDEXES[1]),
            ("{}".into(), ""),
            ("[]".into(), ""),
            ("".into(), ""),
            (image(CONFIGS[0], &[]).replace("\"size\":0", "\"size\":-1"), ""),
        ];
        for (document, media_type) in cases {
            let error = Manifest::parse(document.as_bytes(), media_type).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{document}: {error}");
        }
    }
}
