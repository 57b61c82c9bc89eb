//! Decompression by what the first bytes say: gzip, zstd, xz, bzip2, or none.

#[cfg(feature = "zstd")]
mod zstd;

use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(not(all(feature = "xz", feature = "zstd", feature = "bzip2")))]
use crate::error::ErrorKind;
use crate::error::{Error, Result};

/// What one read of the compressed bytes asks for.
const BUFFER: usize = 256 << 10;
/// Memory that a decoder may take, as `xz` and `zstd` themselves allow.
const MAX_MEMORY: u64 = 128 << 20;

/// What content is compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    /// RFC 1952, 2.3.
    Gzip,
    /// RFC 8878, 3.1.1 and 3.1.2.
    Zstd,
    /// The .xz File Format 1.2.1, 2.1.1.1.
    Xz,
    Bzip2,
}

impl Compression {
    /// Says what content is compressed with that begins so. Six bytes are enough.
    pub(super) fn of(begin: &[u8]) -> Self {
        match *begin {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Bzip2,
            _ => Self::None,
        }
    }
}

/// What may be unpacked whatever its ratio is.
const FREE_OF_RATIO: u64 = 64 << 20;

/// Decompresses `source`. Uncompressed input passes unchanged. Members of gzip and frames of zstd follow each other.
///
/// Errors of `source` come out as they went in. Reading fails with `InvalidConfig` once more is unpacked than `ratio` times what
/// was read.
///
/// # Errors
/// `Unsupported` names the feature that this build lacks.
pub(super) fn decompressed<'a>(source: impl Read + Send + 'a, ratio: Option<u32>) -> Result<Box<dyn Read + Send + 'a>> {
    let (fault, packed) = (Fault::default(), Arc::new(AtomicU64::new(0)));
    let noting = Noting { inner: source, fault: fault.clone(), packed: packed.clone() };
    let mut source = BufReader::with_capacity(BUFFER, noting);
    let begin = source.fill_buf().map_err(|e| fault.of(e))?;
    let (name, decoder): (_, Box<dyn Read + Send + 'a>) = match Compression::of(begin) {
        Compression::None => ("no", Box::new(source)),
        Compression::Gzip => ("gzip", Box::new(flate2::bufread::MultiGzDecoder::new(source))),
        Compression::Zstd => ("zstd", zstd(source)?),
        Compression::Xz => ("xz", xz(source)?),
        Compression::Bzip2 => ("bzip2", bzip2(source)?),
    };
    Ok(Box::new(Decoded { name, decoder, fault, ratio, packed, unpacked: 0 }))
}

#[cfg(feature = "xz")]
fn xz<'a>(source: impl BufRead + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    Ok(Box::new(lzma_rust2::XzReader::new_mem_limit(source, true, (MAX_MEMORY >> 10) as u32)))
}

#[cfg(not(feature = "xz"))]
fn xz<'a>(_: impl BufRead + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    Err(lacking("xz"))
}

#[cfg(feature = "zstd")]
fn zstd<'a>(source: impl BufRead + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    Ok(Box::new(zstd::ZstdReader::new(source)))
}

#[cfg(not(feature = "zstd"))]
fn zstd<'a>(_: impl BufRead + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    Err(lacking("zstd"))
}

#[cfg(feature = "bzip2")]
fn bzip2<'a>(source: impl BufRead + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    Ok(Box::new(bzip2::bufread::MultiBzDecoder::new(source)))
}

#[cfg(not(feature = "bzip2"))]
fn bzip2<'a>(_: impl BufRead + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    Err(lacking("bzip2"))
}

#[cfg(not(all(feature = "xz", feature = "zstd", feature = "bzip2")))]
fn lacking(feature: &str) -> Error {
    let what = format!(
        "it is compressed with {feature}, which this build of cofferdam cannot read: switch its feature `{feature}` on"
    );
    Error::new(ErrorKind::Unsupported, what)
}

/// The error of a source whose bytes a decoder reads. Decoders put errors of their own in its place.
#[derive(Debug, Clone, Default)]
struct Fault(Arc<Mutex<Option<io::Error>>>);

impl Fault {
    fn note(&self, error: io::Error) -> io::Error {
        let seen = io::Error::from(error.kind());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        seen
    }

    fn take(&self) -> Option<io::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn of(&self, error: io::Error) -> Error {
        let error = self.take().unwrap_or(error);
        error.downcast::<Error>().unwrap_or_else(Error::from)
    }
}

