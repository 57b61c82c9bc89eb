//! A service on tokio that runs what strangers send it, each in a container of its own.
//!
//!     cargo run --release --features tokio --example service -- debian.tar
//!
//! It listens on a port of this machine, and then asks itself three things as a client would. A request is a script, ended
//! by closing the sending side. The answer is what the script prints, as it comes, and then how it ended. At most eight run
//! at once; a client that leaves ends its script; each script has ten seconds.

#![allow(clippy::print_stdout, reason = "a program may")]

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use cofferdam::process::{ProcessReader, Stdio};
use cofferdam::tokio::Async;
use cofferdam::{Container, Image, Process, Size};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Scripts that run at once.
const MOST: usize = 8;
/// The largest script, in bytes.
const SCRIPT: u64 = 64 << 10;
const TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> Outcome<()> {
    let rootfs = std::env::args().nth(1).ok_or("usage: service ROOTFS")?;
    // Preparing an image and starting machines block, so tokio's threads for that do it.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let image = spawn_blocking(move || Image::open(rootfs)).await??;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let at = listener.local_addr()?;
        let service = tokio::spawn(serve(listener, image));
        for script in ["echo hello from $(uname -n); exit 7", "sleep 1000", "head -c 100000 /dev/zero | wc -c"] {
            println!("--- {script}\n{}", ask(at, script).await?);
        }
        service.abort();
        Ok(())
    })
}

async fn serve(listener: TcpListener, image: Image) -> Outcome<()> {
    let permits = Arc::new(Semaphore::new(MOST));
    loop {
        let (mut client, _) = listener.accept().await?;
        let (image, permits) = (image.clone(), permits.clone());
        tokio::spawn(async move {
            let answered = match permits.try_acquire() {
                Ok(_permit) => answer(&mut client, image).await,
                Err(_) => Err("too many scripts run already".into()),
            };
            if let Err(error) = answered {
                let _ = client.write_all(format!("[refused: {error}]\n").as_bytes()).await;
            }
        });
    }
}

/// Runs the client's script and gives it what is printed, as it comes.
async fn answer(client: &mut TcpStream, image: Image) -> Outcome<()> {
    let mut script = String::new();
    (&mut *client).take(SCRIPT).read_to_string(&mut script).await?;
    let start = move || -> cofferdam::Result<(Container, Process)> {
        let container = Container::builder(image).memory(Size::mib(128)).hostname("sandbox").start()?;
        let exec = container.exec(["sh", "-c", &script]).stdout(Stdio::piped()).timeout(TIMEOUT);
        let process = exec.spawn()?;
        Ok((container, process))
    };
    let (container, mut process) = spawn_blocking(start).await??;
    let shown = match process.stdout.take() {
        Some(stdout) => show(stdout, client).await,
        None => Ok(()),
    };
    let ended = match shown {
        // Its time-out bounds the wait.
        Ok(()) => Some(process.wait_async().await?.to_string()),
        // The client has left.
        Err(_) => None,
    };
    // A drop waits for the machine's end, which takes milliseconds: not on a thread that serves others.
    spawn_blocking(move || drop(container)).await?;
    if let Some(ended) = ended {
        client.write_all(format!("[{ended}]\n").as_bytes()).await?;
    }
    Ok(())
}

async fn show(stdout: ProcessReader, client: &mut TcpStream) -> io::Result<()> {
    tokio::io::copy(&mut Async::new(stdout)?, client).await.map(drop)
}

/// What a client of the service does.
async fn ask(at: std::net::SocketAddr, script: &str) -> Outcome<String> {
    let mut stream = TcpStream::connect(at).await?;
    stream.write_all(script.as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
