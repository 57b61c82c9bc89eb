//! What benches share. Each figure is a line of JSON.

#![allow(dead_code, reason = "no bench uses all of it")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// Prints a figure of this bench beside what a peer reached. The ratio is above 1 where we are ahead: of rates (units with a
/// stroke) more is better, of all else less.
pub(crate) fn figure(name: &str, value: f64, unit: &str, peer: Option<f64>) {
    let ratio = peer.map(|peer| if unit.contains('/') { value / peer } else { peer / value });
    let text = |value: Option<f64>| value.map_or("null".into(), |value| format!("{value:.3}"));
    println!(
        r#"{{"bench":"{}","figure":"{name}","value":{value:.3},"unit":"{unit}","peer":{},"ratio":{}}}"#,
        env!("CARGO_CRATE_NAME"),
        text(peer),
        text(ratio)
    );
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Where kernels, images and the lab are.
pub(crate) fn cache() -> PathBuf {
    let base = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    PathBuf::from(base.expect("HOME")).join("cofferdam")
}

/// The guest kernel that all machines of a bench run.
pub(crate) fn kernel() -> PathBuf {
    std::env::var("COFFERDAM_KERNEL").map(PathBuf::from).unwrap_or_else(|_| cache().join("kernel/vmlinux"))
}

/// The words that start the newest QEMU that can be had (`lab/qemu`).
fn qemu() -> &'static [String] {
    static WORDS: OnceLock<Vec<String>> = OnceLock::new();
    WORDS.get_or_init(|| {
        let found = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/qemu")).output();
        let directory = found.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        let words = directory.and_then(|directory| std::fs::read_to_string(Path::new(&directory).join("qemu")));
        words.map_or_else(|_| vec!["qemu-system-x86_64".into()], |words| words.lines().map(str::to_owned).collect())
    })
}

/// Returns the command of QEMU's microvm with one processor and `mib` of memory. With ACPI, QEMU 10 would need its option
/// ROMs and be slower.
pub(crate) fn microvm(mib: u64, kernel: &Path, cmdline: &str) -> Command {
    let (program, words) = qemu().split_first().expect("a word");
    let mut qemu = Command::new(program);
    qemu.args(words)
        .args(["-M", "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off", "-accel", "kvm", "-cpu", "host"])
        .args(["-m", &mib.to_string(), "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-append", cmdline, "-kernel"])
        .arg(kernel)
        .stdin(Stdio::null());
    qemu
}

/// A program of a bench's, ended with it, whatever becomes of it.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
