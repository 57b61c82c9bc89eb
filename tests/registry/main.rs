//! Pulls from a real registry on loopback, Debian's `docker-registry`, which `skopeo` fills.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is the test's")]

mod access;
mod full_disk;
mod killed;
mod pulls;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cofferdam::image::{Digest, Registry};

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

    /// Returns how many requests since the last call have `part` in their log line.
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
