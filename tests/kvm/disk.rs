//! Disks are what they were said to be.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use cofferdam::{Disk, ErrorKind, Size};

use crate::fixture::{Outcome, Temp, guest, run};
use crate::{check, check_eq};

fn image(temp: &Temp, name: &str, fill: u8) -> std::io::Result<std::path::PathBuf> {
    let path = temp.path(name);
    fs::write(&path, vec![fill; 1 << 20])?;
    Ok(path)
}

pub fn written_and_read_back() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", 0)?;
    let script = "echo written by the guest | dd of=/dev/vda bs=512 seek=100 conv=sync,fsync 2>/dev/null\nreboot -f";
    run(guest(script).disk(Disk::file(&path)))?;
    let mut bytes = [0; 20];
    File::open(&path)?.read_exact_at(&mut bytes, 100 * 512)?;
    check_eq!(&bytes, b"written by the guest");
    let (_, printed) =
        run(guest("dd if=/dev/vda bs=512 skip=100 count=1 2>/dev/null\nreboot -f").disk(Disk::file(&path)))?;
    check!(printed.contains("written by the guest"), "{printed}");
    Ok(())
}

pub fn order_is_meaning() -> Outcome {
    let temp = Temp::new()?;
    let builder = guest("for d in a b c; do head -c 1 /dev/vd$d; done\nreboot -f")
        .disk(Disk::file(image(&temp, "a.img", b'1')?))
        .disk(Disk::file(image(&temp, "b.img", b'2')?).read_only())
        .disk(Disk::file(image(&temp, "c.img", b'3')?));
    check!(run(builder)?.1.contains("123"));
    Ok(())
}

pub fn read_only_is_kept() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", b'x')?;
    let script = "cat /sys/block/vda/ro\necho y > /dev/vda || echo refused\nreboot -f";
    let (_, printed) = run(guest(script).disk(Disk::file(&path).read_only()))?;
    check!(printed.contains('1') && printed.contains("refused"), "{printed}");
    check!(fs::read(&path)?.iter().all(|b| *b == b'x'));
    Ok(())
}

pub fn one_writer_or_many_readers() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", 0)?;
    let spin = "while :; do sleep 1; done";
    let readers = [guest(spin), guest(spin)].map(|g| g.disk(Disk::file(&path).read_only()).start());
    check!(readers.iter().all(Result::is_ok), "{readers:?}");
    let error = guest(spin).disk(Disk::file(&path)).start().expect_err("a writer beside readers");
    check_eq!(error.kind(), ErrorKind::ResourceExhausted);
    check!(error.to_string().contains("attaching disk 0") && error.to_string().contains("a.img"), "{error}");
    drop(readers);
    guest(spin).disk(Disk::file(&path)).start()?;
    Ok(())
}

pub fn sizes_arrive() -> Outcome {
    let (_, printed) = run(guest("cat /sys/block/vda/size\nreboot -f").disk(Disk::scratch(Size::gib(3))))?;
    check_eq!(printed.trim(), (3 * 1024 * 2048).to_string());
    Ok(())
}
