//! [`ProgramDefaults`]: what an image and a builder say of programs in its containers.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::image::{ImageConfig, shown};
use crate::error::{Context, Error, ErrorKind, Result};

/// Variables that a program has, unless the image or the caller sets them otherwise.
const ENVIRONMENT: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), (HOME, "/root")];
pub(super) const HOME: &str = "HOME";

/// What a program has unless the caller sets it otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProgramDefaults {
    pub env: Vec<(OsString, OsString)>,
    /// The image does not set `HOME`, so that it follows the user.
    pub own_home: bool,
    pub user: Option<OsString>,
    /// Made where it is missing.
    pub working_dir: Option<OsString>,
    /// The image's own program and its arguments; empty where it names none.
    pub command: Vec<OsString>,
    /// What asks the image's own program to end, where that is not SIGTERM.
    pub stop_signal: Option<u8>,
}

impl ProgramDefaults {
    /// Sets a variable, in place of one of the same name.
    pub(super) fn set_env(&mut self, name: OsString, value: OsString) {
        self.own_home &= name != HOME;
        self.env.retain(|(known, _)| *known != name);
        self.env.push((name, value));
    }

    /// # Errors
    /// `Corrupt` for a configuration that cannot be followed.
    pub(super) fn of(config: &ImageConfig) -> Result<Self> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, what).doing("the image's configuration");
        let (mut variables, mut own_home) = (Vec::from(ENVIRONMENT), true);
        for variable in &config.env {
            // As Docker has it, a name alone is an empty variable.
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            if name.is_empty() || variable.contains('\0') {
                return Err(corrupt(format!("{} is no variable", shown(variable.as_bytes()))));
            }
            own_home &= name != HOME;
            variables.push((name, value));
        }
        // The last of each name, in the order of these.
        let last: BTreeMap<&str, usize> = variables.iter().enumerate().map(|(n, (name, _))| (*name, n)).collect();
        let lasting = variables.iter().enumerate().filter(|(n, (name, _))| last.get(name) == Some(n));
        let env = lasting.map(|(_, (name, value))| (OsString::from(name), OsString::from(value))).collect();
        let text = |text: &str| (!text.is_empty()).then(|| OsString::from(text));
        if !config.working_dir.is_empty() && !config.working_dir.starts_with('/') {
            let shown = shown(config.working_dir.as_bytes());
            return Err(corrupt(format!("WorkingDir {shown} does not begin with a slash")));
        }
        let stop_signal = config.stop_signal.as_deref().filter(|name| !name.is_empty()).map(signal_number);
        let stop_signal = stop_signal.transpose().doing(|| "the image's configuration")?;
        Ok(Self {
            env,
            own_home,
            user: text(&config.user),
            working_dir: text(&config.working_dir),
            command: config.entrypoint.iter().chain(&config.cmd).map(OsString::from).collect(),
            stop_signal: stop_signal.filter(|signal| i32::from(*signal) != libc::SIGTERM),
        })
    }
}

/// The names of signal(7) without their `SIG`, in the order of their numbers from 1 on.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
/// As the C library numbers them.
const SIGRTMIN: u8 = 34;
const SIGRTMAX: u8 = 64;

