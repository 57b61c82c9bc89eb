//! Programs in containers, with the vocabulary of `std::process::Command`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use cofferdam::event::EventKind;
use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::{ErrorKind, Exec, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, container, debian_container};
use crate::{check, check_eq};

fn text(exec: Exec) -> cofferdam::Result<String> {
    let output = exec.timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

pub fn output_and_exit_codes_are_returned() -> Outcome {
    let container = container()?;
    let output = container.exec(["sh", "-c", "echo out; exit 42"]).output()?;
    check_eq!((output.stdout.as_slice(), output.status.code()), (&b"out\n"[..], Some(42)));
    check!(container.exec(["true"]).status()?.success());
    check_eq!(container.exec(["sh", "-c", "exit 126"]).status()?.code(), Some(126));
    Ok(())
}

pub fn stdout_and_stderr_are_separate() -> Outcome {
    let output = container()?.exec(["sh", "-c", "echo one; echo two >&2; echo three"]).output()?;
    check_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"one\nthree\n"[..], &b"two\n"[..]));
    Ok(())
}

pub fn environment_and_working_directory_are_set() -> Outcome {
    let container = container()?;
    let seen = text(
        container.exec(["sh", "-c", "echo $A-$B; pwd"]).env("A", "1 2").envs([("B", "3")]).current_dir("/usr/lib"),
    )?;
    check_eq!(seen, "1 2-3\n/usr/lib");
    check_eq!(
        text(container.exec(["env"]).env("X", "y").env_remove("HOME"))?,
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nX=y"
    );
    check_eq!(text(container.exec(["env"]).env_clear())?, "");
    check_eq!(text(container.exec(["printf", "[%s]"]).args(["a b", "", "c\nd"]).arg("*"))?, "[a b][][c\nd][*]");
    Ok(())
}

pub fn programs_run_as_other_users() -> Outcome {
    let container = debian_container().start()?;
    let prepare = "groupadd -g 4242 team && useradd -m -u 1234 -G team,adm worker";
    check!(container.exec(["sh", "-c", prepare]).status()?.success());
    let id = "echo $(id -u) $(id -g) $(id -G) $HOME; grep -c '^Cap.*0000000000000000' /proc/self/status";
    let seen = |user: &str| text(container.exec(["sh", "-c", id]).user(user));
    // Ambient, effective, inheritable and permitted capabilities are none; only the bounding set is there.
    check_eq!(seen("worker")?, "1234 1234 1234 4 4242 /home/worker\n4");
    check_eq!(seen("1234")?, seen("worker")?);
    check_eq!(seen("worker:team")?, "1234 4242 4242 /home/worker\n4");
    check_eq!(seen("77:88")?, "77 88 88 /\n4");
    check_eq!(text(container.exec(["sh", "-c", "id -u; echo $HOME"]).user("root"))?, "0\n/root");
    let home = |exec: Exec| text(exec.user("worker")).map(|text| text.replace('\n', " "));
    check_eq!(home(container.exec(["printenv", "HOME"]).env("HOME", "/elsewhere"))?, "/elsewhere");
    check_eq!(home(container.exec(["sh", "-c", "echo ${HOME-none}"]).env_remove("HOME"))?, "none");
    // It may open its own streams by their names, and no files of root's.
    check_eq!(home(container.exec(["sh", "-c", "echo a > /dev/stdout; cat /dev/stdin"]).stdin_bytes("b"))?, "a b");
    let denied = container.exec(["cat", "/etc/shadow"]).user("worker").output()?;
    check_eq!(denied.status.code(), Some(1));
    for (user, word) in [("nonesuch", "/etc/passwd"), ("root:nonesuch", "/etc/group"), ("", "/etc/passwd")] {
        let error = container.exec(["true"]).user(user).spawn().map(drop).expect_err(user);
        check!(error.kind() == ErrorKind::NotFound, "{error:?}");
        check!(error.to_string().contains(word) && error.to_string().contains(&format!("{user:?}")), "{error}");
    }
    // A pipe in the file's place holds nothing up.
    check!(container.exec(["sh", "-c", "rm /etc/passwd; mkfifo /etc/passwd"]).status()?.success());
    let error = container.exec(["true"]).user("worker").spawn().map(drop).expect_err("no file");
    check!(error.kind() == ErrorKind::Io, "{error:?}");
    check!(container.exec(["true"]).status()?.success());
    Ok(())
}

