//! What an archive of a stranger may cost, and what it may not.

use std::time::Instant;

use super::*;

fn limited(entries: &[Made], limits: ImageLimits) -> Error {
    prepare_with(&archive(entries), |image| image.limits(limits)).map(drop).expect_err("it is beyond a limit")
}

/// It is the embedder's limit, and its method is named.
fn names(error: &Error, method: &str) {
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    assert!(error.to_string().contains(method), "{error}");
}

#[test]
fn limit_errors_name_the_method() {
    let limits = ImageLimits::new;
    let entries: Vec<Made> = (0..100).map(|n| Made::file(format!("d{n}/f"), "x")).collect();
    names(&limited(&entries, limits().max_entries(150)), "ImageLimits::max_entries");
    names(&limited(&entries, limits().max_names(Size::bytes(200))), "ImageLimits::max_names");
    names(&limited(&[Made::file("a/b/c/d", "")], limits().max_depth(2)), "ImageLimits::max_depth");
    let attribute = |path: &str| Made::file(path, "").pax("SCHILY.xattr.user.x", [1; 1000]);
    names(&limited(&[attribute("a")], limits().entry_xattrs(Size::bytes(900))), "ImageLimits::entry_xattrs");
    names(&limited(&[attribute("a"), attribute("b")], limits().xattrs(Size::bytes(1500))), "ImageLimits::xattrs");
    names(&limited(&[attribute("a")], limits().header(Size::bytes(512))), "ImageLimits::header");
    names(&limited(&[Made::file("n".repeat(600), "")], limits().header(Size::bytes(512))), "ImageLimits::header");
    names(&limited(&[Made::file("a", [1; 5000])], limits().file_size(Size::kib(4))), "ImageLimits::file_size");
    let sparse = Made::file("a", [1; 512]).sparse(&[(0, 512)], 1 << 40);
    names(&limited(&[sparse], limits().file_size(Size::gib(1))), "ImageLimits::file_size");
    // Links lead deeper than the path itself shows.
    let deep = [Made::file("a/a/f", ""), Made::symlink("l", "a/a"), Made::file("l/b/f", "")];
    names(&limited(&deep, limits().max_depth(2)), "ImageLimits::max_depth");
}

#[test]
fn metadata_counts_against_the_size_too() {
    // Maps of holes: 16 KiB each.
    let sparse: Vec<Made> = (0..100).map(|n| Made::file(n.to_string(), "").sparse(&[(1 << 40, 0)], 1 << 40)).collect();
    let wide: Vec<Made> = (0..10_000).map(|n| Made::fifo(format!("{n:0100}"))).collect();
    for entries in [sparse, wide] {
        let error = prepare_with(&archive(&entries), |image| image.max_size(Size::mib(1))).map(drop).unwrap_err();
        names(&error, "Image::max_size");
    }
}

/// A path of 2,047 parts once overflowed the preparing thread's stack and ended the process.
#[test]
fn deep_paths_need_no_stack() {
    for (depth, limit) in [(255, 256), (2047, 256), (2047, 100_000)] {
        let bytes = archive(&[Made::file("a/".repeat(depth) + "b", "x")]);
        let limits = ImageLimits::new().max_depth(limit);
        let small = std::thread::Builder::new().stack_size(128 << 10);
        let made = move || prepare_with(&bytes, |image| image.limits(limits)).map(|(_temp, disk)| tree_of(&disk).len());
        match small.spawn(made).unwrap().join().unwrap() {
            Ok(paths) => assert_eq!(paths, depth + 2),
            Err(error) => {
                assert!(depth > limit as usize);
                names(&error, "ImageLimits::max_depth");
            }
        }
    }
}

#[test]
fn deep_directories_need_no_stack() {
    const DEPTH: usize = 1500;
    let temp = Temp::new();
    let root = temp.0.join("root");
    let mut deepest = root.join("a/".repeat(DEPTH));
    fs::create_dir_all(&deepest).unwrap();
    let image =
        |limit| Image::open(&root).unwrap().cache_dir(temp.0.join("cache")).limits(ImageLimits::new().max_depth(limit));
    let outcomes = [image(256).prepare(), image(100_000).prepare()];
    // Removing a whole tree at once keeps a descriptor for each of its levels.
    while deepest != root {
        fs::remove_dir(&deepest).unwrap();
        assert!(deepest.pop());
    }
    let [refused, made] = outcomes;
    names(&refused.unwrap_err(), "ImageLimits::max_depth");
    made.unwrap();
    assert_eq!(tree_of(&disks(&temp).pop().unwrap()).len(), DEPTH + 1);
}

