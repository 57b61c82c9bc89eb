//! The kernel's command line: what the embedder wrote, and what the machine adds to it.

use crate::error::{Error, Result};

/// Parameters that only the machine may set, because it is the machine that they describe.
const OURS: [&str; 2] = ["virtio_mmio.device", "cofferdam.shim"];

/// A command line being put together: the kernel's own parameters, then ` -- ` and init's.
#[derive(Debug, Clone)]
pub(crate) struct Cmdline {
    kernel: Vec<String>,
    init: Option<String>,
    max: usize,
}

impl Cmdline {
    /// Starts with the embedder's text; `max` bytes is what the kernel keeps, with its final NUL.
    ///
    /// # Errors
    /// `InvalidConfig` for text that no command line can carry, or that sets what belongs to the machine.
    pub(crate) fn new(text: &str, max: usize) -> Result<Self> {
        if let Some(bad) = text.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
            return Err(invalid(format!("{bad:?} is not printable ASCII")));
        }
        let (kernel, init) = split(text)?;
        let cmdline = Self { kernel, init: init.map(str::to_owned), max };
        if let Some(ours) = OURS.iter().find(|ours| cmdline.value_of(ours).is_some()) {
            return Err(invalid(format!("`{ours}` is set by the machine itself")));
        }
        Ok(cmdline)
    }

    /// The value of the last `key=value`, or `""` for a bare `key`.
    pub(crate) fn value_of(&self, key: &str) -> Option<&str> {
        self.kernel.iter().rev().find_map(|word| match word.split_once('=') {
            Some((k, value)) => same_key(k, key).then_some(value),
            None => same_key(word, key).then_some(""),
        })
    }

    /// Adds `key=value`, of which there may be many; an empty value makes a bare word.
    pub(crate) fn push(&mut self, key: &str, value: &str) {
        self.kernel.push(if value.is_empty() { key.to_owned() } else { format!("{key}={value}") });
    }

    /// Sets `key=value` unless the embedder chose a value already.
    pub(crate) fn default(&mut self, key: &str, value: &str) {
        if self.value_of(key).is_none() {
            self.push(key, value);
        }
    }

    /// Sets `key=value`.
    ///
    /// # Errors
    /// `InvalidConfig` when the embedder set it to something else.
    pub(crate) fn require(&mut self, key: &str, value: &str) -> Result<()> {
        match self.value_of(key) {
            Some(same) if same == value => Ok(()),
            Some(other) => {
                Err(invalid(format!("`{key}={other}` conflicts with `{key}={value}`, which is needed here")))
            }
            None => {
                self.push(key, value);
                Ok(())
            }
        }
    }

    /// The finished text, without a NUL.
    ///
    /// # Errors
    /// `InvalidConfig` when it is longer than the kernel keeps: what is cut off would be silently ignored.
    pub(crate) fn finish(&self) -> Result<String> {
        let mut text = self.kernel.join(" ");
        if let Some(init) = &self.init {
            text.push_str(" -- ");
            text.push_str(init);
        }
        if text.len() >= self.max {
            return Err(invalid(format!(
                "{} bytes with what the machine adds, but the kernel keeps {}",
                text.len(),
                self.max - 1
            )));
        }
        Ok(text)
    }
}

fn invalid(problem: String) -> Error {
    Error::invalid("Kernel::cmdline", problem)
}

/// The kernel takes dashes and underscores in parameter names for the same.
fn same_key(a: &str, b: &str) -> bool {
    let norm = |s: &str| s.replace('-', "_");
    norm(a) == norm(b)
}

/// Splits at blanks outside double quotes, up to the first word `--`, as the kernel does. What is behind that is init's.
fn split(text: &str) -> Result<(Vec<String>, Option<&str>)> {
    let (mut words, mut quoted, mut begin) = (Vec::new(), false, 0);
    // A blank behind the end, which ends the last word.
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => {
                let word = text.get(begin..at).unwrap_or_default();
                begin = at + 1;
                match word.trim_matches('"') {
                    "--" => return Ok((words, text.get(begin..).map(str::trim).filter(|rest| !rest.is_empty()))),
                    _ if word.is_empty() => {}
                    _ => words.push(word.to_owned()),
                }
            }
            _ => {}
        }
    }
    match quoted {
        true => Err(invalid("a double quote is never closed".into())),
        false => Ok((words, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cmdline(text: &str) -> Result<Cmdline> {
        Cmdline::new(text, 2048)
    }

    #[test]
    fn parameters_come_before_inits_arguments() {
        let mut line = cmdline("console=hvc0  quiet -- single -x").unwrap();
        line.push("virtio_mmio.device", "4K@0xd0000000:5");
        line.default("panic", "-1");
        assert_eq!(
            line.finish().unwrap(),
            "console=hvc0 quiet virtio_mmio.device=4K@0xd0000000:5 panic=-1 -- single -x"
        );
    }

    #[test]
    fn double_dash_may_be_anywhere() {
        for (text, expected) in [
            ("-- x", "a=1 -- x"),
            ("--", "a=1"),
            ("  --  x  -- y ", "a=1 -- x  -- y"),
            ("quiet --", "quiet a=1"),
            ("q=\"b -- c\" -- d", "q=\"b -- c\" a=1 -- d"),
            ("q=\"b -- c\"", "q=\"b -- c\" a=1"),
            ("q \"--\" x", "q a=1 -- x"),
            ("--x y--", "--x y-- a=1"),
        ] {
            let mut line = cmdline(text).unwrap();
            line.push("a", "1");
            assert_eq!(line.finish().unwrap(), expected, "{text}");
        }
        assert!(cmdline("q=\"b -- c").is_err(), "the quote is never closed");
    }

    #[test]
    fn embedder_parameters_override_defaults_and_conflicts_are_rejected() {
        let mut line = cmdline("panic=5 init=/bin/sh").unwrap();
        line.default("panic", "-1");
        line.require("panic", "5").unwrap();
        let error = line.require("init", "/init").unwrap_err();
        assert!(error.to_string().contains("`init=/bin/sh` conflicts with `init=/init`"), "{error}");
        assert_eq!(line.finish().unwrap(), "panic=5 init=/bin/sh");
    }

    #[test]
    fn parameters_reserved_for_the_vm_are_rejected() {
        for text in ["virtio_mmio.device=4K@0:5", "a virtio-mmio.device=1", "cofferdam.shim=1"] {
            assert!(cmdline(text).is_err(), "{text}");
        }
        assert!(cmdline("x -- virtio_mmio.device=1").is_ok());
    }

    #[test]
    fn invalid_command_line_characters_are_rejected() {
        for text in ["a\0b", "a\nb", "größe=1", "dyndbg=\"file x"] {
            assert!(cmdline(text).is_err(), "{text:?}");
        }
        assert_eq!(cmdline("dyndbg=\"file x +p\" y").unwrap().finish().unwrap(), "dyndbg=\"file x +p\" y");
    }

    #[test]
    fn overlong_command_line_is_rejected() {
        assert!(cmdline(&"x".repeat(2047)).unwrap().finish().is_ok());
        let error = cmdline(&"x".repeat(2048)).unwrap().finish().unwrap_err();
        assert!(error.to_string().contains("2048 bytes"), "{error}");
    }
}
