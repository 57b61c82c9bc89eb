//! Programs in terminals, as a person uses them.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam::process::{ExitStatus, ProcessReader, Stdio};
use cofferdam::{Container, ErrorKind, Image, Process};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, cache, container, debian_container, kernel};
use crate::{check, check_eq};

/// What appears on a screen, read by a thread of its own to its end.
struct Screen {
    printed: Printed,
    reader: std::thread::JoinHandle<()>,
}

impl Screen {
    fn of(process: &mut Process) -> Result<Self, Box<dyn std::error::Error>> {
        let printed = Printed::default();
        let (mut output, mut shown) = (process.stdout.take().ok_or("no output")?, printed.clone());
        let reader = std::thread::spawn(move || copy(&mut output, &mut shown));
        Ok(Self { printed, reader })
    }

    /// Waits for the end of the program's output. All that appeared.
    fn into_text(self) -> Result<String, Box<dyn std::error::Error>> {
        self.reader.join().map_err(|_| "the reader panicked")?;
        Ok(self.printed.text())
    }
}

fn copy(output: &mut ProcessReader, to: &mut Printed) {
    let mut piece = [0; 4096];
    while let Ok(n @ 1..) = output.read(&mut piece) {
        let _ = to.write_all(&piece[..n]);
    }
}

fn shell(container: &Container) -> Result<(Process, Screen), Box<dyn std::error::Error>> {
    let mut process = container.exec(["sh", "-i"]).env("PS1", "ready> ").pty(24, 80).spawn()?;
    let screen = Screen::of(&mut process)?;
    screen.printed.wait_for("ready> ")?;
    Ok((process, screen))
}

fn type_keys(process: &mut Process, keys: &str) -> Outcome {
    process.stdin.as_mut().ok_or("no input")?.write_all(keys.as_bytes())?;
    Ok(())
}

pub fn shell_in_a_terminal_echoes_controls_jobs_and_ends() -> Outcome {
    let container = container()?;
    let (mut process, screen) = shell(&container)?;
    check!(process.stderr.is_none());
    type_keys(&mut process, "tty; echo $TERM; stty size; test -t 0 -a -t 1 -a -t 2 && echo all$((40 + 2))\n")?;
    for word in ["/dev/pts/", "xterm", "24 80", "all42"] {
        screen.printed.wait_for(word)?;
    }
    // Ctrl-C reaches the program in the foreground, and not the shell.
    type_keys(&mut process, "sleep 1000; echo status $?\n")?;
    type_keys(&mut process, "\x03")?;
    let deadline = Instant::now() + TEST_TIMEOUT;
    while !screen.printed.text().contains("status 130") {
        check!(Instant::now() < deadline, "{}", screen.printed.text());
        type_keys(&mut process, "\x03")?;
        std::thread::sleep(Duration::from_millis(50));
        type_keys(&mut process, "echo status $?\n")?;
        std::thread::sleep(Duration::from_millis(200));
    }
    type_keys(&mut process, "exit 7\n")?;
    check_eq!(process.wait()?.code(), Some(7));
    check!(screen.into_text()?.contains("exit 7"));
    Ok(())
}

pub fn resized_terminal_signals_its_program() -> Outcome {
    let container = container()?;
    let script = "trap 'stty size; exit 3' WINCH; echo waiting; while :; do sleep 0.1; done";
    let mut process = container.exec(["sh", "-c", script]).pty(5, 6).spawn()?;
    let screen = Screen::of(&mut process)?;
    screen.printed.wait_for("waiting")?;
    process.resize(50, 132)?;
    check_eq!(process.wait()?.code(), Some(3));
    check!(screen.into_text()?.contains("50 132"));
    // It has ended, and is no error.
    process.resize(1, 1)?;
    let plain = container.exec(["true"]).spawn()?;
    check_eq!(plain.resize(1, 1).map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig));
    let error = container.exec(["true"]).pty(1, 1).stderr(Stdio::piped()).spawn().map(drop);
    check_eq!(error.map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig));
    Ok(())
}

pub fn end_of_a_terminals_input_and_hang_up_reach_the_program() -> Outcome {
    let container = container()?;
    // The end of the input, as of Ctrl-D.
    let output =
        container.exec(["cat"]).pty(24, 80).stdin_bytes("a line\nand a part").timeout(TEST_TIMEOUT).output()?;
    check!(output.status.success(), "{output:?}");
    // The echo, and what cat prints.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    check!(text.matches("a line\r\n").count() == 2 && text.matches("and a part").count() == 2, "{text:?}");
    // So does the shell whose prompt reads each key by itself.
    let debian = debian_container().start()?;
    let mut process = debian.exec(["bash", "--norc", "-i"]).env("PS1", "ready> ").pty(24, 80).spawn()?;
    let screen = Screen::of(&mut process)?;
    screen.printed.wait_for("ready> ")?;
    drop(process.stdin.take());
    check_eq!(process.wait_timeout(TEST_TIMEOUT)?.and_then(|status| status.code()), Some(0));
    // A host that reads no more hangs up.
    let mut process = container.exec(["sleep", "1000"]).pty(24, 80).spawn()?;
    drop(process.stdout.take());
    let status = process.wait_timeout(TEST_TIMEOUT)?;
    check_eq!(status, Some(ExitStatus::Signaled { signal: 1 }));
    // A program whose output is not read runs all the same, also where it prints much.
    check!(container.exec(["seq", "100000"]).pty(24, 80).timeout(TEST_TIMEOUT).status()?.success());
    Ok(())
}

