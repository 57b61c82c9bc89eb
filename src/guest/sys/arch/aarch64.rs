//! aarch64: system calls, start code, memory functions, and how a machine ends.

use core::arch::asm;

use super::super::reboot;
use crate::proto::{EXIT_HALT, EXIT_POWER_OFF, EXIT_REBOOT};

/// System call numbers (Linux, include/uapi/asm-generic/unistd.h).
pub(in super::super) mod nr {
    pub(in super::super::super) const EPOLL_CREATE1: usize = 20;
    pub(in super::super::super) const EPOLL_CTL: usize = 21;
    pub(in super::super::super) const EPOLL_PWAIT: usize = 22;
    pub(in super::super::super) const DUP3: usize = 24;
    pub(in super::super::super) const FCNTL: usize = 25;
    pub(in super::super::super) const IOCTL: usize = 29;
    pub(in super::super::super) const MKDIRAT: usize = 34;
    pub(in super::super::super) const UNLINKAT: usize = 35;
    pub(in super::super::super) const SYMLINKAT: usize = 36;
    pub(in super::super::super) const RENAMEAT: usize = 38;
    pub(in super::super::super) const UMOUNT2: usize = 39;
    pub(in super::super::super) const MOUNT: usize = 40;
    pub(in super::super::super) const FTRUNCATE: usize = 46;
    pub(in super::super::super) const CHDIR: usize = 49;
    pub(in super::super::super) const FCHDIR: usize = 50;
    pub(in super::super::super) const CHROOT: usize = 51;
    pub(in super::super::super) const FCHMOD: usize = 52;
    pub(in super::super::super) const FCHOWNAT: usize = 54;
    pub(in super::super::super) const FCHOWN: usize = 55;
    pub(in super::super::super) const OPENAT: usize = 56;
    pub(in super::super::super) const CLOSE: usize = 57;
    pub(in super::super::super) const PIPE2: usize = 59;
    pub(in super::super::super) const GETDENTS64: usize = 61;
    pub(in super::super::super) const LSEEK: usize = 62;
    pub(in super::super::super) const READ: usize = 63;
    pub(in super::super::super) const WRITE: usize = 64;
    pub(in super::super::super) const PREAD64: usize = 67;
    pub(in super::super::super) const PPOLL: usize = 73;
    pub(in super::super::super) const SIGNALFD4: usize = 74;
    pub(in super::super::super) const SPLICE: usize = 76;
    pub(in super::super::super) const READLINKAT: usize = 78;
    pub(in super::super::super) const SYNC: usize = 81;
    pub(in super::super::super) const UTIMENSAT: usize = 88;
    pub(in super::super::super) const EXIT_GROUP: usize = 94;
    pub(in super::super::super) const UNSHARE: usize = 97;
    pub(in super::super::super) const NANOSLEEP: usize = 101;
    pub(in super::super::super) const INIT_MODULE: usize = 105;
    pub(in super::super::super) const CLOCK_GETTIME: usize = 113;
    pub(in super::super::super) const KILL: usize = 129;
    pub(in super::super::super) const RT_SIGPROCMASK: usize = 135;
    pub(in super::super::super) const RT_SIGTIMEDWAIT: usize = 137;
    pub(in super::super::super) const REBOOT: usize = 142;
    pub(in super::super::super) const SETGID: usize = 144;
    pub(in super::super::super) const SETUID: usize = 146;
    pub(in super::super::super) const SETSID: usize = 157;
    pub(in super::super::super) const SETGROUPS: usize = 159;
    pub(in super::super::super) const GETUID: usize = 174;
    pub(in super::super::super) const GETEUID: usize = 175;
    pub(in super::super::super) const GETGID: usize = 176;
    pub(in super::super::super) const GETEGID: usize = 177;
    pub(in super::super::super) const GETGROUPS: usize = 158;
    pub(in super::super::super) const SETHOSTNAME: usize = 161;
    pub(in super::super::super) const UMASK: usize = 166;
    pub(in super::super::super) const GETPID: usize = 172;
    pub(in super::super::super) const SOCKET: usize = 198;
    pub(in super::super::super) const BIND: usize = 200;
    pub(in super::super::super) const LISTEN: usize = 201;
    pub(in super::super::super) const CONNECT: usize = 203;
    pub(in super::super::super) const SETSOCKOPT: usize = 208;
    pub(in super::super::super) const GETSOCKOPT: usize = 209;
    pub(in super::super::super) const SHUTDOWN: usize = 210;
    #[cfg(guest_bin)]
    pub(in super::super::super) const MUNMAP: usize = 215;
    pub(in super::super::super) const EXECVE: usize = 221;
    #[cfg(guest_bin)]
    pub(in super::super::super) const MMAP: usize = 222;
    pub(in super::super::super) const ACCEPT4: usize = 242;
    pub(in super::super::super) const WAIT4: usize = 260;
    pub(in super::super::super) const FSTATFS: usize = 44;
    pub(in super::super::super) const UNAME: usize = 160;
    pub(in super::super::super) const PRCTL: usize = 167;
    pub(in super::super::super) const PRLIMIT64: usize = 261;
    pub(in super::super::super) const FINIT_MODULE: usize = 273;
    pub(in super::super::super) const SECCOMP: usize = 277;
    pub(in super::super::super) const STATX: usize = 291;
    pub(in super::super::super) const CLONE3: usize = 435;
    pub(in super::super::super) const CLOSE_RANGE: usize = 436;
    pub(in super::super::super) const OPENAT2: usize = 437;
}

