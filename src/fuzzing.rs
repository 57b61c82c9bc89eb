//! Entry points of the library as functions of bytes, for fuzzing and tests.
//!
//! Each is a way by which a guest, an image, a peer or a file reaches the library. Each must return whatever the bytes
//! are: no panic, no unbounded wait or growth, no access outside guest memory.

pub mod turns;

use crate::virtio::KeptEvents;
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};

use crate::boot::{Kernel, read_modules, tiny};
use crate::bus::{Bus, BusDevice};
use crate::event_loop::Loop;
use crate::irq::IrqLine;
use crate::memory::{GuestAddress, GuestMemory};
use crate::sys::{self, RegisterPage};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, Options, RawFile};
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Driver, WRITE};
use crate::virtio::vsock::packet::{HEADER, TYPE_STREAM, VsockHeader, VsockOp};
use crate::virtio::vsock::{GUEST_CID, HOST_CID, Vsock, VsockListener};
use crate::virtio::{DrainCause, EventSource, LoopDevice, MmioTransport, Slots, VirtioDevice};

use crate::network::fuzzing::Bytes;
pub use crate::network::fuzzing::{
    amplification as net_amplification, dhcp as net_dhcp, dns as net_dns, header as net_header, policy as net_policy,
    switch as net_switch, user_frame as net_user_frame,
};
pub use turns::device_turn;

/// Chains of any addresses, lengths and flags, and rings written over at any place.
pub fn queue(data: &[u8]) {
    let (mut bytes, mut driver) = (Bytes(data), Driver::start(Rng));
    let memory = driver.memory();
    while !bytes.done() {
        match bytes.byte() % 4 {
            0 => {
                let count = usize::from(bytes.byte() % 8) + 1;
                let piece = |b: &mut Bytes<'_>| {
                    // Most addresses shall hit memory, or every chain would fail at once.
                    let at = u64::from(u32::from_le_bytes(b.number()));
                    let addr = if b.byte().is_multiple_of(8) { at << 32 | at } else { at % 0x200_0000 };
                    (addr, u32::from_le_bytes(b.number()) >> (b.byte() % 32), u16::from(b.byte() % 8))
                };
                let pieces: Vec<_> = (0..count).map(|_| piece(&mut bytes)).collect();
                driver.send_raw(0, &pieces);
            }
            1 => {
                // Rings and tables lie here.
                let at = 0x10_0000 + u64::from(u16::from_le_bytes(bytes.number()));
                let len = usize::from(bytes.byte() % 32);
                let _ = memory.write(GuestAddress(at), bytes.take(len));
            }
            _ => driver.dispatch(0),
        }
    }
    driver.dispatch(0);
}

/// Reads and writes of any register at any width, on a running device.
pub fn mmio(data: &[u8]) {
    static LOOP: OnceLock<Loop<Slots>> = OnceLock::new();
    let make = || Loop::start("fuzzing", Slots::new);
    let devices = LOOP.get_or_init(|| make().unwrap_or_else(|e| unreachable!("{e}")));
    let (reporter, _) = KeptEvents::reporter();
    let its = reporter.clone();
    let Ok(slot) = devices.remote().with(move |slots| slots.add(Box::new(Rng), its)) else {
        unreachable!("the harness lacks what it needs")
    };
    let Ok(memory) = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]) else {
        unreachable!("the harness lacks what it needs")
    };
    let Ok(registers) = RegisterPage::alone() else { unreachable!("the harness lacks what it needs") };
    let host = LoopDevice { remote: devices.remote(), slot };
    let Ok(transport) = MmioTransport::new(Rng.profile(), memory, host, registers, IrqLine::new(|| ()), reporter)
    else {
        unreachable!("the harness lacks what it needs")
    };
    let (bus, transport) = (Bus::default(), Arc::new(Mutex::new(transport)));
    let _ = bus.attach(0..0x1000, transport.clone());
    let mut bus = bus.view();
    // A driver's first steps, so that what follows meets a running device as often as an idle one.
    let mut bytes = Bytes(data);
    if bytes.byte() % 2 == 0 {
        let steps: [(u64, u32); 13] = [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, 8),
            (0x80, 0x1000),
            (0x90, 0x2000),
            (0xa0, 0x3000),
            (0x44, 1),
            (0x70, 15),
            (0x50, 0),
        ];
        for (at, value) in steps {
            bus.write(at, &value.to_le_bytes());
        }
    }
    while !bytes.done() {
        let (at, len) = (u64::from(u16::from_le_bytes(bytes.number()) % 0x210), 1 << (bytes.byte() % 4));
        if bytes.byte() % 4 == 0 {
            bus.read(at, &mut [0; 8][..len]);
        } else {
            let mut value = [0; 8];
            value.iter_mut().zip(bytes.take(len)).for_each(|(to, byte)| *to = *byte);
            bus.write(at, &value[..len]);
        }
    }
    if let Ok(mut transport) = transport.lock() {
        transport.write(0x70, &0u32.to_le_bytes());
    }
    let _ = devices.remote().with(move |slots| slots.remove(slot).is_some());
}

