//! What programs may do and use in a container.

use std::time::Duration;

use cofferdam::process::{ExitStatus, ProcessLimits, Resource};
use cofferdam::{ErrorKind, Exec, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, debian_container};
use crate::{check, check_eq};

fn text(exec: Exec) -> cofferdam::Result<String> {
    let output = exec.timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim_end().to_owned())
}

pub fn groups_are_added_to_those_of_the_user() -> Outcome {
    let container = debian_container().start()?;
    let id = |user: Option<&str>, groups: &[&str]| {
        let exec = container.exec(["id", "-G"]).add_groups(groups.iter().copied());
        text(user.map_or(exec.clone(), |user| exec.user(user)))
    };
    check_eq!(id(None, &["adm", "4242"])?, "0 4 4242");
    check_eq!(id(Some("daemon"), &["www-data"])?, "1 33");
    check_eq!(id(Some("77:88"), &["5"])?, "88 5");
    let error = container.exec(["id"]).add_groups(["nonesuch"]).spawn().map(drop).expect_err("no such group");
    check!(error.kind() == ErrorKind::NotFound && error.to_string().contains("/etc/group"), "{error}");
    Ok(())
}

pub fn cgroup_limits_hold_for_a_program_and_its_children() -> Outcome {
    let container = debian_container().memory(Size::mib(512)).start()?;
    // Memory: the kernel kills the program, and another goes on.
    let limits = ProcessLimits::new().memory(Size::mib(32));
    let hungry = ["perl", "-e", "my $x = 'x' x (200 << 20); print length $x"];
    check_eq!(container.exec(hungry).limits(limits).timeout(TEST_TIMEOUT).status()?, ExitStatus::OomKilled);
    check_eq!(text(container.exec(hungry))?, (200 << 20).to_string());
    // Processes: a shell and two more.
    let forks = "for n in 1 2 3 4 5; do sleep 3 & done 2>&1; wait";
    let limits = ProcessLimits::new().processes(3);
    check!(text(container.exec(["bash", "-c", forks]).limits(limits))?.contains("fork"));
    check_eq!(text(container.exec(["bash", "-c", forks]))?, "");
    // Processor time, and the share of it, as the kernel has them.
    let own = "cd /sys/fs/cgroup$(sed s/0::// /proc/self/cgroup) && cat cpu.max cpu.weight pids.max memory.max";
    let limits = ProcessLimits::new().cpus(0.25).weight(50).processes(9).memory(Size::mib(64));
    check_eq!(text(container.exec(["bash", "-c", own]).limits(limits))?, "25000 100000\n50\n9\n67108864");
    // A tenth of a processor for two seconds.
    let burn = "use Time::HiRes 'time'; my $end = time + 2; 1 while time < $end; open my $f, '<', '/proc/self/cgroup'; \
        my $group = <$f> =~ s/^0::|\\n//gr; exec 'cat', qq(/sys/fs/cgroup$group/cpu.stat)";
    let used = text(container.exec(["perl", "-e", burn]).limits(ProcessLimits::new().cpus(0.1)))?;
    let number = |name: &str| used.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let (throttled, usage) = (number("throttled_usec").ok_or("no time")?, number("usage_usec").ok_or("no time")?);
    check!(usage > 0 && throttled > 4 * usage, "{used}");
    for wrong in
        [ProcessLimits::new().cpus(0.0), ProcessLimits::new().weight(0), ProcessLimits::new().memory(Size::kib(1))]
    {
        check_eq!(
            container.exec(["true"]).limits(wrong).spawn().map(drop).map_err(|e| e.kind()),
            Err(ErrorKind::InvalidConfig)
        );
    }
    Ok(())
}

