//! What an image's configuration says is done: its program, environment, user, working directory and stop signal.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::vsock::VsockStream;
use cofferdam::{Container, ErrorKind, Exit, Image, Process, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, cache, kernel, soak};
use crate::{check, check_eq};

/// The layout that has an image: that of `guest/layout services`, or at full length of others' tools, `guest/images debian`.
fn layout(name: &str) -> PathBuf {
    let layout = match name {
        "scratch" => "foreign/buildah.oci",
        "nodejs" | "python3" => "foreign-debian/docker.oci",
        "openjdk" => "foreign-debian/umoci.oci",
        _ if soak().is_none() => "services.oci",
        "postgres" => "foreign-debian/umoci.oci",
        _ => "foreign-debian/buildah.oci",
    };
    cache().join("images").join(layout)
}

fn image(name: &str) -> cofferdam::Result<Image> {
    Ok(Image::open(layout(name))?.select(name))
}

/// A running container of an image.
fn start(name: &str) -> cofferdam::Result<Container> {
    Container::builder(image(name)?).kernel(kernel()).memory(Size::mib(384)).start_timeout(TEST_TIMEOUT).start()
}

/// Connects as soon as the service listens.
fn connect(container: &Container, port: u16) -> Result<VsockStream, Box<dyn std::error::Error>> {
    // Interpreters take minutes to start in a busy lab.
    let deadline = Instant::now() + TEST_TIMEOUT * 2;
    loop {
        match container.connect(port) {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends `request`, and reads until what came contains `word`.
fn ask(container: &Container, port: u16, request: &[u8], word: &[u8]) -> Outcome {
    let mut stream = connect(container, port)?;
    stream.write_all(request)?;
    let (mut got, mut piece) = (Vec::new(), [0; 4096]);
    while !got.windows(word.len()).any(|window| window == word) {
        let n = stream.read(&mut piece)?;
        check!(n > 0, "the answer was {}", String::from_utf8_lossy(&got));
        got.extend_from_slice(piece.get(..n).unwrap_or_default());
    }
    Ok(())
}

/// Stops the container by the image's signal. Its program had time to end by itself.
fn stop(container: &Container, mut program: Process) -> Outcome {
    let exit = container.stop(Duration::from_secs(60))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    let status = program.wait()?;
    check!(status.success(), "{status}");
    Ok(())
}

pub fn nginx_serves_and_quits_by_its_stop_signal() -> Outcome {
    let container = start("nginx")?;
    let config = image("nginx")?.config()?;
    check_eq!(
        (config.stop_signal.as_deref(), config.exposed_ports.as_slice()),
        (Some("SIGQUIT"), &["80/tcp".to_owned()][..])
    );
    let program = container.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    ask(&container, 80, b"GET / HTTP/1.0\r\n\r\n", b"served by nginx")?;
    // Its working directory was made.
    let seen = container.exec(["sh", "-c", "pwd; id -u"]).output()?;
    check_eq!(seen.stdout, b"/srv/made/here\n0\n");
    check_eq!(container.exec(["pwd"]).current_dir("/").output()?.stdout, b"/\n");
    stop(&container, program)
}

pub fn postgres_runs_as_its_user_and_stops_by_its_signal() -> Outcome {
    let container = start("postgres")?;
    let program = container.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // A request for TLS, which it declines.
    if let Err(error) = ask(&container, 5432, &[0, 0, 0, 8, 4, 210, 22, 47], b"N") {
        program.kill()?;
        let output = program.wait_with_output()?;
        let said = [output.stdout, output.stderr].concat();
        return Err(format!("{error}: {}", String::from_utf8_lossy(&said)).into());
    }
    let seen = container.exec(["sh", "-c", "echo $(id -un) $PGDATA $HOME; stat -c %U $PGDATA"]).output()?;
    check_eq!(seen.stdout, b"postgres /var/lib/postgresql/15/main /var/lib/postgresql\npostgres\n");
    let query = ["psql", "-h", "127.0.0.1", "-Atc", "select 6 * 7"];
    check_eq!(container.exec(query).output()?.stdout, b"42\n");
    let root = container.exec(["id", "-u"]).user("root").output()?;
    check_eq!(root.stdout, b"0\n");
    stop(&container, program)
}

pub fn redis_runs_in_its_directory_as_user_and_group() -> Outcome {
    let container = start("redis")?;
    let program = container.command().arg("--port").arg("6379").stdout(Stdio::piped()).spawn()?;
    ask(&container, 6379, b"SET a b\r\nGET a\r\n", b"+OK\r\n$1\r\nb\r\n")?;
    let seen = container.exec(["sh", "-c", "echo $(pwd) $(id -un) $(id -gn) $(id -Gn)"]).output()?;
    check_eq!(seen.stdout, b"/var/lib/redis redis redis redis\n");
    stop(&container, program)
}

/// Runs in `make soak` alone, which makes its image.
pub fn python_serves_and_ends_by_its_stop_signal() -> Outcome {
    let container = start("python3")?;
    let config = image("python3")?.config()?;
    check_eq!(config.stop_signal.as_deref(), Some("SIGTERM"));
    check_eq!(container.exec(["sh", "-c", "echo made by the test >/srv/page"]).status()?.code(), Some(0));
    let program = container.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    ask(&container, 8000, b"GET /srv/page HTTP/1.0\r\n\r\n", b"made by the test")?;
    ask(&container, 8000, b"GET /nothing HTTP/1.0\r\n\r\n", b"404 File not found")?;
    let exit = container.stop(Duration::from_secs(60))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    let output = program.wait_with_output()?;
    // By the image's environment it does not keep back what it writes.
    check!(output.stdout.starts_with(b"Serving HTTP on"), "{}", String::from_utf8_lossy(&output.stdout));
    let log = String::from_utf8_lossy(&output.stderr);
    check!(log.contains("GET /srv/page HTTP/1.0"), "{log}");
    // Python leaves this signal to the kernel, and ends by it.
    check_eq!(output.status, ExitStatus::Signaled { signal: 15 });
    Ok(())
}

/// Runs in `make soak` alone, which makes its image.
pub fn nodejs_serves_and_stops_by_its_signal() -> Outcome {
    let container = start("nodejs")?;
    let program = container.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    ask(&container, 8080, b"GET / HTTP/1.0\r\n\r\n", b"GET by node\n")?;
    let seen = container.exec(["sh", "-c", "echo $(pwd) $(id -un)"]).output()?;
    check_eq!(seen.stdout, b"/srv nobody\n");
    // By SIGTERM it would end with another status.
    check_eq!(image("nodejs")?.config()?.stop_signal.as_deref(), Some("SIGINT"));
    stop(&container, program)
}

/// Runs in `make soak` alone, which makes its image.
pub fn java_serves_and_its_shutdown_hook_runs() -> Outcome {
    let container = start("openjdk")?;
    let program = container.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    ask(&container, 8080, b"", b"served by Java\n")?;
    check_eq!(container.exec(["id", "-u"]).output()?.stdout, b"1000\n");
    let exit = container.stop(Duration::from_secs(60))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    let output = program.wait_with_output()?;
    check_eq!(output.stdout, b"stopped by its signal\n");
    // Its hook has run, and it ends as by a signal.
    check_eq!(output.status, ExitStatus::Exited { code: 143 });
    Ok(())
}

/// The program ends with another code for each signal: 21 for SIGUSR1, 22 for SIGTERM.
pub fn stop_signal_of_the_image_is_for_its_program_alone() -> Outcome {
    let container = start("scratch")?;
    check_eq!(image("scratch")?.config()?.stop_signal.as_deref(), Some("SIGUSR1"));
    let mut program = container.command().stdout(Stdio::piped()).spawn()?;
    let mut other = container.exec(["/stopped"]).stdout(Stdio::piped()).spawn()?;
    for process in [&mut program, &mut other] {
        let mut ready = [0; 6];
        process.stdout.as_mut().ok_or("no output")?.read_exact(&mut ready)?;
        check_eq!(&ready, b"ready\n");
    }
    let exit = container.stop(Duration::from_secs(60))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    check_eq!(program.wait()?, ExitStatus::Exited { code: 21 });
    check_eq!(other.wait()?, ExitStatus::Exited { code: 22 });
    Ok(())
}

pub fn others_get_sigterm_once_the_program_of_the_image_has_ended() -> Outcome {
    let container = start("nginx")?;
    let program = container.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    ask(&container, 80, b"GET / HTTP/1.0\r\n\r\n", b"served by nginx")?;
    // A client that reads slowly: nginx ends when it has all, and that is when SIGTERM comes.
    let script = "trap 'pgrep -x nginx > /dev/null && exit 1; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut other = container.exec(["sh", "-c", script]).stdout(Stdio::piped()).spawn()?;
    other.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0; 6])?;
    stop(&container, program)?;
    check_eq!(other.wait()?, ExitStatus::Exited { code: 3 });
    Ok(())
}
