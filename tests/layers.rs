//! The architecture, enforced: who may import whom, how large a file may be, what every file begins with.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Every layer and what it may import. `vm` never sees the protocol, `virtio` never sees the hypervisor.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("size", &[]),
    ("rate", &["error"]),
    ("version", &["error"]),
    ("proto", &[]),
    ("sys", &["error", "size"]),
    ("memory", &["sys", "error", "size"]),
    ("event_loop", &["sys", "error"]),
    ("bus", &["sys", "error"]),
    ("irq", &["sys", "error"]),
    ("kvm", &["sys", "memory", "error", "version"]),
    ("legacy", &["bus", "sys", "error"]),
    ("arch", &["kvm", "memory", "bus", "legacy", "sys", "error", "size", "version"]),
    ("boot", &["memory", "arch", "sys", "error"]),
    ("network", &["sys", "memory", "event_loop", "error", "size", "rate"]),
    ("virtio", &["sys", "memory", "bus", "irq", "event_loop", "network", "error", "size", "rate", "version"]),
    (
        "vm",
        &[
            "error",
            "size",
            "rate",
            "version",
            "sys",
            "memory",
            "event_loop",
            "bus",
            "irq",
            "kvm",
            "arch",
            "boot",
            "legacy",
            "network",
            "virtio",
        ],
    ),
    ("container", &["error", "size", "sys", "event_loop", "boot", "virtio", "vm", "proto"]),
    // The only one that knows of a runtime.
    ("async_io", &["error", "sys", "virtio", "vm", "container"]),
    ("guest", &["proto"]),
    // For fuzzing and tests only: calls entry points from outside.
    (
        "fuzzing",
        &[
            "error",
            "size",
            "sys",
            "memory",
            "event_loop",
            "bus",
            "irq",
            "boot",
            "network",
            "virtio",
            "container",
            "proto",
        ],
    ),
];

/// Modules that the crate's users see. Inside, the layer is named that a thing comes from.
const FACADES: &[&str] = &[
    "backend", "cpu", "disk", "event", "exit", "files", "host", "image", "kernel", "net", "process", "stats", "tokio",
    "vsock",
];

/// Crates that live in one layer only.
const CRATES: &[(&str, &[&str])] = &[
    ("kvm_ioctls", &["kvm"]),
    ("kvm_bindings", &["kvm", "arch"]),
    ("vm_memory", &["memory"]),
    ("linux_loader", &["boot"]),
    // In tests only, as another ring to compare with.
    ("virtio_queue", &["virtio"]),
    ("slab", &["memory", "virtio"]),
    // Files below images are called unsafely.
    ("imago", &["sys", "virtio"]),
    ("vmm_sys_util", &["sys"]),
    ("io_uring", &["sys"]),
    ("vm_superio", &["legacy"]),
    ("acpi_tables", &["arch"]),
    // In containers for a checksum, and for images.
    ("flate2", &["boot", "container"]),
    ("ureq", &["container"]),
    ("rustls_graviola", &["container"]),
    ("graviola", &["container"]),
    ("webpki_root_certs", &["container"]),
    ("base64", &["container"]),
    ("sigstore_verify", &["container"]),
    ("lzma_rust2", &["boot", "container"]),
    ("ruzstd", &["boot", "container"]),
    ("bzip2", &["container"]),
    ("syscalls", &["container"]),
    ("tokio", &["async_io"]),
];

/// Directories in which `unsafe` may be allowed.
const UNSAFE: &[&str] = &["sys", "memory", "kvm", "guest"];

/// Words of one architecture: of processors, of machines around them, and of their kernels' files and boot protocols.
const ARCHITECTURE_WORDS: &[&str] = &[
    "x86", "amd64", "i386", "intel64", "rdtsc", "tsc", "cpuid", "msr", "msrs", "xsave", "xcr", "xcrs", "lapic", "apic",
    "ioapic", "pit", "i8042", "ioperm", "rip", "rsp", "rflags", "efer", "cr0", "cr2", "cr3", "cr4", "idt", "tss",
    "pvh", "bzimage", "e820", "mptable", "vmx", "svm", "avx", "sse", "aarch64", "arm64", "psci", "gic", "gicv3", "hlt",
    "ioin", "ioout", "portin", "portout", "eflags", "rax", "outb", "inb", "nmi", "smi", "sipi", "mtrr", "kvmclock",
];

/// Directories of one architecture each, below `src/boot`. All others are in a directory `arch`.
const BOOT_PROTOCOLS: &[&str] = &["boot/aarch64", "boot/x86"];

/// Files that choose one of such directories, and so name them.
const SELECTORS: &[&str] =
    &["arch/mod.rs", "boot/mod.rs", "container/exec/seccomp/arch/mod.rs", "guest/sys/arch/mod.rs", "kvm/arch/mod.rs"];

/// Lines of code, without blank ones, comments and tests, that still are one idea.
const MAX_CODE: usize = 500;

struct Source {
    path: PathBuf,
    layer: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut directories) = (Vec::new(), vec![root.clone()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let inside = path.strip_prefix(&root).unwrap();
                let layer = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
                found.push(Source { text: fs::read_to_string(&path).unwrap(), path, layer });
            }
        }
    }
    assert!(found.len() > 40, "the sources were not found");
    found
}

