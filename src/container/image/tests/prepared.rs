//! Layers on their way into the store: once each, in parallel, and nothing half-made.

use std::io::Read;
use std::sync::{Condvar, Mutex};

use super::super::layers::fuzzing::Blobs;
use super::super::layers::{Allowed, compose, prepare_layers};
use super::super::oci::{
    Descriptor, Digest, ImageConfig, ImageSource, Layer, LayerPhase, LayerProgress, Resolved, from_reader,
};
use super::super::store::Store;
use super::*;

/// Blobs that count how often each is opened.
#[derive(Default)]
struct Counted {
    blobs: Blobs,
    opened: Mutex<BTreeMap<Digest, u32>>,
}

impl ImageSource for Counted {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        *self.opened.lock().unwrap().entry(blob.digest.clone()).or_default() += 1;
        self.blobs.open(blob, deadline)
    }
}

fn layer_of(n: u32) -> Vec<u8> {
    archive(&[Made::file(format!("file-{n}"), n.to_le_bytes().repeat(20_000)), Made::file("top", n.to_string())])
}

fn image(layers: Vec<Layer>) -> Resolved {
    Resolved::without_manifest(b"{}".to_vec(), ImageConfig::default(), layers)
}

fn allowed() -> Allowed {
    Allowed { limits: ImageLimits::default(), max_size: Size::gib(1) }
}

fn deadline() -> PrepareDeadline {
    PrepareDeadline::new(Duration::from_secs(60), None)
}

fn store(temp: &Temp) -> Store {
    Store::open(Some(temp.0.join("cache"))).unwrap()
}

fn in_store(temp: &Temp) -> usize {
    fs::read_dir(temp.0.join("cache/layers")).unwrap().count()
}

#[test]
fn concurrent_callers_unpack_each_layer_once() {
    let (temp, mut source) = (Temp::new(), Counted::default());
    let layers: Vec<Layer> = (0..8).map(|n| source.blobs.add_layer(&layer_of(n))).collect();
    // Each has some of the others' layers, and one of them twice.
    let images: Vec<Resolved> = (0..4).map(|n| image([&layers[n..n + 5], &layers[n..=n]].concat())).collect();
    std::thread::scope(|scope| {
        for image in &images {
            scope.spawn(|| prepare_layers(&store(&temp), &source, image, &allowed(), &deadline(), &|_| {}).unwrap());
        }
    });
    let opened = source.opened.lock().unwrap();
    assert_eq!((opened.len(), in_store(&temp)), (8, 8));
    assert!(opened.values().all(|times| *times == 1), "{opened:?}");
    let pieces = compose(&store(&temp), &images[3].diff_ids(), &allowed(), &deadline()).unwrap();
    // Five layers, and the metadata before and behind them.
    assert_eq!(pieces.len(), 7);
    // Another image of these layers shares their descriptors.
    let others = compose(&store(&temp), &images[2].diff_ids(), &allowed(), &deadline()).unwrap();
    let shared = |piece: &DiskPiece<Arc<File>>| others.iter().any(|other| Arc::ptr_eq(&other.file, &piece.file));
    assert_eq!(pieces.iter().filter(|piece| shared(piece)).count(), 4);
}

#[test]
fn progress_is_told_for_every_layer() {
    let (temp, mut source) = (Temp::new(), Counted::default());
    let image = image((0..5).map(|n| source.blobs.add_layer(&layer_of(n))).collect());
    let told = || {
        let seen = Mutex::new(vec![Vec::new(); 5]);
        let observe = |progress: &LayerProgress| {
            assert_eq!((progress.layers, &progress.digest), (5, &image.layers[progress.layer].blob.digest));
            seen.lock().unwrap()[progress.layer].push((progress.phase, progress.received, progress.size));
        };
        prepare_layers(&store(&temp), &source, &image, &allowed(), &deadline(), &observe).unwrap();
        seen.into_inner().unwrap()
    };
    for layer in told() {
        let size = layer[0].2;
        assert_eq!((layer[0], layer.last()), ((LayerPhase::Reading, 0, size), Some(&(LayerPhase::Done, size, size))));
        assert!(layer.is_sorted_by_key(|(_, received, _)| *received), "{layer:?}");
    }
    assert!(told().iter().all(|layer| matches!(layer[..], [(LayerPhase::Present, ..)])));
}

