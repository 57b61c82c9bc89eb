//! The host's half, with the guest's own half, and with guests that lie.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::num::NonZeroI32;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::super::conversation::Conversation;
use super::super::copy_in::CopyInPlan;
use super::super::copy_out::CopyOutPlan;
use super::super::report::{CopyReport, Tally};
use super::super::{FileMetadata, FileReader};
use crate::container::pair;
use crate::error::{Error, ErrorKind, Result};
use crate::proto::{EntryKind, FileAction, FileEntry, FileRecord};
use crate::size::Size;

/// A directory that goes with the test.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-copy-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A conversation with the guest's own half.
fn real(action: FileAction, path: &Path) -> Result<Conversation> {
    let (near, far) = pair();
    super::serve(far);
    Conversation::over(near, None, Duration::from_secs(60), action, path.as_os_str().as_bytes())
}

fn copy_in(from: &Path, to: &Path) -> Result<CopyReport> {
    let plan = CopyInPlan { from: from.to_owned(), to: to.to_owned(), owner: None, digests: true };
    plan.send(|| real(FileAction::Put, to))
}

fn plan_out(from: &Path, to: &Path) -> CopyOutPlan {
    CopyOutPlan { digests: true, ..CopyOutPlan::new(from.to_owned(), to.to_owned()) }
}

fn copy_out(from: &Path, to: &Path) -> Result<CopyReport> {
    plan_out(from, to).receive(real(FileAction::Get, from)?)
}

/// Path, permissions, seconds and nanoseconds of the last change, content.
type Entry = (PathBuf, u32, i64, i64, Vec<u8>);

/// All of a directory.
fn tree(at: &Path) -> Vec<Entry> {
    let (mut found, mut waiting) = (Vec::new(), vec![at.to_owned()]);
    while let Some(path) = waiting.pop() {
        let m = fs::symlink_metadata(&path).unwrap();
        let content = match () {
            () if m.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            () if m.is_file() => fs::read(&path).unwrap(),
            () => Vec::new(),
        };
        if m.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        // A link's time is the guest's alone.
        let (seconds, nanoseconds) = if m.is_symlink() { (0, 0) } else { (m.mtime(), m.mtime_nsec()) };
        found.push((path.strip_prefix(at).unwrap().to_owned(), m.mode(), seconds, nanoseconds, content));
    }
    found.sort();
    found
}

/// Files of all kinds that a copy keeps.
fn make_tree(at: &Path) {
    fs::create_dir_all(at.join("sub/deep/deeper")).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    fs::write(at.join("sub/small"), "small").unwrap();
    fs::write(at.join("new\nline and \u{1F980}"), "x").unwrap();
    fs::write(at.join(OsStr::from_bytes(b"not \xff utf-8")), "y").unwrap();
    fs::write(at.join("n".repeat(255)), "long name").unwrap();
    let long: Vec<u8> = (0..300_000u32).flat_map(|n| (n * 3).to_le_bytes()).collect();
    fs::write(at.join("sub/deep/long"), &long).unwrap();
    let sparse = fs::File::create(at.join("sub/sparse")).unwrap();
    sparse.set_len(40 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 20 << 20).unwrap();
    let end = fs::File::create(at.join("sub/hole first")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&end, b"end", 1 << 20).unwrap();
    symlink("sub/small", at.join("link")).unwrap();
    symlink("../empty", at.join("sub/up")).unwrap();
    symlink("nowhere", at.join("sub/dangling")).unwrap();
    for (name, mode) in [("empty", 0o600), ("sub/small", 0o444), ("sub/deep", 0o500), ("sub", 0o750)] {
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let file = fs::File::open(at.join("sub/small")).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(super::super::metadata::time(-5, 123_456_789))).unwrap();
}

