//! [`DomainName`]: a name of the DNS, or all names below one.

use std::net::IpAddr;

/// The longest name as text (RFC 1035, 3.1), and the longest label (RFC 1035, 2.3.4).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// A name in lower case without the last dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DomainName {
    text: String,
    /// All below it, and not itself.
    below: bool,
}

impl DomainName {
    /// Reads `example.com` or `*.example.com`.
    pub(crate) fn parse_pattern(text: &str) -> Result<Self, String> {
        if text == "*" || text == "*." {
            return Err("every name is what Rule::allow_public or Rule::deny_all are for".into());
        }
        let (text, below) = text.strip_prefix("*.").map_or((text, false), |rest| (rest, true));
        let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if text.parse::<IpAddr>().is_ok() {
            return Err(format!("{text} is an address and not a name: make a rule of its range"));
        }
        if text.contains('*') {
            return Err(format!("{text:?}: a star may only stand first, as in *.example.com"));
        }
        if let Some(rest) = text.split_once("://").map(|(_, rest)| rest) {
            let host = rest.split(['/', ':', '?', '#']).next().unwrap_or_default();
            return Err(format!("{text:?} is a URL and not a name: say {host:?}, and the port by Rule::port"));
        }
        if let Some((host, _)) = text.split_once('/') {
            return Err(format!("{text:?} has a path, and names have none: say {host:?}"));
        }
        if let Some((host, port)) = text.split_once(':') {
            return Err(format!("{text:?} has a port, and names have none: say {host:?}, and Rule::port({port})"));
        }
        if let Some(bad) =
            text.chars().find(|c| matches!(c, '@' | '?' | '#' | '\\' | '[' | ']' | '"' | '\'' | ',' | ';' | '%'))
        {
            return Err(format!("{text:?}: {bad:?} is not in names: say example.com or *.example.com"));
        }
        if let Some(bad) = text.chars().find(|c| !c.is_ascii_graphic()) {
            return Err(format!(
                "{text:?}: {bad:?} is not in names: write them as the DNS does, with xn-- where needed"
            ));
        }
        if text.split('.').any(str::is_empty) {
            return Err(format!("{text:?} has an empty part: say example.com or *.example.com"));
        }
        if text.len() > MAX_NAME || text.split('.').any(|label| label.len() > MAX_LABEL) {
            return Err(format!("a name has at most {MAX_NAME} characters, and {MAX_LABEL} between dots"));
        }
        Ok(Self { text, below })
    }

    /// Whether `name`, which is in lower case and has no last dot, is meant.
    pub(crate) fn matches(&self, name: &str) -> bool {
        match name.strip_suffix(self.text.as_str()) {
            Some("") => !self.below,
            Some(front) => self.below && front.ends_with('.'),
            None => false,
        }
    }

    /// Whether every name that `other` means is meant.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        if other.below {
            self.below && (self.text == other.text || self.matches(&other.text))
        } else {
            self.matches(&other.text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_match_whole_labels() {
        let name = |text| DomainName::parse_pattern(text).unwrap();
        let (one, all) = (name("Example.COM."), name("*.example.com"));
        assert!(one.matches("example.com") && !one.matches("www.example.com") && !one.matches("ample.com"));
        assert!(all.matches("www.example.com") && all.matches("a.b.example.com"));
        assert!(!all.matches("example.com") && !all.matches("badexample.com") && !all.matches("example.com.evil.org"));
        assert!(all.covers(&name("*.www.example.com")) && all.covers(&all) && !all.covers(&one) && !one.covers(&all));
    }
}
