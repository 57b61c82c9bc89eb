//! The gateway's example with real guests: whom each name leads to, and when guests start and stop.

use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::Size;

use crate::fixture::{Outcome, TEST_TIMEOUT, network_container};
use crate::gateway_example::guests::Guests;
use crate::gateway_example::serve::{self, Limits};
use crate::gateway_example::start;
use crate::{check, check_eq};

const ALICE: &str = "alice.example.test";
const BOB: &str = "bob.example.test";

/// nginx with a certificate of its own making; only on 127.0.0.1.
pub const SERVER: &str = r#"
    set -e; mkdir -p /run/tls /srv/www; cd /run/tls
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key -out cert -subj "/CN=$NAME" \
        -addext "subjectAltName=DNS:$NAME" -days 30 2> /run/tls/log
    echo "I am $NAME" > /srv/www/index.html
    echo 'worker_processes 1; events { worker_connections 512; }
        http { access_log off; server { listen 127.0.0.1:80; listen 127.0.0.1:443 ssl; root /srv/www;
        ssl_certificate /run/tls/cert; ssl_certificate_key /run/tls/key; } }' > /run/tls/nginx.conf
    exec nginx -c /run/tls/nginx.conf -g 'daemon off;'
"#;

/// What curl says to a URL of this name, and its exit code.
fn curl(at: SocketAddr, scheme: &str, name: &str) -> Result<(String, Option<i32>), Box<dyn std::error::Error>> {
    let port = at.port();
    let mut curl = Command::new("curl");
    curl.args([
        "-skv",
        "--max-time",
        "120",
        "-w",
        "status %{http_code}",
        "--resolve",
        &format!("{name}:{port}:{}", at.ip()),
    ]);
    let output = curl.arg(format!("{scheme}://{name}:{port}/")).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((String::from_utf8_lossy(&text).into_owned(), output.status.code()))
}

pub fn each_host_name_reaches_its_own_guest_started_on_demand() -> Outcome {
    let command: Vec<OsString> = ["sh", "-c", SERVER].map(OsString::from).into();
    let guests = Arc::new(Guests::new([ALICE, BOB].map(str::to_owned), Duration::from_secs(4), move |name| {
        start(network_container().memory(Size::mib(192)), name, &command)
    }));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let at = listener.local_addr()?;
    let (served, limits) =
        (guests.clone(), Limits { server: TEST_TIMEOUT, idle_guest: Duration::from_secs(4), ..Limits::default() });
    thread::spawn(move || serve::run(&listener, &served, &limits));

    // Unknown names start nothing.
    let (text, _) = curl(at, "http", "carol.example.test")?;
    check!(text.contains("status 404"), "{text}");
    let (text, code) = curl(at, "https", "carol.example.test")?;
    check!(code == Some(35) && text.contains("unrecognized name"), "{code:?} {text}");
    check_eq!((guests.seen(ALICE), guests.seen(BOB)), (Some((0, false)), Some((0, false))));

    // Many at once start one.
    let first: Vec<_> =
        (0..3).map(|_| thread::spawn(move || curl(at, "http", ALICE).map_err(|e| e.to_string()))).collect();
    for thread in first {
        let (text, _) = thread.join().map_err(|_| "a caller panicked")??;
        check!(text.contains("I am alice.example.test"), "{text}");
    }
    check_eq!(guests.seen(ALICE), Some((1, true)));
    for name in [ALICE, BOB] {
        for scheme in ["http", "https"] {
            let (text, code) = curl(at, scheme, name)?;
            check!(code == Some(0) && text.contains(&format!("I am {name}")), "{scheme} {name}: {text}");
            check!(scheme == "http" || text.contains(&format!("subject: CN={name}")), "another's certificate: {text}");
        }
    }

    // The guest with a connection keeps running, and the idle one is stopped.
    let deadline = Instant::now() + TEST_TIMEOUT;
    while guests.seen(ALICE).is_some_and(|(_, runs)| runs) {
        check!(Instant::now() < deadline, "alice still runs");
        curl(at, "http", BOB)?;
        thread::sleep(Duration::from_millis(200));
    }
    check_eq!(guests.seen(BOB), Some((1, true)));
    let (text, _) = curl(at, "https", ALICE)?;
    check!(text.contains("I am alice.example.test"), "{text}");
    check_eq!(guests.seen(ALICE), Some((2, true)));
    Ok(())
}
