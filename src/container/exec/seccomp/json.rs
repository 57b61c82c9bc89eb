//! A profile as JSON, in Docker's format.
//!
//! `linux.seccomp` of the OCI runtime specification is a part of it.

use serde::Deserialize;

use super::arch;
use super::rule::{Action, Comparison, Condition};
use crate::container::exec::capabilities;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a profile. Docker's own has some 20,000.
pub(super) const MAX_PROFILE: usize = 1024 * 1024;
/// The highest error number that Linux returns.
const MAX_ERRNO: u32 = 4095;
/// The error number where none is named: EPERM.
const DEFAULT_ERRNO: u32 = 1;
/// Arguments of a call.
const ARGUMENTS: u32 = 6;

// An unknown field is refused: a restriction whose name is misspelled would be lost.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ProfileJson {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchJson>>,
    #[serde(default)]
    flags: Option<Vec<String>>,
    #[serde(default)]
    listener_path: Option<String>,
    #[serde(default)]
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<RuleJson>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ArchJson {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RuleJson {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: String,
    #[serde(default)]
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<ArgumentJson>>,
    #[serde(default)]
    includes: Option<SelectionJson>,
    #[serde(default)]
    excludes: Option<SelectionJson>,
    #[serde(default, rename = "comment")]
    _comment: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ArgumentJson {
    index: u32,
    #[serde(default)]
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SelectionJson {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    min_kernel: Option<String>,
}

/// For which guests and programs a rule is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selection {
    pub capabilities: Vec<u64>,
    /// As Go calls them, or other names of the same.
    pub arches: Vec<String>,
    pub min_kernel: Option<KernelVersion>,
}

/// The first two numbers of a kernel's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::container) struct KernelVersion {
    pub major: u16,
    pub minor: u16,
}

/// A rule before it is known for which program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProfileRule {
    /// Numbers of the calls in the guest.
    pub calls: Vec<u32>,
    pub action: Action,
    /// Sets of conditions, of which one must hold.
    pub alternatives: Vec<Vec<Condition>>,
    pub includes: Selection,
    pub excludes: Selection,
}

/// A profile whose every word is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Profile {
    pub default: Action,
    pub rules: Vec<ProfileRule>,
    /// Flags of seccomp(2).
    pub flags: u32,
}

fn invalid(text: impl std::fmt::Display) -> Error {
    Error::invalid("SeccompProfile::from_json", text)
}

/// A word of the profile's, cut to what fits a message.
fn quoted(word: &str) -> String {
    let shown: String = word.chars().take(60).collect();
    format!("{shown:?}")
}

/// # Errors
/// `InvalidConfig` for what is no profile, or has words that Linux does not have. `Unsupported` for actions that need a
/// supervisor beside the program.
pub(super) fn parse(bytes: &[u8]) -> Result<Profile> {
    if bytes.len() > MAX_PROFILE {
        return Err(invalid(format!("{} bytes, and at most {MAX_PROFILE} are read", bytes.len())));
    }
    let json: ProfileJson = serde_json::from_slice(bytes).map_err(|error| invalid(cut(&error.to_string())))?;
    if json.architectures.as_ref().is_some_and(|all| !all.is_empty())
        && json.arch_map.as_ref().is_some_and(|all| !all.is_empty())
    {
        return Err(invalid("it has \"architectures\" and \"archMap\", of which only one can be"));
    }
    for map in json.arch_map.iter().flatten() {
        check_architecture(&map.architecture)?;
        map.sub_architectures.iter().flatten().try_for_each(|name| check_architecture(name))?;
    }
    json.architectures.iter().flatten().try_for_each(|name| check_architecture(name))?;
    if json.listener_path.as_ref().or(json.listener_metadata.as_ref()).is_some_and(|text| !text.is_empty()) {
        return Err(supervised("listenerPath"));
    }
    let default = action(&json.default_action, json.default_errno_ret)?;
    let rules = json.syscalls.into_iter().flatten().map(rule).collect::<Result<_>>()?;
    Ok(Profile { default, rules, flags: flags(json.flags.as_deref().unwrap_or_default())? })
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

fn supervised(what: &str) -> Error {
    let why = format!("SeccompProfile::from_json: {what} needs a program beside the guest's, and there is none");
    Error::new(ErrorKind::Unsupported, why)
}

fn check_architecture(name: &str) -> Result<()> {
    let known = name.strip_prefix("SCMP_ARCH_").is_some_and(|plain| arch::ALL.contains(&plain));
    if known {
        Ok(())
    } else {
        Err(invalid(format!("{} is no architecture, such as \"SCMP_ARCH_NATIVE\"", quoted(name))))
    }
}

/// Flags of seccomp(2), without those that mean nothing for a program that is only beginning.
fn flags(names: &[String]) -> Result<u32> {
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | 2),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | 4),
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => Err(supervised(name)),
        _ => Err(invalid(format!("{} is no flag, such as \"SECCOMP_FILTER_FLAG_LOG\"", quoted(name)))),
    })
}

