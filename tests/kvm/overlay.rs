//! Disks that lie on others: guests write, and what they lie on stays as it is.

use std::error::Error;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam::disk::{ErrorAction, ErrorClass, Overlay};
use cofferdam::{Disk, Size};

use crate::fixture::{Outcome, Temp, guest, run};
use crate::{check, check_eq};

/// Runs a program of the host, which must succeed.
fn host(program: &str, arguments: &[&str], path: &Path) -> Outcome {
    let output = Command::new(program).args(arguments).arg(path).output()?;
    let text = [output.stdout, output.stderr].concat();
    check!(output.status.success(), "{program} {}: {}", path.display(), String::from_utf8_lossy(&text));
    Ok(())
}

/// An image with a journalled file system in it.
fn base(temp: &Temp) -> Result<PathBuf, Box<dyn Error>> {
    let path = temp.path("base.img");
    fs::File::create(&path)?.set_len(64 << 20)?;
    host("/sbin/mke2fs", &["-q", "-t", "ext4", "-F"], &path)?;
    Ok(path)
}

/// Writes files in the file system and reads them back after it was mounted again.
fn writes(n: u32) -> String {
    format!(
        "mkdir /mnt; mount -t ext4 /dev/vda /mnt
        for i in 1 2 3 4 5 6 7 8; do head -c 1000000 /dev/urandom > /mnt/$i; done
        (cd /mnt; md5sum 1 2 3 4 5 6 7 8 > sums); echo guest {n} > /mnt/name; umount /mnt
        mount -t ext4 /dev/vda /mnt; cd /mnt; rm 3; {READS}"
    )
}

const READS: &str = "md5sum -c sums 2>/dev/null | grep -c OK; cat name; cd /; umount /mnt; reboot -f";

fn reads() -> String {
    format!("mkdir /mnt; mount -t ext4 -o ro /dev/vda /mnt; cd /mnt; {READS}")
}

