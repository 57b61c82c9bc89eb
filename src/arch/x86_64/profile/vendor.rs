//! Who made a processor, as leaf 0 says it: twelve letters in three registers.

/// In the order of EBX, ECX, EDX, of which the letters are read as EBX, EDX, ECX.
pub(super) fn words(name: &str) -> [u32; 3] {
    let mut letters = name.bytes().chain(std::iter::repeat(0));
    let mut word = || u32::from_le_bytes(std::array::from_fn(|_| letters.next().unwrap_or(0)));
    let (ebx, edx, ecx) = (word(), word(), word());
    [ebx, ecx, edx]
}

/// The name in leaf 0's registers.
pub(super) fn name([_, ebx, ecx, edx]: [u32; 4]) -> String {
    let letters: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&letters).trim_end_matches('\0').to_owned()
}
