//! The public API: every type of the golden list is `Debug`, `Send` and `Sync`, and what can be awaited has its descriptors.
//!
//! The golden list is `tests/public-api.txt`; `.ci/api` compares it with the crate, or makes it anew.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::os::fd::{AsFd, AsRawFd};
use std::{fs, path::Path};

use cofferdam::{
    backend, cpu, disk, event, exit, files, host, image, kernel, memory, net, process, stats, tokio, vsock,
};

fn good<T: Debug + Send + Sync>() {}
fn awaitable<T: AsFd + AsRawFd>() {}
fn handle<T: Clone>() {}
fn comparable<T: PartialEq>() {}

/// Checks each type, and returns their paths.
macro_rules! types {
    ($($($part:ident)::+),* $(,)?) => {
        BTreeSet::from([$({
            good::<$($part)::+>();
            [$(stringify!($part)),+].join("::")
        }),*])
    };
}

fn all() -> BTreeSet<String> {
    use cofferdam as c;
    let root = types!(
        c::CancelToken,
        c::Cgroup,
        c::Console,
        c::Container,
        c::ContainerBuilder,
        c::Disk,
        c::Error,
        c::ErrorKind,
        c::Exec,
        c::Exit,
        c::Host,
        c::Image,
        c::Kernel,
        c::Net,
        c::Process,
        c::Rate,
        c::Size,
        c::Vm,
        c::VmBuilder,
    );
    let modules = types!(
        backend::Capabilities,
        backend::Csum,
        backend::Gso,
        backend::GsoKind,
        backend::NicConfig,
        backend::Offload,
        backend::Offloads,
        backend::Received,
        cpu::CpuProfile,
        cpu::CpuidBits,
        cpu::CpuidRegister,
        disk::BaseImage,
        disk::CacheMode,
        disk::DiskError,
        disk::DiskHandle,
        disk::DiskLimit,
        disk::DiskOperation,
        disk::DiskUsage,
        disk::ErrorAction,
        disk::ErrorClass,
        disk::FileDisk,
        disk::IoEngine,
        disk::MemoryDisk,
        disk::NamedVolume,
        disk::OpenFileDisk,
        disk::Overlay,
        disk::OverlayDisk,
        disk::OverlayInfo,
        disk::Progress,
        disk::Qcow2Disk,
        disk::ScratchDisk,
        disk::Tmpfs,
        disk::Volume,
        disk::VolumeInfo,
        disk::VolumeStore,
        disk::WritableLayer,
        event::DeviceId,
        event::Event,
        event::EventKind,
        event::Events,
        event::PauseCause,
        event::Throttled,
        exit::ExitReport,
        exit::Registers,
        exit::Stage,
        files::CopyIn,
        files::CopyOut,
        files::CopyReport,
        files::DirEntry,
        files::FileDigest,
        files::FileKind,
        files::FileMetadata,
        files::FileReader,
        files::Files,
        host::Exposure,
        host::KvmAccess,
        host::Vulnerability,
        image::CertificateIdentity,
        image::Collected,
        image::Credentials,
        image::Digest,
        image::FetchRequest,
        image::FetchResponse,
        image::Healthcheck,
        image::ImageConfig,
        image::ImageLimits,
        image::ImageStore,
        image::LayerPhase,
        image::LayerProgress,
        image::Platform,
        image::PublicKey,
        image::PulledImageInfo,
        image::Reference,
        image::Registry,
        image::SignaturePolicy,
        image::TrustRoot,
        kernel::Initramfs,
        kernel::Modules,
        memory::HugetlbMemory,
        memory::Memory,
        net::Capture,
        net::CaptureStats,
        net::Cidr,
        net::ConnectionLimit,
        net::CustomNet,
        net::Denial,
        net::DenyReason,
        net::Mac,
        net::NetHandle,
        net::NetLimit,
        net::NetStats,
        net::Policy,
        net::PortForward,
        net::Protocol,
        net::PublishedPort,
        net::Rule,
        net::SocketNet,
        net::Switch,
        net::SwitchNet,
        net::TapFilesNet,
        net::TapNet,
        net::UserNet,
        process::ExitStatus,
        process::Output,
        process::ProcessLimits,
        process::ProcessReader,
        process::ProcessWriter,
        process::Resource,
        process::SeccompProfile,
        process::Stdio,
        stats::CgroupStats,
        stats::DeviceStats,
        stats::GuestMemoryStats,
        stats::MemoryStats,
        stats::Startup,
        stats::Stats,
        stats::Timeline,
        stats::VcpuStats,
        vsock::Vsock,
        vsock::VsockListener,
        vsock::VsockStream,
    );
    // Of each handle that it takes.
    good::<tokio::Async<event::Events>>();
    good::<tokio::Async<process::ProcessReader>>();
    good::<tokio::Async<process::ProcessWriter>>();
    good::<tokio::Async<vsock::VsockListener>>();
    good::<tokio::Async<vsock::VsockStream>>();
    // They borrow the guest's memory for one call, on one thread.
    good::<backend::Frame<'_>>();
    good::<backend::RxBuffer<'_>>();
    let generic = ["backend::Frame", "backend::RxBuffer", "tokio::Async"].map(str::to_owned);
    root.into_iter().map(|path| path.replace("c::", "")).chain(modules).chain(generic).collect()
}

#[test]
fn every_public_type_is_debug_send_and_sync() {
    let golden = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/public-api.txt")).unwrap();
    let declared = |line: &str| {
        let rest = line.strip_prefix("pub ").map(|rest| rest.strip_prefix("non_exhaustive ").unwrap_or(rest))?;
        let rest = rest.strip_prefix("struct ").or_else(|| rest.strip_prefix("enum "))?;
        let path = rest.strip_prefix("cofferdam::")?;
        Some(path.chars().take_while(|c| c.is_alphanumeric() || matches!(c, ':' | '_')).collect::<String>())
    };
    let lines = golden.lines().map(|line| line.replace("#[non_exhaustive] ", ""));
    let public: BTreeSet<String> = lines.filter_map(|line| declared(&line)).collect();
    assert!(public.len() > 80, "{public:?}");
    assert_eq!(all(), public, "a type is missing here, or is no more");
}

#[test]
fn what_can_be_awaited_has_a_descriptor_of_both_kinds() {
    awaitable::<cofferdam::Vm>();
    awaitable::<cofferdam::Container>();
    awaitable::<cofferdam::CancelToken>();
    awaitable::<cofferdam::Process>();
    awaitable::<event::Events>();
    awaitable::<process::ProcessReader>();
    awaitable::<process::ProcessWriter>();
    awaitable::<vsock::VsockListener>();
    awaitable::<vsock::VsockStream>();
}

#[test]
fn handles_clone_and_ends_compare() {
    handle::<cofferdam::Vm>();
    handle::<cofferdam::Container>();
    handle::<cofferdam::Exec>();
    handle::<disk::DiskHandle>();
    handle::<net::NetHandle>();
    comparable::<cofferdam::Exit>();
    comparable::<event::Event>();
    comparable::<process::ExitStatus>();
    comparable::<process::Output>();
}
