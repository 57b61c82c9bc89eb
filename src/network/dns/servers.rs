//! [`Servers`]: who the host asks for names: `/etc/resolv.conf`, read again when it changes.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// No more than resolvers use themselves (resolv.conf(5), MAXNS).
const MAX_SERVERS: usize = 3;
/// More than any such file has.
const MAX_FILE: u64 = 64 << 10;
/// How often the file and the host's routes are looked at, at most.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
const PORT: u16 = 53;

/// The host's resolvers, and whether the host has a way out.
#[derive(Debug)]
pub(crate) struct Servers {
    /// `None`: they were given.
    file: Option<PathBuf>,
    changed: Option<SystemTime>,
    looked: Option<Instant>,
    all: Vec<SocketAddr>,
    /// Some family has a way out.
    way_out: bool,
}

/// Addresses of documentation (RFC 5737, RFC 3849), which no host has. Nothing is sent to find a route.
const SOMEWHERE: (&str, &str) = ("192.0.2.1", "2001:db8::1");

fn routed(from: &str, to: &str) -> bool {
    UdpSocket::bind((from, 0)).and_then(|socket| socket.connect((to, 9))).is_ok()
}

/// The addresses after `nameserver` (resolv.conf(5)).
fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()).flatten().and_then(|w| w.parse::<IpAddr>().ok())
    };
    text.lines().filter_map(server).take(MAX_SERVERS).map(|address| (address, PORT).into()).collect()
}

impl Servers {
    /// Those that are given, or else those of the host.
    pub(crate) fn new(given: Option<Vec<SocketAddr>>) -> Self {
        let file = given.is_none().then(|| PathBuf::from("/etc/resolv.conf"));
        Self { file, changed: None, looked: None, all: given.unwrap_or_default(), way_out: true }
    }

    /// Who to ask, in their order.
    pub(crate) fn all(&mut self, now: Instant) -> &[SocketAddr] {
        self.look(now);
        &self.all
    }

    /// Whether the host has a way out, by any family. Without one, addresses that lead nowhere are as good as any.
    pub(crate) fn way_out(&mut self, now: Instant) -> bool {
        self.look(now);
        self.way_out
    }

    #[cfg(test)]
    pub(crate) fn pretend(&mut self, way_out: bool, now: Instant) {
        (self.way_out, self.looked) = (way_out, Some(now + Duration::from_secs(1 << 30)));
    }

    fn look(&mut self, now: Instant) {
        if self.looked.is_some_and(|at| now < at + REFRESH_INTERVAL) {
            return;
        }
        self.looked = Some(now);
        self.way_out = routed("0.0.0.0", SOMEWHERE.0) || routed("::", SOMEWHERE.1);
        let Some(path) = &self.file else { return };
        let changed = fs::metadata(path).and_then(|m| m.modified()).ok();
        if changed.is_some() && changed == self.changed {
            return;
        }
        let mut text = Vec::new();
        match fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text)) {
            Ok(_) => (self.all, self.changed) = (parse(&String::from_utf8_lossy(&text)), changed),
            // What was read before is more likely right than nothing.
            Err(error) => log::warn!("the host's resolvers are not known: reading {}: {error}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_file_is_read_again_when_it_changes() {
        let path = std::env::temp_dir().join(format!("resolv.conf.{}", std::process::id()));
        fs::write(&path, "# a comment\nsearch x.y\nnameserver 192.0.2.53\nnameserver fd00::53 \nnameserver nonsense\n")
            .unwrap();
        let mut servers = Servers { file: Some(path.clone()), ..Servers::new(None) };
        let now = Instant::now();
        let expected = ["192.0.2.53:53".parse().unwrap(), "[fd00::53]:53".parse().unwrap()];
        assert_eq!(servers.all(now), expected);
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"nameserver 192.0.2.54\n").unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(9)).unwrap();
        assert_eq!(servers.all(now), expected);
        assert_eq!(servers.all(now + REFRESH_INTERVAL), ["192.0.2.54:53".parse().unwrap()]);
        fs::remove_file(&path).unwrap();
        assert_eq!(servers.all(now + REFRESH_INTERVAL * 2), ["192.0.2.54:53".parse().unwrap()]);
    }
}
