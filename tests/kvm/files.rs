//! Files of running containers, from the host, without any program of the image.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use cofferdam::files::FileKind;
use cofferdam::{Container, ErrorKind, Image, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, container, kernel, soaking};
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What a shell prints.
fn sh(container: &Container, script: &str) -> Result<String> {
    let output = container.exec(["sh", "-c", script]).output()?;
    check!(output.status.success(), "{script}: {:?} {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn files_are_read_written_listed_and_described() -> Outcome {
    let container = container()?;
    let files = container.files();
    // Longer than a record, and than a stream takes at once.
    let long: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 / 3) as u8).collect();
    files.create_dir("/data/a b/c")?;
    files.write("/data/a b/c/long", &long)?;
    files.write("/data/empty", b"")?;
    check!(files.read("/data/a b/c/long")? == long, "it is another content");
    check_eq!(files.read("/data/empty")?, b"");
    check_eq!(sh(&container, "stat -c '%a %u %g %s' '/data/a b/c/long' /data/empty")?, "644 0 0 3000000\n644 0 0 0\n");
    sh(
        &container,
        "cd /data; mkfifo pipe; ln -s 'a b' link; mkdir -m 1777 sticky; printf old > 'new
line'; touch -d @1000000000.25 'new
line'; chown 12:34 'new
line'; chmod 4750 'new
line'; truncate -s 1G sparse",
    )?;
    let listed: BTreeMap<_, _> = files
        .list("/data")?
        .into_iter()
        .map(|entry| (entry.name.to_string_lossy().into_owned(), entry.metadata))
        .collect();
    let kinds: Vec<_> = listed.iter().map(|(name, metadata)| (name.as_str(), metadata.kind, metadata.mode)).collect();
    check_eq!(
        kinds,
        [
            ("a b", FileKind::Directory, 0o755),
            ("empty", FileKind::File, 0o644),
            ("link", FileKind::Symlink, 0o777),
            ("new\nline", FileKind::File, 0o4750),
            ("pipe", FileKind::Special, 0o644),
            ("sparse", FileKind::File, 0o644),
            ("sticky", FileKind::Directory, 0o1777),
        ]
    );
    let metadata = files.stat("/data/new\nline")?;
    check_eq!(metadata, listed["new\nline"]);
    check_eq!((metadata.uid, metadata.gid, metadata.size), (12, 34, Size::bytes(3)));
    check_eq!(metadata.modified, SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000_250));
    check_eq!(files.stat("/data/link")?.link_target, Some("a b".into()));
    // Links lead within the container, in the middle and at the end.
    sh(&container, "ln -s /../../../data/empty /data/up; ln -s '/data/a b' /data/middle")?;
    check_eq!(files.read("/data/up")?, b"");
    check!(files.read("/data/middle/c/long")? == long, "it is another content");
    // A link is replaced, and what it leads to stays.
    files.write("/data/up", "new")?;
    check_eq!(sh(&container, "cat /data/up; stat -c %F /data/up; stat -c %s /data/empty")?, "newregular file\n0\n");
    check!(!files.read("/proc/version")?.is_empty(), "files that claim to be empty are read");
    for (path, kind) in [
        ("/data/none", ErrorKind::NotFound),
        ("/data/none/none", ErrorKind::NotFound),
        ("/data/pipe", ErrorKind::Unsupported),
        ("/dev/null", ErrorKind::Unsupported),
        ("/data", ErrorKind::Io),
        ("/data/sparse", ErrorKind::ResourceExhausted),
        ("data/empty", ErrorKind::InvalidConfig),
        ("/data/em\0pty", ErrorKind::InvalidConfig),
    ] {
        let error = files.read(path).expect_err(path);
        check!(error.kind() == kind && error.to_string().contains("of the container"), "{path}: {error:?}");
    }
    let error = files.write("/none/file", b"x").expect_err("no directory");
    check!(error.kind() == ErrorKind::NotFound && error.to_string().contains("/none/file"), "{error}");
    check_eq!(files.write("/proc/version", b"x").expect_err("no place for files").kind(), ErrorKind::NotFound);
    check_eq!(files.create_dir("/data/empty/x").expect_err("a file").kind(), ErrorKind::Io);
    // Nothing of all this is left in the guest.
    check_eq!(sh(&container, "find / -xdev -name '.cofferdam-*'")?, "");
    check_eq!(sh(&container, "ls /proc | grep -c '^[0-9]'")?.trim().parse::<u32>()? < 6, true);
    Ok(())
}

/// Path, permissions, seconds and nanoseconds of the last change, content.
type Entry = (PathBuf, u32, i64, i64, Vec<u8>);

