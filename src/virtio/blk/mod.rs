//! Block device (Virtio 1.3, 5.2): a disk on a file. Runs on a loop of its own, because files block.
//!
//! Honest by default: a flush is answered after `fdatasync`, so what the guest was told is durable is on the disk.

mod file;
mod request;

use std::io;

pub(crate) use file::DiskFile;
use request::{Header, Kind};

use super::{Chain, DeviceIo, DeviceType, Profile, Source, TooShort, VirtioDevice};

/// The unit of every address and length (Virtio 1.3, 5.2.4).
pub(crate) const SECTOR: u64 = 512;
/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 256;
/// Buffers in one request, beside its header and its status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Feature bits (Virtio 1.3, 5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
/// Status bytes (Virtio 1.3, 5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;
/// The name that a driver may ask for (Virtio 1.3, 5.2.6, VIRTIO_BLK_T_GET_ID).
const ID_LEN: usize = 20;

/// A disk.
#[derive(Debug)]
pub(crate) struct Blk {
    disk: DiskFile,
    id: [u8; ID_LEN],
}

/// What goes wrong with a request.
enum Failure {
    /// The request makes no sense or names sectors that do not exist.
    Malformed,
    /// Its type is not offered.
    Unsupported,
    /// The host could not do it.
    Host(io::Error),
}

impl From<TooShort> for Failure {
    fn from(_: TooShort) -> Self {
        Self::Malformed
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl Blk {
    /// `id` is what the guest sees as the disk's serial number; cut after 20 bytes.
    pub(crate) fn new(disk: DiskFile, id: &str) -> Self {
        let mut bytes = [0; ID_LEN];
        bytes.iter_mut().zip(id.bytes()).for_each(|(to, byte)| *to = byte);
        Self { disk, id: bytes }
    }

    fn serve(&self, chain: &mut Chain) {
        // The last byte is the status; without one there is nowhere to put an answer.
        let Some(data) = chain.writable_len().checked_sub(1) else {
            return;
        };
        let status = match self.execute(chain, data) {
            Ok(()) => S_OK,
            Err(Failure::Malformed) => S_IOERR,
            Err(Failure::Unsupported) => S_UNSUPP,
            Err(Failure::Host(error)) => {
                log::warn!("disk {}: {error}", self.disk);
                S_IOERR
            }
        };
        // Whatever the request left of its data lies before the status.
        let _ = chain.take_writable(chain.writable_len() - 1);
        let _ = chain.write(&[status]);
    }

    /// `data` is the number of writable bytes before the status.
    fn execute(&self, chain: &mut Chain, data: usize) -> Result<(), Failure> {
        let header = Header::parse(&chain.read()?);
        match header.kind {
            Kind::Read => {
                let offset = self.locate(header.sector, data)?;
                let segments = chain.take_writable(data);
                self.disk.read(chain.memory(), &segments, offset)?;
                chain.wrote(data);
            }
            Kind::Write => {
                let length = chain.readable_len();
                let offset = self.locate(header.sector, length)?;
                let segments = chain.take_readable(length);
                self.disk.write(chain.memory(), &segments, offset)?;
            }
            Kind::Flush => self.disk.flush()?,
            Kind::GetId if data >= ID_LEN => chain.write(&self.id)?,
            Kind::GetId => return Err(Failure::Malformed),
            Kind::Other(_) => return Err(Failure::Unsupported),
        }
        Ok(())
    }

    /// The byte offset of `length` bytes at `sector`, all of which exist.
    fn locate(&self, sector: u64, length: usize) -> Result<u64, Failure> {
        let length = length as u64;
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Malformed)?;
        let end = offset.checked_add(length).ok_or(Failure::Malformed)?;
        if length % SECTOR != 0 || end > self.disk.len() {
            return Err(Failure::Malformed);
        }
        Ok(offset)
    }
}

impl VirtioDevice for Blk {
    fn profile(&self) -> Profile {
        // Virtio 1.3, 5.2.4: capacity in sectors, size_max, seg_max; the rest belongs to features not offered.
        let mut config = [0; 60];
        let capacity = (self.disk.len() / SECTOR).to_le_bytes();
        let fields = capacity.iter().chain(&[0; 4]).chain(SEG_MAX.to_le_bytes().iter()).copied().collect::<Vec<u8>>();
        config.iter_mut().zip(fields).for_each(|(to, byte)| *to = byte);
        let read_only = if self.disk.read_only() { F_RO } else { 0 };
        Profile::new(DeviceType::Block).queue(QUEUE_SIZE).features(F_SEG_MAX | F_FLUSH | read_only).config(config)
    }

