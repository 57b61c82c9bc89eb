//! [`ZstdReader`]: any number of frames of zstd, one behind the other (RFC 8878, 3.1).

use std::io::{self, BufRead, Read};

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::MAX_MEMORY;

const FRAME: u32 = 0xfd2f_b528;
/// Frames of the user's own have one of sixteen numbers.
const SKIPPABLE: u32 = 0x0184_d2a5;
/// A decoder begins no second frame of a larger window.
const MAX_REUSED: u64 = 64 << 20;
/// The longest header: magic, descriptor, window, dictionary and content size.
const MAX_HEADER: usize = 18;

/// Reads all frames.
pub(super) struct ZstdReader<R> {
    source: R,
    decoder: FrameDecoder,
    /// Whether the decoder is within a frame.
    begun: bool,
}

fn damaged(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("zstd: {what}"))
}

impl<R: BufRead> ZstdReader<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), begun: false }
    }

    /// Begins the next frame with content; false at the end of the source.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let mut magic = [0; 4];
            self.source.read_exact(&mut magic)?;
            match u32::from_le_bytes(magic) {
                FRAME => {
                    let (header, window) = self.header(magic)?;
                    if window > MAX_REUSED {
                        self.decoder = FrameDecoder::new();
                    }
                    self.decoder.reset(&*header).map_err(damaged)?;
                    return Ok(true);
                }
                other if other >> 4 == SKIPPABLE => {
                    let mut len = [0; 4];
                    self.source.read_exact(&mut len)?;
                    let len = u64::from(u32::from_le_bytes(len));
                    if io::copy(&mut (&mut self.source).take(len), &mut io::sink())? < len {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                _ => return Err(damaged("what follows is no frame")),
            }
        }
    }

    /// Reads the header of a frame, and how large its window is. The decoder does not limit the first one's.
    fn header(&mut self, magic: [u8; 4]) -> io::Result<(Vec<u8>, u64)> {
        let mut header = Vec::with_capacity(MAX_HEADER);
        header.extend(magic);
        let [descriptor] = self.take::<1>(&mut header)?;
        let single_segment = descriptor & 0x20 != 0;
        let mut window = None;
        if !single_segment {
            let [byte] = self.take::<1>(&mut header)?;
            let base = 1u64 << (10 + (byte >> 3));
            window = Some(base + base / 8 * u64::from(byte & 7));
        }
        match descriptor & 3 {
            0 => {}
            1 => drop(self.take::<1>(&mut header)?),
            2 => drop(self.take::<2>(&mut header)?),
            _ => drop(self.take::<4>(&mut header)?),
        }
        let content = match descriptor >> 6 {
            0 if single_segment => u64::from(u8::from_le_bytes(self.take(&mut header)?)),
            0 => 0,
            1 => u64::from(u16::from_le_bytes(self.take(&mut header)?)) + 256,
            2 => u64::from(u32::from_le_bytes(self.take(&mut header)?)),
            _ => u64::from_le_bytes(self.take(&mut header)?),
        };
        let window = window.unwrap_or(content);
        if window > MAX_MEMORY {
            let what = format!("a window of {window} bytes: at most {} MiB are allowed", MAX_MEMORY >> 20);
            return Err(damaged(what));
        }
        Ok((header, window))
    }

    fn take<const N: usize>(&mut self, header: &mut Vec<u8>) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.source.read_exact(&mut bytes)?;
        header.extend(bytes);
        Ok(bytes)
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.begun {
                if !self.begin()? {
                    return Ok(0);
                }
                self.begun = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let step = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, step).map_err(damaged)?;
            }
            match self.decoder.read(buffer)? {
                0 => self.begun = false,
                n => return Ok(n),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut found = Vec::new();
        ZstdReader::new(bytes).read_to_end(&mut found).map(|_| found)
    }

    /// A frame of one raw block.
    fn frame(content: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, content.len() as u8];
        frame.extend((1 | (content.len() as u32) << 3).to_le_bytes().iter().take(3));
        [&frame, content].concat()
    }

    #[test]
    fn frames_follow_each_other_and_some_are_skipped() {
        let skippable = [&0x184d_2a53u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"abc"].concat();
        let all = [&skippable[..], &frame(b"one "), &skippable, &frame(b""), &frame(b"two"), &skippable].concat();
        assert_eq!(read(&all).unwrap(), b"one two");
        for cut in 1..all.len() {
            // Between frames nothing shows that more belongs there.
            let between = [11, 24, 35, 44, 56].contains(&cut);
            assert_eq!(read(&all[..cut]).is_ok(), between, "{cut}");
        }
        assert!(read(&[&all[..], b"garbage"].concat()).is_err());
    }

    #[test]
    fn too_large_window_is_refused_before_memory_is_taken() {
        // The exponents for 128 MiB and for the next size.
        for (byte, fine) in [(17 << 3, true), (17 << 3 | 1, false), (0xff, false)] {
            let frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0, byte][..], &[1, 0, 0]].concat();
            assert_eq!(read(&frame).is_ok(), fine, "{byte}");
            // Also where it is not the first.
            assert_eq!(read(&[frame.clone(), frame].concat()).is_ok(), fine, "{byte}");
        }
        let single = [&[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..], &u64::MAX.to_le_bytes()].concat();
        assert!(read(&single).is_err());
    }
}