/// All of a directory.
fn tree(at: &Path) -> Result<Vec<Entry>> {
    let (mut found, mut waiting) = (Vec::new(), vec![at.to_owned()]);
    while let Some(path) = waiting.pop() {
        let m = fs::symlink_metadata(&path)?;
        let mut content = Vec::new();
        if m.is_dir() {
            for entry in fs::read_dir(&path)? {
                waiting.push(entry?.path());
            }
        } else if m.is_symlink() {
            content = fs::read_link(&path)?.into_os_string().into_encoded_bytes();
        } else {
            content = fs::read(&path)?;
        }
        let (seconds, nanoseconds) = if m.is_symlink() { (0, 0) } else { (m.mtime(), m.mtime_nsec()) };
        found.push((path.strip_prefix(at)?.to_owned(), m.mode(), seconds, nanoseconds, content));
    }
    found.sort();
    Ok(found)
}

pub fn directories_are_copied_in_and_out() -> Outcome {
    let (container, temp) = (container()?, Temp::new()?);
    let from = temp.path("from");
    fs::create_dir_all(from.join("sub/deep"))?;
    fs::write(from.join("empty"), "")?;
    fs::write(from.join("new\nline"), "x")?;
    fs::write(from.join(OsStr::from_bytes(b"not \xff utf-8")), "y")?;
    fs::write(from.join("n".repeat(255)), "long name")?;
    // The lab takes minutes for the digests of more.
    let words = u32::try_from(soaking(16 << 20, 1 << 19))?;
    let long: Vec<u8> = (0..words).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(from.join("sub/deep/long"), &long)?;
    let sparse = fs::File::create(from.join("sub/sparse"))?;
    sparse.set_len(8 << 20)?;
    sparse.write_all_at(b"middle", 4 << 20)?;
    drop(sparse);
    symlink("../empty", from.join("sub/up"))?;
    symlink("/etc/passwd", from.join("sub/away"))?;
    for (name, mode) in [("empty", 0o600), ("sub/deep/long", 0o4755), ("sub/deep", 0o700), ("sub", 0o750)] {
        fs::set_permissions(from.join(name), fs::Permissions::from_mode(mode))?;
    }
    let files = container.files();
    let report = files.copy_in(&from, "/copied").owner(1000, 1001).digests().run()?;
    check_eq!((report.files, report.directories, report.links, report.skipped), (6, 3, 2, 0));
    check_eq!(
        sh(&container, "cd /copied; find . ! -user 1000 -o ! -group 1001; stat -c '%a %s' sub/deep/long")?,
        format!("755 {}\n", long.len())
    );
    let sum = sh(&container, "sha256sum < /copied/sub/deep/long")?;
    let digest = report.digests.iter().find(|it| it.path.ends_with("long")).ok_or("no digest")?;
    check!(sum.starts_with(digest.digest.hex()), "{sum} {digest:?}");
    check!(sh(&container, "du -k /copied/sub/sparse")?.split('\t').next().ok_or("no size")?.parse::<u32>()? < 1024);
    // The link that leads away is not for the host.
    let out = files.copy_out("/copied", temp.path("to")).digests().run()?;
    check_eq!((out.files, out.directories, out.links, out.skipped), (6, 3, 1, 1));
    fs::remove_file(from.join("sub/away"))?;
    fs::set_permissions(from.join("sub/deep/long"), fs::Permissions::from_mode(0o755))?;
    let name_and_time = |all: Vec<Entry>| {
        all.into_iter().map(|(path, mode, seconds, _, content)| {
            // Its entries have changed since.
            let seconds = if path == Path::new("sub") { 0 } else { seconds };
            (path, mode, seconds, content)
        })
    };
    check!(name_and_time(tree(&from)?).eq(name_and_time(tree(&temp.path("to"))?)), "it is not what it was");
    // Single files, whole.
    files.copy_in(from.join("sub/deep/long"), "/one").keep_owner().run()?;
    check!(files.read("/one").is_ok_and(|content| content == long), "it is another content");
    let longer =
        files.copy_out("/copied/sub/sparse", temp.path("x")).max_size(Size::mib(1)).run().expect_err("too long");
    check_eq!(longer.kind(), ErrorKind::ResourceExhausted);
    let more = files.copy_out("/copied", temp.path("y")).max_entries(3).run().expect_err("too many");
    check_eq!(more.kind(), ErrorKind::ResourceExhausted);
    // A program's links below the destination redirect nothing.
    sh(&container, "mkdir -p /redirected /outside; ln -s /outside /redirected/sub")?;
    let error = files.copy_in(&from, "/redirected").run().expect_err("a link is in the way");
    check!(error.to_string().contains("/redirected/sub"), "{error}");
    check_eq!(sh(&container, "ls -A /outside; find / -xdev -name '.cofferdam-*'")?, "");
    // Files of the kernel are not copied, though they are in the way.
    sh(&container, "mkdir -p /mounted/proc /mounted/own; mount -t proc proc /mounted/proc; mkfifo /mounted/own/pipe")?;
    let report = files.copy_out("/mounted", temp.path("mounted")).run()?;
    check_eq!((report.files, report.directories, report.skipped), (0, 3, 1));
    Ok(())
}

