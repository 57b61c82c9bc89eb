//! When a request is repeated, and how long before (RFC 9110, 10.2.3: `Retry-After`).

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::failure::Failure;
use super::fetch::FetchResponse;
use crate::container::image::budget::PrepareDeadline;
use crate::error::{Context, Error, ErrorKind, Result};

/// How often the same is asked before the error is the caller's.
pub(super) const MAX_ATTEMPTS: u32 = 5;

/// Pauses grow from the first to the second. What a server asks for is waited for up to the third.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(10);
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How often the token is checked for a cancellation.
const POLL: Duration = Duration::from_millis(20);

/// Whether another try may have another end.
pub(super) fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, NotFound, PermissionDenied, Unsupported};
    !matches!(error.kind(), InvalidData | InvalidInput | NotFound | PermissionDenied | Unsupported)
}

pub(super) fn is_transient_status(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// The pause after this many failures, counted from 1.
pub(super) fn pause(failures: u32) -> Duration {
    let grown = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(MAX_PAUSE);
    // Not all clients that were refused together come again together.
    let spread = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.subsec_micros() % 256);
    grown - grown / 1024 * spread
}

/// How long the server asks to wait: seconds or a date.
pub(super) fn retry_after(response: &FetchResponse) -> Option<Duration> {
    let value = response.value("retry-after")?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(Duration::from_secs(date(value)?.saturating_sub(now)))
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`, the only form that may still be sent (RFC 9110, 5.6.7).
fn date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let parts: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = parts.as_slice() else { return None };
    let month = MONTHS.iter().position(|name| name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let clock: Vec<u64> = time.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [hour, minute, second] = clock.as_slice() else { return None };
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || *hour > 23 || *minute > 59 || *second > 60 {
        return None;
    }
    // Years that begin in March, so that a leap day is the last.
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    days.checked_sub(719_468).map(|days| days * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Waits, unless it is to end before.
///
/// # Errors
/// `TimedOut` and `Cancelled`.
pub(super) fn wait(pause: Duration, deadline: &PrepareDeadline) -> Result<()> {
    let mut left = pause;
    loop {
        deadline.check()?;
        if left.is_zero() {
            return Ok(());
        }
        let step = left.min(POLL);
        std::thread::sleep(step);
        left -= step;
    }
}

/// Asks until there is an answer, or a failure that is the caller's.
///
/// # Errors
/// That failure; `TimedOut` and `Cancelled`.
pub(super) fn repeat<T>(
    attempts: u32,
    deadline: &PrepareDeadline,
    mut ask: impl FnMut() -> std::result::Result<T, Failure>,
) -> Result<T> {
    for failures in 1.. {
        let failure = match ask() {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        let patient = failure.after.is_none_or(|after| after <= MAX_RETRY_AFTER);
        if !failure.transient || !patient || failures >= attempts {
            let again = if failures > 1 { format!(" (asked {failures} times)") } else { String::new() };
            return Err(failure.error).doing(|| format!("pulling{again}"));
        }
        log::debug!("a request to a registry is repeated: {}", failure.error);
        wait(failure.after.unwrap_or_default().max(pause(failures)), deadline)?;
    }
    deadline.check().and(Err(Error::new(ErrorKind::Io, "no attempt is left")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        for failures in 1..100 {
            let most = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(16)).min(MAX_PAUSE);
            let pause = pause(failures);
            assert!(pause <= most && pause >= most / 2, "{failures}: {pause:?}");
        }
    }

    #[test]
    fn seconds_and_dates_are_read() {
        let after = |value: &str| retry_after(&FetchResponse::new(429, io::empty()).header("Retry-After", value));
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert!(after("Fri, 31 Dec 9999 23:59:59 GMT").unwrap() > Duration::from_secs(1 << 32));
        for wrong in ["", "-1", "soon", "Sun, 06 Nov 1994 08:49:37", "Sun, 06 Nov 1994 25:49:37 GMT", "a b c d e GMT"] {
            assert_eq!(after(wrong), None, "{wrong}");
        }
        assert_eq!(date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(date("Thu, 29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
    }
}
