//! Whom a connection is for: the host of a first HTTP request (RFC 9112), or the server name of a TLS ClientHello (RFC 8446,
//! RFC 6066). A caller may send anything.

/// What the first bytes of a connection are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Http,
    Tls,
}

/// What they say so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// It is not all there yet.
    More,
    /// The name, in small letters.
    Name(String),
    /// It is complete and has no name.
    Unnamed,
    /// It is not what it should be.
    Bad,
}

/// No head is longer.
pub(crate) const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

impl Kind {
    pub(crate) fn of(first: u8) -> Self {
        if first == HANDSHAKE { Self::Tls } else { Self::Http }
    }

    /// Whom it is for.
    pub(crate) fn find(self, bytes: &[u8]) -> Found {
        let found = match self {
            Self::Http => http(bytes),
            Self::Tls => tls(bytes).unwrap_or_else(|found| found),
        };
        if found == Found::More && bytes.len() >= MAX_HEAD { Found::Bad } else { found }
    }
}

fn http(bytes: &[u8]) -> Found {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Found::More,
        Err(_) => return Found::Bad,
    }
    // Other forms of targets are for proxies, and would name a host a second time.
    if !request.path.is_some_and(|path| path.starts_with('/') || path == "*") {
        return Found::Bad;
    }
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => {
            let host = std::str::from_utf8(host.value).unwrap_or_default();
            let (name, port) = host.rsplit_once(':').unwrap_or((host, "0"));
            if port.parse::<u16>().is_err() {
                return Found::Bad;
            }
            name_of(name.strip_suffix('.').unwrap_or(name).as_bytes())
        }
        (None, _) => Found::Unnamed,
        _ => Found::Bad,
    }
}

/// A host's name as there can be one in the DNS.
fn name_of(bytes: &[u8]) -> Found {
    let label = |label: &[u8]| {
        (1..=63).contains(&label.len()) && label.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    if bytes.len() > 253 || !bytes.split(|&b| b == b'.').all(label) {
        return Found::Bad;
    }
    Found::Name(String::from_utf8_lossy(bytes).to_ascii_lowercase())
}

/// RFC 8446, 5.1: the type of a record.
const HANDSHAKE: u8 = 22;
/// RFC 8446, 4: the type of a message.
const CLIENT_HELLO: u8 = 1;
/// RFC 6066, 3.
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// Bytes that are taken off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(n)?;
        self.0 = later;
        Some(now)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// A vector whose length comes before it, in so many bytes.
    fn vector(&mut self, bytes: usize) -> Option<Reader<'a>> {
        let len = self.number(bytes)?;
        self.take(len).map(Reader)
    }
}

fn tls(bytes: &[u8]) -> Result<Found, Found> {
    // Its records, put together.
    let (mut records, mut hello) = (Reader(bytes), Vec::new());
    let whole = |hello: &[u8]| Some(4 + Reader(hello.get(1..)?).number(3)?);
    while whole(&hello).is_none_or(|len| hello.len() < len) {
        let kind = records.number(1).ok_or(Found::More)?;
        let version = records.number(1).ok_or(Found::More)?;
        if (kind, version) != (HANDSHAKE.into(), 3) {
            return Err(Found::Bad);
        }
        records.number(1).ok_or(Found::More)?;
        let fragment = records.vector(2).ok_or(Found::More)?.0;
        if fragment.is_empty() {
            return Err(Found::Bad);
        }
        hello.extend_from_slice(fragment);
        if hello.first() != Some(&CLIENT_HELLO) || whole(&hello).is_some_and(|len| len > MAX_HEAD) {
            return Err(Found::Bad);
        }
    }
    let mut message = Reader(&hello);
    message.take(1);
    server_name(message.vector(3).ok_or(Found::Bad)?).ok_or(Found::Bad)
}

/// RFC 8446, 4.1.2.
fn server_name(mut hello: Reader<'_>) -> Option<Found> {
    // Version and random.
    hello.take(2 + 32)?;
    let (_session, _suites, _compression) = (hello.vector(1)?, hello.vector(2)?, hello.vector(1)?);
    if hello.0.is_empty() {
        return Some(Found::Unnamed);
    }
    let mut extensions = hello.vector(2)?;
    let mut found = Found::Unnamed;
    while !extensions.0.is_empty() {
        let (kind, mut extension) = (extensions.number(2)?, extensions.vector(2)?);
        if kind != usize::from(SERVER_NAME) {
            continue;
        }
        let mut list = extension.vector(2)?;
        let (kind, name) = (list.number(1)?, list.vector(2)?);
        // One name, once.
        if kind != usize::from(HOST_NAME) || !list.0.is_empty() || !extension.0.is_empty() || found != Found::Unnamed {
            return None;
        }
        found = name_of(name.0);
    }
    hello.0.is_empty().then_some(found)
}