pub fn output_of_one_process_is_input_of_another() -> Outcome {
    let container = container()?;
    let mut printing = container.exec(["sh", "-c", "yes | head -c 1000000"]).stdout(Stdio::piped()).spawn()?;
    let output = printing.stdout.take().ok_or("no stdout")?;
    let counted = container.exec(["wc", "-c"]).stdin(output).output()?;
    check_eq!(counted.stdout, b"1000000\n");
    check!(printing.wait()?.success());
    let mut silent = container.exec(["true"]).stdout(Stdio::piped()).spawn()?;
    let output = silent.stdout.take().ok_or("no stdout")?;
    let error = container.exec(["true"]).stderr(output).spawn().map(drop).expect_err("output is not written to");
    check!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("stderr"), "{error}");
    Ok(())
}

pub fn programs_inherit_nothing_from_the_embedder() -> Outcome {
    let container = container()?;
    check_eq!(text(container.exec(["sh", "-c", "cat; ls /proc/self/fd | wc -l; umask"]))?, "4\n0022");
    check_eq!(
        text(container.exec(["sh", "-c", "grep Sig[BI] /proc/self/status | cut -f 2"]))?,
        "0000000000000000\n0000000000000000"
    );
    Ok(())
}

pub fn stdio_from_files_and_bytes() -> Outcome {
    let (container, temp) = (container()?, Temp::new()?);
    let data: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(temp.path("in"), &data)?;
    let copy = container
        .exec(["sh", "-c", "cat; echo done >&2"])
        .stdin(File::open(temp.path("in"))?)
        .stdout(File::create(temp.path("out"))?)
        .stderr(File::create(temp.path("err"))?);
    check!(copy.timeout(TEST_TIMEOUT).status()?.success());
    check!(fs::read(temp.path("out"))? == data);
    check_eq!(fs::read_to_string(temp.path("err"))?, "done\n");
    check_eq!(text(container.exec(["wc", "-c"]).stdin_bytes(data.clone()))?, data.len().to_string());
    check_eq!(text(container.exec(["cat"]).stdin_bytes("some words"))?, "some words");
    // One that does not read its input ends all the same.
    check!(container.exec(["true"]).stdin_bytes(vec![0; 8 << 20]).timeout(TEST_TIMEOUT).status()?.success());
    // A file that takes nothing says why, and the status is there all the same.
    let full = File::options().write(true).open("/dev/full")?;
    let mut process = container.exec(["sh", "-c", "echo lost; exit 3"]).stdout(full).timeout(TEST_TIMEOUT).spawn()?;
    let error = process.wait().expect_err("a full disk");
    check!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("to its file"), "{error}");
    // What is left behind with the stream is cut off.
    let script = ["sh", "-c", "(sleep 1000; echo late) & echo mine"];
    check!(container.exec(script).stdout(File::create(temp.path("out"))?).status()?.success());
    check_eq!(fs::read_to_string(temp.path("out"))?, "mine\n");
    // A pipe without written data does not delay the end of a process.
    let (reader, _writer) = std::io::pipe()?;
    check!(container.exec(["true"]).stdin(OwnedFd::from(reader)).timeout(TEST_TIMEOUT).status()?.success());
    Ok(())
}

pub fn output_is_truncated_when_configured() -> Outcome {
    let container = container()?;
    let exec = container.exec(["sh", "-c", "yes | head -c 1000000; echo few >&2; exit 3"]).output_limit(Size::kib(10));
    let error = exec.clone().output().expect_err("more than 10 KiB");
    check_eq!(error.kind(), ErrorKind::ResourceExhausted);
    let output = exec.truncate_output(true).output()?;
    check_eq!(
        (output.status.code(), output.stdout.len(), output.stderr.as_slice()),
        (Some(3), 10 << 10, &b"few\n"[..])
    );
    check!(output.stdout_truncated && !output.stderr_truncated);
    Ok(())
}

pub fn closing_stdin_ends_the_input() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["wc", "-c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = process.stdin.take().ok_or("no stdin")?;
    stdin.write_all(b"12345")?;
    drop(stdin);
    check_eq!(process.wait_with_output()?.stdout, b"5\n");
    Ok(())
}

pub fn binary_data_is_unchanged_both_ways() -> Outcome {
    let container = container()?;
    let data: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut process = container.exec(["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = process.stdin.take().ok_or("no stdin")?;
    let mut stdout = process.stdout.take().ok_or("no stdout")?;
    let sent = data.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let mut back = Vec::new();
    stdout.read_to_end(&mut back)?;
    writer.join().map_err(|_| "the writer panicked")??;
    check!(back == data, "{} bytes came back of {}", back.len(), data.len());
    check!(process.wait()?.success());
    Ok(())
}

pub fn slow_readers_lose_nothing() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["seq", "200000"]).stdout(Stdio::piped()).spawn()?;
    // The process cannot end before the test reads its output; its last output is there after its end.
    check!(process.wait_timeout(Duration::from_millis(500))?.is_none(), "1.3 MB fit nowhere");
    let mut printed = String::new();
    process.stdout.take().ok_or("no stdout")?.read_to_string(&mut printed)?;
    check_eq!((printed.lines().count(), printed.lines().last()), (200_000, Some("200000")));
    check!(process.wait()?.success());
    Ok(())
}

