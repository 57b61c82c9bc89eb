//! Messages of the DNS (RFC 1035, 4). A question is parsed, an answer is scanned, and what answers the question is
//! passed on unchanged.
//!
//! Compressed names are only skipped and never followed, so that there are no loops to fall into.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::time::Duration;

/// The longest question that is passed on: one name and what EDNS adds.
pub(crate) const MAX_QUERY: usize = 1024;
/// Bytes of the header (RFC 1035, 4.1.1).
const HEADER: usize = 12;

/// Types and the class of the internet (RFC 1035, 3.2.2 and 3.2.4; RFC 3596, 2.1).
pub(crate) const A: u16 = 1;
pub(crate) const AAAA: u16 = 28;
pub(crate) const CNAME: u16 = 5;
pub(crate) const PTR: u16 = 12;
/// EDNS (RFC 6891, 6.1.1).
const OPT: u16 = 41;
const IN: u16 = 1;
/// Whole zones, and everything there is (RFC 1035, 3.2.3; RFC 8482).
const TRANSFERS: std::ops::RangeInclusive<u16> = 251..=255;

/// How it went (RFC 1035, 4.1.1; RFC 6895, 2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
}

/// Why a question is not passed on. With nothing, it cannot be answered.
pub(crate) type Wrong = Option<Code>;

/// What the guest wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub id: u16,
    /// In lower case, without the last dot.
    pub name: String,
    pub kind: u16,
    /// Where the question ends in the message.
    end: usize,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

/// Where the name that begins `at` ends.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            // A pointer ends a name (RFC 1035, 4.1.4).
            len if len & 0xc0 == 0xc0 => return bytes.get(at + 1).map(|_| at + 2),
            len if len & 0xc0 == 0 => at += 1 + usize::from(len),
            _ => return None,
        }
    }
}

impl Question {
    /// Reads a query with one question.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Wrong> {
        let flags = be16(bytes, 2).ok_or(None)?;
        if flags & 0x8000 != 0 || bytes.len() < HEADER {
            return Err(None);
        }
        if flags >> 11 & 15 != 0 {
            return Err(Some(Code::NotImp));
        }
        let wrong = Some(Code::FormErr);
        if bytes.len() > MAX_QUERY
            || be16(bytes, 4) != Some(1)
            || be16(bytes, 6) != Some(0)
            || be16(bytes, 8) != Some(0)
        {
            return Err(wrong);
        }
        let (name, at) = Self::name(bytes, HEADER).ok_or(wrong)?;
        let (kind, class) = (be16(bytes, at).ok_or(wrong)?, be16(bytes, at + 2).ok_or(wrong)?);
        if class != IN || TRANSFERS.contains(&kind) {
            return Err(Some(Code::NotImp));
        }
        Ok(Self { id: be16(bytes, 0).ok_or(wrong)?, name, kind, end: at + 4 })
    }

    /// A name without pointers, for which there is no reason in a question.
    fn name(bytes: &[u8], mut at: usize) -> Option<(String, usize)> {
        let mut name = String::new();
        loop {
            let len = usize::from(*bytes.get(at)?);
            let label = bytes.get(at + 1..at + 1 + len).filter(|_| len < 64)?;
            at += 1 + len;
            if len == 0 {
                return Some((name, at));
            }
            // What a policy's names can hold; a dot within a label would make another name of it.
            if !label.iter().all(|b| b.is_ascii_graphic() && *b != b'.') || name.len() + len > 253 {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|b| char::from(b.to_ascii_lowercase())));
        }
    }

    /// Whether `answer` is one to the question that is in `query`, asked as number `id`.
    pub(crate) fn is_answered(&self, query: &[u8], id: u16, answer: &[u8]) -> bool {
        let asked = |bytes: &[u8]| bytes.get(HEADER..self.end).map(<[u8]>::to_ascii_lowercase);
        let repeated = || be16(answer, 4) == Some(1) && asked(answer).is_some() && asked(answer) == asked(query);
        be16(answer, 0) == Some(id)
            && be16(answer, 2).is_some_and(|flags| flags & 0x8000 != 0 && flags >> 11 & 15 == 0)
            && (repeated() || is_bare_refusal(answer))
    }
}