pub fn terminals_keep_all_output_and_leave_nothing_behind() -> Outcome {
    let container = Arc::new(debian_container().start()?);
    let before = container.exec(["ls", "/dev/pts"]).output()?.stdout;
    let expected: String = (1..=5000).map(|n| format!("{n}\r\n")).collect();
    for round in 0..20 {
        let output = container.exec(["seq", "5000"]).pty(24, 80).timeout(TEST_TIMEOUT).output()?;
        check!(output.stdout == expected.as_bytes(), "round {round}: {} bytes", output.stdout.len());
    }
    // As another user, who owns it and may open it by its name.
    let command = "stat -c '%U %G %a' $(tty); echo again > $(tty)";
    let output = container.exec(["sh", "-c", command]).pty(24, 80).user("daemon").timeout(TEST_TIMEOUT).output()?;
    check_eq!(String::from_utf8_lossy(&output.stdout), "daemon tty 620\r\nagain\r\n");
    check_eq!(container.exec(["ls", "/dev/pts"]).output()?.stdout, before);
    Ok(())
}

pub fn editor_pager_top_and_tmux_draw_on_the_screen() -> Outcome {
    let container =
        Container::builder(Image::open(cache().join("images/debian-12-tools.tar"))?).kernel(kernel()).start()?;
    let program = |words: &[&str]| -> Result<_, Box<dyn std::error::Error>> {
        let mut process = container.exec(words.iter().copied()).env("LC_ALL", "C.UTF-8").pty(24, 80).spawn()?;
        let screen = Screen::of(&mut process)?;
        Ok((process, screen))
    };
    let (mut process, screen) = program(&["vi", "/tmp/file"])?;
    screen.printed.wait_for("/tmp/file")?;
    type_keys(&mut process, "ifirst line\rsecond\x1b")?;
    screen.printed.wait_for("second")?;
    type_keys(&mut process, ":wq\r")?;
    check!(process.wait()?.success());
    let text = container.exec(["cat", "/tmp/file"]).output()?.stdout;
    check_eq!(String::from_utf8_lossy(&text), "first line\nsecond\n");
    let lines: String = (1..=500).map(|n| format!("line {n}\n")).collect();
    check!(container.exec(["sh", "-c", "cat > /tmp/long"]).stdin_bytes(lines).status()?.success());
    let (mut process, screen) = program(&["less", "/tmp/long"])?;
    screen.printed.wait_for("line 23")?;
    check!(!screen.printed.text().contains("line 25"), "a screen of 24 lines: {}", screen.printed.text());
    // A larger window shows more.
    let deadline = Instant::now() + TEST_TIMEOUT;
    while !screen.printed.text().contains("line 38") {
        check!(Instant::now() < deadline, "{}", screen.printed.text());
        // It does not look at its window while it draws.
        process.resize(39, 80)?;
        process.resize(40, 80)?;
        std::thread::sleep(Duration::from_secs(1));
    }
    type_keys(&mut process, "G")?;
    screen.printed.wait_for("line 500")?;
    type_keys(&mut process, "q")?;
    check!(process.wait()?.success());
    let (mut process, screen) = program(&["top"])?;
    screen.printed.wait_for("COMMAND")?;
    type_keys(&mut process, "q")?;
    check!(process.wait()?.success());
    // A terminal in the terminal, from which one detaches and to which one comes back.
    let (mut process, screen) = program(&["tmux", "new-session", "-s", "one", "sh"])?;
    screen.printed.wait_for("[one]")?;
    type_keys(&mut process, "echo in$((40 + 2))\r")?;
    screen.printed.wait_for("in42")?;
    type_keys(&mut process, "\x02d")?;
    check!(process.wait()?.success());
    let (mut process, screen) = program(&["tmux", "attach"])?;
    screen.printed.wait_for("in42")?;
    type_keys(&mut process, "exit\r")?;
    check!(process.wait()?.success());
    Ok(())
}

pub fn reader_that_is_stuck_in_a_terminal_holds_up_its_own_program_alone() -> Outcome {
    let container = debian_container().start()?;
    // userfaultfd(2): reads into a page that is never given wait for ever.
    let stuck = "use constant { UFFD => 323, MMAP => 9 }; my $fd = syscall(UFFD, 0); die qq(userfaultfd: $!) if $fd < 0; \
        open my $u, '+<&=', $fd or die $!; my $api = pack 'QQQ', 0xaa, 0, 0; ioctl($u, 0xc018aa3f, $api) or die qq(api: $!); \
        my $page = syscall(MMAP, 0, 4096, 3, 0x22, -1, 0); die qq(mmap: $!) if $page == -1; \
        my $register = pack 'QQQQ', $page, 4096, 1, 0; ioctl($u, 0xc020aa00, $register) or die qq(register: $!); \
        $SIG{HUP} = 'IGNORE'; $| = 1; if (my $child = fork) { print qq(stuck\\n); sleep 1; exit 0 } \
        syscall(0, 0, $page, 4096); sleep 1000";
    let mut process = container.exec(["perl", "-e", stuck]).pty(24, 80).spawn()?;
    let screen = Screen::of(&mut process)?;
    screen.printed.wait_for("stuck")?;
    type_keys(&mut process, "for the page\n")?;
    check_eq!(process.wait_timeout(TEST_TIMEOUT)?.and_then(|status| status.code()), Some(0));
    for _ in 0..3 {
        check!(container.exec(["true"]).timeout(Duration::from_secs(30)).status()?.success());
    }
    Ok(())
}
