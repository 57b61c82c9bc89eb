//! [`Exec`]: a program to run in a container, with the vocabulary of [`std::process::Command`].

mod capabilities;
mod limits;
mod privileges;
mod seccomp;

use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::Duration;

pub use limits::{ProcessLimits, Resource};
pub(super) use privileges::PrivilegesRequest;
pub(super) use seccomp::KernelVersion;
pub use seccomp::SeccompProfile;
#[cfg(any(test, feature = "internals"))]
pub(crate) use seccomp::fuzz as fuzz_seccomp_profile;

use super::control::{StartRequest, start_program};
use super::defaults::{HOME, ProgramDefaults};
use super::process::{ExitStatus, Output, OutputLimit, Process, ProcessReader, ProcessShared, ProcessWriter};
use super::redirect::SharedFile;
use super::stdio::StdioListeners;
use super::{Container, redirect};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{StringBuf, TerminalSize, VERSION_PRIVILEGES, VERSION_SECCOMP, VERSION_USER};
use crate::size::Size;
use crate::sys::deadline;
use crate::virtio::vsock::VsockStream;
use crate::vm::Vm;
use privileges::Privileges;

/// Describes what one of a process's standard streams is connected to.
#[derive(Debug, Clone, Default)]
pub struct Stdio(StdioKind);

#[derive(Debug, Clone, Default)]
enum StdioKind {
    #[default]
    Null,
    Piped,
    File(Arc<SharedFile>),
    /// Of standard input alone.
    Bytes(Arc<[u8]>),
}

impl Stdio {
    /// Connects the stream to `/dev/null`.
    pub fn null() -> Self {
        Self(StdioKind::Null)
    }

    /// Connects the stream to the embedder by a pipe.
    ///
    /// See [`Process::stdin`], [`Process::stdout`] and [`Process::stderr`].
    pub fn piped() -> Self {
        Self(StdioKind::Piped)
    }
}

/// Connects the stream to a file, pipe or socket of the embedder's, from its present position on.
///
/// A thread of the embedder's process carries the bytes; the guest never has the file. A clone shares the file.
///
/// Standard input ends where the file ends. Output is written while the process runs, and at most ten seconds longer:
/// what a background process prints later is lost. [`Process::wait`] returns when all of it has been written, or says
/// what the host's file failed at; the process's pipe breaks then.
impl From<File> for Stdio {
    fn from(file: File) -> Self {
        Self(StdioKind::File(SharedFile::new(file)))
    }
}

/// As from a [`File`].
impl From<OwnedFd> for Stdio {
    fn from(descriptor: OwnedFd) -> Self {
        File::from(descriptor).into()
    }
}

/// Connects the standard input of a process to what another one prints, as a shell's `|` does.
///
/// The processes may be of different containers. A thread of the embedder's process carries the bytes, as from a
/// [`File`]. It cannot be standard output or error: [`Exec::spawn`] fails with `InvalidConfig` then.
impl From<ProcessReader> for Stdio {
    fn from(output: ProcessReader) -> Self {
        Self(StdioKind::File(SharedFile::of_process(output.into_stream())))
    }
}

/// The kind of terminal that a program has (environ(7)).
const TERM: &str = "TERM";

/// Describes how a program runs; see [`Container::exec`].
///
/// Nothing is done before [`Exec::spawn`], [`Exec::output`] or [`Exec::status`]. The container lives at least as long as
/// this value, and as a call of `output` or `status`. A [`Process`] does not keep it.
///
/// Nothing of the embedder's is inherited. Environment, user and working directory are those of the builder,
/// or else of the image's configuration. What neither says is `PATH` and `HOME`, root of the guest, and `/`. The streams are `/dev/null`.
#[derive(Debug, Clone)]
#[must_use = "nothing runs until `spawn`, `output` or `status`"]
pub struct Exec {
    container: Container,
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    /// `HOME` follows the user.
    own_home: bool,
    user: Option<OsString>,
    current_dir: Option<OsString>,
    /// The directory is the image's or the builder's, and is made where it is missing.
    make_dir: bool,
    stop_signal: Option<u8>,
    privileges: Privileges,
    terminal: Option<TerminalSize>,
    stdio: [Option<Stdio>; 3],
    timeout: Option<Duration>,
    limit: OutputLimit,
    /// The limit was set, and so is for files too.
    file_limit: bool,
}

impl Exec {
    pub(super) fn new(container: Container, argv: Vec<OsString>) -> Self {
        let ProgramDefaults { env, own_home, user, working_dir, .. } = container.defaults();
        let (env, own_home, user, current_dir) = (env.clone(), *own_home, user.clone(), working_dir.clone());
        let limit = OutputLimit { bytes: Size::mib(64), truncate: false };
        Self {
            container,
            argv,
            env,
            own_home,
            user,
            make_dir: current_dir.is_some(),
            current_dir,
            stop_signal: None,
            privileges: Privileges::default(),
            terminal: None,
            stdio: [None, None, None],
            timeout: None,
            limit,
            file_limit: false,
        }
    }

