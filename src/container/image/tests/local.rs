//! Images in layers on this host: layouts and `docker save` archives, good and bad.

use std::io::Write;

use super::super::layers::fuzzing::joined;
use super::super::oci::Digest;
use super::*;

/// The files of a layout, by their paths.
#[derive(Default, Clone)]
pub(super) struct Files(BTreeMap<String, Vec<u8>>);

impl Files {
    pub(super) fn blob(&mut self, bytes: &[u8]) -> (Digest, usize) {
        let digest = Digest::sha256(bytes);
        self.0.insert(format!("blobs/{}/{}", digest.algorithm(), digest.hex()), bytes.to_vec());
        (digest, bytes.len())
    }

    /// Adds an image of these layers, and returns its descriptor without the closing brace.
    pub(super) fn image(&mut self, layers: &[Vec<u8>], packed: impl Fn(&[u8]) -> Vec<u8>, config: &str) -> String {
        let diff_ids: Vec<String> = layers.iter().map(|tar| format!("{:?}", Digest::sha256(tar).to_string())).collect();
        let config = format!(r#"{{{config}"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#, diff_ids.join(","));
        let (config, config_len) = self.blob(config.as_bytes());
        let layers: Vec<String> = layers
            .iter()
            .map(|tar| {
                let (digest, len) = self.blob(&packed(tar));
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":{len}}}"#
                )
            })
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{config_len}}},"layers":[{}]}}"#,
            layers.join(",")
        );
        let (digest, len) = self.blob(manifest.as_bytes());
        format!(r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{len}"#)
    }

    pub(super) fn layout(mut self, images: &[(String, &str)]) -> Self {
        let entries: Vec<String> = images
            .iter()
            .map(|(image, name)| match *name {
                "" => format!("{image}}}"),
                name => format!(r#"{image},"annotations":{{"org.opencontainers.image.ref.name":"{name}"}}}}"#),
            })
            .collect();
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        self.0.insert("index.json".into(), index.into());
        self.0.insert("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        self
    }

    pub(super) fn in_directory(&self, path: &Path) {
        for (name, bytes) in &self.0 {
            let path = path.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn archived(&self) -> Vec<u8> {
        archive(&self.0.iter().map(|(name, bytes)| Made::file(name, bytes)).collect::<Vec<_>>())
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn plain(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

fn base() -> Vec<u8> {
    archive(&[Made::file("etc/motd", "hello"), Made::file("big", vec![5; 100_000])])
}

fn upper() -> Vec<u8> {
    archive(&[Made::file("etc/new", "n"), Made::file(".wh.big", "")])
}

pub(super) const CONFIG: &str = r#""os":"linux","config":{"Cmd":["/bin/sh"],"Env":["A=1"]},"#;

pub(super) fn tree_of_image(image: &Image) -> Result<BTreeMap<String, Node>> {
    let disk = match image.disk(None)? {
        ImageDisk::File(file) => file,
        ImageDisk::Pieces(pieces) => joined(&pieces)?,
    };
    let tree = Reader::open(&disk).tree(1 << 20);
    Ok(tree.into_iter().map(|(path, node)| (String::from_utf8_lossy(&path).into_owned(), node)).collect())
}

pub(super) fn open(temp: &Temp, path: &Path) -> Image {
    Image::open(path).unwrap().cache_dir(temp.0.join("cache"))
}

#[test]
fn layouts_are_recognized_in_every_form() {
    let temp = Temp::new();
    for (n, packed) in [plain as fn(&[u8]) -> Vec<u8>, gzip].into_iter().enumerate() {
        let mut files = Files::default();
        let image = files.image(&[base(), upper()], packed, CONFIG);
        let files = files.layout(&[(image, "latest")]);
        let directory = temp.0.join(format!("layout-{n}"));
        files.in_directory(&directory);
        let (tar, packed) = (temp.0.join(format!("{n}.png")), temp.0.join(format!("{n}.txt")));
        fs::write(&tar, files.archived()).unwrap();
        fs::write(&packed, gzip(&files.archived())).unwrap();
        for path in [&directory, &tar, &packed] {
            let image = open(&temp, path);
            let config = image.config().unwrap();
            assert_eq!((config.cmd, config.env), (vec!["/bin/sh".to_owned()], vec!["A=1".to_owned()]));
            let tree = tree_of_image(&image).unwrap();
            assert_eq!(tree.keys().collect::<Vec<_>>(), ["", "etc", "etc/motd", "etc/new"], "{}", path.display());
            assert_eq!(tree["etc/motd"].content, b"hello");
        }
    }
    // Both layers and the metadata are there once, whatever form they came in.
    assert_eq!(fs::read_dir(temp.0.join("cache/layers")).unwrap().count(), 2);
    assert_eq!(disks(&temp).len(), 1);
}

/// Without its blobs a layout cannot be read again, so what still works was kept.
#[test]
fn clones_of_a_prepared_image_share_its_open_disk_while_the_layout_is_the_same() {
    let temp = Temp::new();
    let mut files = Files::default();
    let image = files.image(&[base(), upper()], plain, CONFIG);
    let directory = temp.0.join("layout");
    files.layout(&[(image, "latest")]).in_directory(&directory);
    let image = open(&temp, &directory);
    let pieces = |image: &Image| match image.disk(None) {
        Ok(ImageDisk::Pieces(pieces)) => pieces,
        other => panic!("{other:?}"),
    };
    let first = pieces(&image);
    fs::remove_dir_all(directory.join("blobs")).unwrap();
    fs::remove_dir_all(temp.0.join("cache/layers")).unwrap();
    let again = pieces(&image.clone());
    assert!(first.len() > 2 && first.iter().zip(&again).all(|(a, b)| Arc::ptr_eq(&a.file, &b.file)));
    let index = fs::read(directory.join("index.json")).unwrap();
    fs::write(directory.join("index.json"), [&index[..], b"\n"].concat()).unwrap();
    assert_eq!(image.disk(None).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn compressed_root_file_systems_are_read() {
    let temp = Temp::new();
    for (n, packed) in [plain as fn(&[u8]) -> Vec<u8>, gzip].into_iter().enumerate() {
        let path = temp.0.join(n.to_string());
        fs::write(&path, packed(&base())).unwrap();
        let image = open(&temp, &path);
        assert_eq!(tree_of_image(&image).unwrap()["etc/motd"].content, b"hello");
        assert_eq!(image.config().unwrap(), ImageConfig::default());
    }
}

#[test]
fn images_that_share_layers_share_their_files() {
    let temp = Temp::new();
    let mut files = Files::default();
    let others = |n: u8| archive(&[Made::file("own", vec![n; 5000])]);
    let images: Vec<_> = (0..3).map(|n| files.image(&[base(), others(n)], gzip, CONFIG)).collect();
    let names = ["a", "b", "c"];
    let files = files.layout(&images.into_iter().zip(names).collect::<Vec<_>>());
    let path = temp.0.join("tar");
    fs::write(&path, files.archived()).unwrap();
    for (n, name) in names.into_iter().enumerate() {
        let tree = tree_of_image(&open(&temp, &path).select(name)).unwrap();
        assert_eq!(tree["own"].content, vec![n as u8; 5000]);
    }
    assert_eq!(fs::read_dir(temp.0.join("cache/layers")).unwrap().count(), 4);
    let error = open(&temp, &path).prepare().unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().ends_with("a, b, c"), "{error}");
    let error = open(&temp, &path).select("d").prepare().unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().ends_with("a, b, c"), "{error}");
    let error = open(&temp, &path).select("d").config().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// A layout of these entries: a platform, a name or none, and the number that its file has.
fn for_platforms(temp: &Temp, entries: &[(&str, &str, u8)]) -> Image {
    let mut files = Files::default();
    let images = entries.iter().map(|(platform, name, n)| {
        let (os, architecture) = platform.split_once('/').unwrap();
        let config = format!(r#""os":"{os}","architecture":"{architecture}","#);
        let image = files.image(&[archive(&[Made::file("own", [*n])])], gzip, &config);
        (format!(r#"{image},"platform":{{"os":"{os}","architecture":"{architecture}"}}"#), *name)
    });
    let images: Vec<_> = images.collect();
    let path = temp.0.join("tar");
    fs::write(&path, files.layout(&images).archived()).unwrap();
    open(temp, &path)
}

#[test]
fn entries_of_one_name_are_chosen_by_their_platform() {
    let temp = Temp::new();
    for (name, other) in [("", ""), ("a", ""), ("a", "b")] {
        let mut entries = vec![("linux/arm64", name, 1), ("linux/s390x", name, 2), ("linux/amd64", name, 3)];
        if !other.is_empty() {
            entries.extend([("linux/s390x", other, 4), ("linux/arm64", other, 5)]);
        }
        for (platform, number) in [("linux/arm64", 1), ("linux/s390x", 2), ("linux/amd64", 3)] {
            let image = for_platforms(&temp, &entries).platform(platform.parse().unwrap());
            let image = if other.is_empty() { image } else { image.select(name) };
            assert_eq!(tree_of_image(&image).unwrap()["own"].content, [number], "{name:?} {other:?} {platform}");
        }
        let image = for_platforms(&temp, &entries).platform("linux/riscv64".parse().unwrap());
        let image = if other.is_empty() { image } else { image.select(name) };
        let error = image.config().unwrap_err();
        let list = "linux/riscv64, see `Image::platform`; there is: linux/amd64, linux/arm64, linux/s390x";
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().ends_with(list), "{error}");
    }
    let image = for_platforms(&temp, &[("linux/arm64", "a", 1), ("linux/arm64", "b", 2)]);
    let error = image.platform("linux/arm64".parse().unwrap()).config().unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().ends_with("a, b"), "{error}");
}

#[test]
fn images_without_names_for_one_platform_are_not_guessed_between() {
    let temp = Temp::new();
    let entries = [("linux/arm64", "", 1), ("linux/arm64", "", 2), ("linux/s390x", "", 3)];
    let image = for_platforms(&temp, &entries);
    let error = image.clone().platform("linux/arm64".parse().unwrap()).config().unwrap_err();
    assert_eq!((error.kind(), error.to_string().matches("sha256:").count()), (ErrorKind::InvalidConfig, 2), "{error}");
    let text = error.to_string();
    let second = text.rsplit(", ").next().unwrap();
    let image = image.select(second).platform("linux/arm64".parse().unwrap());
    assert_eq!(tree_of_image(&image).unwrap()["own"].content, [2]);
}

/// A `docker save` archive of the old form: a folder for each layer, one of them a link to another.
fn saved(config: &str, packed: fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let ids = ["a", "b", "c"].map(|it| it.repeat(64));
    let diff_ids: Vec<String> =
        [base(), upper(), base()].iter().map(|tar| format!("{:?}", Digest::sha256(tar).to_string())).collect();
    let config = format!(r#"{{{config}"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#, diff_ids.join(","));
    let layers: Vec<String> = ids.iter().map(|id| format!("\"{id}/layer.tar\"")).collect();
    let manifest =
        format!(r#"[{{"Config":"{}.json","RepoTags":["app:1"],"Layers":[{}]}}]"#, "d".repeat(64), layers.join(","));
    archive(&[
        Made::directory(format!("{}/", ids[0])),
        Made::file(format!("{}/VERSION", ids[0]), "1.0"),
        Made::file(format!("{}/layer.tar", ids[0]), packed(&base())),
        Made::file(format!("{}/layer.tar", ids[1]), packed(&upper())),
        Made::symlink(format!("{}/layer.tar", ids[2]), format!("../{}/layer.tar", ids[0])),
        Made::file(format!("{}.json", "d".repeat(64)), config),
        Made::file("manifest.json", manifest),
        Made::file("repositories", "{}"),
    ])
}

#[test]
fn old_docker_archives_are_read() {
    let temp = Temp::new();
    for (n, packed) in [plain as fn(&[u8]) -> Vec<u8>, gzip].into_iter().enumerate() {
        let path = temp.0.join(n.to_string());
        fs::write(&path, saved(CONFIG, packed)).unwrap();
        let image = open(&temp, &path).select("docker.io/library/app:1");
        assert_eq!(image.config().unwrap().env, ["A=1"]);
        let tree = tree_of_image(&image).unwrap();
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["", "big", "etc", "etc/motd", "etc/new"]);
    }
    assert_eq!(fs::read_dir(temp.0.join("cache/layers")).unwrap().count(), 2);
}

/// An archive of images that have no layers: their configurations, and the names of those in its manifest.
fn saved_without_layers(temp: &Temp, configs: &[(&str, &str)], named: &[&str]) -> Image {
    let entry = |(n, config): (usize, &&str)| format!(r#"{{"Config":"{config}","RepoTags":["app:{n}"]}}"#);
    let manifest = format!("[{}]", named.iter().enumerate().map(entry).collect::<Vec<_>>().join(","));
    let mut entries: Vec<_> = configs.iter().map(|(name, config)| Made::file(name, config)).collect();
    entries.push(Made::file("manifest.json", manifest));
    let path = temp.0.join("tar");
    fs::write(&path, archive(&entries)).unwrap();
    open(temp, &path)
}

#[test]
fn archive_of_too_many_images_is_refused() {
    let temp = Temp::new();
    let configs = [("a.json", "{}")];
    saved_without_layers(&temp, &configs, &["a.json"; 1000]).select("app:999").config().unwrap();
    let error = saved_without_layers(&temp, &configs, &["a.json"; 1001]).select("app:999").config().unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("1001 images"), "{error}");
}

#[test]
fn only_the_configuration_of_the_chosen_image_is_believed() {
    let temp = Temp::new();
    let configs = [("a.json", r#"{"config":{"Env":["A=1"]}}"#), ("b.json", "damaged")];
    let image = saved_without_layers(&temp, &configs, &["a.json", "b.json"]);
    assert_eq!(image.clone().select("app:0").config().unwrap().env, ["A=1"]);
    let by_digest = image.clone().select(Digest::sha256(configs[0].1.as_bytes()).to_string());
    assert_eq!(by_digest.config().unwrap().env, ["A=1"]);
    assert_eq!(image.select("app:1").config().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn compressed_layout_that_unpacks_to_too_much_is_not_looked_through() {
    let temp = Temp::new();
    let mut files = Files::default();
    let image = files.image(&[base()], plain, CONFIG);
    // The last of all, which nothing but the list of members comes to.
    files.0.insert("zeros".into(), vec![0; 80 << 20]);
    let path = temp.0.join("tar");
    fs::write(&path, gzip(&files.layout(&[(image, "")]).archived())).unwrap();
    open(&temp, &path).config().unwrap();
    let error = open(&temp, &path).limits(ImageLimits::new().max_ratio(10)).config().unwrap_err();
    assert!(
        error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("ImageLimits::max_ratio"),
        "{error}"
    );
}

#[test]
fn image_for_another_platform_is_named() {
    let temp = Temp::new();
    let path = temp.0.join("tar");
    fs::write(&path, saved(r#""os":"linux","architecture":"s390x","#, plain)).unwrap();
    let error = open(&temp, &path).prepare().unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("linux/s390x"), "{error}");
    open(&temp, &path).platform("linux/s390x".parse().unwrap()).prepare().unwrap();
}

#[test]
fn layer_that_is_not_what_its_digests_say_is_refused() {
    let temp = Temp::new();
    let mut files = Files::default();
    let image = files.image(&[base()], gzip, CONFIG);
    let name = format!("blobs/sha256/{}", Digest::sha256(&gzip(&base())).hex());
    let good = files.layout(&[(image, "")]);
    let other = gzip(&upper());
    let with_tail = [gzip(&base()), vec![0; 10]].concat();
    let cut = gzip(&base())[..100].to_vec();
    for bytes in [other, with_tail[..with_tail.len() - 11].to_vec(), cut, Vec::new()] {
        let mut files = good.clone();
        files.0.insert(name.clone(), bytes);
        let path = temp.0.join("tar");
        fs::write(&path, files.archived()).unwrap();
        let error = open(&temp, &path).prepare().unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("layer 0, sha256:"), "{error}");
        assert_eq!(fs::read_dir(temp.0.join("cache/layers")).unwrap().count(), 0);
    }
    let mut files = good.clone();
    files.0.remove(&name);
    let path = temp.0.join("tar");
    fs::write(&path, files.archived()).unwrap();
    assert_eq!(open(&temp, &path).prepare().unwrap_err().kind(), ErrorKind::NotFound);
    // A digest of what is unpacked that is wrong.
    let mut files = Files::default();
    let lying = files.image(&[base()], |_| gzip(&upper()), CONFIG);
    fs::write(&path, files.layout(&[(lying, "")]).archived()).unwrap();
    let error = open(&temp, &path).prepare().unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("unpacked, its digest is"), "{error}");
}

#[test]
fn layer_that_unpacks_to_too_much_is_refused() {
    let temp = Temp::new();
    let mut files = Files::default();
    // Beyond 64 MiB, and by more than a hundred times.
    let image = files.image(&[archive(&[Made::file("zeros", vec![0; 80 << 20])])], gzip, CONFIG);
    let path = temp.0.join("tar");
    fs::write(&path, files.layout(&[(image, "")]).archived()).unwrap();
    let packed = temp.0.join("root file system");
    fs::write(&packed, gzip(&archive(&[Made::file("zeros", vec![0; 80 << 20])]))).unwrap();
    let error = open(&temp, &packed).limits(ImageLimits::new().max_ratio(10)).prepare().unwrap_err();
    assert!(
        error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("ImageLimits::max_ratio"),
        "{error}"
    );
    let error = open(&temp, &path).limits(ImageLimits::new().max_ratio(10)).prepare().unwrap_err();
    assert!(
        error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("ImageLimits::max_ratio"),
        "{error}"
    );
    open(&temp, &path).prepare().unwrap();
}

#[test]
fn damaged_layouts_are_errors() {
    let temp = Temp::new();
    let mut files = Files::default();
    let image = files.image(&[base()], gzip, CONFIG);
    let good = files.layout(&[(image, "")]);
    for (name, bytes, kind) in [
        ("oci-layout", &br#"{"imageLayoutVersion":"2.0.0"}"#[..], ErrorKind::Unsupported),
        ("oci-layout", b"{}", ErrorKind::Corrupt),
        ("index.json", b"{", ErrorKind::Corrupt),
        ("index.json", br#"{"manifests":[]}"#, ErrorKind::NotFound),
        ("index.json", &[b' '; (4 << 20) + 1], ErrorKind::Corrupt),
    ] {
        let mut files = good.clone();
        files.0.insert(name.into(), bytes.to_vec());
        let path = temp.0.join("tar");
        fs::write(&path, files.archived()).unwrap();
        let error = open(&temp, &path).prepare().unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
    }
}

#[test]
fn damaged_layer_in_the_store_is_made_anew() {
    let temp = Temp::new();
    let mut files = Files::default();
    let image = files.image(&[base()], gzip, CONFIG);
    let path = temp.0.join("tar");
    fs::write(&path, files.layout(&[(image, "")]).archived()).unwrap();
    open(&temp, &path).prepare().unwrap();
    let layer = fs::read_dir(temp.0.join("cache/layers")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&layer).unwrap();
    let whole = bytes.clone();
    bytes[5000] ^= 1;
    fs::write(&layer, bytes).unwrap();
    assert_eq!(tree_of_image(&open(&temp, &path)).unwrap()["etc/motd"].content, b"hello");
    assert!(fs::read(&layer).unwrap() == whole);
}

#[test]
fn root_file_system_with_files_of_such_names_is_none_in_layers() {
    let temp = Temp::new();
    let path = temp.0.join("tar");
    let entries = [Made::file("manifest.json", "{}"), Made::directory("usr"), Made::file("usr/x", "")];
    fs::write(&path, archive(&entries)).unwrap();
    assert_eq!(tree_of_image(&open(&temp, &path)).unwrap().len(), 4);
}