/// The code before the file's own tests, without comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..end].lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"))
}

/// Every `crate::name` in the code.
fn imports(text: &str) -> Vec<String> {
    let words = |line: &str| {
        let after = line.split("crate::").skip(1).map(str::to_owned).collect::<Vec<_>>();
        after.into_iter().map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>())
    };
    code(text).flat_map(words).filter(|name| !name.is_empty()).collect()
}

#[test]
fn layers_import_only_what_lies_below() {
    let table: BTreeMap<_, _> = LAYERS.iter().copied().collect();
    for source in sources().iter().filter(|s| s.layer != "lib") {
        let allowed =
            table.get(source.layer.as_str()).unwrap_or_else(|| panic!("{} is not in the table", source.layer));
        for import in imports(&source.text) {
            // What the crate's root re-exports, in documentation links, and macros are no layers.
            let known = table.contains_key(import.as_str());
            let fine = !known || import == source.layer || allowed.contains(&import.as_str());
            assert!(fine, "{} imports crate::{import}, which lies above", source.path.display());
            let facade = FACADES.contains(&import.as_str());
            assert!(!facade, "{} imports crate::{import}: name the layer instead", source.path.display());
        }
    }
}

#[test]
fn dependencies_live_in_one_layer() {
    for source in sources() {
        for (name, layers) in CRATES {
            let used = code(&source.text).any(|line| line.contains(&format!("{name}::")));
            assert!(!used || layers.contains(&source.layer.as_str()), "{} uses {name}", source.path.display());
        }
    }
}

#[test]
fn unsafe_is_allowed_in_marked_directories_only() {
    for source in sources().iter().filter(|s| !UNSAFE.contains(&s.layer.as_str())) {
        assert!(!source.text.contains("allow(unsafe_code"), "{} allows unsafe code", source.path.display());
    }
}

/// The words of architectures in a text, with the numbers of their lines.
fn architecture_words(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        for part in line.split(|c: char| !c.is_ascii_alphanumeric()) {
            // `CpuidBits` is two words, and `BzImage` one.
            let humps = part.match_indices(|c: char| c.is_ascii_uppercase()).map(|(at, _)| at);
            let ends: Vec<usize> = humps.filter(|at| *at > 0).chain([part.len()]).collect();
            let starts = [0].into_iter().chain(ends.iter().copied());
            let whole = (ends.len() > 1).then_some(part);
            let words = starts.zip(&ends).filter_map(|(start, end)| part.get(start..*end)).chain(whole);
            let words = words.map(str::to_ascii_lowercase).filter(|word| ARCHITECTURE_WORDS.contains(&word.as_str()));
            found.extend(words.map(|word| (number, word)));
        }
    }
    found
}

#[test]
fn words_of_an_architecture_stay_in_its_directories() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut selecting = 0;
    for source in sources() {
        let inside = source.path.strip_prefix(&root).unwrap();
        let selects = SELECTORS.iter().any(|it| inside == Path::new(it));
        selecting += usize::from(selects);
        assert!(selects || !source.text.contains("target_arch"), "{} asks for the processor", source.path.display());
        let own = inside.parent().unwrap().iter().any(|it| it == "arch");
        if !selects && !own && !BOOT_PROTOCOLS.iter().any(|it| inside.starts_with(it)) {
            // Tests have samples of what is real: names of packages, lines of configurations.
            let end = source.text.find("#[cfg(test)]\nmod tests {").unwrap_or(source.text.len());
            let test = inside.file_stem().unwrap() == "tests" || inside.parent().unwrap().ends_with("tests");
            let words = if test { Vec::new() } else { architecture_words(&source.text[..end]) };
            assert!(words.is_empty(), "{} has words of one architecture: {words:?}", source.path.display());
        }
    }
    assert_eq!(selecting, SELECTORS.len());
}

#[test]
fn words_of_an_architecture_are_found() {
    let text = "/// As `bzImage` files.\nlet msr_index = CpuidBits::new(0x10);\nscript(\"ripe\", report_interval, SPIT);\nVMX_X86_64";
    let found: Vec<_> = architecture_words(text).into_iter().map(|(line, word)| format!("{line} {word}")).collect();
    assert_eq!(found, ["1 bzimage", "2 msr", "2 cpuid", "4 vmx", "4 x86"]);
}

#[test]
fn files_say_what_they_are_and_hold_one_idea() {
    for source in sources() {
        let path = source.path.display();
        assert!(source.text.starts_with("//!"), "{path} does not begin with what it is");
        let lines = code(&source.text).count();
        assert!(lines <= MAX_CODE, "{path} has {lines} lines of code: that is two ideas");
        let name = source.path.file_stem().unwrap().to_string_lossy();
        let forbidden = ["utils", "common", "helpers", "manager", "types", "misc"];
        assert!(!forbidden.contains(&&*name), "{path}: the name says nothing");
    }
}

#[test]
fn library_makes_no_process_wide_changes() {
    for source in sources().iter().filter(|s| s.layer != "guest") {
        for word in [
            "process::exit",
            "libc::_exit",
            "println!",
            "eprintln!",
            "set_hook",
            "set_logger",
            "todo!",
            "unimplemented!",
        ] {
            let found = code(&source.text).any(|line| line.contains(word));
            assert!(!found, "{} has {word}", source.path.display());
        }
    }
}