#[test]
fn directories_come_back_as_they_went() {
    let temp = Temp::new("round-trip");
    make_tree(&temp.at("from"));
    let inward = copy_in(&temp.at("from"), &temp.at("guest")).unwrap();
    let outward = copy_out(&temp.at("guest"), &temp.at("to")).unwrap();
    assert_eq!(tree(&temp.at("from")), tree(&temp.at("guest")));
    assert_eq!(tree(&temp.at("from")), tree(&temp.at("to")));
    assert_eq!((inward.files, inward.directories, inward.links, inward.skipped), (8, 4, 3, 0));
    let sorted = |report: &CopyReport| {
        let mut digests = report.digests.clone();
        digests.sort_by(|a, b| a.path.cmp(&b.path));
        CopyReport { digests, ..report.clone() }
    };
    assert_eq!(sorted(&inward), sorted(&outward));
    assert_eq!(inward.digests.len(), 8);
    let small = inward.digests.iter().find(|it| it.path == Path::new("sub/small")).unwrap();
    assert_eq!(small.digest, crate::container::Digest::sha256(b"small"));
    let sparse = inward.digests.iter().find(|it| it.path == Path::new("sub/sparse")).unwrap();
    assert_eq!(sparse.digest, crate::container::Digest::sha256(&fs::read(temp.at("from/sub/sparse")).unwrap()));
    for at in ["guest/sub/sparse", "to/sub/sparse"] {
        assert!(fs::metadata(temp.at(at)).unwrap().blocks() < 8 << 11, "{at} has its holes");
    }
    // Once more over what is there.
    assert_eq!(sorted(&copy_in(&temp.at("from"), &temp.at("guest")).unwrap()), sorted(&inward));
    assert_eq!(sorted(&copy_out(&temp.at("guest"), &temp.at("to")).unwrap()), sorted(&inward));
    let names = |at: &str| tree(&temp.at(at)).into_iter().map(|it| (it.0, it.4)).collect::<Vec<_>>();
    assert_eq!(names("from"), names("to"));
}

#[test]
fn single_files_are_copied_by_their_names() {
    let temp = Temp::new("single");
    fs::write(temp.at("file"), "content").unwrap();
    symlink("file", temp.at("link")).unwrap();
    assert_eq!(copy_in(&temp.at("link"), &temp.at("guest")).unwrap().size, Size::bytes(7));
    // What has the name is replaced, and not followed.
    symlink("file", temp.at("here")).unwrap();
    assert_eq!(copy_out(&temp.at("guest"), &temp.at("here")).unwrap().files, 1);
    assert!(fs::symlink_metadata(temp.at("here")).unwrap().is_file());
    assert_eq!(fs::read_to_string(temp.at("here")).unwrap(), "content");
    for (error, kind, text) in [
        (copy_in(&temp.at("none"), &temp.at("x")).unwrap_err(), ErrorKind::NotFound, "none"),
        (copy_in(&temp.at("file"), &temp.at("none/x")).unwrap_err(), ErrorKind::NotFound, "none/x"),
        (copy_in(&temp.at("file"), &temp.at("")).unwrap_err(), ErrorKind::Io, "Is a directory"),
        (copy_out(&temp.at("none"), &temp.at("x")).unwrap_err(), ErrorKind::NotFound, "none"),
        (copy_out(&temp.at("file"), &temp.at("none/x")).unwrap_err(), ErrorKind::NotFound, "none"),
        (copy_out(&temp.at("file"), Path::new("/")).unwrap_err(), ErrorKind::InvalidConfig, "no name"),
        (copy_in(Path::new("/dev/null"), &temp.at("x")).unwrap_err(), ErrorKind::InvalidConfig, "/dev/null"),
        (copy_out(Path::new("/dev/null"), &temp.at("x")).unwrap_err(), ErrorKind::Unsupported, "/dev/null"),
    ] {
        assert!(error.kind() == kind && error.to_string().contains(text), "{text}: {error:?}");
    }
}

#[test]
fn links_below_a_copy_are_not_followed_in_the_guest() {
    let temp = Temp::new("redirected");
    fs::create_dir_all(temp.at("from/sub")).unwrap();
    fs::write(temp.at("from/sub/file"), "new").unwrap();
    fs::create_dir_all(temp.at("outside")).unwrap();
    fs::create_dir_all(temp.at("guest")).unwrap();
    symlink("../outside", temp.at("guest/sub")).unwrap();
    let error = copy_in(&temp.at("from"), &temp.at("guest")).unwrap_err();
    assert!(error.to_string().contains("guest/sub"), "{error}");
    assert_eq!(fs::read_dir(temp.at("outside")).unwrap().count(), 0);
    // The same on the host.
    let error = copy_out(&temp.at("from"), &temp.at("guest")).unwrap_err();
    assert!(error.to_string().contains("sub"), "{error}");
    assert_eq!(fs::read_dir(temp.at("outside")).unwrap().count(), 0);
    // A file in the place of a directory.
    fs::remove_file(temp.at("guest/sub")).unwrap();
    fs::write(temp.at("guest/sub"), "").unwrap();
    assert!(copy_in(&temp.at("from"), &temp.at("guest")).is_err());
    // A directory in the place of a file. Nothing is left of what could not get its name.
    fs::remove_file(temp.at("guest/sub")).unwrap();
    fs::create_dir_all(temp.at("guest/sub/file")).unwrap();
    assert!(copy_in(&temp.at("from"), &temp.at("guest")).is_err());
    assert!(copy_out(&temp.at("from"), &temp.at("guest")).is_err());
    assert_eq!(tree(&temp.at("guest/sub")).len(), 2);
}

