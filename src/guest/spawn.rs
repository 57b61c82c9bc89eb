//! Starts a program. Its streams are connected first; then a process is forked, prepared and becomes the program. Runs
//! on the shim's one thread, which never waits for any of it; the part after the fork runs in the new process.

use core::ffi::CStr;

use super::alloc::ffi::CString;
use super::alloc::vec::Vec;
use super::files;
use super::relay::{Relay, RelayDirection};
use super::seal;
use super::sys::{self, Errno, Fd, POLLOUT, Poll, Vector};
use super::terminal::Terminal;
use super::user::{self, Identity};
use crate::proto::{HOST_CID, Rlimit, Rlimits, Spawn, SpawnStep, Stdio, Strings, TerminalSize};

/// The number of the limit of open files (getrlimit(2)).
pub(super) const RLIMIT_NOFILE: u8 = 7;

/// Leaves an owner or a group as it is (chown(2)).
const UNCHANGED: u32 = u32::MAX;

/// Where programs are looked for if the environment has no `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A step that failed, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SpawnError {
    pub step: SpawnStep,
    pub errno: Errno,
}

impl SpawnError {
    pub(super) const fn new(step: SpawnStep, errno: Errno) -> Self {
        Self { step, errno }
    }
}

/// What every new process needs from the shim.
#[derive(Debug)]
pub(super) struct SpawnEnv {
    /// `/dev/null`, opened before a workload could put something else there.
    pub(super) null: Fd,
    /// The workloads' `/proc`.
    pub(super) proc: Fd,
    /// Where terminals are made; `None` where the kernel has none.
    pub(super) devpts: Option<Fd>,
    /// Files a program may open, and how far it may raise that.
    pub(super) files: (u64, u64),
}

/// One stream to the host on its way.
#[derive(Debug)]
struct StreamLink {
    socket: Fd,
    connected: bool,
}

/// The streams of a program before it runs, by standard descriptor. Without a link it is `/dev/null`, or standard output where `joined`.
#[derive(Debug)]
pub(super) struct StdioStreams {
    links: [Option<StreamLink>; 3],
    joined: bool,
}

impl StdioStreams {
    /// Starts connecting.
    pub(super) fn dial(stdio: &[Stdio; 3]) -> Result<Self, SpawnError> {
        let joined = is_joined(stdio);
        let mut links = [None, None, None];
        for ((number, link), stdio) in links.iter_mut().enumerate().zip(stdio) {
            if let Stdio::Port(port) = *stdio {
                if number == 2 && joined {
                    continue;
                }
                let dialled = sys::connect_vsock(HOST_CID, port);
                let (socket, connected) = dialled.map_err(|errno| SpawnError::new(SpawnStep::Stdio, errno))?;
                *link = Some(StreamLink { socket, connected });
            }
        }
        Ok(Self { links, joined })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.links.iter().flatten().all(|link| link.connected)
    }

    /// What to wait for until it is.
    pub(super) fn polls(&self) -> impl Iterator<Item = Poll> {
        let waiting = self.links.iter().flatten().filter(|link| !link.connected);
        waiting.map(|link| Poll { fd: link.socket.raw(), events: POLLOUT, happened: 0 })
    }

    /// Something happened to the descriptor `fd` of [`StdioStreams::polls`].
    pub(super) fn advance(&mut self, fd: i32) -> Result<(), SpawnError> {
        for link in self.links.iter_mut().flatten().filter(|link| link.socket.raw() == fd) {
            sys::connect_result(&link.socket).map_err(|errno| SpawnError::new(SpawnStep::Stdio, errno))?;
            link.connected = true;
        }
        Ok(())
    }
}

/// Whether standard error goes where standard output goes: then they share a pipe, which keeps their order.
fn is_joined(stdio: &[Stdio; 3]) -> bool {
    matches!(stdio, [_, Stdio::Port(out), Stdio::Port(error)] if out == error)
}

/// A new process.
#[derive(Debug)]
pub(super) struct SpawnedProcess {
    /// As the shim sees it.
    pub(super) pid: i32,
    pub(super) report: Report,
    pub(super) relays: Vec<Relay>,
    pub(super) terminal: Option<Terminal>,
}