/// Returns what a qcow2 image holds after a loss of power.
///
/// The second value is what it holds once the first sector of every `step` was written.
///
/// # Errors
/// As opening such a disk.
#[cfg(feature = "qcow2")]
pub fn qcow2_found(path: &std::path::Path, step: u64, byte: u8) -> crate::Result<[Vec<u8>; 2]> {
    crate::virtio::blk::fuzzing::qcow2_found(path, step, byte)
}

/// An overlay's file with any bytes changed, and what a guest does on it.
pub fn overlay(data: &[u8]) {
    crate::virtio::blk::fuzzing::overlay(data);
}

/// A qcow2 image with any bytes changed, and what a guest does on it.
#[cfg(feature = "qcow2")]
pub fn qcow2_open(data: &[u8]) {
    crate::virtio::blk::fuzzing::qcow2_open(data);
}

/// Block requests of any type and header, in any split and of any size. Both engines run, with and without limits and
/// write cache. Meanwhile the disk grows, and the machine is paused and resumed.
pub fn blk_request(data: &[u8]) {
    let flavour = data.first().copied().unwrap_or_default();
    let disk =
        sys::scratch_file(&std::env::temp_dir(), crate::Size::kib(64)).map(|f| RawFile::from_file(f, flavour == 1));
    let Ok(Ok(disk)) = disk else { unreachable!("the harness lacks what it needs") };
    let engine =
        if flavour & 2 == 0 { crate::virtio::blk::IoEngine::Threads } else { crate::virtio::blk::IoEngine::IoUring };
    let queues = if flavour & 4 == 0 { 1 } else { 3 };
    let limit =
        crate::virtio::blk::DiskLimit::none().write_operations(crate::Rate::per_second(1_000_000).one_time_burst(3));
    let limit = if flavour & 8 == 0 { crate::virtio::blk::DiskLimit::none() } else { limit };
    let disk = Blk::new(Box::new(disk), Options { engine, queues, limit, ..Options::new(0) });
    let (mut bytes, mut driver) = (Bytes(data), Driver::start(disk));
    let timeout = std::time::Duration::from_secs(10);
    while !bytes.done() {
        let (readable, writable) = (usize::from(bytes.byte() % 6), usize::from(bytes.byte() % 6));
        let mut header = [0; 16];
        (header[0], header[8], header[15]) =
            (bytes.byte() % 16, bytes.byte(), bytes.byte() & bytes.byte() & bytes.byte());
        let mut pieces: Vec<Vec<u8>> = vec![header.to_vec()];
        if matches!(header[0], 11 | 13) {
            // Ranges that often exist.
            for _ in 0..readable {
                let mut range = [0; 16];
                (range[0], range[8], range[12]) = (bytes.byte(), bytes.byte() % 32, bytes.byte() & bytes.byte() & 3);
                pieces.push(range.to_vec());
            }
        } else {
            for _ in 0..readable {
                let len = usize::from(u16::from_le_bytes(bytes.number()) % 2048);
                pieces.push(vec![bytes.byte(); len]);
            }
        }
        let what = bytes.byte();
        if what % 4 == 0 {
            pieces[0].truncate(usize::from(bytes.byte() % 16));
        }
        pieces.retain(|piece| !piece.is_empty());
        let readable: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let writable: Vec<usize> =
            (0..writable).map(|_| usize::from(u16::from_le_bytes(bytes.number()) % 2048) + 1).collect();
        let queue = usize::from(what) % usize::from(queues);
        driver.send(queue, &readable, &writable);
        driver.dispatch(queue);
        let (disk, io) = driver.parts();
        match what >> 4 {
            0 => drop(disk.grow(Some(io), u64::from(bytes.byte()) << 9)),
            1 => disk.profile().config.set(32, &[bytes.byte() & 1]),
            2..8 => assert!(disk.drain(io, timeout, DrainCause::Pause), "the disk does not come to rest"),
            8 => disk.ready(io, EventSource::Resumed),
            _ => driver.dispatch_watched(0),
        }
        for queue in 0..usize::from(queues) {
            while driver.receive(queue).is_some() {}
        }
    }
    let (disk, io) = driver.parts();
    disk.drain(io, timeout, DrainCause::End);
    disk.stop(io);
}

