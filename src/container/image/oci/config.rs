//! [`ImageConfig`]: what an image says of how it is run (image-spec, config.md).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::manifest::json;
use super::{Digest, Platform};
use crate::error::{Error, ErrorKind, Result};

/// Says how an image wants to be run. An image of a plain archive or directory says nothing.
///
/// All of it is the word of the image's maker, who may be a stranger.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageConfig {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// The arguments behind those, or the program where there is no entrypoint.
    pub cmd: Vec<String>,
    /// Variables of the environment, each `NAME=value`.
    pub env: Vec<String>,
    /// Who runs it: `user`, `uid`, `user:group`, `uid:gid` and mixtures of them; empty for root.
    pub user: String,
    /// The directory to start in; empty for the root.
    pub working_dir: String,
    /// The signal that asks it to end, by name or number.
    pub stop_signal: Option<String>,
    /// Ports that it listens on: `80`, `80/tcp`, `53/udp`.
    pub exposed_ports: Vec<String>,
    /// Directories in which it keeps data.
    pub volumes: Vec<String>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// How to see whether it works.
    pub healthcheck: Option<Healthcheck>,
    /// The operating system.
    pub os: String,
    /// The architecture of the processor, as Go names it.
    pub architecture: String,
    /// When it was made (RFC 3339).
    pub created: Option<String>,
}

/// Says how to see whether the program of an image works; Docker's extension.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Healthcheck {
    /// `NONE`, or `CMD` and a program, or `CMD-SHELL` and a line of shell.
    pub test: Vec<String>,
    /// Between two checks, where it says so.
    pub interval: Option<Duration>,
    /// How long one check may take, where it says so.
    pub timeout: Option<Duration>,
    /// How long it may fail after the start, where it says so.
    pub start_period: Option<Duration>,
    /// Between two checks in that time, where it says so.
    pub start_interval: Option<Duration>,
    /// How often it fails before it counts as broken, where it says so.
    pub retries: Option<u32>,
}

/// What a configuration says: how it is run, and what its layers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Configuration {
    pub image: ImageConfig,
    pub platform: Platform,
    /// Digests of the layers as they are unpacked, the lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    config: Option<Settings>,
    #[serde(default)]
    rootfs: Option<RootFs>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Settings {
    entrypoint: Option<Words>,
    cmd: Option<Words>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, Option<String>>>,
    healthcheck: Option<HealthSettings>,
}

/// Old programs wrote a single word as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Many(Vec<String>),
    One(String),
}

impl Words {
    fn of(words: Option<Self>) -> Vec<String> {
        match words {
            Some(Self::Many(words)) => words,
            Some(Self::One(word)) => vec![word],
            None => Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct HealthSettings {
    test: Option<Vec<String>>,
    interval: Option<i64>,
    timeout: Option<i64>,
    start_period: Option<i64>,
    start_interval: Option<i64>,
    retries: Option<i64>,
}

impl Configuration {
    /// # Errors
    /// `Corrupt` for what is no configuration of an image.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let Document { created, architecture, os, variant, config, rootfs } = json(bytes)?;
        let settings = config.unwrap_or_default();
        let (os, architecture) = (os.unwrap_or_default(), architecture.unwrap_or_default());
        let platform = Platform::new(&os, &architecture, variant.as_deref());
        let names = |map: Option<BTreeMap<String, _>>| map.unwrap_or_default().into_keys().collect::<Vec<String>>();
        let labels = settings.labels.unwrap_or_default();
        let image = ImageConfig {
            entrypoint: Words::of(settings.entrypoint),
            cmd: Words::of(settings.cmd),
            env: settings.env.unwrap_or_default(),
            user: settings.user.unwrap_or_default(),
            working_dir: settings.working_dir.unwrap_or_default(),
            stop_signal: settings.stop_signal.filter(|signal| !signal.is_empty()),
            exposed_ports: names(settings.exposed_ports),
            volumes: names(settings.volumes),
            labels: labels.into_iter().map(|(name, value)| (name, value.unwrap_or_default())).collect(),
            healthcheck: settings.healthcheck.map(Healthcheck::of),
            os,
            architecture,
            created,
        };
        image.check()?;
        let diff_ids = rootfs.and_then(|rootfs| rootfs.diff_ids).unwrap_or_default();
        Ok(Self { image, platform, diff_ids })
    }
}

impl ImageConfig {
    /// No program can be started with what has a NUL.
    fn check(&self) -> Result<()> {
        let single = [&self.user, &self.working_dir];
        let lists = [&self.entrypoint, &self.cmd, &self.env, &self.volumes];
        let nul = |text: &String| text.contains('\0');
        if single.into_iter().any(nul) || lists.into_iter().flatten().any(nul) {
            return Err(Error::new(ErrorKind::Corrupt, "a text in it has a NUL"));
        }
        Ok(())
    }
}

impl Healthcheck {
    fn of(settings: HealthSettings) -> Self {
        // In nanoseconds; 0 leaves the choice to who runs it.
        let time = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0).map(Duration::from_nanos);
        Self {
            test: settings.test.unwrap_or_default(),
            interval: time(settings.interval),
            timeout: time(settings.timeout),
            start_period: time(settings.start_period),
            start_interval: time(settings.start_interval),
            retries: settings.retries.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_an_image_says_is_kept() {
        let text = r#"{"created":"2024-01-02T03:04:05Z","architecture":"arm64","os":"linux","variant":"v8",
            "config":{"User":"www:33","ExposedPorts":{"80/tcp":{},"53/udp":{}},"Env":["PATH=/bin","A="],
              "Entrypoint":["/run","-x"],"Cmd":"one word","Volumes":{"/data":{}},"WorkingDir":"/srv",
              "Labels":{"a":"b","c":null},"StopSignal":"SIGQUIT","ArgsEscaped":true,
              "Healthcheck":{"Test":["CMD","true"],"Interval":30000000000,"Timeout":0,"Retries":3}},
            "rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]},
            "history":[{"created_by":"x"}]}"#;
        let Configuration { image, platform, diff_ids } = Configuration::parse(text.as_bytes()).unwrap();
        assert_eq!((platform.to_string().as_str(), diff_ids.len()), ("linux/arm64/v8", 1));
        assert_eq!((image.entrypoint, image.cmd), (vec!["/run".into(), "-x".into()], vec!["one word".into()]));
        assert_eq!(image.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!((image.user.as_str(), image.working_dir.as_str()), ("www:33", "/srv"));
        assert_eq!((image.stop_signal.as_deref(), image.volumes), (Some("SIGQUIT"), vec!["/data".into()]));
        assert_eq!(image.labels["c"], "");
        let health = image.healthcheck.unwrap();
        assert_eq!((health.interval, health.timeout, health.retries), (Some(Duration::from_secs(30)), None, Some(3)));
    }

    #[test]
    fn null_and_missing_settings_are_empty() {
        for text in ["{}", r#"{"config":null,"rootfs":null}"#, r#"{"config":{"Env":null,"Cmd":null,"Labels":null}}"#] {
            assert_eq!(Configuration::parse(text.as_bytes()).unwrap().image, ImageConfig::default(), "{text}");
        }
    }

    #[test]
    fn damaged_configuration_is_refused() {
        for text in [
            "",
            "[1]",
            r#"{"config":{"Env":[1]}}"#,
            r#"{"rootfs":{"diff_ids":["x"]}}"#,
            r#"{"config":{"User":"a\u0000b"}}"#,
        ] {
            assert_eq!(Configuration::parse(text.as_bytes()).unwrap_err().kind(), ErrorKind::Corrupt, "{text}");
        }
    }
}