/// Forks. Whether the program runs, the report tells.
pub(super) fn start(
    id: u32,
    spawn: &Spawn<'_>,
    streams: StdioStreams,
    cgroup: Option<&Fd>,
    spawn_env: &SpawnEnv,
) -> Result<SpawnedProcess, SpawnError> {
    let no = |step| move |errno| SpawnError::new(step, errno);
    let Connected { ends: [input, output, error], own, relays, terminal } = match spawn.terminal {
        None => connect_pipes(id, spawn, streams, spawn_env)?,
        Some(size) => connect_terminal(id, spawn, streams, spawn_env, size)?,
    };
    let plan = Child {
        stdio: [&input, &output, &error],
        own,
        has_terminal: terminal.is_some(),
        spawn_env,
        cwd: spawn.cwd.unwrap_or(c"/"),
        make_cwd: spawn.make_cwd,
        user: spawn.user,
        privileges: Privileges {
            groups: spawn.groups,
            rlimits: spawn.rlimits,
            no_new_privs: spawn.no_new_privs,
            capabilities: spawn.capabilities,
            seal: spawn.seal,
            filter: spawn.filter,
            filter_flags: spawn.filter_flags,
        },
        programs: candidates(spawn),
        argv: Vector::new(spawn.argv.iter()).map_err(no(SpawnStep::Fork))?,
        envp: Vector::new(spawn.env.iter()).map_err(no(SpawnStep::Fork))?,
        env: spawn.home.then_some(spawn.env),
    };
    let (reader, writer) = sys::pipe().map_err(no(SpawnStep::Fork))?;
    sys::set_nonblocking(&reader).map_err(no(SpawnStep::Fork))?;
    let pid = sys::fork(cgroup, || plan.run(&writer)).map_err(no(SpawnStep::Fork))?;
    Ok(SpawnedProcess { pid, report: Report(reader), relays, terminal })
}

/// The standard streams as the program gets them, and what carries their bytes.
struct Connected {
    ends: [Fd; 3],
    /// Which of them are its own, and not `/dev/null`.
    own: [bool; 3],
    relays: Vec<Relay>,
    terminal: Option<Terminal>,
}

/// Says on a new stream which program's it is.
fn introduce(socket: &Fd, cookie: &[u8]) -> Result<(), Errno> {
    // A new stream takes that much at once.
    if sys::write(socket, cookie)? == cookie.len() { Ok(()) } else { Err(Errno::EAGAIN) }
}

/// Each stream is a pipe, `/dev/null`, or for standard error the same as standard output.
fn connect_pipes(
    id: u32,
    spawn: &Spawn<'_>,
    streams: StdioStreams,
    spawn_env: &SpawnEnv,
) -> Result<Connected, SpawnError> {
    let no = |errno| SpawnError::new(SpawnStep::Stdio, errno);
    let mut relays = Vec::new();
    let mut ends: [Option<Fd>; 3] = [None, None, None];
    for ((number, link), end) in streams.links.into_iter().enumerate().zip(&mut ends) {
        let Some(link) = link else { continue };
        introduce(&link.socket, spawn.cookie).map_err(no)?;
        let (reader, writer) = sys::pipe().map_err(no)?;
        let (flow, mine, theirs) =
            if number == 0 { (RelayDirection::In, writer, reader) } else { (RelayDirection::Out, reader, writer) };
        sys::set_nonblocking(&mine).map_err(no)?;
        relays.push(Relay::new(id, flow, mine, link.socket));
        *end = Some(theirs);
    }
    let null = || sys::duplicate(&spawn_env.null).map_err(no);
    let own = ends.each_ref().map(Option::is_some);
    let [input, output, error] = ends;
    let output = output.map_or_else(null, Ok)?;
    let error = match error {
        None if streams.joined => sys::duplicate(&output).map_err(no)?,
        error => error.map_or_else(null, Ok)?,
    };
    Ok(Connected { ends: [input.map_or_else(null, Ok)?, output, error], own, relays, terminal: None })
}