/// Packets of any header in any split, while an embedder reads, writes and hangs up.
pub fn vsock_packet(data: &[u8]) {
    let mut vsock = Vsock::new();
    let listener: Option<VsockListener> = vsock.listen(1).ok();
    let (mut bytes, mut driver, mut streams) = (Bytes(data), Driver::start(vsock), Vec::new());
    while !bytes.done() {
        match bytes.byte() % 8 {
            0 => drop(driver.send(0, &[], &[usize::from(bytes.byte()), 1000])),
            1 => streams.extend(listener.as_ref().and_then(|l| l.try_accept().ok().flatten())),
            2 => drop(streams.pop()),
            3 => {
                if let Some(stream) = streams.last_mut() {
                    let _ = stream.set_nonblocking(true).map(|()| stream.write(&[7; 5000]));
                }
            }
            4 => (0..3).for_each(|number| driver.dispatch_watched(number)),
            _ => {
                let op = VsockOp::parse(u16::from(bytes.byte() % 10));
                let header = VsockHeader {
                    len: u32::from(u16::from_le_bytes(bytes.number()) % 3000),
                    src_cid: if bytes.byte() == 0 { 99 } else { GUEST_CID },
                    dst_cid: HOST_CID,
                    src_port: u32::from(bytes.byte() % 4),
                    dst_port: u32::from(bytes.byte() % 3),
                    kind: TYPE_STREAM + u16::from(bytes.byte() == 0),
                    op,
                    flags: u32::from(bytes.byte()),
                    buf_alloc: u32::from_le_bytes(bytes.number()),
                    fwd_cnt: u32::from_le_bytes(bytes.number()),
                };
                let mut packet = header.to_bytes().to_vec();
                packet.resize(HEADER + usize::from(u16::from_le_bytes(bytes.number()) % 3000), 5);
                let (head, tail) = packet.split_at(usize::from(bytes.byte()).min(packet.len()));
                let pieces: Vec<&[u8]> = [head, tail].into_iter().filter(|p| !p.is_empty()).collect();
                driver.send(1, &pieces, &[]);
            }
        }
        driver.dispatch(1);
        while driver.receive(0).is_some() || driver.receive(1).is_some() {}
    }
}

