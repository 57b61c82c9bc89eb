//! Pulls from a real registry on loopback, Debian's `docker-registry`, which `skopeo` fills.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is the test's")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cofferdam::image::{Credentials, Digest, ImageStore, LayerPhase, LayerProgress, Registry};
use cofferdam::{ErrorKind, Size};

/// A directory that goes away with its test.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-pull-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}: install it"));
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// `docker-registry` on a port of its own, and what it was asked for.
struct Server {
    child: Child,
    name: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(temp: &Temp, more: &str) -> Self {
        let config = temp.path("config.yml");
        let storage = temp.path("storage");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n{more}\nhttp:\n  addr: 127.0.0.1:0\n{}",
                storage.display(),
                if temp.path("server.key").exists() {
                    format!("  tls:\n    certificate: {0}/server.crt\n    key: {0}/server.key\n", temp.0.display())
                } else {
                    String::new()
                }
            ),
        )
        .unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry: install the package of that name");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (own, output) = (log.clone(), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).for_each(|it| own.lock().unwrap().push(it))
        });
        let mut errors = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let port = errors.by_ref().find_map(|line| {
            let (_, rest) = line.split_once("listening on 127.0.0.1:")?;
            Some(rest.chars().take_while(char::is_ascii_digit).collect::<String>())
        });
        std::thread::spawn(move || errors.for_each(drop));
        Self { child, name: format!("127.0.0.1:{}", port.expect("the registry listens")), log }
    }

    /// The paths of requests of a kind since the last call.
    fn asked(&self, part: &str) -> usize {
        // What was answered before is in the log before this answer.
        let marker = format!("/v2/marker/manifests/{}", self.log.lock().unwrap().len());
        let _ =
            Command::new("curl").args(["-sk", "-o", "/dev/null", &format!("http://{}{marker}", self.name)]).status();
        let late = std::time::Instant::now() + Duration::from_secs(20);
        while !self.log.lock().unwrap().iter().any(|line| line.contains(&marker)) {
            assert!(std::time::Instant::now() < late, "the registry writes no log");
            std::thread::yield_now();
        }
        let lines = std::mem::take(&mut *self.log.lock().unwrap());
        lines.iter().filter(|line| line.contains(part)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An OCI image layout with one image for this machine and one for another, of these layers: a file's name and content each.
fn layout(temp: &Temp, name: &str, layers: &[(&str, &str)]) -> PathBuf {
    let root = temp.path(name);
    let blobs = root.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8]| {
        let digest = Digest::sha256(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        format!(r#""digest":"{digest}","size":{}"#, bytes.len())
    };
    let (mut described, mut diff_ids) = (Vec::new(), Vec::new());
    for (file, content) in layers {
        let (folder, tar) = (temp.path("layer"), temp.path("layer.tar"));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(file), content).unwrap();
        let (folder, tar) = (folder.to_str().unwrap(), tar.to_str().unwrap());
        run("tar", &["-C", folder, "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "-cf", tar, "."]);
        diff_ids.push(format!("\"{}\"", Digest::sha256(&fs::read(tar).unwrap())));
        run("gzip", &["-nf", tar]);
        let descriptor = blob(&fs::read(format!("{tar}.gz")).unwrap());
        described.push(format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",{descriptor}}}"#));
    }
    let own = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let mut entries = Vec::new();
    for architecture in [own, "s390x"] {
        let config = blob(
            format!(
                r#"{{"architecture":"{architecture}","os":"linux","config":{{"Cmd":["/{architecture}"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
                diff_ids.join(",")
            )
            .as_bytes(),
        );
        let manifest = blob(
            format!(
                r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json",{config}}},"layers":[{}]}}"#,
                described.join(",")
            )
            .as_bytes(),
        );
        entries.push(format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json",{manifest},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        ));
    }
    let index = blob(
        format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{}]}}"#,
            entries.join(",")
        )
        .as_bytes(),
    );
    fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(
        root.join("index.json"),
        format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json",{index},"annotations":{{"org.opencontainers.image.ref.name":"1"}}}}]}}"#
        ),
    )
    .unwrap();
    root
}

fn push(layout: &Path, server: &Server, name: &str, more: &[&str]) {
    let from = format!("oci:{}:1", layout.display());
    let to = format!("docker://{}/{name}", server.name);
    let mut arguments = vec!["copy", "--quiet", "--all", "--dest-tls-verify=false"];
    arguments.extend(more);
    arguments.extend([from.as_str(), to.as_str()]);
    run("skopeo", &arguments);
}

fn registry(server: &Server, temp: &Temp) -> Registry {
    Registry::new().plain_http(&server.name).cache_dir(temp.path("cache")).user_credentials(false)
}

#[test]
fn pulled_image_is_kept_and_its_layers_are_not_asked_for_again() {
    let temp = Temp::new("again");
    let server = Server::start(&temp, "");
    push(&layout(&temp, "one", &[("a", "1"), ("b", "2")]), &server, "team/app:1", &[]);
    push(&layout(&temp, "two", &[("a", "1"), ("c", "3")]), &server, "team/app:2", &[]);
    server.asked("");

    let seen = Arc::new(Mutex::new(Vec::new()));
    let progress = seen.clone();
    let pulls = registry(&server, &temp)
        .progress(move |it: &LayerProgress| progress.lock().unwrap().push((it.layer, it.phase)));
    let image = pulls.pull(format!("{}/team/app:1", server.name)).unwrap();
    let done = |layer| seen.lock().unwrap().contains(&(layer, LayerPhase::Done));
    assert!(done(0) && done(1), "{seen:?}");
    // A configuration and two layers.
    assert_eq!(server.asked("GET /v2/team/app/blobs/"), 3);
    assert_eq!(image.config().unwrap().cmd.len(), 1);
    image.prepare().unwrap();

    // The index alone: what it names is there.
    pulls.pull(format!("{}/team/app:1", server.name)).unwrap().prepare().unwrap();
    let mut lines = server.log.lock().unwrap().clone();
    lines.retain(|line| line.contains("\"GET /v2/team"));
    assert_eq!(lines.len(), 1, "{lines:?}");
    server.asked("");

    // A layer that another image has is not asked for.
    let _ = pulls.pull(format!("{}/team/app:2", server.name)).unwrap();
    assert_eq!(server.asked("GET /v2/team/app/blobs/"), 2);

    let store = ImageStore::at(temp.path("cache"));
    let list = store.list().unwrap();
    let names: Vec<_> = list.iter().map(|it| (it.reference.repository(), it.reference.tag())).collect();
    assert_eq!(names, [("team/app", Some("1")), ("team/app", Some("2"))]);
    assert!(list.iter().all(|it| it.size > Size::bytes(0)));
    assert!(store.verify(Duration::from_secs(60)).unwrap().is_empty());

    // Without the registry it is found by its name, until it is removed.
    let name = format!("{}/team/app:1", server.name);
    drop(server);
    store.image(&name).unwrap().prepare().unwrap();
    store.remove(&name).unwrap();
    assert_eq!(store.image(&name).map(drop).unwrap_err().kind(), ErrorKind::NotFound);
    let before = store.disk_usage().unwrap();
    let collected = store.gc(Size::gib(1)).unwrap();
    assert!(collected.images.is_empty() && collected.freed > Size::bytes(0), "{collected:?}");
    assert!(store.disk_usage().unwrap() < before);
    let other = name.replace("app:1", "app:2");
    store.image(&other).unwrap().prepare().unwrap();
    store.pin(&other, true).unwrap();
    assert!(store.gc(Size::bytes(0)).unwrap().images.is_empty(), "it has a pin");
    store.pin(&other, false).unwrap();
    assert_eq!(store.gc(Size::bytes(0)).unwrap().images.len(), 1);
    assert_eq!(store.disk_usage().unwrap(), Size::bytes(0));
}

#[test]
fn image_for_another_platform_is_chosen_or_named() {
    let temp = Temp::new("platform");
    let server = Server::start(&temp, "");
    push(&layout(&temp, "one", &[("a", "1")]), &server, "app:1", &[]);
    let name = format!("{}/app:1", server.name);
    let image = registry(&server, &temp).platform("linux/s390x".parse().unwrap()).pull(&name).unwrap();
    assert_eq!(image.config().unwrap().cmd, ["/s390x"]);
    let error = registry(&server, &temp).platform("linux/riscv64".parse().unwrap()).pull(&name).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("linux/s390x"), "{error}");
    let error = registry(&server, &temp).pull(format!("{}/app:2", server.name)).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("pulling 127.0.0.1:"), "{error}");
}

