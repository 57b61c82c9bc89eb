//! Small files, read or written whole: configuration, `/proc`, cgroups. Runs on the shim's one thread.

use core::ffi::CStr;

use super::alloc::vec::Vec;
use super::sys::{self, Errno, Fd};

/// The content of a file of at most `max` bytes; of a longer one the beginning.
pub(super) fn read(at: Option<&Fd>, path: &CStr, max: usize) -> Result<Vec<u8>, Errno> {
    let fd = sys::open(at, path, sys::O_RDONLY)?;
    let mut content = Vec::new();
    let mut piece = [0u8; 1024];
    while content.len() < max {
        let room = piece.len().min(max - content.len());
        match sys::read(&fd, piece.get_mut(..room).unwrap_or_default()) {
            Ok(0) => break,
            Ok(n) => content.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(content)
}

/// Writes to a file that exists, in one call, as the files of `/proc` and of cgroups want it.
pub(super) fn write(at: Option<&Fd>, path: &CStr, content: &[u8]) -> Result<(), Errno> {
    let fd = sys::open(at, path, sys::O_WRONLY)?;
    sys::write(&fd, content).map(drop)
}

/// Makes a file. One that is there, even as a link to nowhere, stays as it is.
pub(super) fn create(path: &CStr, content: &[u8]) -> Result<(), Errno> {
    let fd = sys::open(None, path, sys::O_WRONLY | sys::O_CREAT | sys::O_EXCL | sys::O_NOFOLLOW)?;
    sys::write(&fd, content).map(drop)
}

/// The first number in a text.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    let digits = text.iter().skip_while(|byte| !byte.is_ascii_digit()).take_while(|byte| byte.is_ascii_digit());
    digits.fold(None, |number: Option<u64>, digit| {
        Some(number.unwrap_or(0).saturating_mul(10).saturating_add((digit - b'0').into()))
    })
}

/// The number after a word at the beginning of a line, as in `memory.events`.
pub(super) fn entry(text: &[u8], name: &[u8]) -> Option<u64> {
    text.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(name)?.strip_prefix(b" ")).and_then(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_the_kernels_texts() {
        assert_eq!(number(b"32768\n"), Some(32768));
        assert_eq!(number(b"max\n"), None);
        assert_eq!(number(b"99999999999999999999999"), Some(u64::MAX));
        let events = b"low 0\nhigh 0\nmax 17\noom 2\noom_kill 1\noom_group_kill 5\n";
        assert_eq!(entry(events, b"oom_kill"), Some(1));
        assert_eq!(entry(events, b"oom"), Some(2));
        assert_eq!(entry(events, b"populated"), None);
    }

    #[test]
    fn files_are_read_up_to_the_limit() {
        assert_eq!(read(None, c"/proc/self/comm", 3).unwrap().len(), 3);
        assert_eq!(read(None, c"/nowhere", 3), Err(Errno::ENOENT));
        assert_eq!(create(c"/proc/self", b""), Err(Errno::EEXIST));
    }
}