/// Requests of any kind to the balloon, while the embedder asks it for numbers.
pub fn balloon(data: &[u8]) {
    let (mut bytes, mut driver) = (Bytes(data), Driver::start_with(|memory| Balloon::new(memory.clone())));
    let (answer, _told) = std::sync::mpsc::sync_channel(1);
    while !bytes.done() {
        let (what, queue) = (bytes.byte() % 4, usize::from(bytes.byte() % 4));
        match what {
            0 => {
                let len = usize::from(u16::from_le_bytes(bytes.number()) % 600);
                let list = bytes.take(len).to_vec();
                driver.send(queue, &[&list], &[]);
            }
            1 => {
                // Where rings are not, so that chains go on to be found.
                let at = 0x40_0000 + u64::from(u32::from_le_bytes(bytes.number()) % 0x200_0000);
                driver.send_raw(queue, &[(at, u32::from_le_bytes(bytes.number()) >> (bytes.byte() % 32), WRITE)]);
            }
            2 => {
                let (balloon, io) = driver.parts();
                balloon.ask(Some(io), answer.clone());
                balloon.set_target(u64::from_le_bytes(bytes.number()), Some(io));
            }
            _ => while driver.collect(queue).is_some() {},
        }
        driver.dispatch(queue);
    }
}

/// Frames of either direction, in any pieces.
#[cfg(any(feature = "container", test))]
pub fn proto_frame(data: &[u8]) {
    use crate::proto::{BootConfig, Decoder, FROM_GUEST_MAX, FROM_HOST_MAX, FromGuest, FromHost};
    let _ = BootConfig::parse(data);
    for max in [FROM_GUEST_MAX, FROM_HOST_MAX] {
        let (mut decoder, mut bytes) = (Decoder::new(max), Bytes(data));
        let size = usize::from(bytes.byte()) + 1;
        while !bytes.done() {
            let mut input = bytes.take(size);
            while let Ok(Some(frame)) = decoder.next(&mut input) {
                let _ = FromGuest::parse(&frame);
                if let Ok(Some(FromHost::Spawn(spawn))) = FromHost::parse(&frame) {
                    let _ = spawn.argv.iter().chain(spawn.env.iter()).count();
                }
            }
        }
    }
}

/// Records of a conversation about files, in any pieces. What is understood is written as it was.
#[cfg(any(feature = "container", test))]
pub fn proto_files(data: &[u8]) {
    use crate::proto::{Decoder, FILES_FRAME_MAX, FileRecord, is_entry_name};
    let (mut decoder, mut again, mut bytes) =
        (Decoder::new(FILES_FRAME_MAX), Decoder::new(FILES_FRAME_MAX), Bytes(data));
    let size = usize::from(bytes.byte()) + 1;
    while !bytes.done() {
        let mut input = bytes.take(size);
        while let Ok(Some(frame)) = decoder.next(&mut input) {
            let Ok(Some(record)) = FileRecord::parse(&frame) else { continue };
            if let FileRecord::Entry(entry) = record {
                assert!(entry.name.is_empty() || is_entry_name(entry.name), "{entry:?}");
                assert!(entry.mode <= 0o7777 && entry.nanoseconds < 1_000_000_000, "{entry:?}");
            }
            let mut written = Vec::new();
            assert!(record.encode(&mut written).is_ok(), "{record:?}");
            let mut written = &written[..];
            let parsed = again
                .next(&mut written)
                .ok()
                .flatten()
                .map(|frame| FileRecord::parse(&frame).ok().flatten() == Some(record));
            assert_eq!(parsed, Some(true), "{record:?}");
        }
    }
}

/// A hostile shim on the other end of the control stream.
#[cfg(any(feature = "container", test))]
pub fn control_stream(data: &[u8]) {
    crate::container::control_stream(data);
}

/// A profile of system calls, its filter, and calls that the filter judges.
#[cfg(any(feature = "container", test))]
pub fn seccomp_profile(data: &[u8]) {
    crate::container::fuzz_seccomp_profile(data);
}