pub fn signal_ends_a_process() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["sleep", "1000"]).spawn()?;
    process.signal(15)?;
    check_eq!(process.wait()?.signal(), Some(15));
    check_eq!(container.exec(["sh", "-c", "kill -SEGV $$"]).status()?.signal(), Some(11));
    let process = container.exec(["sleep", "1000"]).spawn()?;
    check_eq!(process.signal(0).expect_err("no signal").kind(), ErrorKind::InvalidConfig);
    Ok(())
}

pub fn kill_ends_all_descendants() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["sh", "-c", "sleep 4321 & sleep 4321 & wait"]).spawn()?;
    while text(container.exec(["sh", "-c", "grep -l 4321 /proc/[0-9]*/cmdline | wc -l"]))?.as_str() < "4" {}
    process.kill()?;
    check_eq!(process.wait()?.signal(), Some(9));
    let left = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f 2>/dev/null; echo; done | grep -c '^sleep 4321'";
    let begin = Instant::now();
    while text(container.exec(["sh", "-c", left]))? != "0" {
        check!(begin.elapsed() < TEST_TIMEOUT, "something was left");
    }
    Ok(())
}

pub fn timeout_kills_all_descendants() -> Outcome {
    let container = container()?;
    let begin = Instant::now();
    let output =
        container.exec(["sh", "-c", "echo begun; sleep 4321 & sleep 4321"]).timeout(Duration::from_secs(3)).output()?;
    check!(matches!(output.status, ExitStatus::TimedOut), "{}", output.status);
    check_eq!(output.stdout, b"begun\n");
    check!(begin.elapsed() < TEST_TIMEOUT);
    // The timeout is kept without a call that waits for the process.
    let process = container.exec(["sleep", "4321"]).timeout(Duration::from_millis(100)).spawn()?;
    let status = process.wait_timeout(TEST_TIMEOUT)?.ok_or("it runs on")?;
    check!(matches!(status, ExitStatus::TimedOut), "{status}");
    Ok(())
}

pub fn background_process_does_not_delay_wait() -> Outcome {
    let container = container()?;
    let begin = Instant::now();
    let output = container.exec(["sh", "-c", "sleep 1000 & echo done"]).output()?;
    check_eq!((output.stdout.as_slice(), output.status.code()), (&b"done\n"[..], Some(0)));
    check!(begin.elapsed() < Duration::from_secs(500));
    Ok(())
}

pub fn wait_try_wait_and_wait_timeout_agree() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["cat"]).stdin(Stdio::piped()).spawn()?;
    check!(process.try_wait()?.is_none());
    check!(process.wait_timeout(Duration::from_millis(50))?.is_none());
    // Waiting closes standard input, which ends `cat`.
    check!(process.wait()?.success());
    check!(process.try_wait()?.is_some_and(|status| status.success()));
    Ok(())
}

pub fn spawn_failure_names_its_cause() -> Outcome {
    let container = container()?;
    let arm = "printf '\\177ELF\\2\\1\\1\\0\\0\\0\\0\\0\\0\\0\\0\\0\\2\\0\\267\\0\\1\\0\\0\\0' > /arm; chmod 755 /arm; echo text > /text; chmod 755 /text";
    container.exec(["sh", "-c", arm]).status()?;
    let cases = [
        (container.exec(["nonesuch"]), ErrorKind::NotFound, "nonesuch"),
        (container.exec(["/no/such/program"]), ErrorKind::NotFound, "/no/such/program"),
        (container.exec(["/etc/passwd"]), ErrorKind::PermissionDenied, "/etc/passwd"),
        (container.exec(["/etc"]), ErrorKind::PermissionDenied, "/etc"),
        (container.exec(["/arm"]), ErrorKind::Incompatible, "another processor"),
        (container.exec(["/text"]), ErrorKind::Incompatible, "/text"),
        (container.exec(["true"]).current_dir("/no/such/dir"), ErrorKind::NotFound, "/no/such/dir"),
        (container.exec(["true"]).current_dir("/etc/passwd"), ErrorKind::Io, "/etc/passwd"),
        (container.exec([""]), ErrorKind::InvalidConfig, "no program"),
        (container.exec(["a\0b"]), ErrorKind::InvalidConfig, "NUL"),
        (container.exec(["true"]).env("A=B", "c"), ErrorKind::InvalidConfig, "A=B"),
    ];
    for (exec, kind, word) in cases {
        let error = exec.spawn().map(drop).expect_err(word);
        check!(error.kind() == kind && error.to_string().contains(word), "{word}: {error:?}");
    }
    Ok(())
}

