//! Programs, ends and events on a tokio runtime.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use cofferdam::event::{Event, EventKind};
use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::tokio::Async;
use cofferdam::{Container, ErrorKind, Exit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{JoinHandle, spawn_blocking, yield_now};
use tokio::time::timeout;

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, container};
use crate::{check, check_eq};

/// What tasks return.
type Answer<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// Runs a task on a runtime of one thread, which is not left waiting.
fn run(task: impl Future<Output = Answer>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async { timeout(2 * TEST_TIMEOUT, task).await });
    runtime.shutdown_background();
    outcome.map_err(|_| "never woken")?.map_err(|error| error as Box<dyn Error>)
}

/// Gives a program bytes, and gets them back while they are written.
async fn echo(container: Container, number: u8) -> Answer {
    let exec = container.exec(["sh", "-c", &format!("cat; exit {number}")]);
    let exec = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).timeout(TEST_TIMEOUT);
    let mut process = spawn_blocking(move || exec.spawn()).await??;
    let mut stdin = Async::new(process.stdin.take().ok_or("no stdin")?)?;
    let mut stdout = Async::new(process.stdout.take().ok_or("no stdout")?)?;
    let bytes: Vec<u8> = (0..100_000).map(|at| (at % 251) as u8 ^ number).collect();
    let sent = bytes.clone();
    let writing: JoinHandle<Answer> = tokio::spawn(async move {
        stdin.write_all(&sent).await?;
        stdin.shutdown().await?;
        Ok(())
    });
    let mut read = Vec::new();
    stdout.read_to_end(&mut read).await?;
    writing.await??;
    check!(read == bytes, "{} bytes of {number}", read.len());
    check_eq!(process.wait_async().await?.code(), Some(i32::from(number)));
    // It has ended for ever.
    check_eq!(process.wait_async().await?.code(), Some(i32::from(number)));
    Ok(())
}

pub fn fifty_programs_and_all_ends_are_awaited_on_one_thread() -> Outcome {
    let container = container()?;
    run(async move {
        let events = Async::new(container.events()?)?;
        let reading: JoinHandle<Answer<Vec<Event>>> = tokio::spawn(async move {
            let mut all = Vec::new();
            while let Some(event) = events.next().await? {
                all.push(event);
            }
            Ok(all)
        });
        let (waiting, vm) = (container.clone(), container.vm().clone());
        let ends = [
            tokio::spawn(async move { waiting.wait_async().await }),
            tokio::spawn(async move { vm.wait_async().await }),
        ];
        let programs: Vec<_> = (0..50).map(|number| tokio::spawn(echo(container.clone(), number))).collect();
        for program in programs {
            program.await??;
        }
        check!(!reading.is_finished() && ends.iter().all(|end| !end.is_finished()));
        let stopping = container.clone();
        let exit = spawn_blocking(move || stopping.stop(Duration::from_secs(5))).await??;
        check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
        for end in ends {
            check_eq!(end.await??, exit);
        }
        let all = reading.await??;
        check!(all.first().is_some_and(|event| event.kind == EventKind::Started), "{all:?}");
        check!(all.last().is_some_and(|event| event.kind == EventKind::Ended { exit: exit.clone() }), "{all:?}");
        check_eq!(container.wait_async().await?, exit);
        spawn_blocking(move || drop(container)).await?;
        Ok(())
    })
}

pub fn dropped_futures_lose_no_output() -> Outcome {
    let container = container()?;
    run(async move {
        let script = "for n in $(seq 20); do sleep 0.1; echo $n; done; read line; echo $line";
        let exec = container.exec(["sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = spawn_blocking(move || exec.timeout(TEST_TIMEOUT).spawn()).await??;
        let mut stdin = Async::new(process.stdin.take().ok_or("no stdin")?)?;
        let mut stdout = Async::new(process.stdout.take().ok_or("no stdout")?)?;
        stdin.write_all(b"the last\n").await?;
        let (mut all, mut dropped, mut buffer) = (Vec::new(), 0, [0; 2]);
        loop {
            match timeout(Duration::from_millis(15), stdout.read(&mut buffer)).await {
                Ok(read) => match read? {
                    0 => break,
                    n => all.extend_from_slice(&buffer[..n]),
                },
                Err(_) => {
                    dropped += 1;
                    // Waits for the end may be dropped as well; the first closes nothing that was taken.
                    let _ = timeout(Duration::from_millis(1), process.wait_async()).await;
                }
            }
        }
        let expected: String = (1..=20).map(|n| format!("{n}\n")).collect();
        check_eq!(String::from_utf8_lossy(&all), expected + "the last\n");
        check!(dropped > 3, "only {dropped} reads were dropped");
        check!(process.wait_async().await?.success());
        // The descriptor of a stream taken back blocks, and is at its end.
        let mut stdout = stdout.into_inner()?;
        check_eq!(std::io::Read::read(&mut stdout, &mut buffer)?, 0);
        Ok(())
    })
}

pub fn end_of_the_container_wakes_every_task() -> Outcome {
    let container = container()?;
    run(async move {
        let exec = container.exec(["sleep", "1000"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = spawn_blocking(move || exec.spawn()).await??;
        let mut stdin = Async::new(process.stdin.take().ok_or("no stdin")?)?;
        let mut stdout = Async::new(process.stdout.take().ok_or("no stdout")?)?;
        let listener = Async::new(container.vm().listen_vsock(4000)?)?;
        let waiting = tokio::spawn(async move { process.wait_async().await });
        let reading = tokio::spawn(async move { stdout.read(&mut [0; 1]).await });
        // More than fits anywhere between, of which the program reads nothing.
        let writing = tokio::spawn(async move { stdin.write_all(&vec![0; 16 << 20]).await });
        let accepting = tokio::spawn(async move { listener.accept().await.map(drop) });
        yield_now().await;
        check!(timeout(Duration::from_millis(300), container.wait_async()).await.is_err(), "it runs");
        check!(!waiting.is_finished() && !reading.is_finished() && !writing.is_finished() && !accepting.is_finished());
        container.kill();
        let exit = container.wait_async().await?;
        check!(matches!(exit, Exit::Killed { .. }), "{exit}");
        let status = waiting.await??;
        check!(matches!(status, ExitStatus::VmEnded { .. }), "{status}");
        check_eq!(reading.await??, 0);
        check!(writing.await?.is_err(), "what was not read was not written");
        let error = accepting.await?.expect_err("no connection");
        check_eq!(error.kind(), ErrorKind::InvalidState);
        Ok(())
    })
}

pub fn output_to_a_file_is_complete_after_wait() -> Outcome {
    let (container, temp) = (container()?, Temp::new()?);
    let file = std::fs::File::create(temp.path("out"))?;
    run(async move {
        let exec = container.exec(["sh", "-c", "yes | head -c 5000000; exit 3"]).stdout(file).timeout(TEST_TIMEOUT);
        let mut process = spawn_blocking(move || exec.spawn()).await??;
        check_eq!(process.wait_async().await?.code(), Some(3));
        let status = spawn_blocking(move || process.wait()).await??;
        check_eq!((status.code(), std::fs::metadata(temp.path("out"))?.len()), (Some(3), 5_000_000));
        Ok(())
    })
}
