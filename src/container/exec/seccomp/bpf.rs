//! Rules as a program of classic BPF, which the guest's kernel runs at each call.
//!
//! The program looks at the architecture, finds the call by a binary search over ranges of numbers, and goes through the call's rules.

use std::collections::BTreeMap;

use super::arch;
use super::rule::{Action, Comparison, Condition, Rule};

/// Instructions of a program that Linux takes (`BPF_MAXINSNS`).
pub(super) const MAX_INSTRUCTIONS: usize = 4096;

// Classes, modes and operations (Linux, include/uapi/linux/bpf_common.h).
pub(super) const LOAD_WORD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQUAL: u16 = 0x15;
pub(super) const JUMP_GREATER: u16 = 0x25;
pub(super) const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

// Where things are in struct seccomp_data.
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// One instruction (struct sock_filter).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub operand: u32,
}

impl Instruction {
    fn plain(code: u16, operand: u32) -> Self {
        Self { code, jump_true: 0, jump_false: 0, operand }
    }

    fn returning(action: Action) -> Self {
        Self::plain(RETURN, action.result())
    }

    fn encode(self) -> [u8; 8] {
        let ([a, b], [e, f, g, h]) = (self.code.to_le_bytes(), self.operand.to_le_bytes());
        [a, b, self.jump_true, self.jump_false, e, f, g, h]
    }
}

/// The program as the kernel takes it. Both architectures are little-endian.
pub(super) fn encode(program: &[Instruction]) -> Vec<u8> {
    program.iter().flat_map(|instruction| instruction.encode()).collect()
}

/// Calls from a number on that get the same.
struct CallRange {
    first: u32,
    body: Vec<Instruction>,
}

/// Makes the program: of a call's rules that match the strictest decides, and `default` where none does.
///
/// `None` when it is longer than Linux takes.
pub(super) fn compile(default: Action, rules: &BTreeMap<u32, Vec<Rule>>) -> Option<Vec<Instruction>> {
    let mut ranges: Vec<CallRange> = Vec::new();
    let mut add = |first: u32, body: Vec<Instruction>| {
        if ranges.last().is_none_or(|last| last.body != body) {
            ranges.push(CallRange { first, body });
        }
    };
    let otherwise = || vec![Instruction::returning(default)];
    let mut next = 0;
    for (number, rules) in rules {
        if *number > next {
            add(next, otherwise());
        }
        add(*number, call_body(default, rules)?);
        next = number.checked_add(1)?;
    }
    add(next, otherwise());
    let mut search = search(&ranges)?;
    let mut program = head(default);
    program.append(&mut search);
    (program.len() <= MAX_INSTRUCTIONS).then_some(program)
}

/// Kills what calls as on another architecture or by another ABI, and loads the call's number.
fn head(default: Action) -> Vec<Instruction> {
    let kill = Instruction::returning(Action::KillThread);
    let mut head = vec![
        Instruction::plain(LOAD_WORD, ARCHITECTURE),
        Instruction { code: JUMP_EQUAL, jump_true: 1, jump_false: 0, operand: arch::AUDIT_ARCH },
        kill,
        Instruction::plain(LOAD_WORD, NUMBER),
    ];
    if let Some(foreign) = arch::FOREIGN_CALLS {
        head.extend([
            Instruction { code: JUMP_GREATER_OR_EQUAL, jump_true: 0, jump_false: 3, operand: foreign },
            // -1 is no call: a tracer has taken it out.
            Instruction { code: JUMP_EQUAL, jump_true: 0, jump_false: 1, operand: u32::MAX },
            Instruction::returning(default),
            kill,
        ]);
    }
    head
}

/// Finds the range of the number that is loaded.
fn search(ranges: &[CallRange]) -> Option<Vec<Instruction>> {
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let Some(pivot) = right.first() else { return Some(Vec::new()) };
    if left.is_empty() {
        return Some(pivot.body.clone());
    }
    let (mut lower, mut upper) = (search(left)?, search(right)?);
    let branch = |jump_true| Instruction {
        code: JUMP_GREATER_OR_EQUAL,
        jump_true,
        jump_false: u8::from(jump_true == 0),
        operand: pivot.first,
    };
    let mut all = match u8::try_from(lower.len()) {
        Ok(over) => vec![branch(over)],
        // Conditional jumps are short.
        Err(_) => vec![branch(0), Instruction::plain(JUMP, u32::try_from(lower.len()).ok()?)],
    };
    all.append(&mut lower);
    all.append(&mut upper);
    (all.len() <= MAX_INSTRUCTIONS).then_some(all)
}