#[test]
fn users_of_a_password_file_are_let_in_by_tls() {
    let temp = Temp::new("tls");
    let (key, crt) = (temp.path("server.key"), temp.path("server.crt"));
    let (key, crt) = (key.to_str().unwrap(), crt.to_str().unwrap());
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            key,
            "-out",
            crt,
            "-days",
            "30",
            "-subj",
            "/CN=registry",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ],
    );
    let users = temp.path("users");
    fs::write(&users, run("htpasswd", &["-nbB", "me", "hunter2"])).unwrap();
    let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}", users.display());
    let server = Server::start(&temp, &auth);
    push(&layout(&temp, "one", &[("a", "1")]), &server, "app:1", &["--dest-creds", "me:hunter2"]);
    let name = format!("{}/app:1", server.name);
    let base = || Registry::new().cache_dir(temp.path("cache")).user_credentials(false);
    let error = base().pull(&name).map(drop).unwrap_err();
    assert!(error.to_string().contains("`Registry::ca_certificates`"), "{error}");

    let trusted = || base().ca_certificates(fs::read(crt).unwrap());
    let denied = |registry: Registry| {
        let error = registry.pull(&name).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(!error.to_string().contains("hunter"), "{error}");
    };
    denied(trusted());
    denied(trusted().credentials(&server.name, Credentials::basic("me", "hunter3")));
    trusted().credentials(&server.name, Credentials::basic("me", "hunter2")).pull(&name).unwrap().prepare().unwrap();
    let own = server.name.clone();
    let by_callback =
        trusted().credentials_with(move |name| Ok((name == own).then(|| Credentials::basic("me", "hunter2"))));
    by_callback.cache_dir(temp.path("other")).pull(&name).unwrap().prepare().unwrap();
    let error = base().ca_certificates("none").pull(&name).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
}

