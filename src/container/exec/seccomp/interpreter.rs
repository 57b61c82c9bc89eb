//! Runs filters as the kernel does, to test them.

use super::bpf::{self, Instruction};
use super::{KernelVersion, ProgramTraits, SeccompProfile, arch};

/// A call as a filter sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub number: u32,
    pub architecture: u32,
    pub arguments: [u64; 6],
}

impl Call {
    fn word(&self, at: u32) -> Option<u32> {
        match at {
            bpf::NUMBER => Some(self.number),
            bpf::ARCHITECTURE => Some(self.architecture),
            16..64 => {
                let argument = self.arguments.get(usize::try_from(at - 16).ok()? / 8)?;
                match at % 8 {
                    0 => Some(*argument as u32),
                    4 => Some((argument >> 32) as u32),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// The filter's result. `None` for a program that the kernel would not take.
pub(super) fn run(program: &[Instruction], call: Call) -> Option<u32> {
    let (mut at, mut word) = (0usize, 0);
    // Jumps go forward alone.
    loop {
        let Instruction { code, jump_true, jump_false, operand } = *program.get(at)?;
        at += 1;
        let branch = |condition| usize::from(if condition { jump_true } else { jump_false });
        match code {
            bpf::LOAD_WORD => word = call.word(operand)?,
            bpf::AND => word &= operand,
            bpf::JUMP => at += usize::try_from(operand).ok()?,
            bpf::JUMP_EQUAL => at += branch(word == operand),
            bpf::JUMP_GREATER => at += branch(word > operand),
            bpf::JUMP_GREATER_OR_EQUAL => at += branch(word >= operand),
            bpf::RETURN => return Some(operand),
            _ => return None,
        }
    }
}

/// Decodes what [`bpf::encode`] made.
pub(super) fn decode(program: &[u8]) -> Vec<Instruction> {
    let (instructions, _) = program.as_chunks::<8>();
    let decoded = instructions.iter().map(|[a, b, jump_true, jump_false, e, f, g, h]| Instruction {
        code: u16::from_le_bytes([*a, *b]),
        jump_true: *jump_true,
        jump_false: *jump_false,
        operand: u32::from_le_bytes([*e, *f, *g, *h]),
    });
    decoded.collect()
}

/// Reads a profile of any bytes, makes its filter, and runs it on calls that the bytes choose.
pub(crate) fn fuzz(data: &[u8]) {
    let (choice, json) = data.split_first_chunk::<8>().unwrap_or((&[0; 8], data));
    let Ok(profile) = SeccompProfile::from_json(json) else { return };
    let word = u64::from_le_bytes(*choice);
    let kernel = KernelVersion { major: u16::from(choice[0] % 8), minor: u16::from(choice[1] % 32) };
    let Ok(filter) = profile.filter(ProgramTraits { capabilities: word, kernel }) else { return };
    let program = decode(&filter.program);
    assert!((1..=bpf::MAX_INSTRUCTIONS).contains(&program.len()), "the kernel takes no program of this length");
    for number in (0..600).chain([u32::MAX, arch::FOREIGN_CALLS.unwrap_or(u32::MAX)]) {
        let call =
            Call { number, architecture: arch::AUDIT_ARCH, arguments: [word, word >> 8, 0, 1, u64::MAX, word >> 32] };
        assert!(run(&program, call).is_some(), "the filter has no result for call {number}");
    }
}