/// Whether a server has not understood the question, and so does not repeat it: those do that know no EDNS (RFC 6891, 7).
fn is_bare_refusal(answer: &[u8]) -> bool {
    let counts = answer.get(4..HEADER).filter(|_| answer.len() == HEADER);
    answer.get(3).is_some_and(|flags| flags & 15 == Code::FormErr as u8) && counts == Some(&[0; 8])
}

/// Whether an answer says that there is more, over TCP (RFC 1035, 4.1.1).
pub(crate) fn is_truncated(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|flags| flags & 2 != 0)
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answers {
    pub code: u8,
    pub addresses: Vec<IpAddr>,
    /// How long all of it is valid.
    pub valid: Duration,
}

/// Looks through the answer to `question`. `None`: it is none.
pub(crate) fn answers(question: &Question, bytes: &[u8]) -> Option<Answers> {
    let flags = be16(bytes, 2)?;
    let code = (flags & 15) as u8;
    let (mut at, mut addresses, mut valid) = (question.end, Vec::new(), u32::MAX);
    for _ in 0..be16(bytes, 6)? {
        at = skip_name(bytes, at)?;
        let (kind, class, len) = (be16(bytes, at)?, be16(bytes, at + 2)?, usize::from(be16(bytes, at + 8)?));
        let ttl = u32::from(be16(bytes, at + 4)?) << 16 | u32::from(be16(bytes, at + 6)?);
        let data = bytes.get(at + 10..at + 10 + len)?;
        match (kind, class) {
            (A, IN) => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            (AAAA, IN) => addresses.push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            _ => {}
        }
        // The highest bit means zero (RFC 2181, 8).
        valid = valid.min(if ttl >> 31 == 0 { ttl } else { 0 });
        at += 10 + len;
    }
    Some(Answers { code, addresses, valid: Duration::from_secs(valid.into()) })
}

/// Keeps of an answer to `question` the records of its name, and its EDNS record (RFC 6891, 6.1.1). Which other names
/// were asked, and their addresses, are dropped. False: it is none.
pub(crate) fn strip(question: &Question, bytes: &mut Vec<u8>) -> bool {
    let Some((end, edns)) = sections(question, bytes) else { return false };
    let edns = edns.and_then(|range| bytes.get(range)).map(<[u8]>::to_vec);
    bytes.truncate(end);
    let count = u8::from(edns.is_some());
    bytes.extend(edns.unwrap_or_default());
    if let Some(counts) = bytes.get_mut(8..HEADER) {
        counts.copy_from_slice(&[0, 0, 0, count]);
    }
    true
}

/// Where the answers end, and where the EDNS record is. What comes after the answers may be cut off.
fn sections(question: &Question, bytes: &[u8]) -> Option<(usize, Option<Range<usize>>)> {
    let record = |at: usize| {
        let fixed = skip_name(bytes, at)?;
        let end = fixed + 10 + usize::from(be16(bytes, fixed + 8)?);
        (end <= bytes.len()).then_some(end)
    };
    let mut at = question.end;
    for _ in 0..be16(bytes, 6)? {
        at = record(at)?;
    }
    let (end, others) = (at, u32::from(be16(bytes, 8)?) + u32::from(be16(bytes, 10)?));
    for _ in 0..others {
        let Some(next) = record(at) else { break };
        // Of the root, which is one byte.
        if bytes.get(at) == Some(&0) && be16(bytes, at + 1) == Some(OPT) {
            return Some((end, Some(at..next)));
        }
        at = next;
    }
    Some((end, None))
}

/// The number of a message.
pub(crate) fn set_id(bytes: &mut [u8], id: u16) {
    if let Some(to) = bytes.get_mut(..2) {
        to.copy_from_slice(&id.to_be_bytes());
    }
}

/// An answer with nothing in it.
pub(crate) fn reply(query: &[u8], code: Code) -> Vec<u8> {
    // The question comes along where it was understood.
    let end = Question::parse(query).ok().map_or(HEADER, |question| question.end);
    let mut reply = query.get(..end).unwrap_or_default().to_vec();
    let recursion = query.get(2).map_or(0, |flags| flags & 1);
    if let Some(fixed) = reply.get_mut(2..HEADER) {
        fixed.copy_from_slice(&[0x80 | recursion, 0x80 | code as u8, 0, u8::from(end > HEADER), 0, 0, 0, 0, 0, 0]);
    }
    reply
}

