//! What a container's builder sets for all its programs.

use std::net::{IpAddr, Ipv6Addr};

use cofferdam::disk::Tmpfs;
use cofferdam::{ErrorKind, Exec, Size};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, debian_container};
use crate::{check, check_eq};

fn text(exec: Exec) -> cofferdam::Result<String> {
    let output = exec.timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim_end().to_owned())
}

pub fn programs_have_the_environment_user_and_directory_of_the_builder() -> Outcome {
    let builder = debian_container().env("A", "1").envs([("B", "2"), ("PATH", "/usr/bin:/bin")]).user("daemon");
    let container = builder.current_dir("/srv/made/here").label("team", "one").label("team", "two").start()?;
    let seen = "echo $A$B $PATH $HOME; id -un; pwd";
    check_eq!(text(container.exec(["sh", "-c", seen]))?, "12 /usr/bin:/bin /usr/sbin\ndaemon\n/srv/made/here");
    let own = container.exec(["sh", "-c", seen]).env("A", "x").user("root").current_dir("/");
    check_eq!(text(own)?, "x2 /usr/bin:/bin /root\nroot\n/");
    check_eq!(container.labels().iter().map(|(name, value)| format!("{name}={value}")).collect::<String>(), "team=two");
    Ok(())
}

pub fn memory_file_systems_have_their_size_and_mode() -> Outcome {
    let builder =
        debian_container().tmpfs(Tmpfs::new("/scratch/deep").size(Size::mib(1)).mode(0o750)).tmpfs("/scratch");
    let container = builder.start()?;
    check_eq!(text(container.exec(["stat", "-f", "-c", "%T", "/scratch", "/scratch/deep"]))?, "tmpfs\ntmpfs");
    check_eq!(text(container.exec(["stat", "-c", "%a", "/scratch", "/scratch/deep"]))?, "1777\n750");
    let fill = text(container.exec(["dd", "if=/dev/zero", "of=/scratch/deep/x", "bs=1M", "count=2"]))?;
    check!(fill.contains("No space left"), "{fill}");
    for wrong in ["relative", "/", "/proc/x", "/a/.."] {
        let error = debian_container().tmpfs(wrong).start().map(drop).expect_err(wrong);
        check!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("tmpfs"), "{error}");
    }
    Ok(())
}

pub fn read_only_root_takes_writes_in_memory_alone() -> Outcome {
    let container = debian_container().read_only(true).tmpfs("/tmp").hostname("fixed").start()?;
    for path in ["/file", "/etc/hosts", "/var/tmp/x"] {
        let denied = text(container.exec(["sh", "-c", &format!("echo x > {path}")]))?;
        check!(denied.contains("Read-only file system"), "{path}: {denied}");
    }
    check_eq!(
        text(container.exec(["sh", "-c", "echo x > /tmp/x && cat /tmp/x; hostname; grep -c fixed /etc/hosts"]))?,
        "x\nfixed\n1"
    );
    check!(matches!(container.stop(TEST_TIMEOUT)?, cofferdam::Exit::PowerOff { .. }));
    // The builder's working directory cannot be made.
    let container = debian_container().read_only(true).current_dir("/missing").start()?;
    let error = container.exec(["true"]).spawn().map(drop).expect_err("no directory");
    check!(error.to_string().contains("Read-only file system"), "{error}");
    for builder in
        [debian_container().env("A=B", ""), debian_container().user("a\0"), debian_container().current_dir("\0")]
    {
        check_eq!(builder.start().map(drop).map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig));
    }
    Ok(())
}

pub fn secrets_are_in_memory_alone_and_read_only() -> Outcome {
    let (secret, printed) = ("correct-horse-battery", Printed::default());
    let binary: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let builder = debian_container().secret("token", secret).secret("key.bin", binary.clone());
    check!(!format!("{builder:?}").contains(secret));
    let builder = builder.user("daemon").writable_layer(Size::mib(64)).console(printed.console());
    let container = builder.start()?;
    check_eq!(text(container.exec(["cat", "/run/secrets/token"]))?, secret);
    check!(container.exec(["cat", "/run/secrets/key.bin"]).timeout(TEST_TIMEOUT).output()?.stdout == binary);
    check_eq!(text(container.exec(["stat", "-f", "-c", "%T", "/run/secrets"]))?, "tmpfs");
    check!(text(container.exec(["sh", "-c", "echo x > /run/secrets/token"]).user("root"))?.contains("Read-only"));
    // On no disk, in no message of the kernel, in no variable of a process.
    // What is written to the root is found on its disk, so a secret would be.
    let found = "echo control-text > /root/file; sync; grep -c control-text /dev/vdb; grep -c correct-horse /dev/vdb; \
        cat /proc/cmdline /proc/[0-9]*/environ | grep -ac correct-horse; dmesg | grep -c correct-horse";
    let found = text(container.exec(["sh", "-c", found]).user("root"))?;
    check!(!found.starts_with('0') && found.ends_with("\n0\n0\n0"), "{found}");
    check!(!printed.text().contains(secret) && !format!("{:#}", container.report()).contains(secret));
    Ok(())
}

pub fn names_of_hosts_and_servers_are_written() -> Outcome {
    let builder = debian_container().extra_host("db", [10, 9, 8, 7]).extra_host("db6", Ipv6Addr::LOCALHOST);
    let builder = builder.dns_server([192, 0, 2, 1]).dns_search("one.example").dns_search("two.example");
    let container = builder.start()?;
    check_eq!(text(container.exec(["sh", "-c", "getent hosts db | tr -s ' '"]))?, "10.9.8.7 db");
    check_eq!(text(container.exec(["sh", "-c", "getent hosts db6 | tr -s ' '"]))?, "::1 db6");
    check_eq!(
        text(container.exec(["cat", "/etc/resolv.conf"]))?,
        "nameserver 192.0.2.1\nsearch one.example two.example"
    );
    let many = (1..=4).fold(debian_container(), |builder, n| builder.dns_server(IpAddr::from([192, 0, 2, n])));
    check_eq!(many.start().map(drop).map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig));
    Ok(())
}

pub fn kernel_parameters_are_set_or_named() -> Outcome {
    let container = debian_container().sysctl("net.ipv4.ip_forward", "1").sysctl("kernel/msgmax", "4321").start()?;
    check_eq!(text(container.exec(["cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/msgmax"]))?, "1\n4321");
    for (name, value) in [("net.ipv4.no_such", "1"), ("kernel.msgmax", "many")] {
        let error = debian_container().sysctl(name, value).start().map(drop).expect_err(name);
        let path = name.replace('.', "/");
        check!(error.kind() == ErrorKind::GuestFailed && error.to_string().contains(&path), "{error}");
    }
    Ok(())
}
