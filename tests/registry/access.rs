//! Registries that ask who it is: over TLS, by a password file, and by tokens behind a proxy.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use cofferdam::ErrorKind;
use cofferdam::image::{Credentials, Registry};

use super::{Server, Temp, layout, push, run};

/// Makes `name.key` and `name.crt` in the directory: an authority's, or signed by the authority of that name.
fn certificate(temp: &Temp, name: &str, algorithm: &[&str], authority: Option<&str>) {
    let path = |name: &str| temp.path(name).to_str().unwrap().to_owned();
    let (key, crt, subject) = (path(&format!("{name}.key")), path(&format!("{name}.crt")), format!("/CN={name}"));
    let mut arguments = vec!["req", "-x509", "-nodes", "-days", "30", "-keyout", &key, "-out", &crt, "-subj", &subject];
    arguments.extend(algorithm);
    let Some(authority) = authority else {
        run("openssl", &arguments);
        return;
    };
    let request = path(&format!("{name}.csr"));
    let arguments = [&["req", "-nodes", "-new", "-keyout", &key, "-out", &request, "-subj", &subject][..], algorithm];
    run("openssl", &arguments.concat());
    let extensions = path("extensions");
    fs::write(&extensions, "subjectAltName=IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n").unwrap();
    let (ca, ca_key) = (path(&format!("{authority}.crt")), path(&format!("{authority}.key")));
    let arguments = ["x509", "-req", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial"];
    run("openssl", &[&arguments[..], &["-days", "30", "-extfile", &extensions, "-out", &crt]].concat());
}

const EC: &[&str] = &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
const RSA: &[&str] = &["-newkey", "rsa:2048"];

#[test]
fn users_of_a_password_file_are_let_in_by_tls() {
    let temp = Temp::new("tls");
    let own_name = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"];
    certificate(&temp, "server", &[EC, &own_name].concat(), None);
    let users = temp.path("users");
    fs::write(&users, run("htpasswd", &["-nbB", "me", "hunter2"])).unwrap();
    let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}", users.display());
    let server = Server::start(&temp, &auth);
    push(&layout(&temp, "one", &[("a", "1")]), &server, "app:1", &["--dest-creds", "me:hunter2"]);
    let name = format!("{}/app:1", server.name);
    let base = || Registry::new().cache_dir(temp.path("cache")).user_credentials(false);
    let error = base().pull(&name).map(drop).unwrap_err();
    assert!(error.to_string().contains("`Registry::ca_certificates`"), "{error}");

    let trusted = || base().ca_certificates(fs::read(temp.path("server.crt")).unwrap());
    let denied = |registry: Registry| {
        let error = registry.pull(&name).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(!error.to_string().contains("hunter"), "{error}");
    };
    denied(trusted());
    denied(trusted().credentials(&server.name, Credentials::basic("me", "hunter3")));
    trusted().credentials(&server.name, Credentials::basic("me", "hunter2")).pull(&name).unwrap().prepare().unwrap();
    let own = server.name.clone();
    let by_callback =
        trusted().credentials_with(move |name| Ok((name == own).then(|| Credentials::basic("me", "hunter2"))));
    by_callback.cache_dir(temp.path("other")).pull(&name).unwrap().prepare().unwrap();
    let error = base().ca_certificates("none").pull(&name).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
}

/// A request of the token server: its path with its query, and whose it was.
#[derive(Debug, Clone, PartialEq)]
struct Asked {
    path: String,
    user: Option<String>,
}

/// What signs tokens for a registry: distribution's token specification.
struct TokenServer {
    port: u16,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl TokenServer {
    /// Serves until the test's process ends. It knows one user, and others may pull what is in `public/`.
    fn start(temp: &Temp) -> Self {
        certificate(temp, "signer", RSA, None);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, asked) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new(Vec::new())));
        let (log, directory) = (asked.clone(), temp.0.clone());
        std::thread::spawn(move || listener.incoming().flatten().for_each(|it| answer(it, &log, &directory)));
        Self { port, asked }
    }

    fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// Answers one request, and closes the connection.
