//! [`SeccompProfile`]: which system calls a program may make.

mod arch;
mod bpf;
mod json;
mod rule;

#[cfg(any(test, feature = "internals"))]
mod interpreter;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Exec;
use crate::boot;
use crate::error::{Error, Result};
#[cfg(any(test, feature = "internals"))]
pub(crate) use interpreter::fuzz;
pub(in crate::container) use json::KernelVersion;
use json::{Profile, Selection};
use rule::Rule;

/// Rules with conditions that one program gets: each takes instructions, of which Linux takes 4,096.
const MAX_CONDITIONAL_RULES: usize = bpf::MAX_INSTRUCTIONS;

/// Says which system calls a program may make, and what becomes of others.
///
/// It is for [`Exec::seccomp`]. Clones share what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeccompProfile(Arc<Profile>);

/// A filter as the shim gets it.
#[derive(Debug)]
pub(in crate::container) struct SeccompFilter {
    /// A program of classic BPF.
    pub program: Vec<u8>,
    /// Flags of seccomp(2).
    pub flags: u32,
}

/// What a profile's rules depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProgramTraits {
    /// The capabilities that it can ever have, bit by number.
    pub capabilities: u64,
    pub kernel: KernelVersion,
}

impl SeccompProfile {
    /// Reads a profile in Docker's JSON format, or `linux.seccomp` of the OCI runtime specification.
    ///
    /// - Actions are those of libseccomp, such as `SCMP_ACT_ERRNO`. `SCMP_ACT_KILL` kills the thread. `SCMP_ACT_TRACE`
    ///   and `SCMP_ACT_NOTIFY` are `Unsupported`, as they need a supervisor.
    /// - `args` of a rule must all match. Two on one argument are rules of their own, as for runc.
    /// - Arguments are compared with all their 64 bits, as by libseccomp. Of an `int` the kernel looks at 32 bits only.
    /// - Of a call's rules that match, the strictest decides, and of equally strict ones the first. Where none matches,
    ///   `defaultAction` decides.
    /// - `includes` and `excludes` are decided when a program is started: by its capabilities, the guest's processor and the
    ///   guest's kernel.
    /// - A name that Linux has on other processors alone means nothing here.
    /// - `architectures` and `archMap` change nothing. A program of another architecture, such as one of 32 bits, is killed at
    ///   its first call, by SIGSYS.
    ///
    /// # Errors
    /// `InvalidConfig` for what is no such profile, is above 1 MiB, or has names that Linux does not have. `Unsupported` for
    /// actions and flags that need a supervisor.
    pub fn from_json(json: impl AsRef<[u8]>) -> Result<Self> {
        json::parse(json.as_ref()).map(|profile| Self(Arc::new(profile)))
    }

    /// Makes the filter for a program.
    ///
    /// # Errors
    /// `InvalidConfig` where it is longer than Linux takes.
    pub(super) fn filter(&self, program: ProgramTraits) -> Result<SeccompFilter> {
        let too_long =
            || Error::invalid("seccomp", "the profile's filter is longer than the 4096 instructions that Linux takes");
        let rules = self.rules(program).ok_or_else(too_long)?;
        let code = bpf::compile(self.0.default, &rules).ok_or_else(too_long)?;
        Ok(SeccompFilter { program: bpf::encode(&code), flags: self.0.flags })
    }

    /// The rules that are for this program, by call. `None` where there are too many.
    fn rules(&self, program: ProgramTraits) -> Option<BTreeMap<u32, Vec<Rule>>> {
        let mut rules: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
        let mut conditional = 0;
        for rule in self.0.rules.iter().filter(|it| it.includes.has_all(program) && !it.excludes.has_any(program)) {
            for call in &rule.calls {
                let of_call = rules.entry(*call).or_default();
                for conditions in &rule.alternatives {
                    let rule = Rule { conditions: conditions.clone(), action: rule.action };
                    if rule.conditions.is_empty() && of_call.contains(&rule) {
                        continue;
                    }
                    conditional += usize::from(!rule.conditions.is_empty());
                    if conditional > MAX_CONDITIONAL_RULES {
                        return None;
                    }
                    of_call.push(rule);
                }
            }
        }
        Some(rules)
    }
}

impl Selection {
    fn is_here(&self) -> bool {
        let here = |name: &String| boot::OCI_ALIASES.contains(&name.as_str()) || name == arch::NAME;
        self.arches.iter().any(here)
    }

    /// As an `includes`: all capabilities, one of the architectures, a kernel of that age.
    fn has_all(&self, program: ProgramTraits) -> bool {
        self.capabilities.iter().all(|it| program.capabilities & it != 0)
            && (self.arches.is_empty() || self.is_here())
            && self.min_kernel.is_none_or(|least| program.kernel >= least)
    }

    /// As an `excludes`: one of the capabilities, one of the architectures, or a kernel of that age.
    fn has_any(&self, program: ProgramTraits) -> bool {
        self.capabilities.iter().any(|it| program.capabilities & it != 0)
            || self.is_here()
            || self.min_kernel.is_some_and(|least| program.kernel >= least)
    }
}

impl Exec {
    /// Limits the system calls of the program, and of everything that it starts.
    ///
    /// The guest's kernel enforces it (seccomp(2)), and a program cannot lift it. It is set last, right before the program
    /// is executed, so it must allow `execve`. For a user other than root it is set before the shim becomes that user, unless
    /// [`Exec::no_new_privs`] or [`Exec::hardened`] is set. Then it must allow `fchown`, `setgroups`, `setgid`, `setuid`
    /// and `rt_sigprocmask` too.
    ///
    /// A program of root can make the kernel run others without it, by `core_pattern` for instance. [`Exec::hardened`] prevents
    /// that.
    ///
    /// [`Exec::spawn`] fails with `InvalidConfig` where the filter is longer than Linux takes, and with `Unsupported`
    /// where the guest's kernel has no such filters. Where `execve` is denied with an error number, it fails with the kind of
    /// that error. Where the profile kills instead, the program has ended by SIGSYS.
    pub fn seccomp(mut self, profile: SeccompProfile) -> Self {
        self.privileges.seccomp = Some(profile);
        self
    }
}
