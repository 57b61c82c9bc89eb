//! The smallest kernel files that are valid.
//!
//! For tests and fuzzing, which damage them, and for guests of a few instructions.

/// Where the code lies and is entered.
const START: u64 = 0x10_0000;
/// From where a bzImage is entered, in its second part (Linux x86 boot protocol, 1.4).
const ENTRY: usize = 0x200;

/// Returns an ELF kernel: one segment of `code` at 1 MiB.
///
/// It is entered at its start in 64-bit mode (System V ABI, gABI 4.1 and 5).
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 120];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    put(16, &[2, 0, 62, 0]);
    put(24, &START.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    put(64, &1u32.to_le_bytes());
    let size = code.len() as u64;
    for (at, value) in [(72, 120), (80, START), (88, START), (96, size), (104, size)] {
        put(at, &value.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

/// Returns the same kernel with a PVH entry point.
///
/// A note says that it is entered in 32-bit mode at its start (Xen, public/elfnote.h, `XEN_ELFNOTE_PHYS32_ENTRY`).
#[allow(dead_code, reason = "not every test that includes this file wants it")]
pub fn elf_with_pvh(code: &[u8]) -> Vec<u8> {
    let mut note = vec![4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0];
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&(START as u32).to_le_bytes());
    let mut file = elf(code);
    // A second program header goes between the first and the code.
    let mut header = [0; 56];
    header[..4].copy_from_slice(&4u32.to_le_bytes());
    let (at, size) = ((file.len() + header.len()) as u64, note.len() as u64);
    for (field, value) in [(8, at), (32, size), (40, size), (48, 4)] {
        header[field..field + 8].copy_from_slice(&value.to_le_bytes());
    }
    file.splice(120..120, header);
    file[56] = 2;
    file[72] += header.len() as u8;
    file.extend_from_slice(&note);
    file
}

/// A bzImage whose kernel is `code`, which unpacks nothing (Linux x86 boot protocol, 1.3).
#[allow(dead_code, reason = "not every test that includes this file wants both")]
pub fn vmlinuz(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024 + ENTRY];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1fe, &[0x55, 0xaa]); // boot_flag
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &(START as u32).to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x236, &1u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x258, &START.to_le_bytes()); // pref_address
    put(0x260, &0x1000u32.to_le_bytes()); // init_size
    file.extend_from_slice(code);
    file
}