/// All three streams are one terminal. Where the host reads no output it goes to `/dev/null`.
fn connect_terminal(
    id: u32,
    spawn: &Spawn<'_>,
    streams: StdioStreams,
    spawn_env: &SpawnEnv,
    size: TerminalSize,
) -> Result<Connected, SpawnError> {
    let no = |errno| SpawnError::new(SpawnStep::Stdio, errno);
    let devpts = spawn_env.devpts.as_ref().ok_or(no(Errno::ENODEV))?;
    let [input, output, _] = streams.links.map(|link| link.map(|link| link.socket));
    for socket in input.iter().chain(&output) {
        introduce(socket, spawn.cookie).map_err(no)?;
    }
    let output = output.map_or_else(|| sys::duplicate(&spawn_env.null).map_err(no), Ok)?;
    let (master, slave) = sys::open_terminal(devpts, size).map_err(no)?;
    let again = || sys::duplicate(&slave).map_err(no);
    let ends = [again()?, again()?, again()?];
    let terminal = Some(Terminal::new(id, (master, slave), input, output));
    Ok(Connected { ends, own: [true; 3], relays: Vec::new(), terminal })
}

/// The number of the report's descriptor in the new process, behind the standard streams.
const REPORT: i32 = 3;

/// What a program may do, beside what its user may.
struct Privileges<'a> {
    groups: Strings<'a>,
    rlimits: Rlimits<'a>,
    no_new_privs: bool,
    /// Those that it can ever have.
    capabilities: Option<u64>,
    seal: bool,
    /// What judges its system calls, unless it is empty.
    filter: &'a [u8],
    filter_flags: u32,
}

/// What the new process does until it is the program.
struct Child<'a> {
    stdio: [&'a Fd; 3],
    own: [bool; 3],
    has_terminal: bool,
    spawn_env: &'a SpawnEnv,
    cwd: &'a CStr,
    make_cwd: bool,
    user: Option<&'a CStr>,
    /// What it may do beside that.
    privileges: Privileges<'a>,
    programs: Vec<CString>,
    argv: Vector<'a>,
    envp: Vector<'a>,
    /// The environment once more, where the user's home directory is to be added.
    env: Option<Strings<'a>>,
}