    fn ready(&mut self, io: &mut DeviceIo, _: Source) {
        io.drain(0, |chain| self.serve(chain));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;
    use crate::virtio::testing::{Driver, WRITE};
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    fn disk(sectors: u64) -> (Driver<Blk>, std::fs::File) {
        let mut file = sys::temp_file(&std::env::temp_dir()).unwrap();
        file.write_all(&(0..sectors).flat_map(|n| [n as u8; 512]).collect::<Vec<_>>()).unwrap();
        let disk = DiskFile::from_file(file.try_clone().unwrap(), false).unwrap();
        (Driver::start(Blk::new(disk, "serial")), file)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
    }

    /// Sends one request and returns the data and the status.
    fn request(driver: &mut Driver<Blk>, readable: &[&[u8]], writable: &[usize]) -> (Vec<u8>, u8) {
        assert!(driver.send(0, readable, writable));
        driver.poke(0);
        let (mut bytes, _) = driver.receive(0).unwrap();
        let status = bytes.pop().unwrap();
        (bytes, status)
    }

    #[test]
    fn reads_in_any_split_of_buffers() {
        let (mut driver, _) = disk(8);
        let header = header(0, 2);
        let (data, status) = request(&mut driver, &[&header[..3], &header[3..]], &[100, 412, 512, 1]);
        assert_eq!(status, S_OK);
        assert_eq!((data[0], data[511], data[512]), (2, 2, 3));
        // The status may share a buffer with the data.
        let (data, status) = request(&mut driver, &[&header], &[513]);
        assert_eq!((data.len(), data[0], status), (512, 2, S_OK));
    }

    #[test]
    fn writes_reach_the_file_and_flush_is_answered() {
        let (mut driver, file) = disk(8);
        let (_, status) = request(&mut driver, &[&header(1, 1), &[9; 200], &[8; 312]], &[1]);
        assert_eq!(status, S_OK);
        assert_eq!(request(&mut driver, &[&header(4, 0)], &[1]).1, S_OK);
        let mut back = [0; 512];
        file.read_exact_at(&mut back, 512).unwrap();
        assert_eq!((back[0], back[199], back[200], back[511]), (9, 9, 8, 8));
    }

    #[test]
    fn what_does_not_exist_is_an_io_error() {
        let (mut driver, _) = disk(8);
        for (sector, len) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
            assert_eq!(request(&mut driver, &[&header(0, sector)], &[len, 1]).1, S_IOERR, "{sector} {len}");
            assert_eq!(request(&mut driver, &[&header(1, sector), &vec![0; len]], &[1]).1, S_IOERR);
        }
        assert_eq!(request(&mut driver, &[&[0; 5]], &[1]).1, S_IOERR);
        assert_eq!(request(&mut driver, &[&header(11, 0)], &[1]).1, S_UNSUPP);
    }

    #[test]
    fn the_serial_number_can_be_read() {
        let (mut driver, _) = disk(1);
        let (data, status) = request(&mut driver, &[&header(8, 0)], &[20, 1]);
        assert_eq!((&data[..7], status), (&b"serial\0"[..], S_OK));
        assert_eq!(request(&mut driver, &[&header(8, 0)], &[19, 1]).1, S_IOERR);
    }

    #[test]
    fn a_read_only_disk_refuses_writes_and_says_so() {
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        file.set_len(4096).unwrap();
        let blk = Blk::new(DiskFile::from_file(file, true).unwrap(), "");
        assert_ne!(blk.profile().features & F_RO, 0);
        assert_eq!(request(&mut Driver::start(blk), &[&header(1, 0), &[1; 512]], &[1]).1, S_IOERR);
    }

    #[test]
    fn a_request_without_room_for_a_status_is_given_back() {
        let (mut driver, _) = disk(1);
        driver.send(0, &[&header(4, 0)], &[]);
        driver.poke(0);
        assert_eq!(driver.receive(0), Some((vec![], 0)));
        assert!(!driver.broken());
    }

    #[test]
    fn addresses_outside_memory_need_a_reset() {
        let (mut driver, _) = disk(1);
        driver.send_raw(0, &[(u64::MAX - 4, 16, 0), (0, 1, WRITE)]);
        driver.poke(0);
        assert!(driver.broken());
        assert_eq!(driver.receive(0), None);
    }

    #[test]
    fn a_disk_that_shrank_is_an_io_error() {
        let (mut driver, file) = disk(8);
        file.set_len(512).unwrap();
        assert_eq!(request(&mut driver, &[&header(0, 4)], &[512, 1]).1, S_IOERR);
    }
}