/// An answer to `question`, which is in `query`: its name has these addresses for `ttl` seconds, as far as they are of the kind.
pub(crate) fn found(
    query: &[u8],
    question: &Question,
    addresses: impl IntoIterator<Item = IpAddr>,
    ttl: u32,
) -> Vec<u8> {
    let (mut reply, mut count) = (reply(query, Code::NoError), 0u8);
    for address in addresses {
        let (kind, data) = match address {
            IpAddr::V4(a) => (A, a.octets().to_vec()),
            IpAddr::V6(a) => (AAAA, a.octets().to_vec()),
        };
        if kind != question.kind || count == u8::MAX {
            continue;
        }
        count += 1;
        // The name is that of the question (RFC 1035, 4.1.4).
        reply.extend([0xc0, HEADER as u8]);
        reply.extend([kind, IN].map(u16::to_be_bytes).concat());
        reply.extend(ttl.to_be_bytes());
        reply.extend((data.len() as u16).to_be_bytes());
        reply.extend(data);
    }
    if let Some(field) = reply.get_mut(7) {
        *field = count;
    }
    reply
}

/// The address that a name for the question which name it has means (RFC 1035, 3.5; RFC 3596, 2.5).
pub(crate) fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let parts: Vec<u8> = rest.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
        let [d, c, b, a] = parts[..] else { return None };
        return Some(Ipv4Addr::new(a, b, c, d).into());
    }
    let mut number = 0u128;
    let nibbles: Vec<&str> = name.strip_suffix(".ip6.arpa")?.split('.').collect();
    if nibbles.len() != 32 {
        return None;
    }
    for nibble in nibbles.iter().rev() {
        let digit = u128::from_str_radix(nibble, 16).ok().filter(|_| nibble.len() == 1)?;
        number = number << 4 | digit;
    }
    Some(Ipv6Addr::from(number).into())
}

