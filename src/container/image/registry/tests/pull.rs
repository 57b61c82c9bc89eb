//! Whole pulls from a registry in memory.

use std::io;
use std::sync::Mutex;

use super::super::fetch::{Fetch, FetchRequest, FetchResponse};
use super::*;
use crate::container::image::store::{ImageStore, Store};
use crate::container::image::tests::maker::{Made, archive};
use crate::error::ErrorKind;

/// A registry in memory, by the paths behind `https://r.example/v2/a/b/`.
#[derive(Clone, Default)]
struct Memory {
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fetch for Memory {
    fn fetch(&self, request: &FetchRequest) -> io::Result<FetchResponse> {
        assert!(request.timeout() <= super::super::DEFAULT_TIMEOUT && request.body().is_empty());
        assert!(!format!("{request:?}").is_empty() && request.headers().all(|(name, _)| name != "authorization"));
        let path = request.url().strip_prefix("https://r.example/v2/a/b/").unwrap().to_owned();
        let found = self.files.lock().unwrap().get(&path).cloned();
        self.asked.lock().unwrap().push(format!("{} {path}", request.method()));
        Ok(match found {
            Some(bytes) => FetchResponse::new(200, io::Cursor::new(bytes)),
            None => FetchResponse::new(404, io::empty()),
        })
    }
}

impl Memory {
    fn blob(&self, folder: &str, bytes: &[u8]) -> String {
        let digest = Digest::sha256(bytes);
        self.files.lock().unwrap().insert(format!("{folder}/{digest}"), bytes.to_vec());
        format!(r#""digest":"{digest}","size":{}"#, bytes.len())
    }

    /// An image whose layers are empty archives of different lengths, called by this tag.
    fn image(&self, tag: &str, layers: &[usize]) {
        self.image_of(tag, layers, |blocks| vec![0; 1024 + blocks * 512]);
    }

    fn image_of(&self, tag: &str, layers: &[usize], tar: impl Fn(usize) -> Vec<u8>) {
        let blob = |n: &usize| {
            format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar",{}}}"#, self.blob("blobs", &tar(*n)))
        };
        let described: Vec<_> = layers.iter().map(blob).collect();
        let diff_ids: Vec<_> = layers.iter().map(|n| format!("\"{}\"", Digest::sha256(&tar(*n)))).collect();
        let config = self.blob("blobs", format!(r#"{{"rootfs":{{"diff_ids":[{}]}}}}"#, diff_ids.join(",")).as_bytes());
        let manifest = format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json",{config}}},"layers":[{}]}}"#,
            described.join(",")
        );
        self.files.lock().unwrap().insert(format!("manifests/{tag}"), manifest.into_bytes());
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    fn registry(&self, temp: &Temp) -> super::super::Registry {
        super::super::Registry::new().fetcher(self.clone()).cache_dir(&temp.0).user_credentials(false)
    }
}

#[test]
fn fetcher_of_the_embedder_is_asked_for_what_is_missing() {
    let (temp, memory) = (Temp::new("fetcher"), Memory::default());
    memory.image("1", &[0, 1]);
    memory.image("2", &[0, 2]);
    let registry = memory.registry(&temp);
    let _ = registry.pull("r.example/a/b:1").unwrap();
    assert_eq!(memory.asked().len(), 4, "a manifest, a configuration and two layers");
    let _ = registry.pull("r.example/a/b:1").unwrap();
    assert_eq!(memory.asked(), ["GET manifests/1"]);
    let _ = registry.pull("r.example/a/b:2").unwrap();
    assert_eq!(memory.asked().len(), 3, "one layer is shared");
    let digest = Digest::sha256(&memory.files.lock().unwrap()["manifests/2"]);
    let _ = registry.pull(format!("r.example/a/b@{digest}")).unwrap();
    assert_eq!(memory.asked(), [""; 0], "what a digest names does not change");
}

#[test]
fn damaged_layer_leaves_no_name_and_the_next_pull_mends_it() {
    let (temp, memory) = (Temp::new("damaged"), Memory::default());
    memory.image("1", &[0, 1]);
    let layer =
        memory.files.lock().unwrap().iter().find(|(_, bytes)| bytes.len() == 1536).map(|(path, _)| path.clone());
    let whole = memory.files.lock().unwrap().insert(layer.clone().unwrap(), vec![1; 1536]).unwrap();
    let error = memory.registry(&temp).pull("r.example/a/b:1").map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("layer 1"), "{error}");
    let store = ImageStore::at(&temp.0);
    assert!(store.list().unwrap().is_empty());
    memory.files.lock().unwrap().insert(layer.unwrap(), whole);
    memory.asked();
    let _ = memory.registry(&temp).pull("r.example/a/b:1").unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(memory.asked().len() <= 4);
    // Damage in the store is found, and mended by the next pull.
    assert!(store.verify(LONG).unwrap().is_empty());
    for folder in ["layers", "blobs"] {
        let file = std::fs::read_dir(temp.0.join(folder)).unwrap().next().unwrap().unwrap().path();
        std::fs::write(&file, "damage").unwrap();
        assert_eq!(store.verify(LONG).unwrap(), [file]);
        let _ = memory.registry(&temp).pull("r.example/a/b:1").unwrap();
        assert!(store.verify(LONG).unwrap().is_empty(), "{folder}");
    }
}

#[test]
fn store_keeps_what_is_used_and_what_is_pinned() {
    let (temp, memory) = (Temp::new("gc"), Memory::default());
    let store = ImageStore::at(&temp.0);
    for (tag, layers) in [("1", [0, 1]), ("2", [0, 2]), ("3", [0, 3])] {
        memory.image(tag, &layers);
        let _ = memory.registry(&temp).pull(format!("r.example/a/b:{tag}")).unwrap();
    }
    let tags = || {
        store
            .list()
            .unwrap()
            .into_iter()
            .map(|it| it.reference.tag().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    let used = |tag: &str, seconds| {
        let inner = Store::open(Some(temp.0.clone())).unwrap();
        inner.touch_at(&format!("r.example/a/b:{tag}"), std::time::UNIX_EPOCH + Duration::from_secs(seconds));
    };
    for (tag, seconds) in [("1", 30), ("2", 10), ("3", 20)] {
        used(tag, seconds);
    }
    store.pin("r.example/a/b:1", true).unwrap();
    used("1", 1);
    // All of it may stay, and does.
    assert!(store.gc(Size::gib(1)).unwrap().images.is_empty());
    let before = store.disk_usage().unwrap();
    // One byte less is one image less: the one that was used least recently and has no pin.
    let collected = store.gc(Size::bytes(before.as_bytes() - 1)).unwrap();
    assert_eq!(collected.images.iter().map(|it| it.tag().unwrap()).collect::<Vec<_>>(), ["2"]);
    assert_eq!(collected.freed.as_bytes(), before.as_bytes() - store.disk_usage().unwrap().as_bytes());
    assert_eq!(tags(), ["1", "3"]);
    // What is new stays while the store is used, and the pin for as long as it is there.
    store.remove("r.example/a/b:3").unwrap();
    let user = Store::open(Some(temp.0.clone())).unwrap();
    assert_eq!(store.gc(Size::bytes(0)).unwrap().freed, Size::bytes(0), "the store is used");
    drop(user);
    assert!(store.gc(Size::bytes(0)).unwrap().freed > Size::bytes(0));
    assert_eq!(tags(), ["1"]);
    memory.asked();
    let _ = memory.registry(&temp).pull("r.example/a/b:1").unwrap();
    assert_eq!(memory.asked(), ["GET manifests/1"], "its layers are there");
    assert!(store.list().unwrap()[0].pinned, "it stays so");
}

#[cfg(feature = "signatures")]
#[test]
fn image_that_is_not_admitted_gets_no_name_and_no_layer_is_asked_for() {
    use crate::container::image::{PublicKey, SignaturePolicy};

    let (temp, memory) = (Temp::new("policy"), Memory::default());
    memory.image("1", &[0]);
    let (store, name) = (ImageStore::at(&temp.0), "r.example/a/b:1");
    let pull = |policy| memory.registry(&temp).signature_policy(policy).pull(name);
    let error = pull(SignaturePolicy::refuse_all()).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    assert_eq!(memory.asked(), ["GET manifests/1"]);
    let key = || PublicKey::from_pem(crate::container::image::signature::tests_key()).unwrap();
    let error = pull(SignaturePolicy::accept_all().require("r.example/a", [key()])).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::PermissionDenied && error.to_string().contains("there is none"), "{error}");
    let digest = Digest::sha256(&memory.files.lock().unwrap()["manifests/1"]).to_string();
    let tag = digest.replace(':', "-");
    assert_eq!(
        memory.asked(),
        [
            "GET manifests/1".to_owned(),
            format!("GET manifests/{tag}.sig"),
            format!("GET referrers/{digest}"),
            format!("GET manifests/{tag}"),
        ]
    );
    assert!(store.list().unwrap().is_empty());
    let _ = pull(SignaturePolicy::refuse_all().accept("r.example/a")).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
}

/// The same files at other servers. Layers of `wrong.example` and the configuration of `wrong-config.example` are wrong. Layers of
/// `slow.example` come once `go` says so. Those of `unsupported.example` and `bomb.example` are others that no image may have.
#[derive(Clone)]
struct Others {
    memory: Memory,
    go: Arc<(Mutex<bool>, std::sync::Condvar)>,
}

/// An archive of one entry, of so many bytes.
fn padded(entry: &Made, len: usize) -> Vec<u8> {
    let mut bytes = archive(std::slice::from_ref(entry));
    bytes.resize(len, 0);
    bytes
}

impl Others {
    fn new(memory: &Memory) -> Self {
        Self { memory: memory.clone(), go: Arc::default() }
    }

    fn go(&self) {
        *self.go.0.lock().unwrap() = true;
        self.go.1.notify_all();
    }
}

impl Fetch for Others {
    fn fetch(&self, request: &FetchRequest) -> io::Result<FetchResponse> {
        let url = request.url().to_owned();
        let (host, path) = url.strip_prefix("https://").unwrap().split_once("/v2/a/b/").unwrap();
        let Some(mut bytes) = self.memory.files.lock().unwrap().get(path).cloned() else {
            return Ok(FetchResponse::new(404, io::empty()));
        };
        self.memory.asked.lock().unwrap().push(format!("{host} {path}"));
        let is_layer = path.starts_with("blobs/") && bytes.len() >= 1024;
        match host {
            "wrong.example" if is_layer => bytes[700] ^= 1,
            "wrong-config.example" if path.starts_with("blobs/") && !is_layer => bytes[0] ^= 1,
            "unsupported.example" if is_layer => {
                bytes = padded(&Made::file("file", "").pax("SCHILY.xattr.foo.bar", "x"), bytes.len());
            }
            "bomb.example" if is_layer => bytes = padded(&Made::file("file", "").sparse(&[], 1 << 50), bytes.len()),
            "slow.example" if is_layer => {
                let mut go = self.go.0.lock().unwrap();
                while !*go {
                    go = self.go.1.wait(go).unwrap();
                }
            }
            _ => {}
        }
        Ok(FetchResponse::new(200, io::Cursor::new(bytes)))
    }
}

#[test]
fn layer_that_a_mirror_has_wrong_is_asked_of_the_next_server() {
    let (temp, memory) = (Temp::new("mirror"), Memory::default());
    let of_24_kib = |n: usize| archive(&[Made::file("file", [n as u8; 24 << 10])]);
    memory.image_of("1", &[0, 1, 2], of_24_kib);
    let registry = memory.registry(&temp).fetcher(Others::new(&memory)).mirror("r.example", "wrong.example");
    // The limit counts layers that are kept, and no wrong ones.
    let registry = registry.max_size(crate::size::Size::kib(100));
    let _ = registry.pull("r.example/a/b:1").unwrap();
    let asked = memory.asked();
    let of = |host: &str| asked.iter().filter(|it| it.starts_with(host) && it.contains(" blobs/")).count();
    assert!(of("wrong.example") >= 2 && of("r.example") == 3, "{asked:?}");
    let store = ImageStore::at(&temp.0);
    assert!(store.verify(LONG).unwrap().is_empty() && store.list().unwrap().len() == 1);
    for (mirror, kind) in [
        ("wrong-config.example", ErrorKind::Corrupt),
        ("unsupported.example", ErrorKind::Unsupported),
        ("bomb.example", ErrorKind::InvalidConfig),
    ] {
        let other = Temp::new(mirror);
        let registry = || memory.registry(&other).fetcher(Others::new(&memory));
        let error = registry().pull(format!("{mirror}/a/b:1")).map(drop).unwrap_err();
        assert_eq!(error.kind(), kind, "{mirror}: {error}");
        let _ = registry().mirror("r.example", mirror).pull("r.example/a/b:1").unwrap();
    }
    let small = Temp::new("mirror-limit");
    let registry = memory.registry(&small).fetcher(Others::new(&memory)).max_size(crate::size::Size::kib(60));
    let error = registry.pull("r.example/a/b:1").map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("max_size"), "{error}");
    // When all have it wrong that is the error.
    let temp = Temp::new("mirrors");
    let registry = memory.registry(&temp).fetcher(Others::new(&memory)).mirror("wrong.example", "wrong.example");
    let error = registry.pull("wrong.example/a/b:1").map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("its digest is"), "{error}");
}

#[test]
fn registry_that_stalls_holds_up_no_pull_from_another() {
    let (temp, memory) = (Temp::new("stalls"), Memory::default());
    memory.image("1", &[0, 1]);
    let others = Others::new(&memory);
    let registry = memory.registry(&temp).fetcher(others.clone());
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| registry.pull("slow.example/a/b:1").map(drop));
        while !memory.asked.lock().unwrap().iter().any(|it| it.starts_with("slow.example blobs/")) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let _ = registry.pull("r.example/a/b:1").unwrap();
        let inodes = || {
            let files = std::fs::read_dir(temp.0.join("layers")).unwrap().map(|it| it.unwrap().metadata().unwrap());
            files.map(|it| std::os::unix::fs::MetadataExt::ino(&it)).collect::<std::collections::BTreeSet<_>>()
        };
        let made = inodes();
        assert_eq!(made.len(), 2);
        others.go();
        slow.join().unwrap().unwrap();
        assert_eq!(inodes(), made, "what is there stays, so that all containers share it");
    });
    assert_eq!(ImageStore::at(&temp.0).list().unwrap().len(), 2);
}
