//! Names: messages of the DNS as far as a forwarder must understand them, and who the host asks. No I/O but reading a file.

mod message;
mod servers;

pub(crate) use self::message::{A, AAAA, Code, MAX_QUERY, Question, answers, found, reply, set_id, truncated};
pub(crate) use self::servers::Servers;
