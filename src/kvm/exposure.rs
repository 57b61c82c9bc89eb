//! [`Exposure`]: where a host is weak against its guests, as its kernel tells.

use std::fmt;
use std::fs;
use std::path::Path;

/// Weaknesses of this host against hostile guests, as its kernel reports them in `/sys`.
///
/// Guests of one process share its address space with each other and with the embedder's secrets. They share pages of
/// the kernel and of base disks, and parts of the processor where SMT is on. Only the processor separates them there,
/// as far as the host's kernel mitigates its faults. [`Exposure::warnings`] says in words what to look into.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Exposure {
    /// What the kernel reports of each vulnerability of processors that it knows, by name.
    ///
    /// It is read from `/sys/devices/system/cpu/vulnerabilities`.
    pub vulnerabilities: Vec<Vulnerability>,
    /// Whether SMT is on; `None` when it is not known. Threads share a core by it.
    pub smt: Option<bool>,
    /// Whether the kernel merges equal pages (KSM); `None` when it is not known.
    ///
    /// Guests can spy on each other by it.
    pub ksm: Option<bool>,
    /// Whether KVM offers nested virtualization; `None` when it is not known.
    ///
    /// No guest is shown it unless [`CpuProfile::nested_virtualization`](crate::cpu::CpuProfile::nested_virtualization) asks
    /// for it.
    pub nested: Option<bool>,
}

/// One fault of processors, and what the host's kernel says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Vulnerability {
    /// The kernel's name of it, such as `vmscape`, `l1tf`, `mds`, `retbleed` or `spec_rstack_overflow`.
    pub name: String,
    /// The kernel's words, such as `Not affected` or `Mitigation: IBPB before exit to userspace`.
    pub state: String,
}

/// Files that say more than one line do not say it here.
const STATE_MAX: usize = 256;

impl Exposure {
    /// Reads what lies under `sys`.
    pub(super) fn read(sys: &Path, module: Option<&str>) -> Self {
        let text = |path: &str| fs::read_to_string(sys.join(path)).ok();
        let yes = |path: &str| text(path).and_then(|text| truth(&text));
        let nested = module.map(|module| format!("module/{module}/parameters/nested"));
        Self {
            vulnerabilities: vulnerabilities(&sys.join("devices/system/cpu/vulnerabilities")),
            smt: yes("devices/system/cpu/smt/active"),
            ksm: yes("kernel/mm/ksm/run"),
            nested: nested.and_then(|path| yes(&path)),
        }
    }

    /// Returns what to look into before guests of strangers share this host.
    ///
    /// Each is one sentence for an operator.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self
            .vulnerabilities
            .iter()
            .filter(|it| it.is_open())
            .map(|it| format!("the processor is open to {}: the kernel says {:?}", it.name, it.state))
            .collect();
        if !self.vulnerabilities.is_empty() && !self.vulnerabilities.iter().any(|it| it.name == "vmscape") {
            warnings.push(
                "the kernel is too old to know of vmscape, by which guests spy on the embedder: update it".into(),
            );
        }
        if self.smt == Some(true) {
            warnings.push(
                "threads that share a core are on: guests on them can spy on each other, unless core scheduling or `nosmt` \
                 keeps them apart"
                    .into(),
            );
        }
        if self.ksm == Some(true) {
            warnings.push("equal pages are merged (KSM), by which guests can spy on each other: switch it off".into());
        }
        warnings
    }
}

impl Vulnerability {
    /// Whether the kernel reports the vulnerability as not, or not wholly, mitigated.
    pub fn is_open(&self) -> bool {
        self.state.to_ascii_lowercase().contains("vulnerable")
    }
}

impl fmt::Display for Vulnerability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.state)
    }
}

fn vulnerabilities(directory: &Path) -> Vec<Vulnerability> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let one = |entry: fs::DirEntry| {
        let state = fs::read_to_string(entry.path()).ok()?;
        let state = state.lines().next().unwrap_or_default().chars().take(STATE_MAX).collect();
        Some(Vulnerability { name: entry.file_name().into_string().ok()?, state })
    };
    let mut all: Vec<_> = entries.flatten().filter_map(one).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// How the kernel says yes and no in one file.
fn truth(text: &str) -> Option<bool> {
    match text.trim() {
        "1" | "Y" | "y" => Some(true),
        // KSM that has stopped, and taken apart what it had merged.
        "0" | "2" | "N" | "n" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vulnerabilities_are_parsed_and_rated() {
        let sys = std::env::temp_dir().join(format!("cofferdam-exposure-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = sys.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(Exposure::read(&sys, Some("kvm_intel")), Exposure::default());
        assert!(Exposure::default().warnings().is_empty(), "nothing is known");
        put("devices/system/cpu/vulnerabilities/l1tf", "Mitigation: PTE Inversion; VMX: flush not necessary\n");
        put("devices/system/cpu/vulnerabilities/mds", "Vulnerable: Clear CPU buffers attempted, no microcode\n");
        put("devices/system/cpu/smt/active", "1\n");
        put("kernel/mm/ksm/run", "1\n");
        put("module/kvm_intel/parameters/nested", "Y\n");
        let it = Exposure::read(&sys, Some("kvm_intel"));
        assert_eq!((it.smt, it.ksm, it.nested), (Some(true), Some(true), Some(true)));
        assert_eq!(it.vulnerabilities.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["l1tf", "mds"]);
        assert!(it.vulnerabilities[1].is_open() && !it.vulnerabilities[0].is_open());
        let warnings = it.warnings();
        for word in ["open to mds", "vmscape", "share a core", "merged"] {
            assert!(warnings.iter().any(|warning| warning.contains(word)), "{word}: {warnings:?}");
        }
        put("devices/system/cpu/vulnerabilities/vmscape", "Mitigation: IBPB before exit to userspace\n");
        put("kernel/mm/ksm/run", "0\n");
        assert_eq!(Exposure::read(&sys, None).warnings().len(), 2);
        fs::remove_dir_all(sys).unwrap();
    }
}
