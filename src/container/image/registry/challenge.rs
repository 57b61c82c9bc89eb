//! [`Challenge`]: how a registry wants to be asked, from its header `WWW-Authenticate` (RFC 9110, 11.6.1).

/// Longer headers, and more challenges or parameters than these, are cut off.
const MAX_HEADER: usize = 8 << 10;
const MAX_CHALLENGES: usize = 16;
const MAX_PARAMETERS: usize = 32;

/// One way to authenticate, and what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case: `basic`, `bearer` and others.
    pub scheme: String,
    /// Names in lower case. The first of a name counts.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Reads the challenges of one header. What cannot be read ends it; what stands before counts.
pub(super) fn challenges(header: &str) -> Vec<Challenge> {
    let mut end = header.len().min(MAX_HEADER);
    while !header.is_char_boundary(end) {
        end -= 1;
    }
    let mut rest = Rest(header.get(..end).unwrap_or_default());
    let mut found: Vec<Challenge> = Vec::new();
    loop {
        rest.skip(|c| c == ',' || c.is_ascii_whitespace());
        let name = rest.token();
        if name.is_empty() {
            return found;
        }
        rest.skip(|c| c == ' ' || c == '\t');
        // A name before `=` is a parameter of the challenge before; all else begins one. A token68 is skipped.
        let Some(value) = rest.value() else {
            if found.len() == MAX_CHALLENGES {
                return found;
            }
            found.push(Challenge { scheme: name.to_ascii_lowercase(), parameters: Vec::new() });
            continue;
        };
        let Some(challenge) = found.last_mut() else { return found };
        let name = name.to_ascii_lowercase();
        if challenge.parameters.len() < MAX_PARAMETERS && challenge.parameter(&name).is_none() {
            challenge.parameters.push((name, value));
        }
    }
}

/// What is still to be read.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn skip(&mut self, what: impl Fn(char) -> bool) {
        self.0 = self.0.trim_start_matches(what);
    }

    /// Letters, digits and signs of a token (RFC 9110, 5.6.2).
    fn token(&mut self) -> &'a str {
        let word = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c);
        let end = self.0.find(|c| !word(c)).unwrap_or(self.0.len());
        let (token, rest) = self.0.split_at_checked(end).unwrap_or((self.0, ""));
        self.0 = rest;
        token
    }

    /// The value behind `=`, a token or a quoted string. Without `=` there is none.
    fn value(&mut self) -> Option<String> {
        let behind = self.0.strip_prefix('=')?;
        self.0 = behind;
        self.skip(|c| c == ' ' || c == '\t');
        let Some(quoted) = self.0.strip_prefix('"') else {
            // Some servers leave the quotes of addresses out.
            let end = self.0.find(|c: char| c == ',' || c.is_ascii_whitespace()).unwrap_or(self.0.len());
            let (value, rest) = self.0.split_at_checked(end).unwrap_or((self.0, ""));
            self.0 = rest;
            return Some(value.to_owned());
        };
        let (mut value, mut escaped) = (String::new(), false);
        for (at, c) in quoted.char_indices() {
            match c {
                _ if escaped => {
                    value.push(c);
                    escaped = false;
                }
                '\\' => escaped = true,
                '"' => {
                    self.0 = quoted.get(at + 1..).unwrap_or_default();
                    return Some(value);
                }
                _ => value.push(c),
            }
        }
        self.0 = "";
        Some(value)
    }
}

/// Reads any header, within its bounds.
#[cfg(any(test, feature = "internals"))]
pub(crate) fn fuzz(data: &[u8]) {
    let found = challenges(&String::from_utf8_lossy(data));
    assert!(found.len() <= MAX_CHALLENGES);
    assert!(found.iter().all(|challenge| challenge.parameters.len() <= MAX_PARAMETERS));
    let kept = found.iter().flat_map(|it| &it.parameters).map(|(name, value)| name.len() + value.len());
    assert!(kept.sum::<usize>() <= MAX_HEADER);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(header: &str) -> Vec<String> {
        let one = |it: Challenge| {
            let parameters: Vec<_> = it.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("{} {}", it.scheme, parameters.join(";"))
        };
        challenges(header).into_iter().map(one).collect()
    }

    #[test]
    fn challenges_of_known_registries_are_read() {
        assert_eq!(
            shown(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#
            ),
            ["bearer realm=https://auth.docker.io/token;service=registry.docker.io;scope=repository:a/b:pull,push"]
        );
        assert_eq!(shown(r#"Basic realm="Registry Realm""#), ["basic realm=Registry Realm"]);
        assert_eq!(
            shown(r#"Negotiate, Basic realm="a \"b\" \\c", BEARER Realm = x://y/z?q , service=s"#),
            ["negotiate ", r#"basic realm=a "b" \c"#, "bearer realm=x://y/z?q;service=s"]
        );
        assert_eq!(
            shown(r#"Bearer realm="a",error="invalid_token",realm="b""#),
            ["bearer realm=a;error=invalid_token"]
        );
    }

    #[test]
    fn broken_headers_end_early() {
        assert_eq!(shown(""), [""; 0]);
        assert_eq!(shown("=,="), [""; 0]);
        assert_eq!(shown("realm=x"), [""; 0]);
        assert_eq!(shown(r#"Bearer realm="no end, service=x"#), ["bearer realm=no end, service=x"]);
        assert_eq!(challenges(&"Basic ,".repeat(100)).len(), MAX_CHALLENGES);
        let many: String = (0..100).map(|n| format!("p{n}=v,")).collect();
        assert_eq!(challenges(&format!("Basic {many}")).first().map(|it| it.parameters.len()), Some(MAX_PARAMETERS));
        fuzz("ä".repeat(MAX_HEADER).as_bytes());
    }

    proptest! {
        #[test]
        fn any_header_is_read_within_bounds(header in "[A-Za-z=\",\\\\ /:ä]{0,200}") {
            fuzz(header.as_bytes());
        }
    }
}
