//! Messages of the DNS as far as a forwarder must understand them. Also the servers that the host asks. No I/O but
//! reading a file.

mod message;
mod servers;

pub(crate) use self::message::{
    A, AAAA, CNAME, Code, MAX_QUERY, PTR, Question, answers, found, is_truncated, reply, reverse, set_id, strip,
    truncated,
};
pub(crate) use self::servers::Servers;