/// What decides about one call.
fn call_body(default: Action, rules: &[Rule]) -> Option<Vec<Instruction>> {
    let mut ordered: Vec<&Rule> = rules.iter().collect();
    ordered.sort_by_key(|rule| rule.action.strictness());
    let mut body = Vec::new();
    for rule in ordered {
        body.append(&mut rule_code(rule)?);
        if rule.conditions.is_empty() {
            return Some(body);
        }
        if body.len() > MAX_INSTRUCTIONS {
            return None;
        }
    }
    body.push(Instruction::returning(default));
    Some(body)
}

/// Where a comparison goes on.
#[derive(Clone, Copy)]
enum Target {
    Next,
    /// Behind the condition, which holds.
    Holds,
    /// Behind the rule, which does not match.
    Fails,
}

/// A step of a condition: a plain instruction, or a jump.
enum Step {
    Plain(Instruction),
    Jump(u16, u32, Target, Target),
}

/// Returns from the program where all conditions hold, and goes on behind itself otherwise.
fn rule_code(rule: &Rule) -> Option<Vec<Instruction>> {
    let conditions: Vec<Vec<Step>> = rule.conditions.iter().map(condition_steps).collect();
    let end = conditions.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(end);
    for condition in conditions {
        let behind = code.len() + condition.len();
        for step in condition {
            let here = code.len() + 1;
            let distance = |target| {
                u8::try_from(match target {
                    Target::Next => 0,
                    Target::Holds => behind - here,
                    Target::Fails => end - here,
                })
            };
            code.push(match step {
                Step::Plain(instruction) => instruction,
                Step::Jump(code, operand, to, or) => {
                    Instruction { code, jump_true: distance(to).ok()?, jump_false: distance(or).ok()?, operand }
                }
            });
        }
    }
    code.push(Instruction::returning(rule.action));
    Some(code)
}

/// Arguments have 64 bits, the kernel's machine has 32: the upper half decides first.
fn condition_steps(condition: &Condition) -> Vec<Step> {
    use Target::{Fails, Holds, Next};
    let low_at = ARGUMENTS + 8 * u32::from(condition.index);
    let load = |at| Step::Plain(Instruction::plain(LOAD_WORD, at));
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high, low) = halves(condition.value);
    let ordered = |code, (yes, no)| {
        vec![
            load(low_at + 4),
            Step::Jump(JUMP_GREATER, high, yes, Next),
            Step::Jump(JUMP_EQUAL, high, Next, no),
            load(low_at),
            Step::Jump(code, low, yes, no),
        ]
    };
    match condition.comparison {
        Comparison::Equal => vec![
            load(low_at + 4),
            Step::Jump(JUMP_EQUAL, high, Next, Fails),
            load(low_at),
            Step::Jump(JUMP_EQUAL, low, Holds, Fails),
        ],
        Comparison::NotEqual => vec![
            load(low_at + 4),
            Step::Jump(JUMP_EQUAL, high, Next, Holds),
            load(low_at),
            Step::Jump(JUMP_EQUAL, low, Fails, Holds),
        ],
        Comparison::GreaterOrEqual => ordered(JUMP_GREATER_OR_EQUAL, (Holds, Fails)),
        Comparison::Greater => ordered(JUMP_GREATER, (Holds, Fails)),
        Comparison::Less => ordered(JUMP_GREATER_OR_EQUAL, (Fails, Holds)),
        Comparison::LessOrEqual => ordered(JUMP_GREATER, (Fails, Holds)),
        Comparison::MaskedEqual => {
            let (high_two, low_two) = halves(condition.value_two & condition.value);
            let mask = |bits| Step::Plain(Instruction::plain(AND, bits));
            vec![
                load(low_at + 4),
                mask(high),
                Step::Jump(JUMP_EQUAL, high_two, Next, Fails),
                load(low_at),
                mask(low),
                Step::Jump(JUMP_EQUAL, low_two, Holds, Fails),
            ]
        }
    }
}
