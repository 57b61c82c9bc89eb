//! Images as `qemu-img` makes them, where it is installed, and as no program should.

use std::process::Command;

use super::*;
use crate::memory::GuestAddress;

pub(super) struct Temp(PathBuf);

impl Temp {
    pub(super) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-qcow2-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(fs::canonicalize(path).unwrap())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Runs `qemu-img` in this directory.
    pub(super) fn qemu_img(&self, arguments: &str) -> String {
        let output = Command::new("qemu-img").args(arguments.split(' ')).current_dir(&self.0).output();
        let output = output.expect("qemu-img is not installed: run `make setup` first");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn memory() -> GuestMemory {
    GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

pub(super) fn write(disk: &mut Qcow2, bytes: &[u8], offset: u64) {
    let memory = memory();
    memory.write(GuestAddress(0), bytes).unwrap();
    disk.write(&memory, &[memory.segment(GuestAddress(0), bytes.len()).unwrap()], offset).unwrap();
}

pub(super) fn read(disk: &mut Qcow2, offset: u64, len: usize) -> Vec<u8> {
    let (memory, mut bytes) = (memory(), vec![0; len]);
    disk.read(&memory, &[memory.segment(GuestAddress(5), len).unwrap()], offset).unwrap();
    memory.read(GuestAddress(5), &mut bytes).unwrap();
    bytes
}

#[test]
fn qemu_img_check_passes_after_writes() {
    let temp = Temp::new("written");
    temp.qemu_img("create -q -f qcow2 a.qcow2 64M");
    let mut disk = Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
    assert_eq!(disk.geometry(), Geometry { len: 64 << 20, read_only: false, discard: 64 << 10 });
    write(&mut disk, &[1; 100 * 512], 3 * 512);
    write(&mut disk, &[2; 1 << 20], 10 << 20);
    disk.write_zeroes(4096, 8192, true).unwrap();
    disk.discard(10 << 20, 512 << 10).unwrap();
    disk.flush().unwrap();
    fs::copy(temp.path("a.qcow2"), temp.path("copy.qcow2")).unwrap();
    // Found like this, it was not closed: its counts are made again before anybody goes on.
    let mut copy = Qcow2::open(&temp.path("copy.qcow2"), None, false).unwrap();
    assert_eq!(read(&mut copy, 3 * 512, 512), [1; 512]);
    write(&mut copy, &[3; 1 << 20], 20 << 20);
    drop(copy);
    temp.qemu_img("check -q copy.qcow2");
    assert_eq!(read(&mut disk, 3 * 512, 512), [1; 512]);
    assert_eq!(read(&mut disk, 4096, 8192), [0; 8192]);
    disk.grow(65 << 20).unwrap();
    drop(disk);
    temp.qemu_img("check -q a.qcow2");
    temp.qemu_img("convert -O raw a.qcow2 a.raw");
    let raw = fs::read(temp.path("a.raw")).unwrap();
    assert_eq!((raw.len(), raw[3 * 512], raw[4096], raw[(11 << 20) - 1]), (65 << 20, 1, 0, 2));
}

#[test]
fn backing_files_are_read_and_never_written() {
    let temp = Temp::new("backing");
    fs::write(temp.path("base.raw"), vec![7; 1 << 20]).unwrap();
    temp.qemu_img("create -q -f qcow2 -b base.raw -F raw middle.qcow2");
    temp.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2");
    let middle = fs::read(temp.path("middle.qcow2")).unwrap();
    let mut disk = Qcow2::open(&temp.path("top.qcow2"), Some(&temp.0), false).unwrap();
    write(&mut disk, &[8; 512], 512);
    disk.flush().unwrap();
    assert_eq!(read(&mut disk, 0, 1536), [vec![7; 512], vec![8; 512], vec![7; 512]].concat());
    assert_eq!(fs::read(temp.path("middle.qcow2")).unwrap(), middle);
    assert_eq!(fs::read(temp.path("base.raw")).unwrap(), vec![7; 1 << 20]);
    let error = Qcow2::open(&temp.path("top.qcow2"), Some(&temp.0), false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{error}");
}

#[test]
fn backing_files_elsewhere_and_circles_are_refused() {
    let (temp, other) = (Temp::new("elsewhere"), Temp::new("other"));
    fs::write(other.path("secret"), vec![7; 1 << 20]).unwrap();
    temp.qemu_img(&format!("create -q -f qcow2 -b {} -F raw out.qcow2", other.path("secret").display()));
    let refused = |image: &str, directory: Option<&Path>, word: &str| {
        let error = Qcow2::open(&temp.path(image), directory, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains(word) && error.to_string().contains("backing_dir"), "{error}");
    };
    // Nothing is granted by default, not even what lies beside it.
    fs::write(temp.path("neighbour"), vec![7; 1 << 20]).unwrap();
    temp.qemu_img("create -q -f qcow2 -b neighbour -F raw beside.qcow2");
    refused("beside.qcow2", None, "neighbour is not allowed");
    refused("out.qcow2", Some(&temp.0), "is outside");
    std::os::unix::fs::symlink(other.path("secret"), temp.path("link")).unwrap();
    temp.qemu_img("create -q -f qcow2 -b link -F raw through.qcow2");
    refused("through.qcow2", Some(&temp.0), "is a link");
    // Opening a pipe would wait for a writer.
    fs::remove_file(temp.path("link")).unwrap();
    crate::sys::make_fifo(&temp.path("link")).unwrap();
    refused("through.qcow2", Some(&temp.0), "no regular file");
    crate::sys::make_fifo(&temp.path("pipe.qcow2")).unwrap();
    assert_eq!(Qcow2::open(&temp.path("pipe.qcow2"), None, true).unwrap_err().kind(), ErrorKind::InvalidConfig);
    Qcow2::open(&temp.path("out.qcow2"), Some(&other.0), false).unwrap();
    temp.qemu_img("create -q -f qcow2 one.qcow2 1M");
    temp.qemu_img("create -q -f qcow2 -b one.qcow2 -F qcow2 two.qcow2");
    temp.qemu_img("rebase -u -b two.qcow2 -F qcow2 one.qcow2");
    let error = Qcow2::open(&temp.path("one.qcow2"), Some(&temp.0), true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("comes back"), "{error}");
    temp.qemu_img("rebase -u -b none.qcow2 -F qcow2 one.qcow2");
    assert_eq!(Qcow2::open(&temp.path("one.qcow2"), Some(&temp.0), true).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn damaged_images_are_rejected_without_a_write() {
    let temp = Temp::new("damaged");
    temp.qemu_img("create -q -f qcow2 a.qcow2 64M");
    let (path, good) = (temp.path("a.qcow2"), fs::read(temp.path("a.qcow2")).unwrap());
    let cases: [(usize, &[u8], ErrorKind, &str); 13] = [
        (0, b"QFJ", ErrorKind::Corrupt, "not a qcow2 image"),
        (4, &[0, 0, 0, 9], ErrorKind::Unsupported, "version 9"),
        (35, &[1], ErrorKind::Unsupported, "encrypted (AES)"),
        (35, &[2], ErrorKind::Unsupported, "encrypted (LUKS)"),
        (79, &[2], ErrorKind::Corrupt, "marked \"corrupt\""),
        (79, &[4], ErrorKind::Unsupported, "external data file"),
        (79, &[16], ErrorKind::Unsupported, "extended L2 entries"),
        (72, &[128], ErrorKind::Unsupported, "bit 63"),
        (20, &[0, 0, 0, 40], ErrorKind::Corrupt, "2^40"),
        (31, &[1], ErrorKind::Corrupt, "are not a disk"),
        (36, &[255; 4], ErrorKind::Corrupt, "L1"),
        (48, &[255; 8], ErrorKind::Corrupt, "reference counts"),
        (60, &[0, 0, 0, 1], ErrorKind::Unsupported, "internal snapshots"),
    ];
    for (at, patch, kind, word) in cases {
        let mut bad = good.clone();
        bad[at..at + patch.len()].copy_from_slice(patch);
        fs::write(&path, &bad).unwrap();
        let error = Qcow2::open(&path, None, false).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(word), "{word}: {error:?}");
        assert_eq!(fs::read(&path).unwrap(), bad, "{word}: touched");
    }
    for len in [0, 3, 50, 100] {
        fs::write(&path, &good[..len]).unwrap();
        assert_eq!(Qcow2::open(&path, None, false).unwrap_err().kind(), ErrorKind::Corrupt, "{len}");
    }
    assert_eq!(Qcow2::open(&temp.path("none"), None, false).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn header_extensions_are_whole_and_end_in_the_header() {
    let temp = Temp::new("extensions");
    let path = temp.path("a.qcow2");
    let extension = |kind: u32, data: &[u8]| {
        let mut bytes = [kind.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let names = |len| extension(0x6803_f857, &vec![1; len]);
    let (text, other) = (&[0xff, 0xfe][..], extension(0x1234_5678, &[7; 9]));
    // That of the whole header but for the end marker, which has no room.
    let filled = extension(1, &[0; 512 - 112 - 8]);
    let cases: [(Vec<u8>, &str); 9] = [
        (names(49), "49 bytes"),
        (names(47), "47 bytes"),
        ([other.clone(), names(1)].concat(), "1 bytes"),
        (extension(0xe279_2aca, text), "format of its backing file"),
        (extension(0x4441_5441, text), "external data file"),
        (vec![0, 0, 0, 1, 0, 0, 1, 0x90], "at 112 does not end"),
        (vec![0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff], "at 112 does not end"),
        (vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], "at 112 does not end"),
        (filled, "at 512 does not end"),
    ];
    temp.qemu_img("create -q -f qcow2 -o cluster_size=512 a.qcow2 1M");
    let good = fs::read(&path).unwrap();
    assert_eq!(good[100..104], [0, 0, 0, 112], "qemu-img makes other headers now");
    let with = |extensions: &[u8]| {
        let mut image = good.clone();
        image[112..512].fill(0);
        image[112..112 + extensions.len()].copy_from_slice(extensions);
        fs::write(&path, image).unwrap();
    };
    for (extensions, word) in cases {
        with(&extensions);
        for read_only in [true, false] {
            let error = Qcow2::open(&path, None, read_only).unwrap_err();
            assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(word), "{word}: {error:?}");
        }
    }
    with(&[other, names(0), names(96), extension(0xe279_2aca, b"raw")].concat());
    drop(Qcow2::open(&path, None, false).unwrap());
    // As they come, in either version.
    fs::write(temp.path("base"), [7; 4096]).unwrap();
    for version in ["0.10", "1.1"] {
        temp.qemu_img(&format!("create -q -f qcow2 -o compat={version} -b base -F raw b.qcow2"));
        let mut disk = Qcow2::open(&temp.path("b.qcow2"), Some(&temp.0), true).unwrap();
        assert_eq!(read(&mut disk, 0, 512), [7; 512]);
    }
}

#[test]
fn refcounts_that_stall_allocation_are_rejected() {
    let temp = Temp::new("looking");
    let path = temp.path("a.qcow2");
    fs::write(temp.path("a.raw"), vec![1; 1 << 20]).unwrap();
    temp.qemu_img("convert -f raw -O qcow2 -o cluster_size=512 a.raw a.qcow2");
    let good = fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let table = number(48) as usize;
    let (first, ones) = (number(table), number(40));
    let end = (good.len() as u64).next_multiple_of(512);
    // Of 64 blocks, each of which counts 256 clusters, the file has need of nine.
    let cases: [(usize, u64, &str); 8] = [
        (0, 0, "the header's own cluster is not counted"),
        (0, end, "block 0 is said to be"),
        (1, first, "two of its blocks"),
        (2, first + 8, "block 2 is said to be"),
        (2, end, "block 2 is said to be"),
        (2, 1 << 63, "block 2 is said to be"),
        (40, ones, "block 40 counts clusters behind the end"),
        (9, first + 256, "block 9 is said to be"),
    ];
    for (n, entry, word) in cases {
        let mut bad = good.clone();
        bad[table + n * 8..table + n * 8 + 8].copy_from_slice(&entry.to_be_bytes());
        fs::write(&path, &bad).unwrap();
        let error = Qcow2::open(&path, None, false).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(word), "{word}: {error:?}");
        assert!(fs::read(&path).unwrap() == bad, "{word}: touched");
        // Who only reads has no use for counts.
        let mut disk = Qcow2::open(&path, None, true).unwrap();
        assert_eq!(read(&mut disk, 1 << 19, 512), [1; 512]);
    }
    // A writer for whom there was no more space left four that are empty; five are none of these.
    for (blocks, fits) in [(4u64, true), (5, false)] {
        let mut left = good.clone();
        left.resize((end + 512 * blocks) as usize, 0);
        for n in 0..blocks {
            let at = table + (50 + n as usize) * 8;
            left[at..at + 8].copy_from_slice(&(end + 512 * n).to_be_bytes());
        }
        fs::write(&path, &left).unwrap();
        assert_eq!(Qcow2::open(&path, None, false).is_ok(), fits, "{blocks}");
    }
}

#[test]
fn narrow_refcounts_are_opened_read_only() {
    let temp = Temp::new("narrow");
    let path = temp.path("a.qcow2");
    let cases = [(512, 1, false), (512, 4, false), (2048, 2, false), (2048, 4, false), (4096, 1, true), (512, 8, true)];
    for (cluster, bits, written) in cases {
        temp.qemu_img(&format!("create -q -f qcow2 -o cluster_size={cluster},refcount_bits={bits} a.qcow2 1M"));
        Qcow2::open(&path, None, true).unwrap();
        match Qcow2::open(&path, None, false) {
            Ok(_) => assert!(written, "{cluster} {bits}"),
            Err(e) => {
                assert!(!written && e.kind() == ErrorKind::Unsupported && e.to_string().contains("bits"), "{e:?}")
            }
        }
    }
}

#[test]
fn a_disk_smaller_than_a_cluster_has_pieces_zeroed() {
    let temp = Temp::new("piece");
    temp.qemu_img("create -q -f qcow2 a.qcow2 2048");
    let mut disk = Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
    write(&mut disk, &[1; 2048], 0);
    disk.write_zeroes(0, 512, true).unwrap();
    disk.write_zeroes(1024, 512, true).unwrap();
    assert_eq!(read(&mut disk, 0, 2048), [[0; 512], [1; 512], [0; 512], [1; 512]].concat());
    disk.write_zeroes(512, 1536, true).unwrap();
    assert_eq!(read(&mut disk, 0, 2048), [0; 2048]);
    drop(disk);
    temp.qemu_img("check -q a.qcow2");
}

#[test]
fn tables_of_a_chain_that_take_much_memory_are_refused() {
    let temp = Temp::new("tables");
    temp.qemu_img("create -q -f qcow2 -o cluster_size=2M a.qcow2 65T");
    temp.qemu_img("create -q -f qcow2 -o cluster_size=2M -b a.qcow2 -F qcow2 b.qcow2");
    Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
    let error = Qcow2::open(&temp.path("b.qcow2"), Some(&temp.0), true).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("512 MiB of memory"), "{error:?}");
}

/// Makes wrong counts, and the mark of a program that did not close the image.
fn left_open(path: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut at = [0; 8];
    file.read_exact_at(&mut at, 48).unwrap();
    let table = u64::from_be_bytes(at);
    file.read_exact_at(&mut at, table).unwrap();
    file.write_all_at(&[0; 512], u64::from_be_bytes(at)).unwrap();
    mark(&file, 1).unwrap();
}

#[test]
fn refcounts_are_rebuilt_for_every_width() {
    let temp = Temp::new("recount");
    let raw: Vec<u8> = (0..4u32 << 20).map(|n| (n / 5000) as u8).collect();
    fs::write(temp.path("a.raw"), &raw).unwrap();
    for options in ["refcount_bits=1", "refcount_bits=4", "refcount_bits=64", "cluster_size=512"] {
        temp.qemu_img(&format!("convert -f raw -O qcow2 -o {options} a.raw a.qcow2"));
        check_again(&temp, &raw, options);
    }
    temp.qemu_img("convert -c -f raw -O qcow2 a.raw a.qcow2");
    check_again(&temp, &raw, "compressed");
}

fn check_again(temp: &Temp, raw: &[u8], what: &str) {
    left_open(&temp.path("a.qcow2"));
    let error = Qcow2::open(&temp.path("a.qcow2"), None, true).unwrap_err();
    assert!(error.to_string().contains("open it for writing once"), "{what}: {error}");
    let mut disk = Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
    fs::copy(temp.path("a.qcow2"), temp.path("copy.qcow2")).unwrap();
    assert!(temp.qemu_img("check copy.qcow2").contains("No errors"), "{what}");
    write(&mut disk, &[3; 1 << 20], 1 << 20);
    drop(disk);
    assert!(temp.qemu_img("check a.qcow2").contains("No errors"), "{what}");
    temp.qemu_img("convert -O raw a.qcow2 b.raw");
    let now = fs::read(temp.path("b.raw")).unwrap();
    let wanted = [&raw[..1 << 20], &[3; 1 << 20], &raw[2 << 20..]].concat();
    assert!(now == wanted, "{what}");
}

#[test]
fn invalid_tables_are_not_counted_or_written() {
    let temp = Temp::new("uncountable");
    fs::write(temp.path("a.raw"), vec![1; 1 << 20]).unwrap();
    temp.qemu_img("convert -f raw -O qcow2 a.raw a.qcow2");
    let (path, good) = (temp.path("a.qcow2"), fs::read(temp.path("a.qcow2")).unwrap());
    let at = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let (l1, counts) = (at(40), at(48));
    let l2 = at(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    let cases = [
        (l1, l1, "overlaps"),
        (l1, counts + 512, "within a cluster"),
        (l2, l2, "overlaps"),
        (l2, 512, "within a cluster"),
    ];
    for (at, entry, word) in cases {
        let mut bad = good.clone();
        bad[at as usize..at as usize + 8].copy_from_slice(&u64::to_be_bytes(entry));
        bad[79] |= 1;
        fs::write(&path, &bad).unwrap();
        let error = Qcow2::open(&path, None, false).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(word), "{word}: {error:?}");
        assert!(fs::read(&path).unwrap() == bad, "{word}: touched");
    }
    // What was not there yet when the power went was never promised: what was there before is found instead.
    for (at, entry) in [(l1, 1u64 << 40), (l2, 1 << 50), (l2, 1 << 62 | 1 << 50)] {
        let mut lost = good.clone();
        lost[at as usize..at as usize + 8].copy_from_slice(&entry.to_be_bytes());
        lost[79] |= 1;
        fs::write(&path, &lost).unwrap();
        let mut disk = Qcow2::open(&path, None, false).unwrap();
        assert_eq!(read(&mut disk, 0, 512), [0; 512]);
        write(&mut disk, &[5; 512], 512);
        drop(disk);
        assert!(temp.qemu_img("check a.qcow2").contains("No errors"));
    }
}

/// What is compressed may share a cluster, but not with so much.
#[test]
fn uses_of_a_cluster_are_counted_in_bounded_memory() {
    let temp = Temp::new("shared");
    let path = temp.path("a.qcow2");
    temp.qemu_img("create -q -f qcow2 -o cluster_size=2M a.qcow2 512G");
    let mut shared = fs::read(&path).unwrap();
    let (l1, end) =
        (u64::from_be_bytes(shared[40..48].try_into().unwrap()) as usize, shared.len().next_multiple_of(2 << 20));
    shared.resize(end + (4 << 20), 0);
    for entry in shared[end..end + (2 << 20)].chunks_exact_mut(8).take(65_537) {
        entry.copy_from_slice(&(1u64 << 62 | (end as u64 + (2 << 20))).to_be_bytes());
    }
    shared[l1..l1 + 8].copy_from_slice(&(1 << 63 | end as u64).to_be_bytes());
    shared[79] |= 1;
    fs::write(&path, &shared).unwrap();
    let error = Qcow2::open(&path, None, false).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("too much else"), "{error:?}");
}

#[test]
fn images_of_any_shape_that_qemu_makes_are_written() {
    let temp = Temp::new("shapes");
    for options in [
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=512",
        "preallocation=full,cluster_size=1k,refcount_bits=64",
        "cluster_size=2M,refcount_bits=1",
        "lazy_refcounts=on,cluster_size=4k,refcount_bits=2",
    ] {
        temp.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 12M"));
        for resize in ["--shrink a.qcow2 5M", "a.qcow2 20M"] {
            let mut disk = Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
            write(&mut disk, &[5; 1 << 18], 4 << 20);
            disk.discard(0, 4 << 20).unwrap();
            disk.write_zeroes(4 << 20, 4096, true).unwrap();
            assert_eq!(read(&mut disk, (4 << 20) + 4096, 4096), [5; 4096], "{options}");
            drop(disk);
            assert!(temp.qemu_img("check a.qcow2").contains("No errors"), "{options}");
            temp.qemu_img(&format!("resize -q -f qcow2 {resize}"));
        }
    }
}

#[test]
fn fragmented_refcounts_are_opened_read_only() {
    let temp = Temp::new("used");
    let path = temp.path("a.qcow2");
    temp.qemu_img("create -q -f qcow2 -o cluster_size=4k,refcount_bits=1 a.qcow2 1M");
    // A block counts 2^15 clusters, so that 512 of them count 2^24. They are the only bytes of a file of 64 GiB.
    let (blocks, cluster) = (512u64, 4096u64);
    let (table, first) = (1000 * cluster, 1002 * cluster);
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.set_len((1 << 24) * cluster + cluster).unwrap();
    let entries: Vec<u8> = (0..=blocks).flat_map(|n| (first + n * cluster).to_be_bytes()).collect();
    file.write_all_at(&entries, table).unwrap();
    file.write_all_at(&[table.to_be_bytes().as_slice(), &2u32.to_be_bytes()].concat(), 48).unwrap();
    file.write_all_at(&vec![255; (blocks * cluster) as usize], first).unwrap();
    drop(Qcow2::open(&path, None, false).unwrap());
    file.write_all_at(&[1], first + blocks * cluster).unwrap();
    let error = Qcow2::open(&path, None, false).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("cluster_size=2M"), "{error:?}");
    Qcow2::open(&path, None, true).unwrap();
    // What was given back ends the search. Then the file's length is no matter.
    file.write_all_at(&[0], first + cluster).unwrap();
    drop(Qcow2::open(&path, None, false).unwrap());
    assert_eq!(counts::check_used((1 << 24) + 1).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn empty_images_of_16_tib_are_written() {
    let temp = Temp::new("empty");
    for options in ["cluster_size=64k", "cluster_size=2M,refcount_bits=1"] {
        temp.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 16T"));
        let mut disk = Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
        write(&mut disk, &[1; 512], 15 << 40);
        disk.flush().unwrap();
        drop(disk);
        let mut disk = Qcow2::open(&temp.path("a.qcow2"), None, false).unwrap();
        assert_eq!(read(&mut disk, 15 << 40, 512), [1; 512]);
    }
}

/// Sets the L2 entry of the first guest clusters, of which at least one has data.
fn map(path: &Path, entries: &[u64]) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2 = at(at(40)) & 0x00ff_ffff_ffff_fe00;
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    file.write_all_at(&bytes, l2).unwrap();
}

#[test]
fn header_cluster_named_as_data_is_not_overwritten() {
    let temp = Temp::new("itself");
    fs::write(temp.path("a.raw"), vec![1; 1 << 20]).unwrap();
    let path = temp.path("a.qcow2");
    let header = |path: &Path| fs::read(path).unwrap()[104..4096].to_vec();
    for given_back in [true, false] {
        temp.qemu_img("convert -f raw -O qcow2 -o cluster_size=4k a.raw a.qcow2");
        // Compressed data of one sector, in the header.
        map(&path, &[1 << 62 | 512]);
        let before = header(&path);
        let mut disk = Qcow2::open(&path, None, false).unwrap();
        if given_back {
            disk.discard(0, 4096).unwrap();
        } else {
            disk.write_zeroes(0, 4096, true).unwrap();
        }
        let memory = memory();
        let segment = memory.segment(GuestAddress(0), 8192).unwrap();
        memory.write(GuestAddress(0), &[7; 8192]).unwrap();
        assert!(disk.write(&memory, &[segment], 0).is_err());
        drop(disk);
        assert!(header(&path) == before, "the header is written over");
        assert_eq!(fs::read(&path).unwrap()[..8], [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 3]);
    }
}

/// Calls of write(2) and the like that this thread has made.
fn writes() -> u64 {
    let io = fs::read_to_string("/proc/thread-self/io").expect("a kernel with CONFIG_TASK_IO_ACCOUNTING is needed");
    io.lines().find_map(|line| line.strip_prefix("syscw: ")).unwrap().parse().unwrap()
}

#[test]
fn lost_entries_of_one_table_are_forgotten_in_one_write() {
    let temp = Temp::new("lost");
    fs::write(temp.path("a.raw"), vec![1; 1 << 20]).unwrap();
    let path = temp.path("a.qcow2");
    temp.qemu_img("convert -f raw -O qcow2 a.raw a.qcow2");
    map(&path, &(0..8192).map(|n| (1 << 40) + (n << 16)).collect::<Vec<u64>>());
    left_open(&path);
    let before = writes();
    let mut disk = Qcow2::open(&path, None, false).unwrap();
    assert!(writes() - before < 20, "{} writes", writes() - before);
    assert_eq!(read(&mut disk, 0, 512), [0; 512]);
    drop(disk);
    assert!(temp.qemu_img("check a.qcow2").contains("No errors"));
}