/// An answer that says: ask again over TCP.
pub(crate) fn truncated(query: &[u8]) -> Vec<u8> {
    let mut reply = reply(query, Code::NoError);
    if let Some(flags) = reply.get_mut(2) {
        *flags |= 2;
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        bytes
    }

    #[test]
    fn filtered_answer_keeps_only_the_question_and_edns() {
        let asked = query("example.com", 15);
        let question = Question::parse(&asked).unwrap();
        let record = |name: &[u8], kind: u16, data: &[u8]| {
            let len = (data.len() as u16).to_be_bytes();
            [name, &kind.to_be_bytes(), &[0, 1, 0, 0, 0, 60], &len, data].concat()
        };
        let mut plain = asked.clone();
        (plain[2], plain[3], plain[7]) = (0x81, 0x80, 1);
        plain.extend(record(&[0xc0, 12], 15, &[0, 10, 4, b'm', b'a', b'i', b'l', 0xc0, 12]));
        let (server, glue) = (record(&[0xc0, 12], 2, b"\x03ns1\xc0\x0c"), record(&[0xc0, 12], A, &[10, 0, 0, 1]));
        let edns = record(&[0], 41, &[0, 10, 0, 2, 1, 2]);
        for (before, after) in [(vec![], None), (vec![&glue, &edns, &glue], Some(&edns)), (vec![&glue], None)] {
            let mut answer = plain.clone();
            (answer[9], answer[11]) = (1, before.len() as u8);
            answer.extend(&server);
            before.into_iter().for_each(|record| answer.extend(record));
            let mut expected = plain.clone();
            expected[11] = u8::from(after.is_some());
            expected.extend(after.into_iter().flatten());
            assert!(strip(&question, &mut answer));
            assert_eq!(answer, expected);
            // Stripping it once more changes nothing.
            assert!(strip(&question, &mut answer) && answer == expected);
        }
        let mut short = plain.clone();
        short.pop();
        assert!(!strip(&question, &mut short));
    }

    #[test]
    fn answer_without_the_question_is_a_format_error() {
        let query = query("example.com", A);
        let question = Question::parse(&query).unwrap();
        let bare = |code: u8| {
            let mut answer = query[..HEADER].to_vec();
            (answer[2], answer[3]) = (0x81, code);
            answer[4..].fill(0);
            answer
        };
        let answered = |answer: &[u8]| question.is_answered(&query, question.id, answer);
        assert!(answered(&bare(1)));
        // No error, SERVFAIL, NXDOMAIN, REFUSED.
        for code in [0, 2, 3, 5] {
            assert!(!answered(&bare(code)), "{code}");
        }
        for at in 4..HEADER {
            let mut counts = bare(1);
            counts[at] = 1;
            assert!(!answered(&counts), "{at}");
        }
        assert!(!answered(&[bare(1), vec![0]].concat()));
    }

    #[test]
    fn questions_are_parsed_or_rejected() {
        let question = Question::parse(&query("WWW.Example.com", A)).unwrap();
        assert_eq!((question.name.as_str(), question.kind, question.id), ("www.example.com", A, 0x1234));
        assert_eq!(Question::parse(&query("", A)).unwrap().name, "");
        let wrong = |change: fn(&mut Vec<u8>)| {
            let mut bytes = query("example.com", A);
            change(&mut bytes);
            Question::parse(&bytes).unwrap_err()
        };
        assert_eq!(wrong(|b| b.truncate(11)), None);
        assert_eq!(wrong(|b| b[2] = 0x81), None);
        assert_eq!(wrong(|b| b[2] = 0x29), Some(Code::NotImp));
        assert_eq!(wrong(|b| b[5] = 2), Some(Code::FormErr));
        assert_eq!(wrong(|b| b[12] = 0xc0), Some(Code::FormErr));
        assert_eq!(wrong(|b| b[14] = b'.'), Some(Code::FormErr));
        assert_eq!(wrong(|b| b.truncate(20)), Some(Code::FormErr));
        assert_eq!(Question::parse(&query("example.com", 252)).unwrap_err(), Some(Code::NotImp));
    }

    #[test]
    fn answer_records_are_parsed() {
        let query = query("example.com", A);
        let question = Question::parse(&query).unwrap();
        let mut answer = query.clone();
        (answer[2], answer[3], answer[7]) = (0x81, 0x80, 3);
        // An alias, an address, and one of another family; all names are pointers, one of them to itself.
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 2, 0xc0, 12]);
        answer.extend([0xc0, 29, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 1]);
        answer.extend([0xc0, 12, 0, 28, 0, 1, 0, 0, 1, 0, 0, 16]);
        answer.extend("2001:db8::7".parse::<Ipv6Addr>().unwrap().octets());
        assert!(question.is_answered(&query, 0x1234, &answer) && !question.is_answered(&query, 0x1235, &answer));
        let found = answers(&question, &answer).unwrap();
        assert_eq!((found.code, is_truncated(&answer), found.valid), (0, false, Duration::from_secs(30)));
        assert_eq!(found.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap(), "2001:db8::7".parse().unwrap()]);
        for len in 0..answer.len() {
            let cut = &answer[..len];
            assert!(answers(&question, cut).is_none() || len == answer.len());
        }
        let mut other = answer;
        other[14] ^= 1;
        assert!(!question.is_answered(&query, 0x1234, &other));
    }

    #[test]
    fn reverse_names_are_parsed() {
        let read = |name: &str| reverse(name).map(|address| address.to_string());
        assert_eq!(read("4.3.2.1.in-addr.arpa").as_deref(), Some("1.2.3.4"));
        let six = "8.b.d.0.1.0.0.2.ip6.arpa";
        assert_eq!(read(&format!("7{}.{six}", ".0".repeat(23))).as_deref(), Some("2001:db8::7"));
        for none in ["3.2.1.in-addr.arpa", "5.4.3.2.1.in-addr.arpa", "256.3.2.1.in-addr.arpa", six, "x.in-addr.arpa"] {
            assert_eq!(read(none), None, "{none}");
        }
    }

    #[test]
    fn empty_answers_repeat_the_question() {
        let query = query("example.com", A);
        let denied = reply(&query, Code::NxDomain);
        assert_eq!((denied[3] & 15, denied.len(), denied[2]), (3, query.len(), 0x81));
        assert!(Question::parse(&query).unwrap().is_answered(&query, 0x1234, &denied));
        assert!(truncated(&query)[2] & 2 != 0);
        assert_eq!(reply(&query[..15], Code::FormErr).len(), 12);
        assert!(reply(&[], Code::FormErr).is_empty());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), prefix in any::<bool>()) {
            let mut message = if prefix { query("example.com", A) } else { Vec::new() };
            message.extend(&bytes);
            let _ = (reply(&message, Code::ServFail), truncated(&message));
            if let Ok(question) = Question::parse(&message) {
                let _ = (answers(&question, &message), question.is_answered(&message, 1, &bytes));
            }
        }
    }
}
