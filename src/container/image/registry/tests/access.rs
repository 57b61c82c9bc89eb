//! Authentication, redirects, mirrors and plain HTTP.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::error::ErrorKind;

/// A registry that wants a token of its own service, which gives `token-1`, `token-2` and so on.
fn token_registry(valid: Arc<AtomicU32>) -> Server {
    let given = AtomicU32::new(0);
    Server::start(move |asked| {
        let host = asked.header("host").unwrap().to_owned();
        if asked.path.starts_with("/token") {
            let n = given.fetch_add(1, Ordering::Relaxed) + 1;
            return Answer::new(200, format!(r#"{{"token":"token-{n}","expires_in":300}}"#));
        }
        let wanted = format!("Bearer token-{}", valid.load(Ordering::Relaxed));
        if asked.header("authorization") == Some(&wanted) {
            return Answer::new(200, "content");
        }
        let challenge = format!(r#"Bearer realm="http://{host}/token",service="s",scope="repository:a/b:pull""#);
        Answer::new(401, "").header("WWW-Authenticate", "Negotiate").header("WWW-Authenticate", challenge)
    })
}

fn paths(asked: &[Asked]) -> Vec<&str> {
    asked.iter().map(|it| it.path.split('?').next().unwrap()).collect()
}

#[test]
fn token_is_got_once_and_renewed_when_it_is_refused() {
    let valid = Arc::new(AtomicU32::new(1));
    let server = token_registry(valid.clone());
    let session = session(&server, keyring(&[]));
    for _ in 0..2 {
        assert_eq!(session.manifest("1", None, &deadline()).unwrap().bytes, b"content");
    }
    let asked = server.asked();
    let manifest = "/v2/a/b/manifests/1";
    assert_eq!(paths(&asked), [manifest, "/token", manifest, manifest]);
    assert_eq!(asked[1].path, "/token?scope=repository%3Aa%2Fb%3Apull&service=s");
    assert_eq!(asked[1].header("authorization"), None, "it is asked without a name");
    assert!(asked[0].header("accept").unwrap().contains("application/vnd.oci.image.index.v1+json"));
    // The registry forgets the token before its time.
    valid.store(2, Ordering::Relaxed);
    let blob = blob_of(b"content");
    assert_eq!(read(&session, &blob, &deadline()).unwrap(), b"content");
    assert_eq!(paths(&server.asked())[1], "/token");
    // One that no token is good enough for.
    valid.store(99, Ordering::Relaxed);
    let error = session.manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    assert_eq!(server.asked().len(), 3, "it is not asked for ever");
}

#[test]
fn token_service_is_given_the_credentials_in_the_form_it_knows() {
    let post_only = Arc::new(AtomicBool::new(false));
    let only = post_only.clone();
    let server = Server::start(move |asked| {
        if asked.path.starts_with("/token") {
            if only.load(Ordering::Relaxed) && asked.method == "GET" {
                return Answer::new(405, "");
            }
            return Answer::new(200, r#"{"access_token":"t"}"#);
        }
        match asked.header("authorization") {
            Some("Bearer t") => Answer::new(200, "content"),
            _ => Answer::new(401, "").header("WWW-Authenticate", r#"Bearer realm="/token",service="s""#),
        }
    });
    let name = server.name();
    let ask = |credentials| {
        session(&server, keyring(&[(&name, credentials)])).manifest("1", None, &deadline()).unwrap();
        server.asked()
    };
    let asked = ask(Credentials::basic("u", "p"));
    assert_eq!((asked[1].method.as_str(), asked[1].header("authorization")), ("GET", Some("Basic dTpw")));
    let asked = ask(Credentials::identity_token("id"));
    assert_eq!(asked[1].method, "POST");
    assert!(asked[1].body.starts_with("grant_type=refresh_token&refresh_token=id&"), "{}", asked[1].body);
    post_only.store(true, Ordering::Relaxed);
    let asked = ask(Credentials::basic("u", "p"));
    assert_eq!((asked[1].method.as_str(), asked[2].method.as_str()), ("GET", "POST"));
    assert!(asked[2].body.starts_with("grant_type=password&username=u&password=p&"), "{}", asked[2].body);
    let asked = ask(Credentials::registry_token("t"));
    assert_eq!(asked.len(), 2, "the registry itself takes it");
}

#[test]
fn refused_credentials_are_never_shown() {
    let server = Server::start(|asked| {
        let said = format!(r#"{{"errors":[{{"code":"DENIED","message":"{:?} hunter2"}}]}}"#, asked.headers);
        match asked.path.contains("forbidden") && asked.header("authorization").is_some() {
            true => Answer::new(403, said),
            false => Answer::new(401, said).header("WWW-Authenticate", "Basic realm=\"r\""),
        }
    });
    let name = server.name();
    let secret = keyring(&[(&name, Credentials::basic("u", "hunter2"))]);
    assert!(!format!("{secret:?}").contains("hunter2"));
    for (of, times) in [("1", 2), ("forbidden", 2)] {
        let error = session(&server, secret.clone()).manifest(of, None, &deadline()).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let text = format!("{error} {error:?}");
        assert!(!text.contains("hunter2") && !text.contains("dTpodW50ZXIy"), "{text}");
        assert!(text.contains(&name), "{text}");
        assert_eq!(server.asked().len(), times);
    }
    let error = session(&server, keyring(&[])).manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert!(error.to_string().contains("`Registry::credentials`"), "{error}");
}

#[test]
fn credentials_do_not_follow_a_redirect_to_another_host() {
    let elsewhere = Server::start(|_| Answer::new(200, "content"));
    let to = elsewhere.name();
    let server = Server::start(move |asked| match (asked.header("authorization"), asked.path.as_str()) {
        (None, _) => Answer::new(401, "").header("WWW-Authenticate", "Basic realm=x"),
        (_, "/v2/a/b/manifests/1") => Answer::new(307, "").header("Location", "/v2/a/b/manifests/2"),
        _ => Answer::new(307, "").header("Location", format!("http://{to}/blob?signature=hunter3")),
    });
    let name = server.name();
    let given = keyring(&[(&name, Credentials::basic("u", "hunter2"))]);
    let all = session_of(&[&elsewhere, &server], given.clone(), LONG);
    all.prefer(1);
    assert_eq!(read(&all, &blob_of(b"content"), &deadline()).unwrap(), b"content");
    let asked = elsewhere.asked();
    assert_eq!((asked.len(), asked[0].path.as_str()), (1, "/blob?signature=hunter3"));
    assert_eq!(asked[0].header("authorization"), None);
    assert!(server.asked().iter().skip(1).all(|it| it.header("authorization").is_some()));
    // On the same host they do.
    all.manifest("1", None, &deadline()).unwrap();
    assert!(server.asked().iter().filter(|it| it.header("authorization").is_some()).count() >= 2);
    // Where it leads to a host that plain HTTP is not allowed with, it is not followed.
    let alone = session(&server, given);
    elsewhere.asked();
    let error = alone.manifest("2", None, &deadline()).map(drop).unwrap_err();
    assert!(error.to_string().contains("`Registry::plain_http`"), "{error}");
    assert!(!error.to_string().contains("hunter3"), "{error}");
    assert!(elsewhere.asked().is_empty());
}

#[test]
fn host_behind_a_redirect_that_wants_credentials_gets_none() {
    let greedy = Server::start(|_| Answer::new(401, "").header("WWW-Authenticate", "Basic realm=x"));
    let to = greedy.name();
    let server = Server::start(move |_| Answer::new(302, "").header("Location", format!("http://{to}/x")));
    let names = [server.name(), greedy.name()];
    let given: Vec<_> = names.iter().map(|name| (name.as_str(), Credentials::basic("u", "p"))).collect();
    let all = session_of(&[&greedy, &server], keyring(&given), LONG);
    all.prefer(1);
    assert!(all.blob(1, &Digest::sha256(b""), None, &deadline()).is_err());
    assert!(greedy.asked().iter().all(|it| it.header("authorization").is_none()));
}

#[test]
fn redirects_in_a_circle_end() {
    let server = Server::start(|asked| Answer::new(301, "").header("Location", asked.path.clone()));
    let error = session(&server, keyring(&[])).manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("redirects"), "{error}");
    assert_eq!(server.asked().len(), 11);
}

#[test]
fn mirrors_are_asked_first_and_the_registry_last() {
    let digest = Digest::sha256(b"content");
    let mirror = Server::start(|asked| match asked.path.contains("/manifests/") {
        true => Answer::new(200, "another"),
        false => Answer::new(404, ""),
    });
    let server = Server::start(|_| Answer::new(200, "content"));
    let all = session_of(&[&mirror, &server], keyring(&[]), LONG);
    let text = digest.to_string();
    assert_eq!(all.manifest(&text, Some(&digest), &deadline()).unwrap().bytes, b"content");
    assert_eq!((mirror.asked().len(), server.asked().len()), (1, 1), "what a mirror gives is checked");
    all.prefer(0);
    assert_eq!(read(&all, &blob_of(b"content"), &deadline()).unwrap(), b"content");
    assert_eq!((mirror.asked().len(), server.asked().len()), (1, 1));
    // The registry is preferred now.
    assert_eq!(read(&all, &blob_of(b"content"), &deadline()).unwrap(), b"content");
    assert_eq!((mirror.asked().len(), server.asked().len()), (0, 1));
}

#[test]
fn tls_to_a_server_of_plain_http_names_the_setting() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        // Until the client ends: data that was not read would end the connection with a reset.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let endpoint = Endpoint::of(&format!("{name}/a/b:1").parse().unwrap(), &PlainHosts::default()).unwrap();
    let client = HttpFetcher::new(&[], Proxies::new(|_| None), LONG).unwrap();
    let session = Session::new(Arc::new(client), vec![endpoint], "a/b", keyring(&[]), PlainHosts::default());
    let error = session.manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert!(error.to_string().contains("`Registry::plain_http` allows it"), "{error}");
    drop(session);
    server.join().unwrap();
}

#[test]
fn image_that_is_not_there_is_named() {
    let server =
        Server::start(|_| Answer::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#));
    let error = session(&server, keyring(&[])).manifest("1", None, &deadline()).map(drop).unwrap_err();
    let text = error.to_string();
    assert!(error.kind() == ErrorKind::NotFound && text.contains("MANIFEST_UNKNOWN") && text.contains("a/b"), "{text}");
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn proxy_of_the_environment_is_asked_to_connect() {
    let proxy = Server::start(|_| Answer::new(403, "hunter2"));
    let address = format!("http://u:hunter2@{}", proxy.name());
    let proxies = Proxies::new(|name| (name == "HTTP_PROXY").then(|| address.clone()));
    let plain = PlainHosts(vec!["r.example".into()]);
    let endpoint = Endpoint::of(&"r.example/a/b:1".parse().unwrap(), &plain).unwrap();
    let client = HttpFetcher::new(&[], proxies, LONG).unwrap();
    let session = Session::new(Arc::new(client), vec![endpoint], "a/b", keyring(&[]), plain);
    let error = session.manifest("1", None, &deadline()).map(drop).unwrap_err();
    assert!(!error.to_string().contains("hunter2"), "{error}");
    let asked = proxy.asked();
    assert_eq!((asked[0].method.as_str(), asked[0].path.as_str()), ("CONNECT", "r.example:80"));
    assert_eq!(asked[0].header("proxy-authorization"), Some("Basic dTpodW50ZXIy"));
}