#[test]
fn failing_layer_leaves_nothing_and_names_itself() {
    let (temp, mut source) = (Temp::new(), Counted::default());
    let layers: Vec<Layer> = (0..12).map(|n| source.blobs.add_layer(&layer_of(n))).collect();
    let damaged = &layers[4].blob.digest;
    source.blobs.0.get_mut(damaged).unwrap()[600] ^= 1;
    let image = image(layers.clone());
    let error = prepare_layers(&store(&temp), &source, &image, &allowed(), &deadline(), &|_| {}).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().starts_with("layer 4, sha256:"), "{error}");
    assert!(in_store(&temp) < 12);
    let error = compose(&store(&temp), &image.diff_ids(), &allowed(), &deadline()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // The next try needs only what is not there yet.
    source.blobs.0.get_mut(damaged).unwrap()[600] ^= 1;
    prepare_layers(&store(&temp), &source, &image, &allowed(), &deadline(), &|_| {}).unwrap();
    assert_eq!(in_store(&temp), 12);
    let opened = source.opened.lock().unwrap();
    assert!(opened.iter().all(|(digest, times)| *times == if digest == damaged { 2 } else { 1 }), "{opened:?}");
}

#[test]
fn most_layers_that_may_be_are_one_disk() {
    let (temp, mut source) = (Temp::new(), Counted::default());
    let image = image((0..128).map(|n| source.blobs.add_layer(&layer_of(n))).collect());
    prepare_layers(&store(&temp), &source, &image, &allowed(), &deadline(), &|_| {}).unwrap();
    let pieces = compose(&store(&temp), &image.diff_ids(), &allowed(), &deadline()).unwrap();
    assert_eq!(pieces.len(), 130);
    let disk = super::super::layers::fuzzing::joined(&pieces).unwrap();
    let tree = Reader::open(&disk).tree(16);
    assert_eq!((tree.len(), tree[&b"top"[..]].content.as_slice()), (130, &b"127"[..]));
}

/// A source that gives bytes until it is cancelled.
struct Endless(CancelToken);

impl ImageSource for Endless {
    fn open(&self, _: &Descriptor, _: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        Ok(Box::new(self))
    }
}

impl Read for &Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.cancel();
        // An empty file without end, as tar has it.
        buffer.fill(0);
        Ok(buffer.len())
    }
}

#[test]
fn cancelled_layer_ends_soon_and_is_not_kept() {
    let temp = Temp::new();
    let cancel = CancelToken::new().unwrap();
    let deadline = PrepareDeadline::new(Duration::MAX, [&cancel]);
    let digest = Digest::sha256(b"");
    let layer = Layer { blob: Descriptor::of(digest.clone(), u64::MAX), diff_id: digest };
    let error = prepare_layers(&store(&temp), &Endless(cancel), &image(vec![layer]), &allowed(), &deadline, &|_| {})
        .unwrap_err();
    assert_eq!((error.kind(), in_store(&temp)), (ErrorKind::Cancelled, 0), "{error}");
    let lost = from_reader(io::Error::other("lost"), &deadline);
    assert_eq!(lost.kind(), ErrorKind::Cancelled);
}

