//! Processes that pull at the same time, and those that are killed meanwhile.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cofferdam::Size;
use cofferdam::image::{ImageStore, Registry};

use super::{Server, Temp, layout, lines, push, registry};

/// What a child pulls: an image, the store's directory, and a file that it makes as it begins. It makes another at the end.
const PULL: &str = "COFFERDAM_TEST_PULL";

/// Only a child has something to do here.
#[test]
fn child_pulls_what_it_is_asked_to() {
    let Ok(asked) = std::env::var(PULL) else { return };
    let [name, cache, begun] = asked.split(' ').collect::<Vec<_>>()[..] else { panic!("{asked}") };
    let host = name.split('/').next().unwrap();
    let registry = Registry::new().plain_http(host).cache_dir(cache).user_credentials(false);
    std::fs::write(begun, "").unwrap();
    registry.pull(name).unwrap().prepare().unwrap();
    std::fs::write(format!("{begun}-ended"), "").unwrap();
}

/// A process that pulls.
struct Pulling {
    child: Child,
    begun: std::path::PathBuf,
}

impl Pulling {
    /// Returns when the process is about to pull.
    fn start(name: &str, cache: &Path, temp: &Temp) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let begun = temp.path(&format!("begun-{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "killed::child_pulls_what_it_is_asked_to"]);
        command.env(PULL, format!("{name} {} {}", cache.display(), begun.display()));
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        while !begun.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the process ended early");
            std::thread::sleep(Duration::from_micros(200));
        }
        Self { child, begun }
    }

    fn succeeds(mut self) {
        assert!(self.child.wait().unwrap().success());
        assert!(self.has_ended());
    }

    fn has_ended(&self) -> bool {
        Path::new(&format!("{}-ended", self.begun.display())).exists()
    }

    /// Kills it; whether that was in the middle of the pull.
    fn kill(mut self) -> bool {
        self.child.kill().unwrap();
        let killed = self.child.wait().unwrap().signal() == Some(9);
        killed && !self.has_ended()
    }
}

/// Numbers of a seed, each below `below`.
struct Random(u64);

