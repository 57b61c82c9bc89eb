//! Pulls from a registry on loopback: time and memory, beside `skopeo copy` and `umoci unpack`, in the same run.
//!
//! The registry is Debian's `docker-registry`. Each pull is a process of its own, with a store of its own.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;
#[path = "common/layout.rs"]
mod layout;

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cofferdam::image::{LayerPhase, Registry};
use common::{Running, cache, figure, median};

/// Set for a process that pulls: the registry, the image and the store.
const PULL: &str = "COFFERDAM_BENCH_PULL";
const ROUNDS: usize = 3;
const MIB: f64 = 1_048_576.0;

/// What one pull was.
#[derive(Debug, Clone, Copy)]
struct Pulled {
    ms: f64,
    /// The most memory that the process had.
    peak_mib: f64,
    /// Of layers, as they were sent.
    received_mib: f64,
}

/// Pulls in this process, and prints what it was.
fn pull(words: &str) {
    let mut words = words.split(' ');
    let mut word = || words.next().expect("three words");
    let (host, name, store) = (word(), word(), word());
    let received = Mutex::new(std::collections::BTreeMap::new());
    let total = AtomicU64::new(0);
    let begin = Instant::now();
    let registry = Registry::new().user_credentials(false).plain_http(host).cache_dir(store).progress(move |layer| {
        if layer.phase != LayerPhase::Present {
            received.lock().expect("a lock").insert(layer.layer, layer.received);
        }
        total.store(received.lock().expect("a lock").values().sum(), Ordering::Relaxed);
        if layer.phase == LayerPhase::Done {
            println!("received {}", total.load(Ordering::Relaxed));
        }
    });
    let image = registry.pull(format!("{host}/{name}")).expect("the pull");
    image.prepare().expect("the disk");
    let took = begin.elapsed();
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    println!("took {}", took.as_secs_f64() * 1000.0);
    println!("peak {}", peak.trim().trim_end_matches(" kB"));
}

/// The same in a process of its own.
fn pulled(host: &str, name: &str, store: &Path) -> Pulled {
    let program = std::env::current_exe().expect("this program");
    let output =
        Command::new(program).env(PULL, format!("{host} {name} {}", store.display())).output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let number = |what: &str| {
        let found = text.lines().rev().find_map(|line| line.strip_prefix(what)?.trim().parse::<f64>().ok());
        found.unwrap_or(0.0)
    };
    Pulled { ms: number("took"), peak_mib: number("peak") / 1024.0, received_mib: number("received") / MIB }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output();
    let output = output.expect("docker-registry, skopeo and umoci: run `make bench`");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What others do for it: from the registry to a directory with the files.
fn peer(host: &str, name: &str, dir: &Path) -> f64 {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).expect("a directory");
    let path = |name: &str| dir.join(name).display().to_string();
    let begin = Instant::now();
    let layout = format!("oci:{}:it", path("layout"));
    run("skopeo", &["copy", "--src-tls-verify=false", &format!("docker://{host}/{name}"), &layout]);
    run("umoci", &["unpack", "--image", &format!("{}:it", path("layout")), &path("bundle")]);
    begin.elapsed().as_secs_f64() * 1000.0
}

/// A registry of these layouts, and its name.
fn serve(dir: &Path, images: &[(&str, &Path)]) -> (Running, String) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("a port");
    drop(listener);
    let config = dir.join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{ level: error }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: {address} }}\n",
        dir.join("registry").display()
    );
    std::fs::write(&config, text).expect("a file");
    let mut registry = Command::new("docker-registry");
    registry.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
    let registry = Running(registry.spawn().expect("docker-registry: run `make bench`"));
    let deadline = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "the registry does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    for (name, layout) in images {
        let from = format!("oci:{}", layout.display());
        run("skopeo", &["copy", "--dest-tls-verify=false", &from, &format!("docker://{address}/{name}")]);
    }
    (registry, address.to_string())
}

fn main() {
    if let Ok(words) = std::env::var(PULL) {
        return pull(&words);
    }
    let dir = std::env::temp_dir().join(format!("cofferdam-bench-image-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let rootfs: PathBuf = cache().join("images/debian-12-network.tar");
    let small: Vec<_> = (1..=9).map(|number| layout::small_layer(&dir, number)).collect();
    let layers: Vec<_> = std::iter::once(rootfs).chain(small).collect();
    let (first, second) = (dir.join("first"), dir.join("second"));
    layout::make(&first, &layers[..9]);
    layout::make(&second, &layers);
    let (registry, host) = serve(&dir, &[("first:1", &first), ("second:1", &second)]);

    let (mut ours, mut theirs, mut shared) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let store = dir.join("store");
        ours.push(pulled(&host, "first:1", &store));
        shared.push(pulled(&host, "second:1", &store));
        std::fs::remove_dir_all(&store).expect("a store");
        theirs.push(peer(&host, "first:1", &dir.join("peer")));
    }
    let of = |pulls: &[Pulled], field: fn(&Pulled) -> f64| median(&pulls.iter().map(field).collect::<Vec<_>>());
    let name = "pull and unpack an image of 9 layers and 612 MB";
    figure(name, of(&ours, |pull| pull.ms), "ms", Some(median(&theirs)));
    figure("memory of the process that pulls it, at most", of(&ours, |pull| pull.peak_mib), "MiB", None);
    figure("layers of it, as they are sent", of(&ours, |pull| pull.received_mib), "MiB", None);
    figure("pull of an image that has one small layer more", of(&shared, |pull| pull.ms), "ms", None);
    figure("layers that this pull receives", of(&shared, |pull| pull.received_mib), "MiB", None);
    drop(registry);
    std::fs::remove_dir_all(dir).expect("a directory of its own");
}
