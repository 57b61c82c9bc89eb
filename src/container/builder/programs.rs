//! Environment, user and directory of all programs of a container, and its labels.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::ContainerBuilder;
use crate::container::defaults::ProgramDefaults;
use crate::container::exec::{c_string, check_variable};
use crate::error::Result;

/// As the embedder set it, over what the image says.
#[derive(Debug, Clone, Default)]
pub(super) struct ProgramSettings {
    env: Vec<(OsString, OsString)>,
    user: Option<OsString>,
    current_dir: Option<OsString>,
    pub(super) labels: BTreeMap<String, String>,
}

impl ProgramSettings {
    /// # Errors
    /// `InvalidConfig`, naming the method, for what no program can have.
    pub(super) fn check(&self) -> Result<()> {
        for (name, value) in &self.env {
            check_variable(name, value)?;
        }
        c_string("user", self.user.as_ref())?;
        c_string("current_dir", self.current_dir.as_ref()).map(drop)
    }

    /// Puts these over what the image says.
    pub(super) fn apply(self, defaults: &mut ProgramDefaults) {
        for (name, value) in self.env {
            defaults.set_env(name, value);
        }
        defaults.user = self.user.or(defaults.user.take());
        defaults.working_dir = self.current_dir.or(defaults.working_dir.take());
    }
}

impl ContainerBuilder {
    /// Sets an environment variable of all programs, over that of the image.
    ///
    /// [`Exec::env`](crate::Exec::env) is over both. A name that is empty, or has `=` or a NUL, is `InvalidConfig` of
    /// [`ContainerBuilder::start`].
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.programs.env.push((name.into(), value.into()));
        self
    }

    /// Sets environment variables of all programs.
    pub fn envs<K: Into<OsString>, V: Into<OsString>>(self, vars: impl IntoIterator<Item = (K, V)>) -> Self {
        vars.into_iter().fold(self, |builder, (name, value)| builder.env(name, value))
    }

    /// Sets the user of all programs, in place of the image's; see [`Exec::user`](crate::Exec::user).
    ///
    /// A user that the container does not have is an error of [`Exec::spawn`](crate::Exec::spawn).
    pub fn user(mut self, user: impl Into<OsString>) -> Self {
        self.programs.user = Some(user.into());
        self
    }

    /// Sets the working directory of all programs, in place of the image's.
    ///
    /// It is made where it is missing, as `docker run --workdir` does.
    pub fn current_dir(mut self, dir: impl Into<OsString>) -> Self {
        self.programs.current_dir = Some(dir.into());
        self
    }

    /// Gives the container a label, in place of one of the same name.
    ///
    /// Labels are for the embedder, and the guest does not see them. [`Container::labels`](crate::Container::labels)
    /// returns them.
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.programs.labels.insert(name.into(), value.into());
        self
    }
}
