//! Kernel files for tests and fuzzing. None is valid, as none can be opened.

/// Returns an ELF kernel of `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    [b"\x7fELF\x02\x01\x01", code].concat()
}

/// Returns an `Image` of `code` (Linux, Documentation/arch/arm64/booting.rst, 4).
pub fn vmlinuz(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 64];
    file[56..60].copy_from_slice(b"ARM\x64");
    file.extend_from_slice(code);
    file
}
