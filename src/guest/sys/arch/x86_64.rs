//! x86_64: system calls, start code, memory functions, and the ports by which a machine ends.

use core::arch::asm;

use super::super::{O_WRONLY, Result, open, syscall};

/// System call numbers (Linux, arch/x86/entry/syscalls/syscall_64.tbl).
pub(in super::super) mod nr {
    pub(in super::super::super) const READ: usize = 0;
    pub(in super::super::super) const WRITE: usize = 1;
    pub(in super::super::super) const CLOSE: usize = 3;
    pub(in super::super::super) const LSEEK: usize = 8;
    #[cfg(guest_bin)]
    pub(in super::super::super) const MMAP: usize = 9;
    #[cfg(guest_bin)]
    pub(in super::super::super) const MUNMAP: usize = 11;
    pub(in super::super::super) const RT_SIGPROCMASK: usize = 14;
    pub(in super::super::super) const IOCTL: usize = 16;
    pub(in super::super::super) const PREAD64: usize = 17;
    pub(super) const PWRITE64: usize = 18;
    pub(in super::super::super) const NANOSLEEP: usize = 35;
    pub(in super::super::super) const GETPID: usize = 39;
    pub(in super::super::super) const SOCKET: usize = 41;
    pub(in super::super::super) const CONNECT: usize = 42;
    pub(in super::super::super) const SHUTDOWN: usize = 48;
    pub(in super::super::super) const BIND: usize = 49;
    pub(in super::super::super) const LISTEN: usize = 50;
    pub(in super::super::super) const SETSOCKOPT: usize = 54;
    pub(in super::super::super) const GETSOCKOPT: usize = 55;
    pub(in super::super::super) const EXECVE: usize = 59;
    pub(in super::super::super) const WAIT4: usize = 61;
    pub(in super::super::super) const KILL: usize = 62;
    pub(in super::super::super) const UNAME: usize = 63;
    pub(in super::super::super) const FCNTL: usize = 72;
    pub(in super::super::super) const FTRUNCATE: usize = 77;
    pub(in super::super::super) const CHDIR: usize = 80;
    pub(in super::super::super) const FCHDIR: usize = 81;
    pub(in super::super::super) const FCHMOD: usize = 91;
    pub(in super::super::super) const FCHOWN: usize = 93;
    pub(in super::super::super) const UMASK: usize = 95;
    pub(in super::super::super) const SETUID: usize = 105;
    pub(in super::super::super) const SETGID: usize = 106;
    pub(in super::super::super) const SETSID: usize = 112;
    pub(in super::super::super) const SETGROUPS: usize = 116;
    pub(in super::super::super) const GETUID: usize = 102;
    pub(in super::super::super) const GETEUID: usize = 107;
    pub(in super::super::super) const GETGID: usize = 104;
    pub(in super::super::super) const GETEGID: usize = 108;
    pub(in super::super::super) const GETGROUPS: usize = 115;
    pub(in super::super::super) const RT_SIGTIMEDWAIT: usize = 128;
    pub(in super::super::super) const FSTATFS: usize = 138;
    pub(in super::super::super) const PRCTL: usize = 157;
    pub(in super::super::super) const CHROOT: usize = 161;
    pub(in super::super::super) const SYNC: usize = 162;
    pub(in super::super::super) const MOUNT: usize = 165;
    pub(in super::super::super) const UMOUNT2: usize = 166;
    pub(in super::super::super) const REBOOT: usize = 169;
    pub(in super::super::super) const SETHOSTNAME: usize = 170;
    pub(super) const IOPERM: usize = 173;
    pub(in super::super::super) const INIT_MODULE: usize = 175;
    pub(in super::super::super) const GETDENTS64: usize = 217;
    pub(in super::super::super) const CLOCK_GETTIME: usize = 228;
    pub(in super::super::super) const EXIT_GROUP: usize = 231;
    pub(in super::super::super) const EPOLL_CTL: usize = 233;
    pub(in super::super::super) const OPENAT: usize = 257;
    pub(in super::super::super) const MKDIRAT: usize = 258;
    pub(in super::super::super) const FCHOWNAT: usize = 260;
    pub(in super::super::super) const UNLINKAT: usize = 263;
    pub(in super::super::super) const RENAMEAT: usize = 264;
    pub(in super::super::super) const SYMLINKAT: usize = 266;
    pub(in super::super::super) const READLINKAT: usize = 267;
    pub(in super::super::super) const PPOLL: usize = 271;
    pub(in super::super::super) const UNSHARE: usize = 272;
    pub(in super::super::super) const SPLICE: usize = 275;
    pub(in super::super::super) const UTIMENSAT: usize = 280;
    pub(in super::super::super) const EPOLL_PWAIT: usize = 281;
    pub(in super::super::super) const ACCEPT4: usize = 288;
    pub(in super::super::super) const SIGNALFD4: usize = 289;
    pub(in super::super::super) const EPOLL_CREATE1: usize = 291;
    pub(in super::super::super) const DUP3: usize = 292;
    pub(in super::super::super) const PIPE2: usize = 293;
    pub(in super::super::super) const PRLIMIT64: usize = 302;
    pub(in super::super::super) const FINIT_MODULE: usize = 313;
    pub(in super::super::super) const SECCOMP: usize = 317;
    pub(in super::super::super) const STATX: usize = 332;
    pub(in super::super::super) const CLONE3: usize = 435;
    pub(in super::super::super) const CLOSE_RANGE: usize = 436;
    pub(in super::super::super) const OPENAT2: usize = 437;
}