#[test]
fn special_files_and_links_out_of_the_copy_are_left_out() {
    let temp = Temp::new("special");
    fs::create_dir_all(temp.at("from/sub/dir")).unwrap();
    crate::sys::make_fifo(&temp.at("from/pipe")).unwrap();
    let kept = [("a", "sub"), ("b", "./sub/dir"), ("sub/c", "../a/dir"), ("sub/dir/d", "../../b//."), ("e", "none")];
    let left_out = [
        ("f", "/etc"),
        ("g", ".."),
        ("h", "sub/.."),
        ("sub/i", "../../x"),
        ("sub/dir/j", "../../../x"),
        ("k", "a/../../x"),
        ("l", "./../x"),
    ];
    for (name, target) in kept.iter().chain(&left_out) {
        symlink(target, temp.at("from").join(name)).unwrap();
    }
    let report = copy_out(&temp.at("from"), &temp.at("to")).unwrap();
    assert_eq!((report.links, report.skipped), (5, 8));
    for (name, target) in kept {
        assert_eq!(fs::read_link(temp.at("to").join(name)).unwrap(), Path::new(target));
    }
    for (name, _) in left_out {
        assert!(fs::symlink_metadata(temp.at("to").join(name)).is_err(), "{name}");
    }
    let all = CopyOutPlan { all_links: true, ..plan_out(&temp.at("from"), &temp.at("all")) };
    let report = all.receive(real(FileAction::Get, &temp.at("from")).unwrap()).unwrap();
    assert_eq!((report.links, report.skipped), (12, 1));
    // To the guest, where they lead within the guest, all go.
    let report = copy_in(&temp.at("from"), &temp.at("guest")).unwrap();
    assert_eq!((report.links, report.skipped), (12, 1));
}

#[test]
fn copies_keep_to_their_limits() {
    let temp = Temp::new("limits");
    make_tree(&temp.at("from"));
    let run = |plan: CopyOutPlan| plan.receive(real(FileAction::Get, &temp.at("from")).unwrap());
    for plan in [
        CopyOutPlan { max_entries: 14, ..plan_out(&temp.at("from"), &temp.at("to")) },
        CopyOutPlan { max_size: Size::mib(42), ..plan_out(&temp.at("from"), &temp.at("to")) },
    ] {
        let error = run(plan).unwrap_err();
        assert!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("allows more"), "{error}");
    }
    run(CopyOutPlan { max_entries: 15, max_size: Size::mib(43), ..plan_out(&temp.at("from"), &temp.at("to")) })
        .unwrap();
    assert!(tree(&temp.at("to")).iter().all(|it| !it.0.to_string_lossy().contains(".cofferdam-")));
    // One directory too deep, on its way in and out. The path is longer than Linux takes at once.
    let deep = |n: usize| {
        let root = temp.at(&format!("deep{n}"));
        fs::create_dir_all(root.join(vec!["d"; n - 1].join("/"))).unwrap();
        root
    };
    assert_eq!(copy_in(&deep(128), &temp.at("in")).unwrap().directories, 128);
    assert_eq!(copy_out(&deep(128), &temp.at("out")).unwrap().directories, 128);
    for error in [copy_in(&deep(129), &temp.at("in")), copy_out(&deep(129), &temp.at("out"))] {
        let error = error.unwrap_err();
        assert!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("128"), "{error}");
    }
}

fn entry<'a>(name: &'a [u8], kind: EntryKind, target: &'a [u8]) -> FileRecord<'a> {
    FileRecord::Entry(FileEntry {
        name,
        kind,
        mode: 0o6777,
        uid: 0,
        gid: 0,
        size: u64::MAX,
        seconds: i64::MIN,
        nanoseconds: 0,
        target,
    })
}