pub fn a_full_disk_is_an_error_and_leaves_nothing() -> Outcome {
    let (container, temp) = (container()?, Temp::new()?);
    sh(&container, "mkdir /small; mount -t tmpfs -o size=2m tmpfs /small; echo kept > /small/kept")?;
    let (files, long) = (container.files(), vec![7; 8 << 20]);
    fs::write(temp.path("long"), &long)?;
    for error in [
        files.write("/small/kept", &long).expect_err("it does not fit"),
        files.copy_in(temp.path("long"), "/small/kept").run().map(drop).expect_err("it does not fit"),
    ] {
        check!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("/small/kept"), "{error:?}");
    }
    check_eq!(sh(&container, "ls -A /small; cat /small/kept")?, "kept\nkept\n");
    sh(&container, "mount -o remount,ro /small")?;
    check_eq!(files.write("/small/kept", "x").expect_err("it is read-only").kind(), ErrorKind::PermissionDenied);
    Ok(())
}

/// An image of one empty directory, in which nothing can be executed.
pub fn an_image_without_programs_has_files() -> Outcome {
    let temp = Temp::new()?;
    fs::create_dir_all(temp.path("image/only"))?;
    let image = Image::open(temp.path("image"))?;
    let container = Container::builder(image).kernel(kernel()).start_timeout(TEST_TIMEOUT).start()?;
    let files = container.files();
    check_eq!(files.list("/only")?, []);
    files.create_dir("/only/made")?;
    files.write("/only/made/file", "content")?;
    files.copy_out("/only", temp.path("out")).run()?;
    check_eq!(fs::read_to_string(temp.path("out/made/file"))?, "content");
    // A guest that is paused is waited for as long as it may take.
    container.pause()?;
    let error = files.clone().timeout(Duration::from_secs(2)).stat("/only").expect_err("it is paused");
    check_eq!(error.kind(), ErrorKind::TimedOut);
    container.resume()?;
    check_eq!(files.read("/only/made/file")?, b"content");
    container.kill();
    container.wait();
    check_eq!(files.stat("/only").expect_err("it has ended").kind(), ErrorKind::InvalidState);
    Ok(())
}

pub fn programs_cannot_end_requests_and_requests_are_counted() -> Outcome {
    let container = container()?;
    let files = container.files();
    files.write("/long", vec![1; 4 << 20])?;
    let mut readers = (0..16).map(|_| files.open("/long")).collect::<cofferdam::Result<Vec<_>>>()?;
    // Their streams are full, and wait for the host.
    let error = files.stat("/long").expect_err("there are sixteen");
    check!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("16"), "{error}");
    let killed = container.exec(["sh", "-c", "kill -9 -1; kill -9 $$"]).status()?;
    check!(!killed.success(), "{killed}");
    let mut reader = readers.pop().ok_or("no reader")?;
    check_eq!(reader.metadata().size, Size::mib(4));
    check_eq!(std::io::copy(&mut reader, &mut std::io::sink())?, 4 << 20);
    drop((reader, readers));
    // The others end when the host has hung up.
    let begin = Instant::now();
    while files.stat("/long").is_err() {
        check!(begin.elapsed() < TEST_TIMEOUT, "they go on");
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Each file costs a fifth of what a program costs, at most.
pub fn many_small_files_are_copied_fast() -> Outcome {
    let (container, temp) = (container()?, Temp::new()?);
    let count = u32::try_from(soaking(10_000, 600))?;
    fs::create_dir_all(temp.path("from"))?;
    for n in 0..count {
        fs::write(temp.path("from").join(n.to_string()), n.to_string())?;
    }
    let files = container.files();
    let begin = Instant::now();
    let report = files.copy_in(temp.path("from"), "/many").run()?;
    let copied = begin.elapsed() / count;
    check_eq!(report.files, u64::from(count));
    check_eq!(sh(&container, "ls /many | wc -l; cat /many/567")?, format!("{count}\n567"));
    check_eq!(files.list("/many")?.len(), count as usize);
    check_eq!(files.copy_out("/many", temp.path("to")).run()?.files, u64::from(count));
    let begin = Instant::now();
    for n in 0..20 {
        let output = container.exec(["cat", &format!("/many/{n}")]).output()?;
        check_eq!(output.stdout, n.to_string().as_bytes());
    }
    let executed = begin.elapsed() / 20;
    check!(copied * 5 <= executed, "a file takes {copied:?}, a program {executed:?}");
    Ok(())
}
