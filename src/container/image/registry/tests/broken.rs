//! Connections that break or stall, servers that lie or are busy.

use std::time::Instant;

use super::*;
use crate::container::CancelToken;
use crate::error::ErrorKind;

/// 300 kB that are not the same everywhere.
fn content() -> Vec<u8> {
    (0..300_000_u32).map(|n| (n * 7 / 3) as u8).collect()
}

/// What is missing from a request's position on.
fn rest(asked: &Asked, content: &[u8]) -> Option<(usize, Answer)> {
    let from = asked.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().unwrap();
    let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
    Some((from, Answer::new(206, &content[from..]).header("Content-Range", range)))
}

#[test]
fn broken_connection_is_read_on_from_where_it_broke() {
    let server = Server::start(|asked| match rest(asked, &content()) {
        None => Answer::new(200, content()).end(End::CutAt(100_000)),
        Some((from, answer)) if from < 200_000 => answer.end(End::CutAt(150_000)),
        Some((_, answer)) => answer,
    });
    let session = session(&server, keyring(&[]));
    assert_eq!(read(&session, &blob_of(&content()), &deadline()).unwrap(), content());
    let ranges: Vec<_> = server.asked().iter().map(|it| it.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".into()), Some("bytes=250000-".into())]);
}

#[test]
fn server_that_knows_no_ranges_sends_it_anew() {
    let turn = AtomicU32::new(0);
    let server = Server::start(move |_| match turn.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::new(200, content()).end(End::CutAt(200_000)),
        _ => Answer::new(200, content()),
    });
    let session = session(&server, keyring(&[]));
    assert_eq!(read(&session, &blob_of(&content()), &deadline()).unwrap(), content());
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn wrong_range_is_not_believed() {
    for (status, range) in
        [(206, "bytes 0-299999/300000"), (206, "bytes 100000-299999/400000"), (206, "x"), (416, "bytes */300000")]
    {
        let server = Server::start(move |asked| match asked.header("range") {
            Some(_) => Answer::new(status, content()).header("Content-Range", range),
            None => Answer::new(200, content()),
        });
        let plain = session(&server, keyring(&[]));
        let broken = Server::start(|_| Answer::new(200, content()).end(End::CutAt(100_000)));
        let all = session_of(&[&broken, &server], keyring(&[]), LONG);
        assert_eq!(read(&all, &blob_of(&content()), &deadline()).unwrap(), content(), "{status} {range}");
        let asked: Vec<_> = server.asked().iter().map(|it| it.header("range").is_some()).collect();
        assert_eq!(asked, [true, false]);
        assert_eq!(read(&plain, &blob_of(&content()), &deadline()).unwrap(), content());
    }
}

#[test]
fn connection_that_always_breaks_is_given_up() {
    let server = Server::start(|asked| match rest(asked, &content()) {
        None => Answer::new(200, content()).end(End::CutAt(10)),
        Some((_, answer)) => answer.end(End::CutAt(10)),
    });
    let error = read(&session(&server, keyring(&[])), &blob_of(&content()), &deadline()).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("ended early"), "{error}");
    assert_eq!(server.asked().len(), 5);
}

#[test]
fn wrong_lengths_and_digests_are_found() {
    let good = blob_of(&content());
    let longer: Vec<u8> = content().into_iter().chain([0]).collect();
    let mut other = content();
    other[150_000] ^= 1;
    let cases = [
        (Answer::new(200, content()[1..].to_vec()), "299999 bytes"),
        (Answer::new(200, longer), "300001 bytes"),
        (Answer::new(200, other), "its digest is"),
        (Answer::new(200, Vec::new()), "0 bytes"),
    ];
    for (answer, what) in cases {
        let server = Server::start(move |_| answer.clone());
        let error = read(&session(&server, keyring(&[])), &good, &deadline()).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(what), "{what}: {error}");
    }
    // Nothing behind its size is read of a body without an end.
    let server = Server::start(|_| Answer::new(200, vec![0; 1000]).end(End::Endless));
    let endless = read(&session(&server, keyring(&[])), &blob_of(&vec![0; 150_000]), &deadline());
    assert_eq!(endless.unwrap(), vec![0; 150_000]);
}

