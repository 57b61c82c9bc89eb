//! Numbers of a running VM: what its processors and devices did so far.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::cgroup::CgroupStats;
use super::disk::IoEngine;
use crate::size::Size;
use crate::virtio::DeviceId;
pub use crate::virtio::balloon::GuestMemoryStats;

/// The counters of a VM; see [`Vm::stats`](crate::Vm::stats). They only grow.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// One for each vCPU, in their order.
    pub vcpus: Vec<VcpuStats>,
    /// One for each virtio device: disks first, in their order.
    pub devices: Vec<DeviceStats>,
    /// Of the control group, when the VM has one.
    pub cgroup: Option<CgroupStats>,
}

/// What a vCPU has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuStats {
    /// Processor time of its thread: in the guest, in KVM, and in this crate. Time in which the guest's processor
    /// idled is not in it.
    pub cpu_time: Duration,
    /// Accesses to ports, which devices of this crate served.
    pub port_exits: u64,
    /// Accesses to device registers in memory, likewise. Queue notifications are not among them.
    pub mmio_exits: u64,
    /// Interruptions: by a pause, by the VM's end, or by a signal from elsewhere.
    pub interrupted_exits: u64,
    /// All others.
    pub other_exits: u64,
}

/// What a device has seen so far.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceStats {
    /// Which device.
    pub device: DeviceId,
    /// Notifications of the driver.
    pub kicks: u64,
    /// Descriptor chains taken from the driver.
    pub requests: u64,
    /// Bytes in those chains that the driver gave the device to read, headers included.
    ///
    /// Of a disk, that is what the guest writes.
    pub bytes_from_guest: u64,
    /// Bytes that the device wrote to guest memory, status bytes included.
    ///
    /// Of a disk, that is what the guest reads.
    pub bytes_to_guest: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Times the driver made a mistake that needs a reset.
    pub driver_errors: u64,
    /// Requests that the host failed, tries included. Only disks have them.
    pub io_errors: u64,
    /// Requests of a disk that waited for a limit.
    ///
    /// Of a network card, how often frames began to wait, each way.
    pub throttled: u64,
    /// How long they have waited in sum, when they went on.
    ///
    /// Of a network card, how long frames of either way could not go on.
    pub throttled_time: Duration,
    /// What moves a disk's bytes: [`IoEngine::IoUring`] or [`IoEngine::Threads`].
    pub engine: Option<IoEngine>,
    /// Bytes of the console that were not given to [`Console::writer`](crate::Console::writer), because it was too slow.
    pub dropped: u64,
}

/// What a guest's memory costs the host, and how the guest uses it; see [`Vm::memory_stats`](crate::Vm::memory_stats).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// What the guest was given.
    pub configured: Size,
    /// What of that the host has in memory now. Pages of the kernel's image that several VMs share count in each.
    pub resident: Size,
    /// Memory of this process for the VM beside that.
    ///
    /// It is for the threads' stacks, the pages that vCPUs share with the host's kernel, and the tail of the console.
    /// Neither the allocator's share nor what the host's kernel keeps is in it.
    pub overhead: Size,
    /// What is in the balloon, as the guest says.
    pub balloon: Size,
    /// Memory that the guest has reported as free so far, in sum. The host took it each time.
    pub reported: Size,
    /// How the guest uses its memory, as it reports.
    ///
    /// `None` when it has no driver or did not answer.
    pub guest: Option<GuestMemoryStats>,
}

/// A vCPU's own count: written by its thread, read by anybody.
#[derive(Debug, Default)]
pub(super) struct ExitCounts {
    pub port: AtomicU64,
    pub mmio: AtomicU64,
    pub interrupted: AtomicU64,
    pub other: AtomicU64,
}