fn go_on(_: cofferdam::disk::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub fn three_guests_share_one_unchanged_base() -> Outcome {
    let temp = Temp::new()?;
    let base = base(&temp)?;
    let before = fs::read(&base)?;
    let disk = |n: u32| temp.path(&format!("{n}.overlay"));
    let ends: Vec<_> = std::thread::scope(|scope| {
        let start = |n| {
            let builder = guest(&writes(n)).disk(Disk::overlay(&base).persist_at(disk(n)));
            scope.spawn(move || run(builder).map_err(|e| e.to_string()))
        };
        let threads: Vec<_> = (0..3).map(start).collect();
        threads.into_iter().map(|t| t.join().expect("a thread panicked")).collect()
    });
    for (n, end) in (0..).zip(ends) {
        let wanted = format!("7\nguest {n}");
        check_eq!(end?.1.trim(), wanted);
        let (overlay, flat) = (Overlay::open(disk(n))?, temp.path(&format!("{n}.img")));
        check!(overlay.info()?.allocated < Size::mib(24), "{:?}", overlay.info());
        overlay.flatten(&flat, go_on)?;
        host("/sbin/e2fsck", &["-fn"], &flat)?;
        check_eq!(run(guest(&reads()).disk(Disk::overlay(&base).persist_at(disk(n))))?.1.trim(), wanted);
    }
    check!(fs::read(&base)? == before, "the base was written");
    Ok(())
}

pub fn non_persistent_overlay_is_discarded() -> Outcome {
    let temp = Temp::new()?;
    let (base, directory) = (base(&temp)?, temp.path("overlays"));
    fs::create_dir(&directory)?;
    let before = fs::read(&base)?;
    for _ in 0..2 {
        let (_, printed) = run(guest(&writes(1)).disk(Disk::overlay(&base).scratch_dir(&directory)))?;
        check_eq!(printed.trim(), "7\nguest 1");
        check!(fs::read_dir(&directory)?.next().is_none(), "something was left behind");
    }
    check!(fs::read(&base)? == before, "the base was written");
    Ok(())
}

pub fn frozen_overlay_is_a_base_of_others() -> Outcome {
    let temp = Temp::new()?;
    let base = base(&temp)?;
    let lower = Overlay::create(temp.path("lower"), &base)?;
    run(guest(&writes(1)).disk(Disk::overlay(&base).persist_at(lower.path())))?;
    lower.freeze()?;
    let (_, printed) = run(guest(&reads()).disk(Disk::overlay(&lower)))?;
    check_eq!(printed.trim(), "7\nguest 1");
    let upper = temp.path("upper");
    run(guest("mkdir /mnt; mount -t ext4 /dev/vda /mnt; echo another > /mnt/name; umount /mnt; reboot -f")
        .disk(Disk::overlay(&lower).persist_at(&upper)))?;
    let upper = Overlay::open(upper)?;
    upper.rebase(&base, go_on)?;
    upper.compact(go_on)?;
    fs::remove_file(lower.path())?;
    check_eq!(run(guest(&reads()).disk(Disk::overlay(&base).persist_at(upper.path())))?.1.trim(), "7\nanother");
    Ok(())
}

pub fn overlay_at_its_max_size_fails_writes() -> Outcome {
    let temp = Temp::new()?;
    let path = temp.path("base.img");
    fs::File::create(&path)?.set_len(64 << 20)?;
    let script =
        "dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null && echo all || echo refused; reboot -f";
    let disk = |max| {
        let disk = Disk::overlay(&path).scratch_dir(temp.path("")).max_size(max);
        disk.on_error(ErrorClass::NoSpace, ErrorAction::Report)
    };
    let (_, printed) = run(guest(script).disk(disk(Size::mib(4))))?;
    check!(printed.contains("refused"), "{printed}");
    let (_, printed) = run(guest(script).disk(disk(Size::mib(80))))?;
    check!(printed.contains("all"), "{printed}");
    Ok(())
}

pub fn qcow2_write_leaves_the_backing_file_unchanged() -> Outcome {
    let temp = Temp::new()?;
    let base = base(&temp)?;
    let (before, image, flat) = (fs::read(&base)?, temp.path("top.qcow2"), temp.path("flat.img"));
    host("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw"], &image)?;
    let (_, printed) = run(guest(&writes(1)).disk(Disk::qcow2(&image).backing_dir(temp.path(""))))?;
    check_eq!(printed.trim(), "7\nguest 1");
    host("qemu-img", &["check", "-q"], &image)?;
    let from = image.to_str().ok_or("a path")?;
    host("qemu-img", &["convert", "-O", "raw", from], &flat)?;
    host("/sbin/e2fsck", &["-fn"], &flat)?;
    check_eq!(
        run(guest(&reads()).disk(Disk::qcow2(&image).backing_dir(temp.path("")).read_only(true)))?.1.trim(),
        "7\nguest 1"
    );
    check!(fs::read(&base)? == before, "the backing file was written");
    Ok(())
}

pub fn direct_and_memory_disks_keep_data() -> Outcome {
    let temp = Temp::new()?;
    let path = base(&temp)?;
    // What /tmp is made of in the lab knows no direct I/O in old kernels; those say so.
    match run(guest(&writes(1)).disk(Disk::file(&path).direct(true))) {
        Ok((_, printed)) => {
            check_eq!(printed.trim(), "7\nguest 1");
            host("/sbin/e2fsck", &["-fn"], &path)?;
        }
        Err(e) => check!(e.to_string().contains("direct: the file system knows no direct I/O"), "{e}"),
    }
    let script = "echo kept | dd of=/dev/vda bs=512 seek=9 conv=sync,fsync 2>/dev/null; dd if=/dev/vda bs=512 skip=9 count=1 2>/dev/null; reboot -f";
    check!(run(guest(script).disk(Disk::memory(Size::mib(8))))?.1.contains("kept"));
    Ok(())
}