/// What a child of the tests below pulls: an image, and the store's directory.
const PULL: &str = "COFFERDAM_TEST_PULL";

/// Only a child has something to do here.
#[test]
fn child_pulls_what_it_is_asked_to() {
    let Ok(asked) = std::env::var(PULL) else { return };
    let (name, cache) = asked.split_once(' ').unwrap();
    let host = name.split('/').next().unwrap();
    let registry = Registry::new().plain_http(host).cache_dir(cache).user_credentials(false);
    registry.pull(name).unwrap().prepare().unwrap();
}

fn child(name: &str, cache: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_pulls_what_it_is_asked_to"]).env(PULL, format!("{name} {}", cache.display()));
    command.stdout(Stdio::null()).spawn().unwrap()
}

/// Lines that differ from each other.
fn lines(seed: u64, bytes: usize) -> String {
    let mut all = String::new();
    let mut n = seed;
    while all.len() < bytes {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        all += &format!("{n:016x}\n");
    }
    all
}

#[test]
fn killed_pull_leaves_a_whole_store_and_the_next_one_succeeds() {
    let temp = Temp::new("kill");
    let server = Server::start(&temp, "");
    let (a, b, c) = (lines(1, 2 << 20), lines(2, 2 << 20), lines(3, 2 << 20));
    push(&layout(&temp, "one", &[("a", &a), ("b", &b), ("c", &c)]), &server, "app:1", &[]);
    let name = format!("{}/app:1", server.name);
    let begun = std::time::Instant::now();
    assert!(child(&name, &temp.path("first")).wait().unwrap().success());
    let whole = begun.elapsed();
    let (rounds, mut killed) = (40_u32, 0);
    for round in 0..rounds {
        let cache = temp.path(&format!("cache{}", round % 4));
        let mut child = child(&name, &cache);
        std::thread::sleep(whole * round / rounds);
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        if cache.exists() {
            assert!(ImageStore::at(&cache).verify(Duration::from_secs(60)).unwrap().is_empty());
        }
    }
    assert!(killed > 0, "none was killed");
    for n in 0..4 {
        let cache = temp.path(&format!("cache{n}"));
        registry(&server, &temp).cache_dir(&cache).pull(&name).unwrap().prepare().unwrap();
        let store = ImageStore::at(&cache);
        assert_eq!((store.list().unwrap().len(), store.verify(Duration::from_secs(60)).unwrap().len()), (1, 0));
        // Nothing is there that the image does not need, but its composed disk.
        assert_eq!(store.gc(Size::gib(1)).unwrap().freed, Size::bytes(0));
    }
}

#[test]
fn two_processes_get_what_both_need_once() {
    let temp = Temp::new("two");
    let server = Server::start(&temp, "");
    let (a, b, c) = (lines(1, 4 << 20), lines(2, 1 << 20), lines(3, 1 << 20));
    push(&layout(&temp, "one", &[("a", &a), ("b", &b)]), &server, "app:1", &[]);
    push(&layout(&temp, "two", &[("a", &a), ("c", &c)]), &server, "app:2", &[]);
    server.asked("");
    let cache = temp.path("cache");
    let children = ["1", "2", "1", "2"].map(|tag| child(&format!("{}/app:{tag}", server.name), &cache));
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let store = ImageStore::at(&cache);
    assert_eq!((store.list().unwrap().len(), store.verify(Duration::from_secs(60)).unwrap().len()), (2, 0));
    // Three layers, and the two configurations as often as they are asked for.
    let blobs = server.asked("GET /v2/app/blobs/");
    assert!((5..=7).contains(&blobs), "{blobs} blobs were asked for");
}