impl ExitCounts {
    pub(super) fn stats(&self, cpu_time: Duration) -> VcpuStats {
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        VcpuStats {
            cpu_time,
            port_exits: count(&self.port),
            mmio_exits: count(&self.mmio),
            interrupted_exits: count(&self.interrupted),
            other_exits: count(&self.other),
        }
    }
}

/// One more. Only the vCPU's thread writes, so no atomic addition is needed.
pub(super) fn count(n: &AtomicU64) {
    n.store(n.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// A number's name without the suffix of counters, what it means, and where it is.
type Metric<T> = (&'static str, &'static str, fn(&T) -> u64);

const DEVICE_METRICS: [Metric<DeviceStats>; 8] = [
    ("cofferdam_device_kicks", "Notifications of the driver.", |d| d.kicks),
    ("cofferdam_device_requests", "Descriptor chains taken from the driver.", |d| d.requests),
    ("cofferdam_device_from_guest_bytes", "Bytes in those chains for the device to read.", |d| d.bytes_from_guest),
    ("cofferdam_device_to_guest_bytes", "Bytes written to guest memory.", |d| d.bytes_to_guest),
    ("cofferdam_device_interrupts", "Interrupts raised.", |d| d.interrupts),
    ("cofferdam_device_driver_errors", "Mistakes of the driver that needed a reset.", |d| d.driver_errors),
    ("cofferdam_device_io_errors", "Requests that the host failed.", |d| d.io_errors),
    ("cofferdam_device_throttled", "Requests that waited for a limit, or times that frames began to.", |d| d.throttled),
];

const DEVICE_TIMES: [TimeMetric<DeviceStats>; 1] =
    [("cofferdam_device_throttled_seconds", "Time that requests or frames have waited for a limit.", |d| {
        d.throttled_time
    })];

/// The same in seconds.
type TimeMetric<T> = (&'static str, &'static str, fn(&T) -> Duration);

const CGROUP_METRICS: [TimeMetric<CgroupStats>; 2] = [
    ("cofferdam_cgroup_cpu_seconds", "Processor time of all threads of the VM.", |g| g.cpu_time),
    ("cofferdam_cgroup_throttled_seconds", "Time in which they waited for their limit.", |g| g.throttled_time),
];

const EXITS: [Metric<VcpuStats>; 4] = [
    ("port", "", |v| v.port_exits),
    ("mmio", "", |v| v.mmio_exits),
    ("interrupted", "", |v| v.interrupted_exits),
    ("other", "", |v| v.other_exits),
];

impl Stats {
    /// Returns the counters of several VMs in the text format of OpenMetrics 1.0.
    ///
    /// Each VM has the given name as label `vm`. Serving the text is the embedder's.
    pub fn openmetrics<'a>(all: impl IntoIterator<Item = (&'a str, &'a Self)>) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write_metrics(&mut text, &all.into_iter().collect::<Vec<_>>());
        text
    }
}

/// OpenMetrics 1.0, "Text format": each family once, its samples together, counters with `_total`, `# EOF` at the end.
fn write_metrics(to: &mut String, all: &[(&str, &Stats)]) -> fmt::Result {
    let labels = |vm: &str, key: &str, value: &str| format!("vm=\"{}\",{key}=\"{}\"", escaped(vm), escaped(value));
    let vcpus = || all.iter().flat_map(|(vm, s)| s.vcpus.iter().enumerate().map(move |(n, v)| (*vm, n, v)));
    let devices = || all.iter().flat_map(|(vm, s)| s.devices.iter().map(move |d| (*vm, d)));
    let times = vcpus().map(|(vm, n, vcpu)| (labels(vm, "vcpu", &n.to_string()), vcpu.cpu_time));
    write_seconds(to, "cofferdam_vcpu_cpu_seconds", "Processor time of the vCPU's thread.", times)?;
    let family = "cofferdam_vcpu_exits";
    writeln!(to, "# TYPE {family} counter\n# HELP {family} Times the guest needed the host, by reason.")?;
    for (vm, n, vcpu) in vcpus() {
        for (reason, _, value) in EXITS {
            let labels = labels(vm, "vcpu", &n.to_string());
            writeln!(to, "{family}_total{{{labels},reason=\"{reason}\"}} {}", value(vcpu))?;
        }
    }
    for (family, help, value) in DEVICE_METRICS {
        writeln!(to, "# TYPE {family} counter")?;
        if family.ends_with("_bytes") {
            writeln!(to, "# UNIT {family} bytes")?;
        }
        writeln!(to, "# HELP {family} {help}")?;
        for (vm, device) in devices() {
            writeln!(to, "{family}_total{{{}}} {}", labels(vm, "device", &device.device.to_string()), value(device))?;
        }
    }
    for (family, help, value) in DEVICE_TIMES {
        let times = devices().map(|(vm, device)| (labels(vm, "device", &device.device.to_string()), value(device)));
        write_seconds(to, family, help, times)?;
    }
    for (family, help, value) in CGROUP_METRICS {
        let groups = all.iter().filter_map(|(vm, s)| Some((vm, s.cgroup?)));
        let times = groups.map(|(vm, group)| (format!("vm=\"{}\"", escaped(vm)), value(&group)));
        write_seconds(to, family, help, times)?;
    }
    to.write_str("# EOF\n")
}

/// A family of times: the labels of each, and it.
fn write_seconds(
    to: &mut String,
    family: &str,
    help: &str,
    times: impl Iterator<Item = (String, Duration)>,
) -> fmt::Result {
    writeln!(to, "# TYPE {family} counter\n# UNIT {family} seconds\n# HELP {family} {help}")?;
    for (labels, time) in times {
        writeln!(to, "{family}_total{{{labels}}} {}.{:09}", time.as_secs(), time.subsec_nanos())?;
    }
    Ok(())
}

/// A label's value (OpenMetrics 1.0, "Escaping").
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_has_each_family_once_with_all_its_samples() {
        let device = DeviceStats {
            device: DeviceId::Disk(0),
            kicks: 1,
            requests: 2,
            bytes_from_guest: 3,
            bytes_to_guest: 4,
            interrupts: 5,
            driver_errors: 6,
            io_errors: 7,
            throttled: 8,
            throttled_time: Duration::from_millis(1250),
            engine: None,
            dropped: 0,
        };
        let vcpu = VcpuStats { cpu_time: Duration::from_millis(1500), mmio_exits: 7, ..VcpuStats::default() };
        let cgroup = CgroupStats { throttled_time: Duration::from_millis(250), ..CgroupStats::default() };
        let stats = Stats { vcpus: vec![vcpu; 2], devices: vec![device], cgroup: Some(cgroup) };
        let text = Stats::openmetrics([("a", &stats), ("quo\"te}", &stats)]);
        for line in [
            "cofferdam_vcpu_cpu_seconds_total{vm=\"a\",vcpu=\"1\"} 1.500000000",
            "cofferdam_vcpu_exits_total{vm=\"a\",vcpu=\"0\",reason=\"mmio\"} 7",
            "cofferdam_vcpu_exits_total{vm=\"quo\\\"te}\",vcpu=\"0\",reason=\"mmio\"} 7",
            "cofferdam_cgroup_throttled_seconds_total{vm=\"a\"} 0.250000000",
            "cofferdam_device_throttled_seconds_total{vm=\"a\",device=\"disk0\"} 1.250000000",
            "# UNIT cofferdam_device_to_guest_bytes bytes",
            "cofferdam_device_to_guest_bytes_total{vm=\"quo\\\"te}\",device=\"disk0\"} 4",
        ] {
            assert_eq!(text.lines().filter(|l| *l == line).count(), 1, "{line}\n{text}");
        }
        assert_eq!(text.matches("# TYPE ").count(), 13);
        assert!(text.ends_with("# EOF\n") && !text.contains("\n\n"));
    }
}
