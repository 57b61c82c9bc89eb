//! Overlays whose process is killed while it freezes, flattens, rebases or compacts them: the old state is whole or the new one is,
//! and nothing else is left in the directory.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use cofferdam::disk::Overlay;
use libtest_mimic::{Arguments, Trial};

/// In the environment of a process that goes on until it is killed: the directory.
const VICTIM: &str = "COFFERDAM_TEST_OVERLAYS";
const KILLS: u64 = 30;
const SIZE: usize = 24 << 20;

/// Random bytes, other for each seed.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let words = (0..SIZE / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// Two bases that differ here and there, and an overlay that has the content of the second where they differ.
fn prepare(directory: &Path) -> Vec<u8> {
    let (one, mut two) = (noise(1), noise(1));
    for at in (0..SIZE).step_by(64 << 10) {
        two[at..at + 4096].fill(7);
    }
    fs::write(directory.join("one"), one).unwrap();
    fs::write(directory.join("two"), &two).unwrap();
    let overlay = Overlay::create(directory.join("overlay"), directory.join("two")).unwrap();
    // What differs is copied into it.
    overlay.rebase(directory.join("one"), |_| ControlFlow::Continue(())).unwrap();
    two
}

fn flattened(path: &Path, to: &Path) -> Vec<u8> {
    Overlay::open(path).unwrap().flatten(to, |_| ControlFlow::Continue(())).unwrap();
    let mut bytes = Vec::new();
    File::open(to).unwrap().read_to_end(&mut bytes).unwrap();
    fs::remove_file(to).unwrap();
    bytes
}

/// Does all of it again and again.
fn victim(directory: &Path) -> ! {
    let (overlay, flat) = (Overlay::open(directory.join("overlay")).unwrap(), directory.join("flat"));
    let on = |_| ControlFlow::Continue(());
    std::io::stdout().write_all(b"ready\n").unwrap();
    loop {
        overlay.rebase(directory.join("two"), on).unwrap();
        overlay.compact(on).unwrap();
        overlay.rebase(directory.join("one"), on).unwrap();
        overlay.compact(on).unwrap();
        let _ = fs::remove_file(&flat);
        overlay.flatten(&flat, on).unwrap();
        let (top, frozen) = (directory.join("top"), directory.join("frozen"));
        for path in [&top, &frozen] {
            let _ = fs::remove_file(path);
        }
        let snapshot = Overlay::create(&frozen, directory.join("one")).unwrap();
        snapshot.freeze().unwrap();
        Overlay::create(&top, &snapshot).unwrap();
    }
}

fn main() -> ExitCode {
    if let Some(directory) = std::env::var_os(VICTIM) {
        victim(directory.as_ref());
    }
    let test = Trial::test("a_kill_leaves_the_old_state_or_the_new_one", || {
        kill_again_and_again();
        Ok(())
    });
    libtest_mimic::run(&Arguments::from_args(), vec![test]).exit_code()
}

fn kill_again_and_again() {
    let directory = std::env::temp_dir().join(format!("cofferdam-kill-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let wanted = prepare(&directory);
    let known = ["one", "two", "overlay", "flat", "top", "frozen"].map(PathBuf::from);
    let mut seed = 1u64;
    for kill in 0..KILLS {
        let me = std::env::current_exe().unwrap();
        let mut child = Command::new(me).env(VICTIM, &directory).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(seed >> 33 & 0x7_ffff));
        child.kill().unwrap();
        child.wait().unwrap();
        let names = fs::read_dir(&directory).unwrap().map(|entry| PathBuf::from(entry.unwrap().file_name()));
        let left: Vec<_> = names.filter(|name| !known.contains(name)).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "kill {kill}");
        assert!(flattened(&directory.join("overlay"), &directory.join("check")) == wanted, "kill {kill}");
        // What is there of the others is whole.
        if let Ok(flat) = File::open(directory.join("flat")) {
            let mut last = [0; 4096];
            flat.read_exact_at(&mut last, (SIZE - 4096) as u64).unwrap();
            assert_eq!(last[..], wanted[SIZE - 4096..], "kill {kill}");
        }
        for name in ["top", "frozen"] {
            if directory.join(name).exists() {
                Overlay::open(directory.join(name)).unwrap_or_else(|e| panic!("kill {kill}: {e}"));
            }
        }
    }
    fs::remove_dir_all(&directory).unwrap();
}