impl Random {
    fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// Whatever was pulled until now, the store is whole, and has no name but `name`, and that only with all it stands for.
fn check(cache: &Path, name: &str, at: &str) {
    if !cache.exists() {
        return;
    }
    let store = ImageStore::at(cache);
    let broken = store.verify(Duration::from_secs(60)).unwrap();
    assert!(broken.is_empty(), "{at}: {broken:?}");
    for listed in store.list().unwrap() {
        assert_eq!(listed.reference.to_string(), name, "{at}");
        store.image(name).unwrap_or_else(|error| panic!("{at}: {error}")).prepare().unwrap();
    }
}

#[test]
fn pull_killed_at_any_moment_leaves_a_whole_store_and_the_next_one_succeeds() {
    let rounds = if std::env::var_os("COFFERDAM_SOAK").is_some() { 100 } else { 20 };
    let seed = std::env::var("COFFERDAM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64);
    println!("COFFERDAM_SEED={seed}");
    let mut random = Random(seed);
    let temp = Temp::new("kill");
    let server = Server::start(&temp, "");
    let contents: Vec<_> = (0..6).map(|n| (format!("file-{n}"), lines(n, 1 << 20))).collect();
    let layers: Vec<_> = contents.iter().map(|(name, content)| (&**name, &**content)).collect();
    push(&layout(&temp, "one", &layers), &server, "app:1", &[]);
    let name = format!("{}/app:1", server.name);

    let measure = |n: u32| {
        let begun = Instant::now();
        Pulling::start(&name, &temp.path(&format!("whole-{n}")), &temp).succeeds();
        begun.elapsed()
    };
    let mut whole = (0..3).map(measure).min().unwrap();
    let (mut killed, mut round, mut store, mut kills_of_store) = (0, 0, 0, 0);
    while killed < rounds {
        round += 1;
        assert!(
            round <= 10 * rounds,
            "seed {seed}: {killed} of {round} were killed in the middle of a pull of {whole:?}"
        );
        // Every other store sees several kills before a pull ends.
        let cache = temp.path(&format!("cache-{store}"));
        let moment = Duration::from_micros(random.below(whole.as_micros().max(1) as u64));
        let at =
            format!("seed {seed}, round {round}, after {moment:?} of {whole:?}, kill {kills_of_store} of the store");
        let pulling = Pulling::start(&name, &cache, &temp);
        std::thread::sleep(moment);
        match pulling.kill() {
            true => killed += 1,
            // The machine has become faster: a whole pull had ended by then.
            false if kills_of_store == 0 => whole = moment,
            // The store had most of the layers.
            false => {}
        }
        check(&cache, &name, &at);
        kills_of_store += 1;
        if store % 2 == 1 && kills_of_store < 3 {
            continue;
        }
        let image = registry(&server, &temp).cache_dir(&cache).pull(&name).unwrap_or_else(|e| panic!("{at}: {e}"));
        image.prepare().unwrap_or_else(|error| panic!("{at}: {error}"));
        check(&cache, &name, &at);
        let store_of_image = ImageStore::at(&cache);
        assert_eq!(store_of_image.list().unwrap().len(), 1, "{at}");
        // Nothing is there that the image does not need, but its composed disk.
        assert_eq!(store_of_image.gc(Size::gib(1)).unwrap().freed, Size::bytes(0), "{at}");
        std::fs::remove_dir_all(&cache).unwrap();
        (store, kills_of_store) = (store + 1, 0);
    }
    println!("{killed} of {round} were killed in the middle of a pull of {whole:?}");
}

#[test]
fn processes_get_what_several_need_once() {
    let temp = Temp::new("two");
    let server = Server::start(&temp, "");
    let (a, b, c) = (lines(1, 4 << 20), lines(2, 1 << 20), lines(3, 1 << 20));
    push(&layout(&temp, "one", &[("a", &a), ("b", &b)]), &server, "app:1", &[]);
    push(&layout(&temp, "two", &[("a", &a), ("c", &c)]), &server, "app:2", &[]);
    server.asked("");
    let cache = temp.path("cache");
    let pulling = ["1", "2", "1", "2"].map(|tag| Pulling::start(&format!("{}/app:{tag}", server.name), &cache, &temp));
    pulling.into_iter().for_each(Pulling::succeeds);
    let store = ImageStore::at(&cache);
    assert_eq!((store.list().unwrap().len(), store.verify(Duration::from_secs(60)).unwrap().len()), (2, 0));
    // Three layers, and the two configurations as often as they are asked for.
    let blobs = server.asked("GET /v2/app/blobs/");
    assert!((5..=7).contains(&blobs), "{blobs} blobs were asked for");
}

/// A process that waits for a layer of another goes on by itself once that has been killed.
#[test]
fn pull_goes_on_when_another_process_with_the_same_layers_is_killed() {
    let temp = Temp::new("survivor");
    let server = Server::start(&temp, "");
    let contents: Vec<_> = (0..5).map(|n| (format!("file-{n}"), lines(n, 1 << 20))).collect();
    let layers: Vec<_> = contents.iter().map(|(name, content)| (&**name, &**content)).collect();
    push(&layout(&temp, "one", &layers[..4]), &server, "app:1", &[]);
    push(&layout(&temp, "two", &layers[1..]), &server, "app:2", &[]);
    let [one, two] = ["1", "2"].map(|tag| format!("{}/app:{tag}", server.name));
    let begun = Instant::now();
    Pulling::start(&one, &temp.path("whole"), &temp).succeeds();
    let whole = begun.elapsed();
    let (rounds, mut killed) = (6, 0);
    for round in 0..rounds {
        let cache = temp.path(&format!("cache-{round}"));
        let victim = Pulling::start(&one, &cache, &temp);
        let survivor = Pulling::start(&two, &cache, &temp);
        std::thread::sleep(whole * round / rounds);
        killed += u32::from(victim.kill());
        survivor.succeeds();
        check_both(&cache, &one, &two);
    }
    assert!(killed > 0, "none was killed in the middle");
}

/// The second image is there, and the first wherever it has a name.
fn check_both(cache: &Path, one: &str, two: &str) {
    let store = ImageStore::at(cache);
    assert!(store.verify(Duration::from_secs(60)).unwrap().is_empty());
    let names: Vec<_> = store.list().unwrap().iter().map(|listed| listed.reference.to_string()).collect();
    assert!(names.contains(&two.to_owned()) && names.iter().all(|name| name == one || name == two), "{names:?}");
    for name in names {
        store.image(&name).unwrap().prepare().unwrap();
    }
}