    pub(super) fn of_image(container: Container) -> Self {
        let (argv, stop_signal) = (container.defaults().command.clone(), container.defaults().stop_signal);
        Self { stop_signal, ..Self::new(container, argv) }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.argv.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.argv.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    pub fn env(self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        let mut this = self.env_remove(name.clone());
        this.env.push((name, value.into()));
        this
    }

    /// Sets environment variables.
    pub fn envs<K: Into<OsString>, V: Into<OsString>>(self, vars: impl IntoIterator<Item = (K, V)>) -> Self {
        vars.into_iter().fold(self, |exec, (name, value)| exec.env(name, value))
    }

    /// Removes an environment variable.
    pub fn env_remove(mut self, name: impl Into<OsString>) -> Self {
        let name = name.into();
        self.own_home &= name != HOME;
        self.env.retain(|(known, _)| *known != name);
        self
    }

    /// Removes all environment variables, those of the image and the builder too.
    ///
    /// Programs are still looked for in the usual directories.
    pub fn env_clear(mut self) -> Self {
        self.env.clear();
        self.own_home = false;
        self
    }

    /// Sets the user and the group of the program.
    ///
    /// `USER` or `USER:GROUP`, each a name or a number, as `docker exec --user` has them. Names are looked up in
    /// `/etc/passwd` and `/etc/group` of the container. Digits are always a number. Numbers need not be there; the group is then 0. Without a group
    /// the user has the groups that list it. `HOME` is the user's home directory, unless it was set or removed.
    pub fn user(mut self, user: impl Into<OsString>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Sets the working directory, a path in the container.
    ///
    /// Unlike that of the image or the builder it must be there.
    pub fn current_dir(mut self, dir: impl Into<OsString>) -> Self {
        self.make_dir = false;
        self.current_dir = Some(dir.into());
        self
    }

    /// Sets standard input; `/dev/null` by default.
    pub fn stdin(mut self, stdio: impl Into<Stdio>) -> Self {
        self.stdio[0] = Some(stdio.into());
        self
    }

    /// Gives the program these bytes as standard input, and then the end of file.
    pub fn stdin_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdio[0] = Some(Stdio(StdioKind::Bytes(bytes.into().into())));
        self
    }

    /// Sets standard output; `/dev/null` by default, but for [`Exec::output`], which reads it.
    pub fn stdout(mut self, stdio: impl Into<Stdio>) -> Self {
        self.stdio[1] = Some(stdio.into());
        self
    }

    /// Sets standard error; `/dev/null` by default, but for [`Exec::output`], which reads it.
    pub fn stderr(mut self, stdio: impl Into<Stdio>) -> Self {
        self.stdio[2] = Some(stdio.into());
        self
    }

    /// Gives the program a terminal of so many rows and columns, in characters.
    ///
    /// It is the controlling terminal of the program's session, and its three standard streams (pty(7)). Standard input
    /// and output are piped, unless they are set otherwise. What is written to [`Process::stdin`] is typed.
    /// [`Process::stdout`] has what the program prints, and the echo of what is typed. There is no
    /// [`Process::stderr`]. `TERM` is `xterm`, unless it is set. [`Process::resize`] changes the size.
    ///
    /// When standard input is dropped or at its end, a program that reads lines reads the end, as after Ctrl-D. With
    /// [`Stdio::null`] as standard input nothing is typed, and the input does not end. Dropping standard output hangs
    /// up: the program gets SIGHUP. When the program exits, its output ends and the terminal is hung up, also where
    /// others have it open.
    ///
    /// [`Exec::spawn`] fails with `InvalidConfig` where standard error is anything but [`Stdio::null`]. It also fails
    /// where the guest's kernel has no pseudo-terminals.
    pub fn pty(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some(TerminalSize { rows, columns });
        self
    }

    /// Sets how long the program may run, counted from the call that starts it.
    ///
    /// Then it is killed with everything that it started, whether or not the embedder waits for it. Its end is
    /// [`ExitStatus::TimedOut`], also when the time was over before the guest had started it.
    ///
    /// The host keeps the time. A guest that hangs, is paused or does not obey delays the end by two seconds at most,
    /// and [`Exec::output`] by four. A guest that runs and has not killed the program 30 seconds later is ended, with
    /// [`Exit::Unresponsive`](crate::Exit).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Limits the bytes that are read of each stream; 64 MiB by default.
    ///
    /// Of piped streams it is for [`Exec::output`] and [`Process::wait_with_output`]. A program that prints more is
    /// killed, and they fail with `ResourceExhausted`. A file has no limit by default. It gets no
    /// more than one that is set, and [`Process::wait`] fails then. See also [`Exec::truncate_output`].
    pub fn output_limit(mut self, limit: Size) -> Self {
        self.limit.bytes = limit;
        self.file_limit = true;
        self
    }

    /// Sets whether a program goes on that prints more than [`Exec::output_limit`].
    ///
    /// By default it is killed. If it goes on, output beyond the limit is discarded. [`Output::stdout_truncated`] or
    /// [`Output::stderr_truncated`] is set then.
    pub fn truncate_output(mut self, truncate: bool) -> Self {
        self.limit.truncate = truncate;
        self
    }

    /// Starts the program, and returns when it runs or when its time is over.
    ///
    /// Waits for the guest at most 72 seconds: 60 to start the program, 2 to give it up, 10 for its streams.
    ///
    /// # Errors
    /// - `NotFound`, `PermissionDenied` and `Incompatible` (not a program, or one for another processor) name the
    ///   program, directory, user or group.
    /// - `NotFound` where the guest's kernel has no cgroup controller for [`Exec::limits`], and `PermissionDenied` for a
    ///   resource limit above the kernel's own.
    /// - `InvalidConfig`, naming the method, for a value that cannot be, such as an empty program.
    /// - `ResourceExhausted` when the guest cannot run one more, or when the embedder's process has no descriptors
    ///   left.
    /// - `TimedOut` when the guest does not start it within a minute.
    /// - `InvalidState` when the container has ended.
    pub fn spawn(self) -> Result<Process> {
        let what = format!("running {:?} in the container", self.argv.first().cloned().unwrap_or_default());
        let user = self.user.as_ref().map(|user| format!(", as {user:?}")).unwrap_or_default();
        let dir = self.current_dir.as_ref().map(|dir| format!(", in {dir:?}")).unwrap_or_default();
        self.start().doing(|| what + &user + &dir)
    }

    /// Runs the program to its end and returns what it printed.
    ///
    /// # Errors
    /// As [`Exec::spawn`] and [`Process::wait_with_output`].
    pub fn output(mut self) -> Result<Output> {
        self.stdio[1].get_or_insert(Stdio::piped());
        if self.terminal.is_none() {
            self.stdio[2].get_or_insert(Stdio::piped());
        }
        // It lives at least as long as the call.
        let _container = self.container.clone();
        self.spawn()?.wait_with_output()
    }

    /// Runs the program to its end.
    ///
    /// What it prints is discarded, in a terminal too, unless [`Exec::stdout`] or [`Exec::stderr`] is set.
    ///
    /// # Errors
    /// As [`Exec::spawn`].
    pub fn status(mut self) -> Result<ExitStatus> {
        if self.terminal.is_some() {
            // It is not read.
            self.stdio[1].get_or_insert(Stdio::null());
        }
        let _container = self.container.clone();
        self.spawn()?.wait()
    }

    fn start(mut self) -> Result<Process> {
        if self.terminal.is_some() {
            self.connect_terminal()?;
        }
        let deadline = self.timeout.and_then(deadline);
        let (argv, env, cwd) =
            (self.strings()?, self.environment()?, c_string("current_dir", self.current_dir.as_ref())?);
        let user = c_string("user", self.user.as_ref())?;
        let home = user.is_some() && self.own_home;
        let state = ProcessShared::new()?;
        let stdio = self.stdio.map(|it| it.unwrap_or_default().0);
        check_outputs(&stdio)?;
        let (vm, agent) = (self.container.vm(), self.container.agent());
        let (make_cwd, stop_signal) = (self.make_dir, self.stop_signal);
        let (terminal, privileges) = (self.terminal, self.privileges.request(agent.kernel())?);
        if privileges.seccomp.is_some() && agent.version() < VERSION_SECCOMP {
            let old = "the guest's shim is too old for filters of system calls";
            return Err(Error::new(ErrorKind::Unsupported, old));
        }
        if (terminal.is_some() || privileges.is_any()) && agent.version() < VERSION_PRIVILEGES {
            let old = "the guest's shim is too old for terminals, limits and capabilities";
            return Err(Error::new(ErrorKind::Unsupported, old));
        }
        if (user.is_some() || make_cwd || stop_signal.is_some()) && agent.version() < VERSION_USER {
            let old = "the guest's shim is too old for users, directories and stop signals";
            return Err(Error::new(ErrorKind::Unsupported, old));
        }
        let listeners = StdioListeners::listen(vm, agent, stdio.each_ref().map(|it| !matches!(it, StdioKind::Null)))?;
        let (ports, cookie, shared) = (listeners.ports(), listeners.cookie(), state.clone());
        let request = StartRequest {
            argv,
            env,
            cwd,
            make_cwd,
            user,
            privileges,
            home,
            stop_signal,
            terminal,
            ports,
            cookie,
            deadline,
            state: shared,
        };
        let number =
            start_program(&agent.remote(), request, None).map_err(|error| listeners.refused().unwrap_or(error))?;
        let mut process = Process::new(agent.remote(), number, state.clone(), self.limit);
        process.has_terminal = terminal.is_some();
        let limit = self.file_limit.then_some(self.limit);
        // A stream that fails is the end of the process.
        connect(vm, &mut process, listeners, stdio, (limit, &state)).inspect_err(|_| process.give_up())?;
        Ok(process)
    }

    /// Sets what a program in a terminal has unless it was set otherwise.
    fn connect_terminal(&mut self) -> Result<()> {
        if self.stdio[2].as_ref().is_some_and(|stdio| !matches!(stdio.0, StdioKind::Null)) {
            return Err(Error::invalid("stderr", "a terminal has one output, which is standard output"));
        }
        self.stdio[2] = None;
        self.stdio[0].get_or_insert(Stdio::piped());
        self.stdio[1].get_or_insert(Stdio::piped());
        if !self.env.iter().any(|(name, _)| name == TERM) {
            self.env.push((TERM.into(), "xterm".into()));
        }
        Ok(())
    }

    fn strings(&self) -> Result<StringBuf> {
        if self.argv.first().is_none_or(|program| program.is_empty()) {
            return Err(Error::invalid("exec", "there is no program to run"));
        }
        let mut strings = StringBuf::new();
        for arg in &self.argv {
            let bytes = arg.as_encoded_bytes();
            strings.push(bytes).map_err(|_| Error::invalid("exec", format!("argument {arg:?} has a NUL")))?;
        }
        Ok(strings)
    }

    fn environment(&self) -> Result<StringBuf> {
        let mut strings = StringBuf::new();
        // The shim adds that of the user.
        let shims = self.own_home && self.user.is_some();
        for (name, value) in self.env.iter().filter(|(name, _)| !shims || name != HOME) {
            check_variable(name, value)?;
            let pair = [name.as_encoded_bytes(), b"=", value.as_encoded_bytes()].concat();
            strings.push(&pair).map_err(|_| Error::invalid("env", "a NUL"))?;
        }
        Ok(strings)
    }
}

/// # Errors
/// `InvalidConfig` for what cannot be in an environment.
pub(super) fn check_variable(name: &OsString, value: &OsString) -> Result<()> {
    let (bytes, has_nul) = (name.as_encoded_bytes(), |text: &OsString| text.as_encoded_bytes().contains(&0));
    if bytes.is_empty() || bytes.contains(&b'=') || has_nul(name) || has_nul(value) {
        return Err(Error::invalid("env", format!("{name:?} is not a name, or it or its value has a NUL")));
    }
    Ok(())
}

pub(super) fn c_string(method: &str, text: Option<&OsString>) -> Result<Option<CString>> {
    let text = text.cloned().map(OsString::into_vec);
    text.map(CString::new).transpose().map_err(|_| Error::invalid(method, "it has a NUL"))
}

/// What another process prints can only be read.
fn check_outputs(stdio: &[StdioKind; 3]) -> Result<()> {
    for (stream, method) in stdio.iter().skip(1).zip(["stdout", "stderr"]) {
        if matches!(stream, StdioKind::File(file) if !file.is_writable()) {
            return Err(Error::invalid(method, "what another process prints can only be a standard input"));
        }
    }
    Ok(())
}

/// Takes the process's streams. Each is the handle's, or has a thread that carries its bytes.
fn connect(
    vm: &Vm,
    process: &mut Process,
    listeners: StdioListeners,
    [input, output, error]: [StdioKind; 3],
    (limit, state): (Option<OutputLimit>, &Arc<ProcessShared>),
) -> Result<()> {
    let [stdin, stdout, stderr] = listeners.into_streams();
    match (stdin.accept(state)?, input) {
        (Some(stream), StdioKind::File(file)) => redirect::read_from(vm, file, stream, state.clone())?,
        (Some(stream), StdioKind::Bytes(bytes)) => redirect::read_bytes(vm, bytes, stream, state)?,
        (stream, _) => process.stdin = stream.map(ProcessWriter),
    }
    let carry = |name, stream: Option<VsockStream>, to| -> Result<_> {
        Ok(match (stream, to) {
            (Some(stream), StdioKind::File(file)) => {
                (None, Some(redirect::write_to(vm, name, file, stream, (limit, state.clone()))?))
            }
            (stream, _) => (stream.map(ProcessReader), None),
        })
    };
    (process.stdout, process.redirects[0]) = carry("stdout", stdout.accept(state)?, output)?;
    (process.stderr, process.redirects[1]) = carry("stderr", stderr.accept(state)?, error)?;
    Ok(())
}
