//! Small files, read or written whole: configuration, `/proc`, cgroups. Runs on the shim's one thread.

use core::ffi::CStr;

use super::alloc::ffi::CString;
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
    write_all(&fd, content)
}

/// Writes a file that is there and empty. One behind a link that leads nowhere is made there, or in the link's place.
pub(super) fn fill(path: &CStr, content: &[u8]) -> Result<(), Errno> {
    match sys::open(None, path, sys::O_RDWR | sys::O_CREAT | sys::O_NONBLOCK) {
        Ok(fd) => match sys::read(&fd, &mut [0])? {
            0 => sys::write(&fd, content).map(drop),
            _ => Ok(()),
        },
        Err(Errno::ENOENT) => {
            sys::unlink(path)?;
            create(path, content)
        }
        Err(errno) => Err(errno),
    }
}

/// Makes each directory of a path that is not there.
pub(super) fn make_directories(path: &CStr) -> Result<(), Errno> {
    let bytes = path.to_bytes();
    let ends = bytes.iter().enumerate().filter(|(at, byte)| *at > 0 && **byte == b'/').map(|(at, _)| at);
    for end in ends.chain([bytes.len()]) {
        let part = CString::new(bytes.get(..end).unwrap_or_default()).unwrap_or_default();
        match sys::mkdir(None, &part, 0o755) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The longest file that [`append_unless`] looks through.
const LINES_MAX: usize = 256 * 1024;

/// Appends lines to a file, unless it has them. It needs none either where `word` stands on some line, not behind a `#`.
pub(super) fn append_unless(path: &CStr, word: Option<&[u8]>, lines: &[u8]) -> Result<(), Errno> {
    let fd = sys::open(None, path, sys::O_RDWR | sys::O_APPEND | sys::O_NONBLOCK)?;
    let mut content = Vec::new();
    let mut piece = [0u8; 4096];
    loop {
        match sys::read(&fd, &mut piece) {
            Ok(0) => break,
            Ok(n) => content.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        if content.len() > LINES_MAX {
            return if word.is_some() { Ok(()) } else { Err(Errno::EFBIG) };
        }
    }
    // A root that was kept has them from the last time.
    if word.is_some_and(|word| has_word(&content, word)) || has_lines(&content, lines) {
        return Ok(());
    }
    let before: &[u8] = if content.is_empty() || content.ends_with(b"\n") { b"" } else { b"\n" };
    write_all(&fd, &[before, lines].concat())
}

/// Writes all of it, in as many calls as it takes.
pub(super) fn write_all(fd: &Fd, mut content: &[u8]) -> Result<(), Errno> {
    while !content.is_empty() {
        match sys::write(fd, content) {
            Ok(0) => return Err(Errno::EIO),
            Ok(n) => content = content.get(n..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Whether these whole lines are there, one after the other.
fn has_lines(content: &[u8], lines: &[u8]) -> bool {
    let mut starts = content.split_inclusive(|&byte| byte == b'\n').scan(0, |at, line| {
        let start = *at;
        *at += line.len();
        Some(start)
    });
    starts.any(|start| content.get(start..).is_some_and(|rest| rest.starts_with(lines)))
}

fn has_word(content: &[u8], word: &[u8]) -> bool {
    content.split(|&byte| byte == b'\n').any(|line| {
        let said = line.split(|&byte| byte == b'#').next().unwrap_or_default();
        said.split(u8::is_ascii_whitespace).any(|it| it == word)
    })
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
    fn numbers_are_parsed_from_proc_files() {
        assert_eq!(number(b"32768\n"), Some(32768));
        assert_eq!(number(b"max\n"), None);
        assert_eq!(number(b"99999999999999999999999"), Some(u64::MAX));
        let events = b"low 0\nhigh 0\nmax 17\noom 2\noom_kill 1\noom_group_kill 5\n";
        assert_eq!(entry(events, b"oom_kill"), Some(1));
        assert_eq!(entry(events, b"oom"), Some(2));
        assert_eq!(entry(events, b"populated"), None);
    }

    #[test]
    fn words_match_whole_and_outside_comments() {
        let hosts = b"127.0.0.1\tlocalhost box.lan # spare\n10.0.0.1 other\n";
        for (word, there) in [("localhost", true), ("box.lan", true), ("box", false), ("spare", false), ("other", true)]
        {
            assert_eq!(has_word(hosts, word.as_bytes()), there, "{word}");
        }
    }

    #[test]
    fn existing_etc_files_are_kept_and_missing_ones_created() {
        let dir = std::env::temp_dir().join(std::format!("cofferdam-files-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let c = |name: &str| CString::new(dir.join(name).into_os_string().into_encoded_bytes()).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        std::fs::write(dir.join("empty"), "").unwrap();
        std::fs::write(dir.join("own"), "127.0.0.1 localhost").unwrap();
        std::os::unix::fs::symlink("nowhere/at/all", dir.join("dangling")).unwrap();
        std::os::unix::fs::symlink("target", dir.join("link")).unwrap();
        for name in ["empty", "own", "dangling", "link"] {
            assert_eq!(create(&c(name), b"x"), Err(Errno::EEXIST));
            fill(&c(name), b"new\n").unwrap();
        }
        assert_eq!(
            ["empty", "own", "dangling", "target"].map(read),
            ["new\n", "127.0.0.1 localhost", "new\n", "new\n"]
        );
        for _ in 0..2 {
            append_unless(&c("own"), Some(b"box"), b"127.0.0.1\tbox\n").unwrap();
        }
        assert_eq!(read("own"), "127.0.0.1 localhost\n127.0.0.1\tbox\n");
        // Always, and behind a last line that has no end.
        std::fs::write(dir.join("unended"), "127.0.0.1 box").unwrap();
        append_unless(&c("unended"), None, b"10.0.0.1\tbox\n").unwrap();
        assert_eq!(read("unended"), "127.0.0.1 box\n10.0.0.1\tbox\n");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn files_are_read_up_to_the_limit() {
        assert_eq!(read(None, c"/proc/self/comm", 3).unwrap().len(), 3);
        assert_eq!(read(None, c"/nowhere", 3), Err(Errno::ENOENT));
        assert_eq!(create(c"/proc/self", b""), Err(Errno::EEXIST));
    }
}