#[test]
fn layers_together_take_no_more_than_the_most_of_one_image() {
    let mut source = Blobs::default();
    let layers: Vec<Layer> = (0..4).map(|n| source.add_layer(&layer_of(n))).collect();
    let allowed = Allowed { limits: ImageLimits::default(), max_size: Size::kib(200) };
    let prepare = |layers: &[Layer]| {
        let temp = Temp::new();
        prepare_layers(&store(&temp), &source, &image(layers.to_vec()), &allowed, &deadline(), &|_| {})
    };
    // Each of them has 84 KiB.
    prepare(&layers[..2]).unwrap();
    let error = prepare(&layers).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    assert!(error.to_string().contains("Image::max_size"), "{error}");
}

/// How far the servers of [`Misled`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Begun,
    /// The wrong bytes of the first layer have taken its space, but for the end.
    Taken,
    /// The second layer had no space left.
    Refused,
}

/// A source whose first server has wrong bytes for one layer. Their end comes once another layer has failed for want of space.
struct Misled {
    right: Counted,
    wrong: (Digest, Vec<u8>),
    stage: Mutex<Stage>,
    changed: Condvar,
}

impl Misled {
    fn reach(&self, stage: Stage) {
        *self.stage.lock().unwrap() = stage;
        self.changed.notify_all();
    }

    fn wait(&self, stage: Stage) {
        let held = self.stage.lock().unwrap();
        let (held, _) = self.changed.wait_timeout_while(held, Duration::from_secs(30), |held| *held < stage).unwrap();
        assert!(*held >= stage, "{stage:?} is not reached, but {:?}", *held);
    }

    fn times(&self, layer: &Layer) -> u32 {
        self.right.opened.lock().unwrap().get(&layer.blob.digest).copied().unwrap_or_default()
    }
}

impl ImageSource for Misled {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let right = self.right.open(blob, deadline)?;
        let first = self.right.opened.lock().unwrap()[&blob.digest] == 1;
        if blob.digest == self.wrong.0 && first {
            return Ok(Box::new(Held { source: self, left: &self.wrong.1 }));
        }
        self.wait(Stage::Taken);
        Ok(right)
    }

    fn distrust(&self, blob: &Descriptor) -> bool {
        let is_wrong = blob.digest == self.wrong.0;
        if !is_wrong {
            self.reach(Stage::Refused);
        }
        is_wrong
    }
}

/// The wrong bytes, whose last one is held back.
struct Held<'a> {
    source: &'a Misled,
    left: &'a [u8],
}

impl Read for Held<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let [last] = self.left {
            self.source.reach(Stage::Taken);
            self.source.wait(Stage::Refused);
            self.left = &[];
            buffer[0] = *last;
            return Ok(1);
        }
        let n = buffer.len().min(self.left.len().saturating_sub(1));
        let (given, left) = self.left.split_at(n);
        buffer[..n].copy_from_slice(given);
        self.left = left;
        Ok(n)
    }
}

#[test]
fn space_that_wrong_bytes_took_is_free_for_other_layers() {
    let (temp, mut right) = (Temp::new(), Counted::default());
    let mut wrong = archive(&[Made::file("large", vec![1; 160 << 10])]);
    // Zeros follow an archive. They are more than what is read at once, so the file is written before the last one comes.
    wrong.resize(3 << 20, 0);
    let mut padded = layer_of(0);
    padded.resize(wrong.len(), 0);
    let layers = [padded, layer_of(1)].map(|bytes| right.blobs.add_layer(&bytes));
    let wrong = (layers[0].blob.digest.clone(), wrong);
    let source = Misled { right, wrong, stage: Mutex::new(Stage::Begun), changed: Condvar::new() };
    // Both layers have 84 KiB.
    let allowed = Allowed { limits: ImageLimits::default(), max_size: Size::kib(200) };
    prepare_layers(&store(&temp), &source, &image(layers.to_vec()), &allowed, &deadline(), &|_| {}).unwrap();
    assert_eq!(*source.stage.lock().unwrap(), Stage::Refused);
    // Wrong, and right from another server; without space, and once more.
    assert_eq!((source.times(&layers[0]), source.times(&layers[1]), in_store(&temp)), (2, 2, 2));
}