#[test]
fn manifests_and_tokens_are_bounded() {
    let large = Server::start(|_| Answer::new(200, vec![b' '; 10 << 20]));
    let endless = Server::start(|_| Answer::new(200, vec![b' '; 1 << 16]).end(End::Endless));
    for server in [&large, &endless] {
        let error = session(server, keyring(&[])).manifest("1", None, &deadline()).map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("4096 KiB"), "{error}");
    }
    let token = Server::start(|asked| match asked.path.starts_with("/token") {
        true => Answer::new(200, vec![b' '; 1 << 16]).end(End::Endless),
        false => Answer::new(401, "").header("WWW-Authenticate", "Bearer realm=/token"),
    });
    let error = session(&token, keyring(&[])).manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("256 KiB"), "{error}");
}

#[test]
fn silent_server_is_left_in_time() {
    let server = Server::start(|_| Answer::new(200, content()).end(End::StallAt(1000)));
    let idle = Duration::from_millis(50);
    let all = session_of(&[&server], keyring(&[]), idle);
    let begun = Instant::now();
    let soon = PrepareDeadline::new(Duration::from_millis(700), None);
    let error = read(&all, &blob_of(&content()), &soon).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(server.asked().len() > 1, "it was asked anew after the idle time");
    // With a longer deadline the attempts end it.
    let error = read(&all, &blob_of(&content()), &deadline()).unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("byte 1000"), "{error}");
}

#[test]
fn cancelled_pull_leaves_a_silent_server() {
    let token = CancelToken::new().unwrap();
    let cancelled = token.clone();
    let server = Server::start(move |_| {
        cancelled.cancel();
        Answer::new(200, content()).end(End::StallAt(0))
    });
    let temp = Temp::new("cancel");
    let registry = super::super::Registry::new().plain_http(&server.name()).cancel(&token).cache_dir(&temp.0);
    let begun = Instant::now();
    let error = registry.pulled(format!("{}/a/b:1", server.name()).parse().unwrap()).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let late = super::super::Registry::new().plain_http(&server.name()).cache_dir(&temp.0);
    let late = late.timeout(Duration::from_millis(100)).pulled(format!("{}/a/b:1", server.name()).parse().unwrap());
    let error = late.map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("Registry::timeout"), "{error}");
}

#[test]
fn busy_registry_is_asked_again_when_it_says() {
    let wait = Answer::new(429, "").header("Retry-After", "1");
    let server = Server::start(by_turns(vec![wait, Answer::new(503, ""), Answer::new(200, "content")]));
    let begun = Instant::now();
    let found = session(&server, keyring(&[])).manifest("1", None, &deadline()).unwrap();
    assert_eq!(found.bytes, b"content");
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(server.asked().len(), 3);
}

#[test]
fn rate_limit_is_named_with_the_words_of_the_registry() {
    let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#;
    let server = Server::start(move |_| Answer::new(429, body).header("Retry-After", "3600"));
    let begun = Instant::now();
    let error = session(&server, keyring(&[])).manifest("1", None, &deadline()).map(drop).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(text.contains("rate limit") && text.contains("You have reached") && text.contains("3600 s"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(20) && server.asked().len() == 1, "it is not waited for so long");
}

#[test]
fn pause_that_a_mirror_asks_for_holds_up_no_other_server() {
    for seconds in ["3600", "30"] {
        let mirror = Server::start(move |_| Answer::new(429, "").header("Retry-After", seconds));
        let server = Server::start(|_| Answer::new(200, "content"));
        let both = session_of(&[&mirror, &server], keyring(&[]), LONG);
        // It is shorter than either pause.
        let deadline = PrepareDeadline::fixed(std::time::Duration::from_secs(20), "late");
        assert_eq!(read(&both, &blob_of(b"content"), &deadline).unwrap(), b"content", "{seconds}");
        assert_eq!((mirror.asked().len(), server.asked().len()), (1, 1));
    }
}

#[test]
fn registry_that_is_not_there_is_an_error() {
    let gone = Server::start(|_| Answer::new(200, ""));
    let all = session_of(&[&gone], keyring(&[]), LONG);
    let name = gone.name();
    drop(gone);
    let error = all.manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert!(error.to_string().contains(&name) && error.to_string().contains("refused"), "{error}");
}