/// Both are other bits than those of most processors (Linux, arch/arm64/include/uapi/asm/fcntl.h).
pub(in super::super::super) const O_DIRECTORY: usize = 0o40_000;
pub(in super::super::super) const O_NOFOLLOW: usize = 0o100_000;

/// struct epoll_event (Linux, include/uapi/linux/eventpoll.h).
#[derive(Clone, Copy)]
#[repr(C)]
pub(in super::super) struct EpollEvent {
    pub(in super::super) events: u32,
    pub(in super::super) token: u64,
}

/// Returns what the kernel returns: a result, or a negative error number.
///
/// # Safety
///
/// The arguments are what the system call `n` takes: pointers are valid for what the kernel reads and writes through them.
pub(in super::super) unsafe fn system_call(n: usize, args: [usize; 6]) -> usize {
    let result: usize;
    let [a, b, c, d, e, f] = args;
    // SAFETY: system calls change x0 only; what the kernel does with the arguments is the caller's promise.
    unsafe {
        asm!("svc 0", in("x8") n, inlateout("x0") a => result, in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
             options(nostack));
    }
    result
}

/// Prints without the kernel: not here, as there is nothing at an address that is known to all machines.
pub(in super::super::super) fn print(_: &[u8]) {}

/// Asks the machine's firmware to end it, through the kernel (PSCI 1.1, SYSTEM_OFF and SYSTEM_RESET). Returns where it does not.
pub(in super::super::super) fn end_machine(value: u8) {
    const RB_POWER_OFF: usize = 0x4321_fedc;
    const RB_RESTART: usize = 0x0123_4567;
    let command = match value {
        EXIT_POWER_OFF | EXIT_HALT => RB_POWER_OFF,
        EXIT_REBOOT => RB_RESTART,
        // The panic that follows tells more than a reset.
        _ => return,
    };
    let _ = reboot(command);
}

// The kernel enters with the stack pointer at argc, aligned to 16 bytes; nothing there is wanted. There is no frame and no caller
// before this (Procedure Call Standard for the Arm 64-bit Architecture, 6.4).
#[cfg(guest_bin)]
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, xzr",
    "mov x30, xzr",
    "bl {run}",
    "brk #1",
    run = sym super::super::super::runtime::start,
);

// Being assembly, these cannot be compiled into calls of themselves.
#[cfg(guest_bin)]
core::arch::global_asm!(
    ".globl memcpy",
    ".globl memmove",
    ".globl memset",
    ".globl memcmp",
    ".globl bcmp",
    ".globl strlen",
    // (x0: to, x1: from, x2: count); x0 stays what it is.
    "memmove:",
    // Only where the target begins inside the source must the copy run backwards.
    "sub x3, x0, x1",
    "cmp x3, x2",
    "b.lo 4f",
    "memcpy:",
    "mov x3, x0",
    "2:",
    "subs x2, x2, #8",
    "b.lo 3f",
    "ldr x4, [x1], #8",
    "str x4, [x3], #8",
    "b 2b",
    "3:",
    "adds x2, x2, #8",
    "b.eq 6f",
    "5:",
    "ldrb w4, [x1], #1",
    "strb w4, [x3], #1",
    "subs x2, x2, #1",
    "b.ne 5b",
    "6:",
    "ret",
    "4:",
    // There is at least one byte, as the distance is less than the count.
    "subs x2, x2, #1",
    "ldrb w4, [x1, x2]",
    "strb w4, [x0, x2]",
    "b.ne 4b",
    "ret",
    // (x0: to, w1: byte, x2: count)
    "memset:",
    "mov x3, x0",
    "and x1, x1, #0xff",
    "mov x4, #0x0101010101010101",
    "mul x1, x1, x4",
    "2:",
    "subs x2, x2, #8",
    "b.lo 3f",
    "str x1, [x3], #8",
    "b 2b",
    "3:",
    "adds x2, x2, #8",
    "b.eq 5f",
    "4:",
    "strb w1, [x3], #1",
    "subs x2, x2, #1",
    "b.ne 4b",
    "5:",
    "ret",
    // (x0, x1: what is compared, x2: count)
    "memcmp:",
    "bcmp:",
    "2:",
    "cbz x2, 3f",
    "ldrb w3, [x0], #1",
    "ldrb w4, [x1], #1",
    "sub x2, x2, #1",
    "cmp w3, w4",
    "b.eq 2b",
    "sub w0, w3, w4",
    "ret",
    "3:",
    "mov w0, wzr",
    "ret",
    "strlen:",
    "mov x1, x0",
    "2:",
    "ldrb w2, [x1], #1",
    "cbnz w2, 2b",
    "sub x0, x1, x0",
    "sub x0, x0, #1",
    "ret",
);