/// Headers that are no entries, without end, each cost a copy of the global one, and nothing counted them.
#[test]
fn headers_that_are_no_entries_are_counted_too() {
    let extended = |n: usize| archive(&vec![Made::file("x", "").of_type(b'x'); n]);
    let limits = || ImageLimits::new().max_entries(100);
    let read = |bytes: &[u8], cancel: &CancelToken, cancelled: bool| {
        let file = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
        let deadline = PrepareDeadline::new(Duration::MAX, [cancel]);
        let mut source = Canceling { bytes, cancel: cancelled.then_some(cancel) };
        write_archive(&mut source, &file, &Budget::new(&limits(), Size::mib(1), &deadline)).map(drop).unwrap_err()
    };
    let never = CancelToken::new().unwrap();
    assert_eq!(read(&extended(400), &never, false).kind(), ErrorKind::Corrupt);
    names(&read(&extended(401), &never, false), "ImageLimits::max_entries");
    // Nothing more is read, and no entry comes.
    assert_eq!(read(&extended(1), &CancelToken::new().unwrap(), true).kind(), ErrorKind::Cancelled);

    let records: Vec<u8> = (0..45_780).flat_map(|n| maker::record(&format!("SCHILY.xattr.{n:x}"), b"")).collect();
    let global = Made { data: records, ..Made::file("g", "") }.of_type(b'g');
    assert!(global.data.len() < 1 << 20);
    names(&refused(&[global, Made::file("f", "")]), "ImageLimits::entry_xattrs");
}

/// An archive that is canceled while it is read.
struct Canceling<'a> {
    bytes: &'a [u8],
    cancel: Option<&'a CancelToken>,
}

impl Read for Canceling<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        self.cancel.into_iter().for_each(CancelToken::cancel);
        self.bytes.read(to)
    }
}

/// Each of these once took time by the square, or wrapped a counter. What memory they take, `tests/image_memory.rs` measures.
#[test]
fn wide_images_take_linear_time() {
    const N: usize = 100_000;
    const SMALLER: usize = 20;
    let files: Vec<Made> = (0..N).map(|n| Made::file(format!("d/entry-{n:07}"), "")).collect();
    let fifos: Vec<Made> = (0..N).map(|n| Made::fifo(format!("d/entry-{n:07}"))).collect();
    let mut links = vec![Made::file("d/first", "x")];
    links.extend((1..66_000).map(|n| Made::link(format!("d/entry-{n:07}"), "d/first")));
    for (entries, links) in [(files, 1), (fifos, 1), (links, 66_000)] {
        // Of this thread's processor, so that a busy machine changes little.
        let written = |entries: &[Made]| {
            let bytes = archive(entries);
            let file = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
            let deadline = PrepareDeadline::new(Duration::MAX, None);
            let begin = crate::sys::processor_time();
            let budget = Budget::new(&ImageLimits::new(), Size::gib(1), &deadline);
            write_archive(&mut &bytes[..], &file, &budget).unwrap();
            (file, crate::sys::processor_time() - begin)
        };
        let (_, short) = written(&entries[..entries.len() / SMALLER]);
        let (disk, long) = written(&entries);
        // By the square it would be 400 times as long.
        assert!(long < short * 5 * SMALLER as u32, "{} entries: {long:?}, a part of them: {short:?}", entries.len());
        let tree = Reader::open(&disk).tree(0);
        assert_eq!(tree.len(), entries.len() + 2);
        assert_eq!(tree[&b"d/entry-0065999"[..]].nlink, links);
    }
}

#[test]
fn preparation_ends_in_time_and_when_it_is_cancelled() {
    let bytes = archive(&[Made::file("a", "x")]);
    let error = prepare_with(&bytes, |image| image.prepare_timeout(Duration::ZERO)).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("Image::prepare_timeout"), "{error}");
    drop(prepare_with(&bytes, |image| image.prepare_timeout(Duration::MAX)).unwrap());

    let temp = Temp::new();
    // A hole of a tebibyte, too large to be read in time.
    let tar = temp.0.join("image.tar");
    File::create(&tar).unwrap().set_len(1 << 40).unwrap();
    let image = Image::open(&tar).unwrap().cache_dir(temp.0.join("cache"));
    // By the image's own token, and by that of a start.
    for own in [true, false] {
        let (token, other) = (CancelToken::new().unwrap(), CancelToken::new().unwrap());
        let image = image.clone().cancel(if own { &token } else { &other });
        let error = std::thread::scope(|scope| {
            let waiting =
                scope.spawn(|| if own { image.prepare().unwrap_err() } else { image.disk(Some(&token)).unwrap_err() });
            std::thread::sleep(Duration::from_millis(100));
            token.cancel();
            let begin = Instant::now();
            let error = waiting.join().unwrap();
            assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
            error
        });
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        // What is cancelled stays so.
        let begun = image.disk(Some(&token)).unwrap_err();
        assert_eq!(begun.kind(), ErrorKind::Cancelled, "{begun}");
    }
}