pub fn output_beyond_the_limit_is_an_error() -> Outcome {
    let container = container()?;
    let error = container.exec(["yes"]).output_limit(Size::mib(1)).output().expect_err("yes never ends");
    check_eq!(error.kind(), ErrorKind::ResourceExhausted);
    check!(error.to_string().contains("1 MiB"), "{error}");
    Ok(())
}

pub fn oom_kill_is_reported() -> Outcome {
    let container = debian_container().memory(Size::mib(160)).start()?;
    let status = container.exec(["sh", "-c", "exec tail /dev/zero"]).timeout(TEST_TIMEOUT).status()?;
    check!(matches!(status, ExitStatus::OomKilled), "{status}");
    check!(container.exec(["true"]).status()?.success(), "the container goes on");
    // A child's end by it is reported at once, and counted.
    let mut events = container.events()?.map(|event| event.kind);
    check!(events.any(|kind| kind == EventKind::Ready), "no event says that programs can be started");
    let line = "tail /dev/zero; echo $?; read wait; tail /dev/zero; exit 3";
    let mut parent = container.exec(["sh", "-c", line]).timeout(TEST_TIMEOUT);
    parent = parent.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut parent = parent.spawn()?;
    let killed = |kills| EventKind::OutOfMemory { program: "sh".into(), kills };
    // That of the program above is the first.
    check!(events.any(|kind| kind == killed(1)) && events.any(|kind| kind == killed(1)));
    check_eq!((parent.oom_kills(), parent.try_wait()?), (1, None));
    drop(parent.stdin.take());
    let output = parent.wait_with_output()?;
    check_eq!((output.status.code(), output.oom_kills), (Some(3), 2));
    check_eq!(output.stdout, b"137\n");
    check!(events.any(|kind| kind == killed(2)));
    Ok(())
}

pub fn concurrent_processes_all_finish() -> Outcome {
    let container = container()?;
    let processes = (0..50).map(|n| {
        container
            .exec(["sh", "-c", "cat; echo $0"])
            .arg(n.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
    });
    for (n, process) in processes.collect::<Result<Vec<_>, _>>()?.into_iter().enumerate() {
        check_eq!(String::from_utf8_lossy(&process.wait_with_output()?.stdout).trim(), n.to_string());
    }
    Ok(())
}

pub fn closed_reader_breaks_the_pipe() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["yes"]).stdout(Stdio::piped()).spawn()?;
    let mut stdout = process.stdout.take().ok_or("no stdout")?;
    let mut some = [0; 1000];
    stdout.read_exact(&mut some)?;
    drop(stdout);
    let status = process.wait_timeout(TEST_TIMEOUT)?.ok_or("it goes on writing")?;
    check!(status.signal() == Some(13) || status.code() == Some(1), "{status}");
    Ok(())
}

pub fn pid_1_survives_kill_all() -> Outcome {
    let container = container()?;
    let status =
        container.exec(["sh", "-c", "kill -9 -1; kill -9 1; sleep 1; exit 5"]).timeout(TEST_TIMEOUT).status()?;
    // A shell does not signal itself with -1.
    check!(matches!(status, ExitStatus::Exited { code: 5 } | ExitStatus::Signaled { signal: 9 }), "{status}");
    check_eq!(text(container.exec(["echo", "alive"]))?, "alive");
    Ok(())
}

pub fn orphans_are_reaped_by_pid_1() -> Outcome {
    let container = container()?;
    container.exec(["sh", "-c", "for n in $(seq 50); do sh -c 'sleep 0.01 &' & done; wait"]).status()?;
    let zombies = "sleep 0.5; grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
    check_eq!(text(container.exec(["sh", "-c", zombies]))?, "0");
    Ok(())
}

pub fn end_of_the_vm_is_reported_to_waiters() -> Outcome {
    let container = container()?;
    let mut process = container.exec(["sleep", "1000"]).spawn()?;
    container.kill();
    let status = process.wait()?;
    check!(matches!(status, ExitStatus::VmEnded { .. }), "{status}");
    let error = container.exec(["true"]).spawn().map(drop).expect_err("the machine is gone");
    check_eq!(error.kind(), ErrorKind::InvalidState);
    Ok(())
}

pub fn arguments_of_the_largest_size_are_passed() -> Outcome {
    let container = container()?;
    let long = "x".repeat(100_000);
    check_eq!(text(container.exec(["sh", "-c", "echo ${#0} ${#A}"]).arg(&long).env("A", &long))?, "100000 100000");
    let error = container.exec(["true"]).args((0..50).map(|_| long.clone())).spawn().map(drop).expect_err("5 MB");
    check_eq!(error.kind(), ErrorKind::InvalidConfig);
    Ok(())
}
