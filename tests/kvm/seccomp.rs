//! Programs whose system calls are filtered.

use cofferdam::process::SeccompProfile;
use cofferdam::{Container, ErrorKind, Exec};

use crate::fixture::{Outcome, TEST_TIMEOUT, debian_container};
use crate::{check, check_eq};

/// The number of SIGSYS (signal(7)).
const SIGSYS: i32 = 31;

/// What a program prints, with its errors.
fn text(exec: Exec) -> cofferdam::Result<String> {
    let output = exec.timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim_end().to_owned())
}

fn perl(container: &Container, script: &str) -> Exec {
    container.exec(["perl", "-e", script])
}

/// All calls are allowed but those of the rules.
fn allowing_all_but(rules: &str) -> cofferdam::Result<SeccompProfile> {
    SeccompProfile::from_json(format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{rules}]}}"#))
}

const NO_DIRECTORIES: &str = r#"{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}"#;

pub fn denied_calls_fail_in_a_program_and_its_children() -> Outcome {
    let container = debian_container().start()?;
    let profile = allowing_all_but(&format!(
        r#"{NO_DIRECTORIES}, {{"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}},
        {{"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97, "args": [{{"index": 0, "value": 1, "op": "SCMP_CMP_NE"}}]}}"#
    ))?;
    let numbers = "mkdir '/tmp/d' or print $! + 0, ' '; symlink '/', '/tmp/l' or print $! + 0, ' '; \
        for (1, 2) { socket(S, $_, 1, 0) ? print 'made ' : print $! + 0, ' ' }";
    check_eq!(text(perl(&container, numbers).seccomp(profile.clone()))?, "1 38 made 97");
    check_eq!(text(perl(&container, numbers))?, "made made");
    // What it starts cannot lift it, as root either.
    let child = container.exec(["sh", "-c", "sh -c 'mkdir /tmp/child'; grep Seccomp: /proc/self/status"]);
    let child = text(child.seccomp(profile.clone()))?;
    check!(child.contains("Operation not permitted") && child.contains("Seccomp:\t2"), "{child}");
    // However the program may be set up: before it becomes another user, or after.
    for exec in [
        container.exec(["mkdir", "/tmp/user"]).user("daemon"),
        container.exec(["mkdir", "/tmp/user"]).user("daemon").no_new_privs(true),
        container.exec(["mkdir", "/tmp/user"]).user("daemon").hardened(),
        container.exec(["mkdir", "/tmp/user"]).hardened(),
        container.exec(["mkdir", "/tmp/user"]).capabilities(["KILL"]),
    ] {
        let refused = text(exec.clone().seccomp(profile.clone()))?;
        check!(refused.contains("Operation not permitted"), "{exec:?}: {refused}");
    }
    check_eq!(text(container.exec(["ls", "/tmp"]))?, "d\nl");
    Ok(())
}

pub fn calls_that_kill_end_the_program_by_sigsys() -> Outcome {
    let container = debian_container().start()?;
    for action in ["SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"] {
        let profile = allowing_all_but(&format!(r#"{{"name": "getppid", "action": "{action}"}}"#))?;
        let killed = perl(&container, "getppid()").seccomp(profile).timeout(TEST_TIMEOUT);
        let status = killed.status()?;
        check!(status.signal() == Some(SIGSYS), "{action}: {status:?}");
    }
    let trap = allowing_all_but(r#"{"name": "getppid", "action": "SCMP_ACT_TRAP"}"#)?;
    let handled = "$SIG{SYS} = sub { print 'handled'; exit }; getppid(); print 'on'";
    check_eq!(text(perl(&container, handled).seccomp(trap))?, "handled");
    let log = allowing_all_but(r#"{"name": "getppid", "action": "SCMP_ACT_LOG"}"#)?;
    check_eq!(text(perl(&container, "getppid(); print 'on'").seccomp(log))?, "on");
    // Another goes on.
    check_eq!(text(perl(&container, "getppid(); print 'on'"))?, "on");
    Ok(())
}

pub fn programs_that_may_not_begin_are_errors_or_killed() -> Outcome {
    let container = debian_container().start()?;
    let execve = |action| allowing_all_but(&format!(r#"{{"name": "execve", "action": "{action}"}}"#));
    let error = container.exec(["true"]).seccomp(execve("SCMP_ACT_ERRNO")?).spawn().map(drop).expect_err("no execve");
    check!(error.kind() == ErrorKind::PermissionDenied && error.to_string().contains("executing it"), "{error}");
    let killed = container.exec(["true"]).seccomp(execve("SCMP_ACT_KILL_PROCESS")?).timeout(TEST_TIMEOUT);
    check_eq!(killed.status()?.signal(), Some(SIGSYS));
    // Without root's privileges it is set before the user is.
    let setuid = allowing_all_but(r#"{"name": "setuid", "action": "SCMP_ACT_ERRNO"}"#)?;
    let user = || container.exec(["id", "-u"]).user("daemon").seccomp(setuid.clone());
    let error = user().spawn().map(drop).expect_err("no setuid");
    check!(error.kind() == ErrorKind::PermissionDenied && error.to_string().contains("becoming the user"), "{error}");
    check_eq!(text(user().no_new_privs(true))?, "1");
    // A profile that only pretends leaves the program no root.
    let faked =
        ["setuid", "setgid"].map(|name| format!(r#"{{"name": "{name}", "action": "SCMP_ACT_ERRNO", "errnoRet": 0}}"#));
    for rule in faked {
        let profile = allowing_all_but(&rule)?;
        let faked = container.exec(["id", "-u"]).user("daemon").seccomp(profile).spawn().map(drop);
        let error = faked.err().ok_or("a program has kept root's privileges")?;
        check!(
            error.kind() == ErrorKind::PermissionDenied && error.to_string().contains("becoming the user"),
            "{error}"
        );
    }
    let rules: Vec<_> = (0..1000).map(|n| format!(
        r#"{{"name": "read", "action": "SCMP_ACT_ERRNO", "args": [{{"index": 2, "value": {}, "op": "SCMP_CMP_EQ"}}]}}"#, (n << 32) + 7u64
    )).collect();
    let long = allowing_all_but(&rules.join(","))?;
    let error = container.exec(["true"]).seccomp(long).spawn().map(drop).expect_err("too long");
    check!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("4096"), "{error}");
    // One that just fits is taken.
    let nearly = allowing_all_but(&rules[..800].join(","))?;
    check_eq!(text(container.exec(["echo", "fits"]).seccomp(nearly))?, "fits");
    Ok(())
}

/// Allows what ordinary programs do, in the form of Docker's own profile.
const ORDINARY: &str = r#"{
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}
    ],
    "syscalls": [
        {"names": ["access", "brk", "chdir", "clock_gettime", "clock_nanosleep", "close", "close_range", "dup", "dup2", "dup3",
            "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "execve", "exit", "exit_group", "faccessat", "faccessat2",
            "fadvise64", "fadvise64_64", "fchown", "fcntl", "fcntl64", "fork", "fstat", "fstat64", "fstatfs", "futex", "futex_time64",
            "getcwd", "getdents", "getdents64", "getegid", "geteuid", "getgid", "getgroups", "getpgid", "getpgrp", "getpid",
            "getppid", "getrandom", "getresgid", "getresuid", "getrlimit", "getsid", "gettid", "getuid", "getxattr", "ioctl", "kill",
            "lgetxattr", "llistxattr", "lseek", "_llseek", "lstat", "madvise", "mkdir", "mkdirat", "mmap", "mmap2", "mprotect",
            "mremap", "munmap", "nanosleep", "newfstatat", "_newselect", "open", "openat", "openat2", "pipe", "pipe2", "poll",
            "ppoll", "prctl", "pread64", "prlimit64", "pselect6", "pwrite64", "read", "readlink", "readlinkat", "readv", "rename",
            "rmdir", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigreturn", "rt_sigsuspend", "sched_getaffinity",
            "sched_yield", "select", "set_robust_list", "set_tid_address", "setgid", "setgroups", "setpgid", "setuid",
            "sigaltstack", "sigreturn", "socketcall", "stat", "statfs", "statx", "sysinfo", "tgkill", "time", "times", "ugetrlimit",
            "umask", "uname", "unlink", "unlinkat", "utimensat", "vfork", "wait4", "waitid", "waitpid", "write", "writev"],
            "action": "SCMP_ACT_ALLOW"},
        {"names": ["process_vm_readv", "ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["s390_pci_mmio_read"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390", "s390x"]}},
        {"names": ["clone", "clone3", "mount", "unshare"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]},
            "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}}
    ]
}"#;

pub fn ordinary_programs_run_under_a_profile_of_dockers_form() -> Outcome {
    let container = debian_container().start()?;
    let profile = SeccompProfile::from_json(ORDINARY)?;
    let lines: [(&[&str], &str); 4] = [
        (&["sh", "-c", "echo one; echo two | cat; (exit 3) || echo $?"], "one\ntwo\n3"),
        (&["ls", "/etc/debian_version", "/bin/sh"], "/bin/sh\n/etc/debian_version"),
        (&["bash", "-c", "x=$(seq 3 | sort -r | tr '\\n' ' '); echo $x; [[ -d /usr ]] && echo yes"], "3 2 1\nyes"),
        (&["perl", "-MPOSIX", "-e", "open my $f, '-|', 'uname' or die; print <$f>; print 6 * 7"], "Linux\n42"),
    ];
    for (line, printed) in lines {
        let exec = container.exec(line.iter().copied()).seccomp(profile.clone());
        for exec in [exec.clone(), exec.clone().hardened(), exec.clone().user("daemon"), exec.user("daemon").hardened()]
        {
            check_eq!(text(exec)?, printed);
        }
    }
    // What depends on capabilities: namespaces are for those who may administer.
    let unshare = || container.exec(["unshare", "--mount", "echo", "apart"]).seccomp(profile.clone());
    check_eq!(text(unshare())?, "apart");
    let refused = text(unshare().hardened())?;
    check!(refused.contains("Operation not permitted"), "{refused}");
    // And what is allowed to none: chroot(2).
    check_eq!(text(perl(&container, "chroot '/' or print $! + 0").seccomp(profile))?, "1");
    Ok(())
}