/// What the host makes of a guest that says just this, then hangs up.
fn said(records: &[FileRecord<'_>], plan: &CopyOutPlan) -> Result<CopyReport> {
    let mut bytes = Vec::new();
    records.iter().for_each(|record| record.encode(&mut bytes).unwrap());
    let (near, mut far) = pair();
    let talk = thread::spawn(move || far.write_all(&bytes));
    let path = plan.from.as_os_str().as_bytes();
    let conversation = Conversation::over(near, None, Duration::from_secs(60), FileAction::Get, path).unwrap();
    let outcome = plan.receive(conversation);
    let _ = talk.join().unwrap();
    outcome
}

#[test]
fn guests_that_lie_write_nothing_outside_of_the_copy() {
    use EntryKind::{Directory, File, Link};
    let temp = Temp::new("lies");
    fs::create_dir_all(temp.at("outside")).unwrap();
    let root = entry(b"", Directory, b"");
    let data = FileRecord::Data(b"evil");
    let out: &[u8] = b"../outside";
    let names: [&[u8]; 7] = [b"..", b".", b"a/b", b"/etc", b"../outside/x", b"nul\0", &[b'n'; 256]];
    let mut lies: Vec<Vec<FileRecord<'_>>> = Vec::new();
    for name in names {
        lies.push(vec![root, entry(name, File, b""), data, FileRecord::FileEnd]);
        lies.push(vec![root, entry(name, Directory, b"")]);
        lies.push(vec![root, entry(name, Link, b"x")]);
    }
    // Through a link that the host has just made, with the caller's leave.
    lies.push(vec![root, entry(b"l", Link, out), entry(b"l", Directory, b""), entry(b"x", File, b""), data]);
    // Above the root.
    lies.push(vec![root, FileRecord::Leave, entry(b"x", File, b""), data]);
    lies.push(vec![root, FileRecord::Leave, FileRecord::Leave]);
    // What is out of place, or missing.
    lies.push(vec![data]);
    lies.push(vec![entry(b"x", File, b""), data, FileRecord::FileEnd, FileRecord::Done]);
    lies.push(vec![entry(b"", Link, out), FileRecord::Done]);
    lies.push(vec![entry(b"", EntryKind::Special, b""), FileRecord::Done]);
    lies.push(vec![root, data]);
    lies.push(vec![root, entry(b"", File, b""), FileRecord::FileEnd]);
    lies.push(vec![root, entry(b"x", File, b""), FileRecord::Leave]);
    lies.push(vec![root, entry(b"x", File, b""), FileRecord::Request { action: FileAction::Get, path: b"/" }]);
    lies.push(vec![root, entry(b"x", File, b""), data]);
    lies.push(vec![root, FileRecord::Done]);
    lies.push(vec![root]);
    lies.push(vec![]);
    for (n, lie) in lies.iter().enumerate() {
        let plan = CopyOutPlan { all_links: true, ..plan_out(Path::new("/x"), &temp.at("to")) };
        let error = said(lie, &plan).unwrap_err();
        let kinds = [ErrorKind::GuestFailed, ErrorKind::Io];
        assert!(kinds.contains(&error.kind()), "{n} {lie:?}: {error:?}");
        assert_eq!(fs::read_dir(temp.at("outside")).unwrap().count(), 0, "{n} {lie:?}");
        let left: Vec<_> = fs::read_dir(&temp.0).unwrap().map(|it| it.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "to" || name == "outside"), "{n} {lie:?}: {left:?}");
    }
    // No file has more rights than its user has.
    let good = [root, entry(b"f", File, b""), data, FileRecord::FileEnd, FileRecord::Leave, FileRecord::Done];
    said(&good, &plan_out(Path::new("/x"), &temp.at("good"))).unwrap();
    assert_eq!(fs::metadata(temp.at("good/f")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(temp.at("good")).unwrap().mode() & 0o7777, 0o755);
    // With digests a file's path is kept: all of them together have a bound.
    let mut tally = Tally::new(u64::MAX, Size::gib(1), true);
    let long = vec![b'x'; 1 << 20];
    let kept = (0..).take_while(|_| tally.file().and_then(|()| tally.file_end(&long)).is_ok()).take(100).count();
    assert_eq!(kept, 64);
    // Zeros without end.
    let hole = FileRecord::Hole { length: u64::MAX };
    for holes in [vec![hole], vec![FileRecord::Hole { length: 1 << 62 }; 8]] {
        let lie = [&[root, entry(b"z", File, b"")][..], &holes].concat();
        let error = said(&lie, &plan_out(Path::new("/x"), &temp.at("good"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    }
}

#[test]
fn holes_take_no_more_than_the_time_that_is_set() {
    let temp = Temp::new("holes");
    let hole = |records: &[FileRecord<'_>]| {
        let (near, mut far) = pair();
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.encode(&mut bytes).unwrap());
        far.write_all(&bytes).unwrap();
        // The guest does not hang up.
        (Conversation::over(near, None, Duration::from_millis(100), FileAction::Get, b"/x").unwrap(), far)
    };
    let begin = Instant::now();
    let length = 1 << 50;
    let (conversation, _far) = hole(&[entry(b"", EntryKind::File, b""), FileRecord::Hole { length }]);
    let plan = CopyOutPlan { max_size: Size::bytes(u64::MAX), ..plan_out(Path::new("/x"), &temp.at("out")) };
    assert_eq!(plan.receive(conversation).unwrap_err().kind(), ErrorKind::TimedOut);
    let (mut conversation, _far) = hole(&[entry(b"", EntryKind::File, b""), FileRecord::Hole { length }]);
    let FileRecord::Entry(first) = conversation.next().unwrap() else { panic!("no entry") };
    let metadata = FileMetadata::new(&first);
    let mut reader = FileReader { conversation, metadata, piece: Vec::new(), at: 0, hole: 0, ended: false };
    let ended = std::io::copy(&mut reader, &mut std::io::sink()).unwrap_err();
    assert!(ended.to_string().contains("the time for it is over"), "{ended}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 0);
}

#[test]
fn guests_that_are_silent_or_slow_cost_the_time_that_is_set() {
    let begin = Instant::now();
    let (near, mut far) = pair();
    let mut conversation = Conversation::over(near, None, Duration::from_millis(100), FileAction::Read, b"/x").unwrap();
    // Byte by byte, which never comes to an end in time.
    let mut record = Vec::new();
    FileRecord::Data(&[0; 10_000]).encode(&mut record).unwrap();
    let talk = thread::spawn(move || {
        record.iter().all(|byte| {
            thread::sleep(Duration::from_millis(2));
            far.write_all(&[*byte]).is_ok()
        })
    });
    let error = conversation.next().unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("timeout"), "{error}");
    drop(conversation);
    assert!(!talk.join().unwrap(), "it was hung up");
    // One that takes nothing.
    let (near, far) = pair();
    let mut conversation = Conversation::over(near, None, Duration::from_millis(100), FileAction::Put, b"/x").unwrap();
    let error = (0..).find_map(|_| conversation.say(&FileRecord::Data(&[0; 65_536])).err()).unwrap();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(far);
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[test]
fn failures_of_the_guest_are_typed_and_name_the_path() {
    let failed = |errno: i32, path: &'static [u8]| -> Error {
        let failure = FileRecord::Failed { errno: NonZeroI32::new(errno).unwrap(), path };
        said(&[failure], &plan_out(Path::new("/x"), Path::new("/nowhere"))).unwrap_err()
    };
    for (errno, kind) in [
        (libc::ENOENT, ErrorKind::NotFound),
        (libc::EACCES, ErrorKind::PermissionDenied),
        (libc::EROFS, ErrorKind::PermissionDenied),
        (libc::EEXIST, ErrorKind::AlreadyExists),
        (libc::ENOSPC, ErrorKind::ResourceExhausted),
        (libc::EDQUOT, ErrorKind::ResourceExhausted),
        (libc::ENOMEM, ErrorKind::GuestFailed),
        (libc::EAGAIN, ErrorKind::GuestFailed),
        (libc::EINVAL, ErrorKind::Unsupported),
        (libc::EISDIR, ErrorKind::Io),
    ] {
        let error = failed(errno, b"/some/path");
        assert!(error.kind() == kind && error.to_string().contains("\"/some/path\" in the guest"), "{error:?}");
    }
    let error = failed(libc::EAGAIN, b"");
    assert!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("16 requests"), "{error}");
    // It says so while the host sends, and takes nothing more.
    let temp = Temp::new("failed");
    fs::write(temp.at("file"), vec![1; 8 << 20]).unwrap();
    let (near, mut far) = pair();
    let mut bytes = Vec::new();
    FileRecord::Failed { errno: NonZeroI32::new(libc::ENOSPC).unwrap(), path: b"/full" }.encode(&mut bytes).unwrap();
    far.write_all(&bytes).unwrap();
    let plan = CopyInPlan { from: temp.at("file"), to: "/full".into(), owner: None, digests: false };
    let start = || Conversation::over(near, None, Duration::from_secs(60), FileAction::Put, b"/full");
    let error = plan.send(start).unwrap_err();
    assert!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("/full"), "{error}");
    drop(far);
}
