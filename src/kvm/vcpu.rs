//! One vCPU: runs until it needs the host.
//!
//! Other threads can take it out of the guest.

use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;

use super::{ArchExit, failed};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{ForkGuard, ProcessGeneration, keep_private};

/// Why `KVM_RUN` came back. The slices are KVM's own buffer: the answer to a read is what the guest will see.
#[derive(Debug)]
pub(crate) enum VcpuExit<'a> {
    /// The guest reads memory that nothing backs.
    MmioRead { addr: u64, data: &'a mut [u8] },
    /// The guest writes memory that nothing backs.
    MmioWrite { addr: u64, data: &'a [u8] },
    /// What only some processors have.
    Arch(ArchExit<'a>),
    /// KVM_EXIT_SYSTEM_EVENT and its type.
    SystemEvent(u32),
    /// A signal, or a kick.
    Interrupted,
    /// The processor refused to enter the guest, for this hardware reason.
    EntryFailed(u64),
    /// KVM cannot go on: its sub-error and what it says of it (KVM API, 5, KVM_EXIT_INTERNAL_ERROR).
    InternalError { suberror: u32, data: Vec<u64> },
    /// Anything else, by KVM's number.
    Unknown(u32),
}

/// The `kvm_run` page, mapped once more, so that other threads may set its `immediate_exit` at any time.
pub(in crate::kvm) struct RunPage {
    run: NonNull<kvm_run>,
    len: usize,
    /// Where it is mapped.
    origin: ProcessGeneration,
}

// SAFETY: the mapping belongs to this value alone and is unmapped with it. Fields are read by the vCPU's thread only,
// through raw pointers; the one byte that other threads write is accessed as an atomic everywhere here.
unsafe impl Send for RunPage {}
// SAFETY: see above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(vcpu: &kvm_ioctls::VcpuFd, len: usize) -> Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(Error::new(ErrorKind::Unsupported, format!("KVM's run structure has only {len} bytes")));
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of the vCPU's descriptor at an address of the kernel's choice (KVM API, 4.5).
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        match NonNull::new(at.cast()) {
            Some(run) if at != libc::MAP_FAILED => {
                keep_private(at, len);
                Ok(Self { run, len, origin: ProcessGeneration::current() })
            }
            _ => Err(Error::last_os().doing("mapping a vCPU's run page")),
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped as long as `self`. The field is one byte, which the kernel reads and this process
        // accesses only through this atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }

    /// Where the page is mapped, as long as `self`.
    pub(in crate::kvm) fn as_ptr(&self) -> *const kvm_run {
        self.run.as_ptr()
    }

    fn exit_reason(&self) -> u32 {
        // SAFETY: `self` keeps the page mapped; the field is a plain integer.
        unsafe { (&raw const (*self.run.as_ptr()).exit_reason).read_volatile() }
    }

    fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: `self` keeps the page mapped. After KVM_EXIT_INTERNAL_ERROR the kernel has written the `internal`
        // member, which is plain integers.
        let internal = unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1.internal).read_volatile() };
        (internal.suberror, internal.data.iter().take(internal.ndata as usize).copied().collect())
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // A child of fork has no such mapping, and may have another one there.
        if self.origin.is_current() {
            // SAFETY: `map` made the mapping in this process, with this length, and it cannot be reached after this.
            unsafe { libc::munmap(self.run.as_ptr().cast(), self.len) };
        }
    }
}

/// Makes a vCPU leave the guest at its next chance, or not enter at all. Outliving the vCPU is harmless.
#[derive(Clone)]
pub(crate) struct Kicker(Arc<RunPage>);

impl Kicker {
    /// From now on `run` returns [`VcpuExit::Interrupted`] at once. A signal is needed beside this
    /// to get a vCPU out that is in the guest already; in this order nothing is lost in between.
    pub(crate) fn request_exit(&self) {
        // A child of fork has no such page.
        if self.0.origin.is_current() {
            self.0.immediate_exit().store(1, Ordering::SeqCst);
        }
    }
}

impl Kicker {
    /// Bytes of the page by which the vCPU's thread and KVM speak, and those beside it.
    pub(crate) fn held(&self) -> usize {
        self.0.len
    }
}

impl fmt::Debug for Kicker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kicker")
    }
}

/// One vCPU, owned by the thread that runs it.
pub(crate) struct VcpuFd {
    _guard: ForkGuard,
    pub(super) fd: kvm_ioctls::VcpuFd,
    page: Arc<RunPage>,
}

impl VcpuFd {
    pub(super) fn new(fd: kvm_ioctls::VcpuFd, run_size: usize) -> Result<Self> {
        let page = Arc::new(RunPage::map(&fd, run_size)?);
        Ok(Self { _guard: ForkGuard::new(&fd), fd, page })
    }

    pub(crate) fn kicker(&self) -> Kicker {
        Kicker(self.page.clone())
    }

    /// As [`Kicker::request_exit`], by the vCPU's own thread: `run` finishes what the last exit began, and no more.
    pub(crate) fn request_exit(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// The kick was seen: `run` enters the guest again.
    pub(crate) fn clear_exit_request(&self) {
        self.page.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Runs the guest until it needs something.
    ///
    /// # Errors
    /// What `KVM_RUN` fails with, but EINTR and EAGAIN, which are [`VcpuExit::Interrupted`].
    pub(crate) fn run(&mut self) -> Result<VcpuExit<'_>> {
        use kvm_ioctls::VcpuExit as Exit;
        Ok(match self.fd.run() {
            Ok(Exit::MmioRead(addr, data)) => VcpuExit::MmioRead { addr, data },
            Ok(Exit::MmioWrite(addr, data)) => VcpuExit::MmioWrite { addr, data },
            Ok(Exit::SystemEvent(kind, _)) => VcpuExit::SystemEvent(kind),
            Ok(Exit::Intr) => VcpuExit::Interrupted,
            Ok(Exit::FailEntry(reason, _)) => VcpuExit::EntryFailed(reason),
            Ok(Exit::InternalError) => {
                let (suberror, data) = self.page.internal_error();
                VcpuExit::InternalError { suberror, data }
            }
            Ok(exit) => match ArchExit::new(exit, &self.page) {
                Some(exit) => VcpuExit::Arch(exit),
                None => VcpuExit::Unknown(self.page.exit_reason()),
            },
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => VcpuExit::Interrupted,
            Err(e) => return Err(failed(e)).doing(|| "running a vCPU"),
        })
    }
}

impl fmt::Debug for VcpuFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VcpuFd({})", self.fd.as_raw_fd())
    }
}
