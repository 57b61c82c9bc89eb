//! Builds the guest shim with the compiler that builds the library, and leaves it as `$OUT_DIR/shim` for `include_bytes!`.
//!
//! No nested cargo, no crates, no libc, no network: `$RUSTC src/guest/main.rs` and the linker that linked this very script. All
//! flags are here. So the shim is the same byte for byte in every profile and directory, whatever flags and wrapper build the library.
#![allow(clippy::print_stdout, reason = "cargo reads its directives there")]

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What fits in beside a kernel without anybody noticing; far more than it should ever be.
const MAX_SIZE: u64 = 128 * 1024;

/// Prints as its text, because that is how cargo shows what `main` returns.
struct Failure(String);

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What compiling for a processor takes.
#[derive(Clone, Copy)]
struct Architecture {
    /// The least of its processors.
    cpu: &'static str,
    /// The largest page of a guest's kernel.
    page: u32,
    /// Whether the library is of use without a shim. Where it starts no guests yet, checking it should take no linker.
    may_lack_linker: bool,
}

impl Architecture {
    fn of(name: &str) -> Option<Self> {
        match name {
            "x86_64" => Some(Self { cpu: "x86-64", page: 4096, may_lack_linker: false }),
            "aarch64" => Some(Self { cpu: "generic", page: 65536, may_lack_linker: true }),
            _ => None,
        }
    }
}

fn main() -> Result<(), Failure> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/guest");
    println!("cargo::rerun-if-changed=src/proto");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    println!("cargo::rustc-check-cfg=cfg(guest_bin)");

    let shim = PathBuf::from(variable("OUT_DIR")?).join("shim");
    // Documentation is built on machines of every kind and never runs a guest.
    if env::var_os("DOCS_RS").is_some() {
        return std::fs::write(&shim, []).map_err(|error| Failure(format!("writing {}: {error}", shim.display())));
    }
    let target = text("TARGET")?;
    let architecture = Architecture::of(&text("CARGO_CFG_TARGET_ARCH")?);
    let (Some(architecture), "linux") = (architecture, text("CARGO_CFG_TARGET_OS")?.as_str()) else {
        return Err(Failure(format!("cofferdam compiles for x86_64 and aarch64 Linux only; the target is {target}")));
    };
    if let Err(failure) = build(&shim, &target, architecture) {
        if !architecture.may_lack_linker {
            return Err(failure);
        }
        check(&target, architecture)?;
        println!("cargo::warning=no linker for {target}: containers will have no guest shim");
        return std::fs::write(&shim, []).map_err(|error| Failure(format!("writing {}: {error}", shim.display())));
    }
    match std::fs::metadata(&shim) {
        Ok(metadata) if (1..=MAX_SIZE).contains(&metadata.len()) => Ok(()),
        Ok(metadata) => {
            Err(Failure(format!("the guest shim has {} bytes; at most {MAX_SIZE} are meant", metadata.len())))
        }
        Err(error) => Err(Failure(format!("the guest shim was not written to {}: {error}", shim.display()))),
    }
}

/// Tries the linkers until one works: the one that cargo uses, then the one that comes with rustup's compilers and needs nothing installed.
fn build(shim: &Path, target: &str, architecture: Architecture) -> Result<(), Failure> {
    let page = format!("max-page-size={}", architecture.page);
    let mut through_cc: Vec<OsString> = Vec::new();
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut flag = OsString::from("-Clinker=");
        flag.push(linker);
        through_cc.push(flag);
    }
    for arg in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-Wl,--build-id=none",
        "-Wl,--no-eh-frame-hdr",
        &format!("-Wl,-z,{page}"),
    ] {
        through_cc.push(format!("-Clink-arg={arg}").into());
    }
    let direct: Vec<OsString> = [
        "-Clinker=rust-lld",
        "-Clinker-flavor=ld.lld",
        "-Clink-arg=--build-id=none",
        "-Clink-arg=--no-eh-frame-hdr",
        &format!("-Clink-arg=-z{page}"),
    ]
    .map(OsString::from)
    .into();

    let mut complaints = String::new();
    for linking in [&through_cc, &direct] {
        let output = compile(shim, target, architecture, linking)?;
        if output.status.success() {
            return Ok(());
        }
        complaints.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    Err(Failure(format!(
        "compiling the guest shim for {target} failed. It needs what compiling this crate needs: rustc's standard library for {target} \
         and a linker (Debian: apt-get install gcc). The compiler said:\n{complaints}"
    )))
}

/// Compiles the shim to machine code that nothing links.
fn check(target: &str, architecture: Architecture) -> Result<(), Failure> {
    let object = PathBuf::from(variable("OUT_DIR")?).join("shim.o");
    let output = compile(&object, target, architecture, &["--emit=obj".into()])?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    output.status.success().then_some(()).ok_or_else(|| {
        Failure(format!(
            "compiling the guest shim for {target} failed. It needs rustc's standard library for {target}. The compiler said:\n{complaints}"
        ))
    })
}

fn compile(out: &Path, target: &str, architecture: Architecture, more: &[OsString]) -> Result<Output, Failure> {
    let source = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let mut remap = OsString::from("--remap-path-prefix=");
    remap.push(&source);
    remap.push("=cofferdam");

    let mut rustc = Command::new(variable("RUSTC")?);
    rustc.arg(source.join("src/guest/main.rs")).arg("-o").arg(out).arg(remap);
    rustc.args([
        "--crate-name=shim",
        "--crate-type=bin",
        "--edition=2024",
        "--cfg=guest_bin",
        "--check-cfg=cfg(guest_bin, test)",
        "--target",
        target,
    ]);
    rustc.args([
        "-Cpanic=abort",
        "-Copt-level=z",
        "-Clto=fat",
        "-Ccodegen-units=1",
        "-Cstrip=symbols",
        "-Cdebuginfo=0",
    ]);
    rustc.args([
        "-Crelocation-model=static",
        &format!("-Ctarget-cpu={}", architecture.cpu),
        "-Cforce-unwind-tables=no",
        "-Cdebug-assertions=no",
    ]);
    // On musl targets the compiler brings start files and a libc of its own.
    if text("CARGO_CFG_TARGET_ENV")? == "musl" {
        rustc.arg("-Clink-self-contained=no");
    }
    rustc.args(more);
    // What wraps the compiler for the library (caches, clippy, coverage) and what bends its output has no say here.
    for name in
        ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "SOURCE_DATE_EPOCH"]
    {
        rustc.env_remove(name);
    }
    rustc.output().map_err(|error| Failure(format!("running {:?}: {error}", rustc.get_program())))
}

fn variable(name: &str) -> Result<OsString, Failure> {
    env::var_os(name).ok_or_else(|| Failure(format!("cargo did not set {name}")))
}

fn text(name: &str) -> Result<String, Failure> {
    variable(name)?.into_string().map_err(|value| Failure(format!("{name} is not UTF-8: {value:?}")))
}
