//! The packet header of a socket device as one value (Virtio 1.3, 5.10.6).

/// Bytes of a header on the wire.
pub(crate) const HEADER: usize = 44;
/// The only kind of socket offered (Virtio 1.3, 5.10.6, VIRTIO_VSOCK_TYPE_STREAM).
pub(crate) const TYPE_STREAM: u16 = 1;

/// What a packet is for (Virtio 1.3, 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VsockOp {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    Unknown(u16),
}

impl VsockOp {
    pub(crate) fn parse(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// Shutdown flag: the sender will not receive any more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// Shutdown flag: the sender will not send any more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;

/// A header's fields; no combination is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VsockHeader {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: VsockOp,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl VsockHeader {
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: VsockOp::parse(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.number().to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Writes the next `N` bytes.
fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    if let Some((now, later)) = std::mem::take(rest).split_first_chunk_mut() {
        *now = field;
        *rest = later;
    }
}

/// The next `N` bytes; zeros beyond the end, which a header of fixed length never meets.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((now, later)) => {
            *rest = later;
            *now
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_written_as_they_are_read() {
        let mut bytes = [0; HEADER];
        bytes.iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8 + 1);
        let header = VsockHeader::parse(&bytes);
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!((header.src_cid, header.fwd_cnt), (0x0807_0605_0403_0201, 0x2c2b_2a29));
        assert!((0..=u16::MAX).all(|n| VsockOp::parse(n).number() == n));
    }
}
