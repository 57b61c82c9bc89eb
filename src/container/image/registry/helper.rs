//! Credential helpers: programs of the user's that keep credentials (docker-credential-helpers).

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::credentials::Credentials;
use super::login::of_user;
use crate::container::image::budget::PrepareDeadline;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;

/// A person may have to unlock a store of keys.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
const MAX_ANSWER: usize = 64 << 10;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Ends the program in any case.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks the program `docker-credential-` and this name for the credentials for a server. It may have none.
///
/// # Errors
/// `NotFound` without such a program; `TimedOut`; `Corrupt` for an answer that is none. No error has what the program said.
pub(super) fn ask(program: &str, server: &str, deadline: &PrepareDeadline) -> Result<Option<Credentials>> {
    let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let name = format!("docker-credential-{program}");
    let doing = || format!("asking {name} for credentials");
    if program.is_empty() || program.len() > 100 || !program.bytes().all(known) {
        return Err(Error::new(ErrorKind::Corrupt, "the name of a credential helper is no name of a program"));
    }
    answer(Command::new(&name), server, HELPER_TIMEOUT, deadline).doing(doing)
}

fn answer(
    mut command: Command,
    server: &str,
    timeout: Duration,
    deadline: &PrepareDeadline,
) -> Result<Option<Credentials>> {
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = Killed(command.spawn()?);
    if let Some(mut input) = child.0.stdin.take() {
        // One that ends without reading says so by its answer.
        let _ = input.write_all(server.as_bytes());
    }
    let (mut answer, begun) = (Vec::new(), Instant::now());
    let Some(mut output) = child.0.stdout.take() else { return Ok(None) };
    loop {
        deadline.check()?;
        if begun.elapsed() > timeout {
            return Err(Error::new(ErrorKind::TimedOut, format!("it has not answered for {timeout:?}")));
        }
        if !sys::wait_readable(output.as_fd(), Some(POLL))? {
            continue;
        }
        let mut buffer = [0; 4096];
        let n = output.read(&mut buffer)?;
        answer.extend_from_slice(buffer.get(..n).unwrap_or_default());
        if n == 0 {
            break;
        }
        if answer.len() > MAX_ANSWER {
            return Err(Error::new(ErrorKind::Corrupt, "its answer is longer than 64 KiB"));
        }
    }
    if let Ok(Answer { username, secret }) = serde_json::from_slice(&answer) {
        return Ok(Some(of_user(username, secret)));
    }
    // As all of them say it.
    if String::from_utf8_lossy(&answer).contains("credentials not found") {
        return Ok(None);
    }
    Err(Error::new(ErrorKind::Corrupt, "its answer is none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(script: &str) -> Result<Option<Credentials>> {
        let mut command = Command::new("sh");
        // What follows is `get`.
        command.args(["-c", script, "helper"]);
        answer(command, "r.example", Duration::from_millis(300), &PrepareDeadline::new(HELPER_TIMEOUT, None))
    }

    #[test]
    fn program_is_asked_as_docker_asks_it() {
        let echo = r#"read -r server; echo "{\"ServerURL\":\"x\",\"Username\":\"$1\",\"Secret\":\"$server\"}""#;
        assert!(said(echo).unwrap() == Some(Credentials::basic("get", "r.example")));
        let token = r#"echo '{"Username":"<token>","Secret":"id"}'"#;
        assert!(said(token).unwrap() == Some(Credentials::identity_token("id")));
        assert!(said("echo credentials not found in native keychain; exit 1").unwrap().is_none());
    }

    #[test]
    fn program_that_fails_or_hangs_is_an_error() {
        let kind = |script: &str| said(script).map(drop).unwrap_err().kind();
        assert_eq!(kind("echo hunter2"), ErrorKind::Corrupt);
        assert!(!said("echo hunter2").map(drop).unwrap_err().to_string().contains("hunter2"));
        assert_eq!(kind("exit 1"), ErrorKind::Corrupt);
        assert_eq!(kind("exec tail -f /dev/null"), ErrorKind::TimedOut);
        assert_eq!(kind("exec cat /dev/zero"), ErrorKind::Corrupt);
        let deadline = PrepareDeadline::new(HELPER_TIMEOUT, None);
        assert_eq!(ask("cofferdam-is-none", "x", &deadline).map(drop).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(ask("../../bin/sh", "x", &deadline).map(drop).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
