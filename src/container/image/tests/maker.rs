//! Makes archives of any kind, right or wrong.

/// One header with its data.
#[derive(Clone)]
pub(crate) struct Made {
    pub path: Vec<u8>,
    pub typeflag: u8,
    pub link: Vec<u8>,
    pub data: Vec<u8>,
    pub mode: u32,
    pub owner: (u64, u64),
    pub mtime: i64,
    pub device: (u32, u32),
    pub magic: [u8; 8],
    /// Of an extended header before it.
    pub pax: Vec<(String, Vec<u8>)>,
    /// What stands in fields of GNU's sparse format: pieces, and the real size.
    pub sparse: Option<(Vec<(u64, u64)>, u64)>,
}

pub(crate) const GNU: [u8; 8] = *b"ustar  \0";
pub(crate) const USTAR: [u8; 8] = *b"ustar\x0000";
pub(crate) const V7: [u8; 8] = [0; 8];

impl std::fmt::Debug for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy;
        let kind = char::from(self.typeflag).escape_default();
        write!(f, "[{kind} {} -> {} {:o} {}", text(&self.path), text(&self.link), self.mode, self.mtime)?;
        self.pax.iter().try_for_each(|(key, value)| write!(f, " {key}={}", text(value)))?;
        write!(f, "]")
    }
}

impl Made {
    fn new(path: impl AsRef<[u8]>, typeflag: u8) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            typeflag,
            link: Vec::new(),
            data: Vec::new(),
            mode: 0o640,
            owner: (1000, 1001),
            mtime: 1_600_000_000,
            device: (1, 3),
            magic: GNU,
            pax: Vec::new(),
            sparse: None,
        }
    }

    pub fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(path, b'0') }
    }

    pub fn directory(path: impl AsRef<[u8]>) -> Self {
        Self { mode: 0o750, ..Self::new(path, b'5') }
    }

    pub fn symlink(path: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Self {
        Self { link: to.as_ref().to_vec(), ..Self::new(path, b'2') }
    }

    pub fn link(path: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Self {
        Self { link: to.as_ref().to_vec(), ..Self::new(path, b'1') }
    }

    pub fn device(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, b'3')
    }

    pub fn fifo(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, b'6')
    }

    /// The same with a record in an extended header.
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    pub fn of_type(mut self, typeflag: u8) -> Self {
        self.typeflag = typeflag;
        self
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn at(mut self, mtime: i64) -> Self {
        self.mtime = mtime;
        self
    }

    pub fn magic(mut self, magic: [u8; 8]) -> Self {
        self.magic = magic;
        self
    }

    pub fn sparse(mut self, pieces: &[(u64, u64)], size: u64) -> Self {
        self.sparse = Some((pieces.to_vec(), size));
        self.of_type(b'S')
    }

    fn append_to(&self, archive: &mut Vec<u8>) {
        if !self.pax.is_empty() {
            let records: Vec<u8> = self.pax.iter().flat_map(|(key, value)| record(key, value)).collect();
            Self { data: records, ..Self::new("pax", b'x') }.append_to(archive);
        }
        for (long, typeflag) in [(&self.path, b'L'), (&self.link, b'K')] {
            if long.len() > 100 {
                Self { data: [long, &[0][..]].concat(), ..Self::new("././@LongLink", typeflag) }.append_to(archive);
            }
        }
        let mut header = [0; 512];
        let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
        put(0, &self.path[..self.path.len().min(100)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, &number(self.owner.0 as i64, 8));
        put(116, &number(self.owner.1 as i64, 8));
        put(124, &number(self.data.len() as i64, 12));
        put(136, &number(self.mtime, 12));
        put(148, b"        ");
        put(156, &[self.typeflag]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, &self.magic);
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        let pieces: Vec<[u8; 24]> = self.sparse.iter().flat_map(|(pieces, _)| pieces.iter().map(piece)).collect();
        for (n, piece) in pieces.iter().take(4).enumerate() {
            put(386 + 24 * n, piece);
        }
        put(482, &[u8::from(pieces.len() > 4)]);
        if let Some((_, size)) = &self.sparse {
            put(483, &number(*size as i64, 12));
        }
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        let mut rest = pieces.iter().skip(4).peekable();
        while rest.peek().is_some() {
            let start = archive.len();
            rest.by_ref().take(21).for_each(|piece| archive.extend(piece));
            archive.resize(start + 504, 0);
            archive.push(u8::from(rest.peek().is_some()));
            archive.resize(start + 512, 0);
        }
        archive.extend(&self.data);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
}

fn piece((offset, len): &(u64, u64)) -> [u8; 24] {
    let mut piece = [0; 24];
    piece[..12].copy_from_slice(&number(*offset as i64, 12));
    piece[12..].copy_from_slice(&number(*len as i64, 12));
    piece
}

/// In octal where it fits, else in base 256.
fn number(n: i64, len: usize) -> Vec<u8> {
    let octal = format!("{n:0width$o}", width = len - 1);
    if n >= 0 && octal.len() < len {
        return [octal.as_bytes(), b"\0"].concat();
    }
    let sign = if n < 0 { 0xff } else { 0 };
    let mut field = vec![sign; len - 8];
    field.extend(n.to_be_bytes());
    field[0] |= 0x80;
    field
}

pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = 2 + key.len() + value.len() + 1;
    let len = (1..12).map(|digits| rest + digits).find(|len| len.to_string().len() + rest == *len).expect("a length");
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

/// All of them, and the end.
pub(crate) fn archive(entries: &[Made]) -> Vec<u8> {
    let mut archive = Vec::new();
    entries.iter().for_each(|entry| entry.append_to(&mut archive));
    archive.resize(archive.len() + 1024, 0);
    archive
}