impl Child<'_> {
    fn run(&self, report: &Fd) -> i32 {
        let _ = sys::write(report, &sys::getpid().to_ne_bytes());
        let prepared = self.prepare().and_then(|()| sys::move_to(report, REPORT));
        // From here on it has nothing of other programs, whatever holds it up.
        let (report, prepared) = match &prepared {
            Ok(report) => {
                sys::keep_only(REPORT as u32 + 1);
                (report, Ok(()))
            }
            Err(errno) => (report, Err(SpawnError::new(SpawnStep::Prepare, *errno))),
        };
        let SpawnError { step, errno } = prepared.map_or_else(|error| error, |()| self.become_the_program());
        let mut message = [0u8; 8];
        message[..4].copy_from_slice(&(step as u32).to_ne_bytes());
        message[4..].copy_from_slice(&errno.0.to_ne_bytes());
        let _ = sys::write(report, &message);
        127
    }

    /// Returns only if it could not.
    fn become_the_program(&self) -> SpawnError {
        self.try_to_become_it().unwrap_or_else(|error| error)
    }

    /// Returns how executing it failed, or the step before.
    fn try_to_become_it(&self) -> Result<SpawnError, SpawnError> {
        let at = |step| move |errno| SpawnError::new(step, errno);
        // As root, which can also enter what its user cannot.
        if self.make_cwd {
            files::make_directories(self.cwd).map_err(at(SpawnStep::Chdir))?;
        }
        sys::chdir(self.cwd).map_err(at(SpawnStep::Chdir))?;
        let groups = self.privileges.groups;
        let identity = match (self.user, groups.is_empty()) {
            (None, true) => None,
            (user, _) => Some(user::resolve(user.map(CStr::to_bytes), groups)?),
        };
        let home = identity.as_ref().and_then(|identity| CString::new(identity.home.as_slice()).ok());
        let with_home = match (&home, self.env) {
            (Some(home), Some(env)) => {
                let all: Vec<&CStr> = env.iter().chain([home.as_c_str()]).collect();
                Some(Vector::new(all.iter().copied()).map_err(at(SpawnStep::Prepare))?)
            }
            _ => None,
        };
        // What takes memory is done; what takes privileges comes before they are given up.
        for Rlimit { resource, soft, hard } in self.privileges.rlimits.iter() {
            sys::set_rlimit(resource, soft, hard).map_err(at(SpawnStep::Rlimit))?;
        }
        if self.privileges.seal {
            seal::kernel_files().map_err(at(SpawnStep::Privileges))?;
        }
        if let Some(kept) = self.privileges.capabilities {
            drop_capabilities(kept).map_err(at(SpawnStep::Privileges))?;
        }
        let no_new_privs = self.privileges.no_new_privs;
        // Where nothing else allows it, the kernel wants root's privileges for it.
        let early = !no_new_privs && identity.as_ref().is_some_and(|it| it.uid != 0);
        if early {
            self.set_filter()?;
        }
        if let Some(identity) = &identity {
            self.become_user(identity).map_err(at(SpawnStep::User))?;
            let Identity { uid, gid, groups, .. } = identity;
            if early && !self.privileges.filter.is_empty() && !sys::is_user(*uid, *gid, groups) {
                return Err(SpawnError::new(SpawnStep::User, Errno::EPERM));
            }
        }
        if no_new_privs {
            sys::set_no_new_privs().map_err(at(SpawnStep::Privileges))?;
        }
        // What was sent meanwhile takes effect here, with the default actions.
        sys::block_signals(0).map_err(at(SpawnStep::Prepare))?;
        if !early {
            self.set_filter()?;
        }
        Ok(SpawnError::new(SpawnStep::Exec, self.execute(with_home.as_ref().unwrap_or(&self.envp))))
    }

    fn set_filter(&self) -> Result<(), SpawnError> {
        let Privileges { filter, filter_flags, .. } = self.privileges;
        if filter.is_empty() {
            return Ok(());
        }
        sys::set_filter(filter, filter_flags).map_err(|errno| SpawnError::new(SpawnStep::Seccomp, errno))
    }

    /// The program can open its own streams again, by `/dev/stdout` for instance.
    fn become_user(&self, Identity { uid, gid, groups, .. }: &Identity) -> Result<(), Errno> {
        // A terminal's group is that of those who may write to it, as for grantpt(3).
        let gid_of_streams = if self.has_terminal { UNCHANGED } else { *gid };
        for (stream, _) in sys::standard_streams().iter().zip(self.own).filter(|(_, own)| *own) {
            sys::change_owner(stream, *uid, gid_of_streams)?;
        }
        sys::become_user(*uid, *gid, groups)
    }

    fn prepare(&self) -> Result<(), Errno> {
        sys::set_sid()?;
        for (number, fd) in (0..).zip(self.stdio) {
            sys::dup_onto(fd, number)?;
        }
        if self.has_terminal {
            sys::take_terminal()?;
        }
        sys::umask(0o022);
        // The shim is out of the OOM killer's reach, its workloads are not.
        files::write(Some(&self.spawn_env.proc), c"self/oom_score_adj", b"0")?;
        // Last: until it is the program it has all that the shim has open, which may be more.
        sys::set_rlimit(RLIMIT_NOFILE, self.spawn_env.files.0, self.spawn_env.files.1)
    }

    /// The rules of execvp(3), but that a file which is no program is not given to a shell.
    fn execute(&self, envp: &Vector<'_>) -> Errno {
        let mut result = Errno::ENOENT;
        for program in &self.programs {
            match sys::execve(program, &self.argv, envp) {
                Errno::EACCES => result = Errno::EACCES,
                Errno::ENOENT | Errno::ENOTDIR | Errno::ENODEV | Errno::ESTALE | Errno::ETIMEDOUT => {}
                errno => return errno,
            }
        }
        result
    }
}