fn action(name: &str, errno: Option<u32>) -> Result<Action> {
    let action = match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_LOG" => Action::Log,
        "SCMP_ACT_ALLOW" => Action::Allow,
        "SCMP_ACT_ERRNO" => {
            let errno = errno.unwrap_or(DEFAULT_ERRNO);
            let known = u16::try_from(errno).ok().filter(|_| errno <= MAX_ERRNO);
            return known.map(Action::Errno).ok_or_else(|| invalid(format!("error {errno} is above {MAX_ERRNO}")));
        }
        "SCMP_ACT_TRACE" | "SCMP_ACT_NOTIFY" => return Err(supervised(name)),
        _ => return Err(invalid(format!("{} is no action, such as \"SCMP_ACT_ERRNO\"", quoted(name)))),
    };
    match errno {
        // The specification asks for it.
        Some(errno) => Err(invalid(format!("{name} takes no error number, and {errno} is one"))),
        None => Ok(action),
    }
}

fn rule(json: RuleJson) -> Result<ProfileRule> {
    let names = match (json.name, json.names) {
        (Some(name), None) => vec![name],
        (None, Some(names)) if !names.is_empty() => names,
        (Some(name), Some(names)) if names.is_empty() => vec![name],
        _ => return Err(invalid("a rule has either \"name\" or \"names\" of calls")),
    };
    let mut calls = Vec::new();
    for name in &names {
        match arch::known_call(name) {
            Some(arch::KnownCall::Here(number)) => calls.push(number),
            Some(arch::KnownCall::Elsewhere) => {}
            None => return Err(invalid(format!("Linux has no system call {}", quoted(name)))),
        }
    }
    calls.sort_unstable();
    calls.dedup();
    let conditions = json.args.unwrap_or_default().iter().map(condition).collect::<Result<Vec<_>>>()?;
    Ok(ProfileRule {
        calls,
        action: action(&json.action, json.errno_ret)?,
        alternatives: alternatives(conditions),
        includes: selection(json.includes.unwrap_or_default())?,
        excludes: selection(json.excludes.unwrap_or_default())?,
    })
}

/// All conditions hold together. Where two are on the same argument each is a rule of its own, as for runc.
fn alternatives(conditions: Vec<Condition>) -> Vec<Vec<Condition>> {
    let arguments = conditions.iter().fold(0u8, |arguments, condition| arguments | 1 << condition.index);
    let twice = arguments.count_ones() as usize != conditions.len();
    if twice { conditions.into_iter().map(|condition| vec![condition]).collect() } else { vec![conditions] }
}

fn condition(json: &ArgumentJson) -> Result<Condition> {
    let comparison = match json.op.as_str() {
        "SCMP_CMP_NE" => Comparison::NotEqual,
        "SCMP_CMP_LT" => Comparison::Less,
        "SCMP_CMP_LE" => Comparison::LessOrEqual,
        "SCMP_CMP_EQ" => Comparison::Equal,
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual,
        "SCMP_CMP_GT" => Comparison::Greater,
        "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual,
        other => return Err(invalid(format!("{} is no comparison, such as \"SCMP_CMP_EQ\"", quoted(other)))),
    };
    let index = u8::try_from(json.index).ok().filter(|_| json.index < ARGUMENTS);
    let index = index.ok_or_else(|| invalid(format!("argument {}: calls have arguments 0 to 5", json.index)))?;
    Ok(Condition { index, comparison, value: json.value, value_two: json.value_two })
}

fn selection(json: SelectionJson) -> Result<Selection> {
    let set =
        |name: &String| capabilities::set([name]).map_err(|_| invalid(format!("{} is no capability", quoted(name))));
    Ok(Selection {
        capabilities: json.caps.iter().flatten().map(set).collect::<Result<_>>()?,
        arches: json.arches.unwrap_or_default(),
        min_kernel: json.min_kernel.as_deref().filter(|text| !text.is_empty()).map(kernel_version).transpose()?,
    })
}

/// `4.8`, as Docker writes it.
fn kernel_version(text: &str) -> Result<KernelVersion> {
    let number = |part: &str| part.parse().ok().filter(|_| part.bytes().all(|byte| byte.is_ascii_digit()));
    let parts = text.split_once('.').map(|(major, minor)| (number(major), number(minor)));
    match parts {
        Some((Some(major), Some(minor))) => Ok(KernelVersion { major, minor }),
        _ => Err(invalid(format!("minKernel is a version such as \"4.8\", not {}", quoted(text)))),
    }
}