pub(in super::super::super) const O_DIRECTORY: usize = 0o200_000;
pub(in super::super::super) const O_NOFOLLOW: usize = 0o400_000;

/// The port to which the shim writes how the machine shall end. It is one byte wide, and the VMM stops the VM there.
const EXIT_PORT: u16 = 0x600;
/// The first serial port, which takes what is to be printed.
const SERIAL_PORT: u16 = 0x3f8;

/// struct epoll_event (Linux, include/uapi/linux/eventpoll.h), which has no padding here.
#[derive(Clone, Copy)]
#[repr(C, packed)]
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
    // SAFETY: system calls clobber rcx, r11 and rax only; what the kernel does with the arguments is the caller's promise.
    unsafe {
        asm!("syscall", inlateout("rax") n => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Writes one byte to an I/O port. Fails where the process may not, as for any but root.
fn write_port(port: u16, value: u8) -> Result<()> {
    // SAFETY: ioperm takes plain numbers.
    unsafe { syscall(nr::IOPERM, [usize::from(port), 1, 1, 0, 0, 0]) }?;
    // SAFETY: `out` touches no memory of this process, and the permission for this port was just given.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    Ok(())
}

/// Prints without the kernel, on the serial port.
pub(in super::super::super) fn print(line: &[u8]) {
    for byte in line {
        let _ = write_port(SERIAL_PORT, *byte);
    }
}

/// Asks the VMM to end the machine. Returns where it does not.
pub(in super::super::super) fn end_machine(value: u8) {
    // A machine without ACPI has no way of its own to switch off, so the VMM offers one. Kernels are built with either way to it, or none.
    let _ = write_port(EXIT_PORT, value);
    if let Ok(ports) = open(None, c"/dev/port", O_WRONLY) {
        let (byte, offset) = ([value], usize::from(EXIT_PORT));
        // SAFETY: the kernel reads one byte of the array.
        let _ = unsafe { syscall(nr::PWRITE64, [ports.arg(), byte.as_ptr() as usize, 1, offset, 0, 0]) };
    }
}

// The kernel enters with the stack pointer at argc (System V ABI x86-64, 3.4.1); nothing there is wanted. A call leaves the stack as a
// Rust function expects it.
#[cfg(guest_bin)]
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {run}",
    "ud2",
    run = sym super::super::super::runtime::start,
);

// The string instructions are the fastest there is in few bytes, and being assembly these cannot be compiled into calls of themselves.
#[cfg(guest_bin)]
core::arch::global_asm!(
    ".globl memcpy",
    ".globl memmove",
    ".globl memset",
    ".globl memcmp",
    ".globl bcmp",
    ".globl strlen",
    // (rdi: to, rsi: from, rdx: count)
    "memcpy:",
    "mov rax, rdi",
    "2:",
    "mov rcx, rdx",
    "shr rcx, 3",
    "rep movsq",
    "mov ecx, edx",
    "and ecx, 7",
    "rep movsb",
    "ret",
    "memmove:",
    "mov rax, rdi",
    "mov rcx, rdi",
    "sub rcx, rsi",
    // Only where the target begins inside the source must the copy run backwards.
    "cmp rcx, rdx",
    "jae 2b",
    "mov rcx, rdx",
    "lea rdi, [rdi + rdx - 1]",
    "lea rsi, [rsi + rdx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    "memset:",
    "mov r8, rdi",
    "movzx eax, sil",
    "mov rcx, 0x0101010101010101",
    "imul rax, rcx",
    "mov rcx, rdx",
    "shr rcx, 3",
    "rep stosq",
    "mov ecx, edx",
    "and ecx, 7",
    "rep stosb",
    "mov rax, r8",
    "ret",
    "memcmp:",
    "bcmp:",
    "xor eax, eax",
    "mov rcx, rdx",
    "test rcx, rcx",
    "jz 3f",
    "repe cmpsb",
    "je 3f",
    "movzx eax, byte ptr [rdi - 1]",
    "movzx ecx, byte ptr [rsi - 1]",
    "sub eax, ecx",
    // memcmp(a, b) is the sign of a - b, and rdi was a.
    "3:",
    "ret",
    "strlen:",
    "mov rax, rdi",
    "4:",
    "cmp byte ptr [rax], 0",
    "je 5f",
    "inc rax",
    "jmp 4b",
    "5:",
    "sub rax, rdi",
    "ret",
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_guest_agree_on_ports() {
        assert_eq!(crate::arch::layout::EXIT_PORT, u64::from(EXIT_PORT));
        assert_eq!(crate::arch::layout::SERIAL_PORT, u64::from(SERIAL_PORT));
    }
}
