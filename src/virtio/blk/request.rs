//! The header of a block request (Virtio 1.3, 5.2.6).

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Other(u32),
}

/// The first 16 bytes of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub sector: u64,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; 16]) -> Self {
        let [a, b, c, d, _, _, _, _, sector @ ..] = *bytes;
        let kind = match u32::from_le_bytes([a, b, c, d]) {
            0 => Kind::Read,
            1 => Kind::Write,
            4 => Kind::Flush,
            8 => Kind::GetId,
            other => Kind::Other(other),
        };
        Self { kind, sector: u64::from_le_bytes(sector) }
    }
}