fn answer(mut stream: TcpStream, asked: &Mutex<Vec<Asked>>, directory: &Path) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let path = lines.next().and_then(|line| line.split(' ').nth(1).map(str::to_owned)).unwrap_or_default();
    let basic = lines.find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        let value = value.strip_prefix("Basic ").filter(|_| name.eq_ignore_ascii_case("authorization"))?;
        String::from_utf8(STANDARD.decode(value).ok()?).ok()
    });
    let user = basic.as_deref().and_then(|pair| pair.split_once(':')).map(|(user, _)| user.to_owned());
    asked.lock().unwrap().push(Asked { path: path.clone(), user });
    // `repository:team/app:pull,push`, in which `%3A` and so on may stand.
    let path = path.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",");
    let scope = path.split(['?', '&']).find_map(|part| part.strip_prefix("scope=")).unwrap_or_default();
    let [kind, name, actions] = scope.split(':').collect::<Vec<_>>()[..] else {
        return respond(&mut stream, "400 Bad Request", "{}");
    };
    let granted = match basic.as_deref() {
        Some("me:hunter2") => actions,
        None if name.starts_with("public/") => "pull",
        _ => return respond(&mut stream, "401 Unauthorized", r#"{"details":"incorrect username or password"}"#),
    };
    let actions = granted.split(',').map(|action| format!("{action:?}")).collect::<Vec<_>>().join(",");
    let access = format!(r#"[{{"type":"{kind}","name":"{name}","actions":[{actions}]}}]"#);
    let token = token(directory, &access);
    respond(&mut stream, "200 OK", &format!(r#"{{"token":"{token}","expires_in":300}}"#));
}

fn respond(stream: &mut TcpStream, status: &str, body: &str) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n");
    // A client that is gone has its answer no more.
    let _ = stream.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes());
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

/// A JSON web token with these rights, signed by the key of `signer.crt`.
fn token(directory: &Path, access: &str) -> String {
    let certificate = fs::read_to_string(directory.join("signer.crt")).unwrap();
    let der: String = certificate.lines().filter(|line| !line.starts_with("-----")).collect();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let head = format!(r#"{{"typ":"JWT","alg":"RS256","x5c":["{der}"]}}"#);
    let claims = format!(
        r#"{{"iss":"signer","sub":"me","aud":"registry","exp":{},"nbf":{},"iat":{now},"jti":"1","access":{access}}}"#,
        now + 300,
        now - 10
    );
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(head), URL_SAFE_NO_PAD.encode(claims));
    let key = directory.join("signer.key");
    let mut child = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign", key.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(signed.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(output.stdout))
}

/// nginx, which ends TLS for a registry and a token server.
struct Proxy {
    child: Child,
    /// Requests and how they were answered, one a line.
    log: std::path::PathBuf,
}

impl Proxy {
    /// Listens on `port`, with the certificate `server.crt`.
    fn start(temp: &Temp, port: u16, registry: &str, tokens: u16) -> Self {
        let (directory, log) = (temp.0.display(), temp.path("access.log"));
        let config = format!(
            r#"
daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; worker_processes 1; {}
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    log_format short '$request_method $uri $status';
    access_log {} short;
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {directory}/server.crt; ssl_certificate_key {directory}/server.key;
        location /v2/ {{
            proxy_pass http://{registry};
            proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto https;
        }}
        location /token {{ proxy_pass http://127.0.0.1:{tokens}; }}
    }}
}}
"#,
            if run("id", &["-u"]).trim() == "0" { "user root;" } else { "" },
            log.display()
        );
        let file = temp.path("nginx.conf");
        fs::write(&file, config).unwrap();
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
        let mut child = Command::new("nginx")
            .env("PATH", path)
            .args(["-p", temp.0.to_str().unwrap(), "-c", file.to_str().unwrap(), "-e", "stderr"])
            .spawn()
            .unwrap_or_else(|error| panic!("nginx: {error}: run `make setup`"));
        let late = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = child.try_wait().unwrap();
            let said = || fs::read_to_string(temp.path("error.log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < late, "nginx does not listen: {ended:?} {}", said());
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, log }
    }

    /// The requests since the last call.
    fn take(&self) -> Vec<String> {
        let lines = fs::read_to_string(&self.log).unwrap().lines().map(str::to_owned).collect();
        fs::write(&self.log, "").unwrap();
        lines
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // By its signal its workers end with it.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

#[test]
fn tokens_of_a_server_behind_a_proxy_with_tls_let_in() {
    let temp = Temp::new("proxy");
    certificate(&temp, "authority", EC, None);
    certificate(&temp, "proxied", EC, Some("authority"));
    let tokens = TokenServer::start(&temp);
    // Free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let auth = format!(
        "auth:\n  token:\n    realm: https://127.0.0.1:{port}/token\n    service: registry\n    issuer: signer\n    rootcertbundle: {}",
        temp.path("signer.crt").display()
    );
    let server = Server::start(&temp, &auth);
    for kind in ["key", "crt"] {
        fs::rename(temp.path(&format!("proxied.{kind}")), temp.path(&format!("server.{kind}"))).unwrap();
    }
    let proxy = Proxy::start(&temp, port, &server.name, tokens.port);
    let host = format!("127.0.0.1:{port}");

    // Another client gets in so, which is how the images come there.
    let certificates = temp.path("certificates");
    fs::create_dir(&certificates).unwrap();
    fs::copy(temp.path("authority.crt"), certificates.join("ca.crt")).unwrap();
    let one = layout(&temp, "one", &[("a", "1"), ("b", "2")]);
    for name in ["team/app:1", "public/app:1"] {
        let (from, to) = (format!("oci:{}:1", one.display()), format!("docker://{host}/{name}"));
        let certificates = format!("--dest-cert-dir={}", certificates.display());
        run("skopeo", &["copy", "--quiet", "--all", &certificates, "--dest-creds", "me:hunter2", &from, &to]);
    }
    let pushed = tokens.take();
    assert!(pushed.iter().any(|it| it.user.as_deref() == Some("me")), "{pushed:?}");
    proxy.take();

    let registry = |cache: &str| {
        let authority = fs::read(temp.path("authority.crt")).unwrap();
        Registry::new().cache_dir(temp.path(cache)).user_credentials(false).ca_certificates(authority)
    };
    let mine = Credentials::basic("me", "hunter2");
    let name = format!("{host}/team/app:1");
    registry("mine").credentials(&host, mine.clone()).pull(&name).unwrap().prepare().unwrap();
    let asked = tokens.take();
    // One token serves for all of a pull, and says what it is for.
    assert_eq!(asked.len(), 1, "{asked:?}");
    let path = asked[0].path.replace("%3A", ":").replace("%2F", "/");
    assert!(path.contains("service=registry") && path.contains("scope=repository:team/app:pull"), "{path}");
    assert_eq!(asked[0].user.as_deref(), Some("me"));
    let lines = proxy.take();
    let count = |part: &str, status: &str| lines.iter().filter(|it| it.contains(part) && it.ends_with(status)).count();
    // It was refused once, and once it had the token never again.
    assert_eq!((count("/v2/", " 401"), count("/token", " 200")), (1, 1), "{lines:?}");
    assert_eq!(count("/v2/team/app/blobs/", " 200"), 3, "{lines:?}");

    // What is public needs no password. A token for it is none for the rest.
    let public = format!("{host}/public/app:1");
    registry("public").pull(&public).unwrap().prepare().unwrap();
    assert!(tokens.take().iter().all(|it| it.user.is_none() && it.path.contains("public")));
    for credentials in [None, Some(Credentials::basic("me", "hunter3")), Some(Credentials::basic("you", "hunter2"))] {
        let registry = match credentials {
            Some(credentials) => registry("none").credentials(&host, credentials),
            None => registry("none"),
        };
        let error = registry.pull(&name).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(!error.to_string().contains("hunter"), "{error}");
        assert!(!tokens.take().is_empty(), "the token server was not asked");
    }
    // Without its authority the proxy is not trusted, and learns nothing.
    // It writes its log once it has answered.
    while !proxy.take().is_empty() {
        std::thread::sleep(Duration::from_millis(200));
    }
    let error = Registry::new().cache_dir(temp.path("none")).user_credentials(false).credentials(&host, mine);
    let error = error.pull(&name).map(drop).unwrap_err();
    assert!(error.to_string().contains("`Registry::ca_certificates`"), "{error}");
    assert_eq!((tokens.take(), proxy.take()), (Vec::new(), Vec::new()));
}