/// The number of a signal: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.
///
/// # Errors
/// `Corrupt` for anything else.
fn signal_number(text: &str) -> Result<u8> {
    let unknown =
        || Error::new(ErrorKind::Corrupt, format!("StopSignal {} is no signal of Linux", shown(text.as_bytes())));
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let is_real_time = |number: &u8| (SIGRTMIN..=SIGRTMAX).contains(number);
    let distance = |text: &str, sign| match text {
        "" => Some(0),
        text => text.strip_prefix(sign).and_then(|text| text.parse::<u8>().ok()),
    };
    let number = if let Some(more) = name.strip_prefix("RTMIN") {
        distance(more, '+').and_then(|more| SIGRTMIN.checked_add(more)).filter(is_real_time)
    } else if let Some(less) = name.strip_prefix("RTMAX") {
        distance(less, '-').and_then(|less| SIGRTMAX.checked_sub(less)).filter(is_real_time)
    } else if let Ok(number) = name.parse() {
        Some(number).filter(|number| (1..=31).contains(number) || is_real_time(number))
    } else {
        NAMES.iter().position(|known| *known == name).and_then(|n| u8::try_from(n + 1).ok())
    };
    number.ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl FnOnce(&mut ImageConfig)) -> Result<ProgramDefaults> {
        let mut config = ImageConfig::default();
        change(&mut config);
        ProgramDefaults::of(&config)
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn image_without_configuration_leaves_the_usual_defaults() {
        let defaults = config(|_| ()).unwrap();
        assert_eq!(defaults.env.iter().map(|(name, _)| name.to_str().unwrap()).collect::<Vec<_>>(), ["PATH", "HOME"]);
        assert!(defaults.own_home && defaults.user.is_none() && defaults.working_dir.is_none());
        assert!(defaults.command.is_empty() && defaults.stop_signal.is_none());
    }

    #[test]
    fn configuration_replaces_defaults() {
        let defaults = config(|it| {
            it.env = strings(&["PATH=/opt", "A=b=c", "EMPTY", "A=again", "HOME=/data"]);
            (it.entrypoint, it.cmd) = (strings(&["/entry", "-x"]), strings(&["serve", ""]));
            (it.user, it.working_dir) = ("www:adm".into(), "/srv/it".into());
            it.stop_signal = Some("SIGQUIT".into());
        })
        .unwrap();
        let env: Vec<String> =
            defaults.env.iter().map(|(name, value)| format!("{}={}", name.display(), value.display())).collect();
        assert_eq!(env, ["PATH=/opt", "EMPTY=", "A=again", "HOME=/data"]);
        assert!(!defaults.own_home);
        assert_eq!(defaults.command, ["/entry", "-x", "serve", ""]);
        assert_eq!((defaults.user.unwrap(), defaults.working_dir.unwrap()), ("www:adm".into(), "/srv/it".into()));
        assert_eq!(defaults.stop_signal, Some(3));
    }

    /// Each of them is looked at a few times, however many there are.
    #[test]
    fn very_many_variables_are_taken() {
        let env: Vec<String> = (0..300_000).map(|n| format!("V{n}=x")).collect();
        let defaults = config(|it| it.env = [env.clone(), env].concat()).unwrap();
        assert_eq!(defaults.env.len(), 300_002);
    }

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGSYS", 31),
            ("WINCH", 28),
            ("SIGRTMIN", 34),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
            ("RTMAX", 64),
            ("64", 64),
        ] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for text in
            ["", "0", "65", "32", "33", "-1", "SIG", "SIGNONE", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMAX-40", "300"]
        {
            assert_eq!(signal_number(text).unwrap_err().kind(), ErrorKind::Corrupt, "{text}");
        }
        assert_eq!(config(|it| it.stop_signal = Some("SIGTERM".into())).unwrap().stop_signal, None);
        assert_eq!(config(|it| it.stop_signal = Some(String::new())).unwrap().stop_signal, None);
    }

    #[test]
    fn configurations_that_cannot_be_followed_are_corrupt() {
        let wrong: [fn(&mut ImageConfig); 4] = [
            |it| it.env = strings(&["=value"]),
            |it| it.env = strings(&["A=\0"]),
            |it| it.working_dir = "relative".into(),
            |it| it.stop_signal = Some("SIGNONE".into()),
        ];
        for change in wrong {
            assert_eq!(config(change).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        // Little of a long text is repeated.
        let long: [fn(&mut ImageConfig); 3] = [
            |it| it.env = vec![format!("={}", "x".repeat(1 << 20))],
            |it| it.working_dir = "x".repeat(1 << 20),
            |it| it.stop_signal = Some("x".repeat(1 << 20)),
        ];
        for change in long {
            assert!(config(change).unwrap_err().to_string().len() < 400);
        }
    }
}