/// Takes from this process for good all capabilities but those of the mask, bit by number.
fn drop_capabilities(kept: u64) -> Result<(), Errno> {
    for number in (0..u64::BITS).filter(|number| kept >> number & 1 == 0) {
        match sys::drop_capability(number) {
            Ok(()) => {}
            // The kernel has no more; there are always some.
            Err(Errno::EINVAL) if number > 0 => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The paths at which the program may be, in order.
fn candidates(spawn: &Spawn<'_>) -> Vec<CString> {
    let program = spawn.argv.iter().next().unwrap_or(c"");
    let name = program.to_bytes();
    if name.is_empty() || name.contains(&b'/') {
        return Vec::from([CString::from(program)]);
    }
    let path = spawn.env.iter().find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="));
    // An empty entry is the working directory.
    let join = |directory: &[u8]| {
        let slash: &[u8] = if directory.is_empty() || directory.ends_with(b"/") { b"" } else { b"/" };
        CString::new([directory, slash, name].concat()).unwrap_or_default()
    };
    path.unwrap_or(DEFAULT_PATH).split(|&byte| byte == b':').map(join).collect()
}

/// The steps that a new process tells by name; all others are [`SpawnStep::Prepare`].
const REPORTED: [SpawnStep; 7] = [
    SpawnStep::Chdir,
    SpawnStep::Exec,
    SpawnStep::User,
    SpawnStep::Group,
    SpawnStep::Rlimit,
    SpawnStep::Privileges,
    SpawnStep::Seccomp,
];

/// What the new process says before it is the program: its pid, and if it never becomes the program, why. Then it hangs up.
#[derive(Debug)]
pub(super) struct Report(Fd);

impl Report {
    /// To wait for the hanging up.
    pub(super) fn poll(&self) -> Poll {
        Poll { fd: self.0.raw(), events: 0, happened: 0 }
    }

    /// The pid as the workloads see it, or the refusal. To be read when the process has hung up or died.
    pub(super) fn read(self) -> Result<u32, SpawnError> {
        let mut message = [0u8; 12];
        let length = sys::read(&self.0, &mut message).unwrap_or(0);
        let [a, b, c, d, e, f, g, h, i, j, k, l] = message;
        if length < message.len() {
            // Without a word it was killed before it could say one; then it did run, and its end is reported later.
            return Ok(u32::from_ne_bytes([a, b, c, d]));
        }
        let step = u32::from_ne_bytes([e, f, g, h]);
        let step = REPORTED.into_iter().find(|&known| known as u32 == step).unwrap_or(SpawnStep::Prepare);
        Err(SpawnError::new(step, Errno(i32::from_ne_bytes([i, j, k, l]))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::StringBuf;

    fn list(strings: &[&str]) -> StringBuf {
        let mut list = StringBuf::new();
        strings.iter().for_each(|string| list.push(string.as_bytes()).unwrap());
        list
    }

    fn spawn<'a>(argv: &'a StringBuf, env: &'a StringBuf) -> Spawn<'a> {
        Spawn { argv: argv.as_strings(), env: env.as_strings(), ..Spawn::default() }
    }

    fn found(argv: &[&str], env: &[&str]) -> Vec<String> {
        let (argv, env) = (list(argv), list(env));
        candidates(&spawn(&argv, &env)).into_iter().map(|path| path.into_string().unwrap()).collect()
    }

    #[test]
    fn programs_are_found_in_path() {
        assert_eq!(found(&["ls"], &["HOME=/", "PATH=/a:/b/", "PATH=/c"]), ["/a/ls", "/b/ls"]);
        assert_eq!(found(&["ls"], &[]).len(), 6);
        assert_eq!(found(&["ls"], &["PATH=:/a"]), ["ls", "/a/ls"]);
        assert_eq!(found(&["./ls"], &["PATH=/a"]), ["./ls"]);
        assert_eq!(found(&[""], &["PATH=/a"]), [""]);
    }

    #[test]
    fn output_and_error_on_one_port_share_a_pipe() {
        assert!(is_joined(&[Stdio::Null, Stdio::Port(7), Stdio::Port(7)]));
        assert!(!is_joined(&[Stdio::Port(7), Stdio::Port(7), Stdio::Port(8)]));
        assert!(!is_joined(&[Stdio::Null; 3]));
    }

    /// A process of this host that dies before it is the program: preparing it needs no more than an ordinary test may.
    fn try_to_start(argv: &[&str], cwd: Option<&CStr>) -> Result<u32, SpawnError> {
        try_to_start_as(argv, Spawn { cwd, ..Spawn::default() })
    }

    fn try_to_start_as(argv: &[&str], settings: Spawn<'_>) -> Result<u32, SpawnError> {
        let spawn_env = SpawnEnv {
            null: sys::open(None, c"/dev/null", sys::O_RDWR).unwrap(),
            proc: sys::open(None, c"/proc", sys::O_PATH).unwrap(),
            devpts: Some(sys::open(None, c"/dev", sys::O_PATH).unwrap()),
            files: (64, 64),
        };
        let (argv, env) = (list(argv), StringBuf::new());
        let request = Spawn { argv: argv.as_strings(), env: env.as_strings(), ..settings };
        let streams = StdioStreams::dial(&request.stdio)?;
        assert!(streams.is_connected());
        let started = start(1, &request, streams, None, &spawn_env)?;
        let mut polls = [started.report.poll()];
        assert_eq!(sys::poll(&mut polls, Some(sys::now_ns() + 10_000_000_000)), Ok(1));
        assert!(started.relays.is_empty());
        started.report.read()
    }

    #[test]
    fn a_program_starts() {
        assert!(try_to_start(&["true"], None).unwrap() > 0);
    }

    #[test]
    fn spawn_failure_has_step_and_errno() {
        assert_eq!(try_to_start(&["/nowhere"], None), Err(SpawnError::new(SpawnStep::Exec, Errno::ENOENT)));
        assert_eq!(try_to_start(&["no-such-program"], None), Err(SpawnError::new(SpawnStep::Exec, Errno::ENOENT)));
        assert_eq!(try_to_start(&[""], None), Err(SpawnError::new(SpawnStep::Exec, Errno::ENOENT)));
        assert_eq!(try_to_start(&["/etc/passwd"], None), Err(SpawnError::new(SpawnStep::Exec, Errno::EACCES)));
        assert_eq!(try_to_start(&["/"], None), Err(SpawnError::new(SpawnStep::Exec, Errno::EACCES)));
        assert_eq!(try_to_start(&["true"], Some(c"/nowhere")), Err(SpawnError::new(SpawnStep::Chdir, Errno::ENOENT)));
        assert!(Strings::default().is_empty());
    }

    #[test]
    fn unknown_users_are_refused_before_the_program_runs() {
        let refused = |user| try_to_start_as(&["true"], Spawn { user: Some(user), ..Spawn::default() });
        assert_eq!(refused(c"no-such-user"), Err(SpawnError::new(SpawnStep::User, Errno::ENOENT)));
        assert_eq!(refused(c"root:no-such-group"), Err(SpawnError::new(SpawnStep::Group, Errno::ENOENT)));
    }

    #[test]
    fn filters_are_taken_or_refused_by_the_kernel() {
        // Allows all: BPF_RET | BPF_K of SECCOMP_RET_ALLOW.
        let allow = [6, 0, 0, 0, 0, 0, 0xff, 0x7f];
        let filtered =
            |filter, no_new_privs| try_to_start_as(&["true"], Spawn { filter, no_new_privs, ..Spawn::default() });
        assert!(filtered(&allow, true).unwrap() > 0);
        let refused = Err(SpawnError::new(SpawnStep::Seccomp, Errno::EINVAL));
        assert_eq!(filtered(&[0xff; 8], true), refused, "no instruction");
        assert_eq!(filtered(&[6, 0, 0], true), refused, "no program");
    }

    #[test]
    fn missing_working_directories_are_made_when_asked_for() {
        let dir = std::env::temp_dir().join(format!("cofferdam-cwd-{}", std::process::id()));
        let path = std::ffi::CString::new(dir.join("a//b/").into_os_string().into_encoded_bytes()).unwrap();
        assert_eq!(try_to_start(&["true"], Some(&path)), Err(SpawnError::new(SpawnStep::Chdir, Errno::ENOENT)));
        for _ in 0..2 {
            let made = Spawn { cwd: Some(&path), make_cwd: true, ..Spawn::default() };
            try_to_start_as(&["true"], made).unwrap();
        }
        assert!(dir.join("a/b").is_dir());
        std::fs::remove_dir_all(&dir).unwrap();
        let file = Spawn { cwd: Some(c"/etc/passwd/x"), make_cwd: true, ..Spawn::default() };
        let file = try_to_start_as(&["true"], file);
        assert_eq!(file, Err(SpawnError::new(SpawnStep::Chdir, Errno::ENOTDIR)));
    }
}