pub fn resource_limits_are_inherited_by_children() -> Outcome {
    let container = debian_container().start()?;
    let exec = container.exec(["bash", "-c", "ulimit -Sn; ulimit -Hn; bash -c 'ulimit -Hn; ulimit -f'; ulimit -c"]);
    let exec = exec
        .rlimit(Resource::OpenFiles, 64, 128)
        .rlimit(Resource::FileSize, 1 << 20, 1 << 20)
        .rlimit(Resource::Core, Resource::UNLIMITED, Resource::UNLIMITED)
        .user("daemon");
    check_eq!(text(exec)?, "64\n128\n128\n1024\nunlimited");
    check_eq!(text(container.exec(["bash", "-c", "ulimit -Sn; ulimit -Hn"]))?, "1024\n524288");
    // Of the limit of a file's size.
    let write = container.exec(["dd", "if=/dev/zero", "of=/tmp/big", "bs=1M", "count=3"]);
    let status = write.rlimit(Resource::FileSize, 1 << 20, 1 << 20).timeout(Duration::from_secs(60)).status()?;
    check_eq!(status.signal(), Some(25));
    let error = container.exec(["true"]).rlimit(Resource::Core, 2, 1).spawn().map(drop).expect_err("soft above hard");
    check_eq!(error.kind(), ErrorKind::InvalidConfig);
    Ok(())
}

pub fn capabilities_and_new_privileges_are_taken_away() -> Outcome {
    let container = debian_container().start()?;
    let status = "grep -E '^(CapBnd|CapEff|NoNewPrivs)' /proc/self/status | tr -d '\\t' | tr '\\n' ' '";
    let seen = |exec: Exec| text(exec.arg(status));
    let shell = || container.exec(["sh", "-c"]);
    check_eq!(
        seen(shell().capabilities(["CAP_CHOWN", "net_raw"]))?,
        "CapEff:0000000000002001 CapBnd:0000000000002001 NoNewPrivs:0"
    );
    check_eq!(seen(shell().capabilities::<&str>([]))?, "CapEff:0000000000000000 CapBnd:0000000000000000 NoNewPrivs:0");
    check_eq!(seen(shell().hardened())?, "CapEff:00000000a80425fb CapBnd:00000000a80425fb NoNewPrivs:1");
    check_eq!(
        seen(shell().no_new_privs(true).user("daemon").capabilities(["KILL"]))?,
        "CapEff:0000000000000000 CapBnd:0000000000000020 NoNewPrivs:1"
    );
    // A set-user-ID program of root's, run by another user.
    check!(container.exec(["install", "-m", "4755", "/usr/bin/id", "/usr/local/bin/su-id"]).status()?.success());
    let id = || container.exec(["su-id", "-u"]).user("daemon");
    check_eq!(
        (text(id())?, text(id().no_new_privs(true))?, text(id().hardened())?),
        ("0".into(), "1".into(), "1".into())
    );
    // Root cannot undo it by the files of the kernel, and can where it is not hardened.
    let undo = "group=/sys/fs/cgroup$(sed s/0::// /proc/self/cgroup); for try in \
        \"echo max > $group/memory.max\" 'echo $$ > /sys/fs/cgroup/cgroup.procs' 'mkdir /sys/fs/cgroup/cofferdam/999' \
        'echo x > /proc/sys/kernel/hostname' 'echo h > /proc/sysrq-trigger' 'mount -o remount,rw /sys' 'umount /proc/sys'; do \
        sh -c \"$try\" 2>/dev/null && echo \"$try\"; done; true";
    let limits = ProcessLimits::new().memory(Size::mib(64));
    check_eq!(text(container.exec(["bash", "-c", undo]).hardened().limits(limits))?, "");
    check!(text(container.exec(["bash", "-c", undo]).limits(limits))?.contains("echo max"));
    // A bomb that is hardened leaves room for another program.
    let bomb = container.exec(["bash", "-c", "f() { f | f & }; f; sleep 1000"]).hardened().spawn()?;
    std::thread::sleep(Duration::from_secs(2));
    check!(container.exec(["true"]).timeout(TEST_TIMEOUT).status()?.success());
    bomb.kill()?;
    // What the powers are for fails without them, and works with them.
    let mount = || container.exec(["mount", "-t", "tmpfs", "none", "/mnt"]);
    check!(!mount().hardened().status()?.success());
    check!(mount().status()?.success());
    let error = container.exec(["true"]).capabilities(["CAP_FLY"]).spawn().map(drop).expect_err("no capability");
    check!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("CAP_FLY"), "{error}");
    Ok(())
}