struct Noting<R> {
    inner: R,
    fault: Fault,
    /// How much was read.
    packed: Arc<AtomicU64>,
}

impl<R: Read> Read for Noting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(n) => {
                self.packed.fetch_add(n as u64, Ordering::Relaxed);
                Ok(n)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => Err(self.fault.note(error)),
        }
    }
}

struct Decoded<'a> {
    name: &'static str,
    decoder: Box<dyn Read + Send + 'a>,
    fault: Fault,
    ratio: Option<u32>,
    packed: Arc<AtomicU64>,
    unpacked: u64,
}

impl Decoded<'_> {
    fn check_ratio(&self) -> Result<()> {
        let Some(ratio) = self.ratio else { return Ok(()) };
        let most = self.packed.load(Ordering::Relaxed).saturating_mul(u64::from(ratio));
        if self.unpacked.saturating_sub(FREE_OF_RATIO) > most {
            let what = format!("it unpacks to more than {ratio} times its size");
            return Err(Error::invalid("ImageLimits::max_ratio", what));
        }
        Ok(())
    }
}

impl Read for Decoded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer).map_err(|error| match (self.fault.take(), error.kind()) {
            (Some(fault), _) => fault,
            (None, io::ErrorKind::Interrupted) => error,
            (None, _) => {
                io::Error::new(io::ErrorKind::InvalidData, format!("its {} compression is damaged: {error}", self.name))
            }
        });
        self.unpacked += *read.as_ref().unwrap_or(&0) as u64;
        self.check_ratio()?;
        read
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    #[cfg(all(feature = "xz", feature = "zstd", feature = "bzip2"))]
    use crate::error::ErrorKind;

    /// What a program makes of its input.
    fn through(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut command = Command::new(program);
        let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect(program);
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(output.status.success(), "{program}");
        output.stdout
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut found = Vec::new();
        decompressed(bytes, None)?.read_to_end(&mut found).map(|_| found)
    }

    /// Text with repetitions near and far.
    fn sample() -> Vec<u8> {
        let mut n = 1u32;
        let words = (0..60_000).flat_map(|_| {
            n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            format!("{} ", n >> 20).into_bytes()
        });
        words.collect()
    }

    const PROGRAMS: &[(&str, &[&str])] = &[
        ("gzip", &["-9"]),
        #[cfg(feature = "zstd")]
        ("zstd", &["-q", "-3"]),
        #[cfg(feature = "zstd")]
        ("zstd", &["-q", "-19", "--check"]),
        #[cfg(feature = "xz")]
        ("xz", &["-1"]),
        #[cfg(feature = "bzip2")]
        ("bzip2", &[]),
        ("cat", &[]),
    ];

    #[test]
    fn all_compressions_are_recognized_and_undone() {
        let sample = sample();
        for (program, arguments) in PROGRAMS {
            let packed = through(program, arguments, &sample);
            assert!(read(&packed).unwrap() == sample, "{program}");
            // One behind the other is both of them.
            let twice = [&packed[..], &packed].concat();
            assert!(read(&twice).unwrap() == [&sample[..], &sample].concat(), "{program}");
        }
        assert_eq!(read(b"").unwrap(), b"");
    }

    #[test]
    fn damage_is_reported() {
        let sample = sample();
        for (program, arguments) in PROGRAMS.iter().filter(|(program, _)| *program != "cat") {
            let packed = through(program, arguments, &sample);
            let cut = read(&packed[..packed.len() / 2]).unwrap_err();
            assert_eq!(cut.kind(), io::ErrorKind::InvalidData, "{program}: {cut}");
        }
    }

    #[test]
    fn error_of_the_source_comes_through() {
        struct Failing<'a>(&'a [u8]);
        impl Read for Failing<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                match self.0.read(buffer)? {
                    0 => Err(Error::new(ErrorKind::TimedOut, "no answer").into()),
                    n => Ok(n),
                }
            }
        }
        for (program, arguments) in PROGRAMS {
            let packed = through(program, arguments, &sample());
            let mut source = decompressed(Failing(&packed[..packed.len() / 2]), None).unwrap();
            let error = source.read_to_end(&mut Vec::new()).unwrap_err();
            assert_eq!(error.downcast::<Error>().unwrap().kind(), ErrorKind::TimedOut, "{program}");
        }
    }
}