/// A kernel file of any bytes, or a valid one that is damaged.
pub fn kernel_image(data: &[u8]) {
    let Ok(mut file) = sys::temp_file(&std::env::temp_dir()) else {
        return;
    };
    let mut bytes = Bytes(data);
    let file_bytes = match bytes.byte() % 4 {
        0 => data.to_vec(),
        1 => damaged(tiny::vmlinuz(&[0xf4; 600]), bytes),
        // With a configuration embedded, as far as its gzip header goes.
        2 => tiny::elf(&[b"IKCFG_ST\x1f\x8b\x08", bytes.0, b"IKCFG_ED"].concat()),
        _ => damaged(tiny::elf(&[0xf4; 600]), bytes),
    };
    if file.write_all(&file_bytes).is_ok() {
        let _ = Kernel::read(&mut file);
    }
}

/// A kernel module packed in any way, and the lists of a directory of modules.
pub fn kernel_module(data: &[u8]) {
    const START: [&[u8]; 4] = [b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b""];
    let mut bytes = Bytes(data);
    let start = START[usize::from(bytes.byte() % 4)];
    // Words of a few modules, so that they need each other often.
    let mut list = |words: [&str; 8]| -> String {
        let len = usize::from(bytes.byte() % 64);
        bytes.take(len).iter().map(|byte| words[usize::from(byte % 8)]).collect()
    };
    let dep = list(["k/a.ko:", "k/b.ko:", "k/c.ko:", " k/a.ko", " k/b.ko", " k/c.ko.xz", "\n", "../"]);
    let softdep = list(["softdep a pre:", "softdep b pre:", " a", " b", " c", " x", "\n", " post:"]);
    let alias = list(["alias x", "alias c", " a", " b", " c", "*", "\n", "alias "]);
    read_modules([start, bytes.0].concat(), [&dep, &softdep, &alias]);
}

/// Writes over numbers in a file, and may cut it off.
fn damaged(mut file: Vec<u8>, mut bytes: Bytes<'_>) -> Vec<u8> {
    while !bytes.done() {
        let at = usize::from(u16::from_le_bytes(bytes.number())) % file.len();
        let len = 1usize << (bytes.byte() % 5);
        if len == 16 {
            file.truncate(at.max(1));
        } else {
            file[at..].iter_mut().zip(bytes.take(len)).for_each(|(to, byte)| *to = *byte);
        }
    }
    file
}

/// An archive of any bytes, or of entries with any fields and right checksums.
#[cfg(any(feature = "container", test))]
pub fn image_tar(data: &[u8]) {
    crate::container::image_tar(data);
}

/// Indexes, manifests and configurations of images, of any bytes.
#[cfg(any(feature = "container", test))]
pub fn oci_manifest(data: &[u8]) {
    crate::container::oci_manifest(data);
}

/// Layers of entries with any fields, and the disk that is composed of them.
#[cfg(any(feature = "container", test))]
pub fn oci_layer(data: &[u8]) {
    crate::container::oci_layer(data);
}

/// The file of an unpacked layer, of any bytes or with a log of them.
#[cfg(any(feature = "container", test))]
pub fn oci_layer_file(data: &[u8]) {
    crate::container::oci_layer_file(data);
}

/// Any text as the name of an image.
#[cfg(any(feature = "container", test))]
pub fn reference(data: &[u8]) {
    crate::container::fuzz_reference(data);
}

/// Any header by which a registry says how to authenticate.
#[cfg(feature = "registry")]
pub fn auth_challenge(data: &[u8]) {
    crate::container::fuzz_challenge(data);
}

/// What a registry gives as a keyless signature: bundles, annotations, trust roots.
#[cfg(feature = "keyless")]
pub fn keyless_signature(data: &[u8]) {
    crate::container::keyless_signature(data);
}

/// Devices with a driver in front of them, for `benches/virtio.rs`.
#[cfg(feature = "internals")]
pub mod bench {
    use std::fs::File;
    use std::io::Read;

    use super::*;
    use crate::virtio::vsock::VsockStream;

    const PAGE: usize = 4096;

    /// The shortest way through a queue: an entropy device that is asked for nothing.
    #[derive(Debug)]
    pub struct Queue(Driver<Rng>);

    impl Queue {
        #[allow(clippy::new_without_default, missing_docs, reason = "for this repository's bench alone")]
        pub fn new() -> Self {
            Self(Driver::start(Rng))
        }

