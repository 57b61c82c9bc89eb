//! What became of each test, written down at once: a lab that dies loses none of it, and lab/runner adds it up.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

static FILE: OnceLock<Mutex<File>> = OnceLock::new();

/// Takes the file of `--tally=FILE` out of the arguments. Tests that run this program again do not pass it on.
pub fn take(arguments: &mut Vec<String>) -> Option<String> {
    let at = arguments.iter().position(|argument| argument.starts_with("--tally="))?;
    Some(arguments.remove(at).split_off("--tally=".len()))
}

/// Writes to the end of that file from now on; the tests that had passed before.
pub fn open(path: &Path) -> std::io::Result<HashSet<String>> {
    let before = std::fs::read_to_string(path)?;
    let _ = FILE.set(Mutex::new(File::options().append(true).open(path)?));
    let passed = |line: &str| Some(line.strip_prefix("passed ")?.split(' ').next()?.to_owned());
    Ok(before.lines().filter_map(passed).collect())
}

/// Writes a line: what became of a test, its name, and milliseconds.
pub fn write(became: &str, name: &str, took: Duration) {
    if let Some(file) = FILE.get() {
        let line = format!("{became} {name} {}\n", took.as_millis());
        let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
    }
}
