//! [`Failure`]: why a request failed, and whether another try may help.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;

use super::fetch::FetchResponse;
use super::retry;
use super::url::brief;
use crate::error::{Error, ErrorKind};

/// What is read of an answer that is an error.
const MAX_WORDS: u64 = 8 << 10;

/// An error, and what may be done about it.
pub(super) struct Failure {
    pub error: Error,
    /// Whether it may pass.
    pub transient: bool,
    /// How long the server asks to wait.
    pub after: Option<Duration>,
}

impl Failure {
    /// One that another try does not change.
    pub fn last(error: Error) -> Self {
        Self { error, transient: false, after: None }
    }

    pub fn transient(error: Error) -> Self {
        Self { error, transient: true, after: None }
    }
}

/// An answer with a status of success.
pub(super) struct Reply(pub FetchResponse);

/// The codes of the distribution-spec, and of Docker Hub for its limit.
const CODES: [&str; 18] = [
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DENIED",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "MANIFEST_UNVERIFIED",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "TAG_INVALID",
    "TOOMANYREQUESTS",
    "UNAUTHORIZED",
    "UNAVAILABLE",
    "UNKNOWN",
    "UNSUPPORTED",
];

/// A status, and whether its server was sent a secret.
///
/// It may repeat that in any spelling. Then only codes that are known are shown.
pub(super) struct Words {
    status: u16,
    knows_secret: bool,
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Words {
    pub fn of(status: u16, knows_secret: bool) -> Self {
        Self { status, knows_secret }
    }

    /// Whether the answer is one, or what is wrong with it. `what` was asked for.
    pub fn judge(self, response: FetchResponse, what: &str) -> Result<Reply, Failure> {
        use ErrorKind::{Corrupt, Io, NotFound, PermissionDenied, ResourceExhausted};
        let status = self.status;
        if matches!(status, 200 | 206) {
            return Ok(Reply(response));
        }
        let after = retry::retry_after(&response);
        let transient = retry::is_transient_status(status);
        let said = self.said(response);
        let (kind, text) = match status {
            404 => (NotFound, format!("there is no such image, or no such part of it, at {what}{said}")),
            401 => (PermissionDenied, format!("where {what} is kept credentials are wanted, which are not sent there")),
            403 => {
                (PermissionDenied, format!("{what} is refused{said}: it is not there, or not for these credentials"))
            }
            429 => {
                let wait = after.map_or(String::new(), |after| format!(", and asks to wait {} s", after.as_secs()));
                let text = format!("its rate limit is used up{said}{wait}: log in, use a mirror, or try later");
                (ResourceExhausted, text)
            }
            416 => (Corrupt, format!("{what} has no bytes where they were asked for")),
            500..=599 => (Io, format!("it fails with status {status}{said}")),
            100..=399 => (Corrupt, format!("it answers with status {status}, which means nothing here")),
            _ => (Io, format!("it refuses the request with status {status}{said}")),
        };
        Err(Failure { error: Error::new(kind, text), transient, after })
    }

    /// What the server says, as far as it is fit to be shown.
    fn said(&self, response: FetchResponse) -> String {
        let mut bytes = Vec::new();
        if response.into_body().take(MAX_WORDS).read_to_end(&mut bytes).is_err() {
            return String::new();
        }
        let text = String::from_utf8_lossy(&bytes);
        let words = match serde_json::from_slice::<Errors>(&bytes) {
            Ok(Errors { errors }) if self.knows_secret => {
                let known = errors.iter().map(|it| it.code.as_str()).filter(|code| CODES.contains(code));
                known.take(3).collect::<Vec<_>>().join("; ")
            }
            Ok(Errors { errors }) => {
                let each = errors.iter().take(3).map(|it| format!("{} {}", it.code, it.message).trim().to_owned());
                each.collect::<Vec<_>>().join("; ")
            }
            // A page for a browser says nothing here.
            Err(_) if self.knows_secret || text.trim_start().starts_with(['<', '{', '[']) => String::new(),
            Err(_) => text.trim().to_owned(),
        };
        let words = brief(&words);
        if words.is_empty() {
            return String::new();
        }
        format!(" ({words})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(status: u16, body: &'static str) -> Failure {
        failed_with(status, body, false)
    }

    fn failed_with(status: u16, body: &'static str, knows_secret: bool) -> Failure {
        let words = Words::of(status, knows_secret);
        let response = FetchResponse::new(status, body.as_bytes()).header("Retry-After", "9");
        words.judge(response, "a/b").map(drop).unwrap_err()
    }

    #[test]
    fn words_of_the_registry_are_shown() {
        let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit"}]}"#;
        let limit = failed(429, body);
        assert!(limit.error.kind() == ErrorKind::ResourceExhausted && limit.transient);
        assert_eq!(limit.after, Some(Duration::from_secs(9)));
        let text = limit.error.to_string();
        assert!(
            text.contains("rate limit") && text.contains("TOOMANYREQUESTS You have") && text.contains("9 s"),
            "{text}"
        );
        assert_eq!(failed(404, "").error.kind(), ErrorKind::NotFound);
        assert_eq!(failed(403, "no").error.kind(), ErrorKind::PermissionDenied);
        assert!(failed(502, "<html>").transient && !failed(400, "").transient);
        assert_eq!(failed(204, "").error.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn secrets_and_control_characters_are_not_shown() {
        for body in [
            "your password hunter2 is wrong",
            r#"{"errors":[{"message":"hunter2"}]}"#,
            r#"{"errors":[{"message":"\u0068unter2"}]}"#,
            r#"{"errors":[{"code":"hunter2"},{"code":"DENIED"}]}"#,
            r#"{"errors":[{"code":"dTpodW50ZXIy","message":"dTpodW50ZXIy, %68unter2"}]}"#,
        ] {
            let text = failed_with(500, body, true).error.to_string();
            assert!(["hunter2", "unter2", "dTpodW50ZXIy"].iter().all(|it| !text.contains(it)), "{text}");
            assert_eq!(text.contains("(DENIED)"), body.contains("DENIED"), "{text}");
        }
        let text = failed(500, "a\u{1b}[31m\nb").error.to_string();
        assert!(text.contains("(a[31mb)"), "{text:?}");
    }
}