        /// `n` chains of one buffer, one kick each.
        pub fn run(&mut self, n: u32) {
            for _ in 0..n {
                self.0.send(0, &[b"x"], &[]);
                self.0.dispatch(0);
                self.0.collect(0);
            }
        }
    }

    /// A disk on a file in the page cache.
    #[derive(Debug)]
    pub struct Blk(Driver<super::Blk>, File);

    impl Blk {
        #[allow(
            clippy::new_without_default,
            missing_docs,
            clippy::unwrap_used,
            reason = "for this repository's bench alone"
        )]
        pub fn new(engine: crate::virtio::blk::IoEngine) -> Self {
            let file = sys::scratch_file(&std::env::temp_dir(), crate::Size::mib(1)).unwrap();
            let disk = RawFile::from_file(file.try_clone().unwrap(), false).unwrap();
            let disk = super::Blk::new(Box::new(disk), Options { engine, ..Options::new(0) });
            assert_eq!(disk.engine(), engine);
            Self(Driver::start(disk), file)
        }

        /// The file itself.
        #[allow(clippy::unwrap_used, reason = "for this repository's bench alone")]
        pub fn file(&self) -> File {
            self.1.try_clone().unwrap()
        }

        /// `n` reads of 4 KiB, one kick each.
        pub fn run(&mut self, n: u32) {
            for _ in 0..n {
                self.0.send(0, &[&[0; 16]], &[PAGE, 1]);
                self.0.dispatch(0);
                while self.0.collect(0).is_none() {
                    self.0.dispatch_watched(0);
                }
            }
        }
    }

    /// One connection with a guest.
    #[derive(Debug)]
    pub struct Vsock(Driver<super::Vsock>, VsockStream);

    /// The guest's half of one connection.
    fn header(op: VsockOp, len: usize) -> [u8; HEADER] {
        VsockHeader {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: 1,
            len: len as u32,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        }
        .to_bytes()
    }

    impl Vsock {
        #[allow(
            clippy::new_without_default,
            missing_docs,
            clippy::unwrap_used,
            reason = "for this repository's bench alone"
        )]
        pub fn new() -> Self {
            let mut device = super::Vsock::new();
            let listener = device.listen(1).unwrap();
            let mut driver = Driver::start(device);
            for _ in 0..64 {
                driver.send(0, &[], &[PAGE]);
            }
            driver.send(1, &[&header(VsockOp::Request, 0)], &[]);
            driver.dispatch(1);
            let stream = listener.try_accept().unwrap().unwrap();
            Self(driver, stream)
        }

        /// `n` packets of 4 KiB, each read by the embedder at once.
        #[allow(clippy::unwrap_used, reason = "for this repository's bench alone")]
        pub fn run(&mut self, n: u32) {
            let (header, mut page) = (header(VsockOp::Data, PAGE), [0; PAGE]);
            for _ in 0..n {
                self.0.send(1, &[&header, &page], &[]);
                self.0.dispatch(1);
                self.1.read_exact(&mut page).unwrap();
                self.0.collect(1);
                while self.0.collect(0).is_some() {
                    self.0.send(0, &[], &[PAGE]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[cfg(not(feature = "qcow2"))]
    fn qcow2(_: &[u8]) {}
    #[cfg(feature = "qcow2")]
    use super::qcow2_open as qcow2;

    #[test]
    fn no_turn_exceeds_its_budget() {
        for device in 0..turns::DEVICES {
            let mut data = vec![device];
            for round in 0..6u8 {
                data.extend([round.wrapping_mul(47), round, 255, round + 3, 2, round.wrapping_mul(80)]);
                data.extend([round; 44]);
            }
            device_turn(&data);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            for target in [queue, mmio, blk_request, balloon, vsock_packet, proto_frame, proto_files, control_stream, seccomp_profile, kernel_image, kernel_module, image_tar, oci_manifest, oci_layer, oci_layer_file, reference, overlay, qcow2] {
                target(&data);
            }
        }
    }
}
