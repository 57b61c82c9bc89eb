//! Guests that are ready to be tested with.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::tiny;
use cofferdam::disk::WritableLayer;
use cofferdam::kernel::{Initramfs, Modules};
use cofferdam::{Console, Container, ContainerBuilder, Disk, ErrorKind, Exit, Image, Kernel, Size, Vm, VmBuilder};

/// What a test returns.
pub type Outcome = Result<(), Box<dyn Error>>;

/// Longer than anything takes in the lab, where a guest's second may be many.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(120);

/// Fails the test unless the condition holds, and says what was seen.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($seen:tt)*) => {
        if !$condition {
            return Err(format!("not so: {} — {}", stringify!($condition), format_args!($($seen)*)).into());
        }
    };
    ($condition:expr) => { $crate::check!($condition, "") };
}

/// Fails the test unless both are equal.
#[macro_export]
macro_rules! check_eq {
    ($left:expr, $right:expr) => {
        match (&$left, &$right) {
            (left, right) if left != right => {
                return Err(format!("{} is {left:?} instead of {right:?}", stringify!($left)).into());
            }
            _ => {}
        }
    };
}

/// Where `make setup` puts what it makes.
pub fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    base.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache")).join("cofferdam")
}

/// Our kernel, opened once.
pub fn kernel() -> Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(|| Kernel::find().expect("run `make setup` first")).clone()
}

/// The same kernel as distributions ship theirs.
pub fn bzimage() -> cofferdam::Result<Kernel> {
    Kernel::open(cache().join("kernel/bzImage"))
}

/// The same kernel, of which nothing is known.
pub fn unknown_kernel(temp: &Temp) -> Result<Kernel, Box<dyn Error>> {
    let path = temp.path("bzImage");
    std::fs::copy(cache().join("kernel/bzImage"), &path)?;
    Ok(Kernel::open(path)?)
}

/// A kernel of a distribution with its modules, unmodified, and its version.
pub fn distribution(which: &str) -> Result<(Kernel, String), Box<dyn Error>> {
    let stamp =
        std::fs::read_to_string(cache().join("kernels/stamp")).map_err(|e| format!("run `make setup` first: {e}"))?;
    let version = |line: &str| Some(line.strip_prefix(which)?.strip_prefix(' ')?.to_owned());
    let release = stamp.lines().find_map(version).ok_or_else(|| format!("no kernel {which} in {stamp}"))?;
    Ok((distribution_alone(which)?.modules(distribution_modules(which)?), release))
}

/// The same kernel without its modules.
pub fn distribution_alone(which: &str) -> cofferdam::Result<Kernel> {
    Kernel::open(cache().join("kernels").join(which).join("vmlinuz"))
}

/// Its modules.
pub fn distribution_modules(which: &str) -> cofferdam::Result<Modules> {
    Modules::open(cache().join("kernels").join(which).join("modules"))
}

/// The disk of the system below.
pub fn system_disk() -> PathBuf {
    cache().join("system/disk.ext4")
}

/// The whole Debian with systemd that `make setup` made, on its disk, as it boots by itself.
pub fn system(console: Console) -> Result<Vm, Box<dyn Error>> {
    let directory = cache().join("system");
    let initramfs = Initramfs::open(directory.join("initrd"))?;
    let cmdline = "console=hvc0 root=/dev/vda rw quiet";
    let kernel = Kernel::open(directory.join("vmlinuz"))?.cmdline(cmdline).initramfs(initramfs);
    let vm = Vm::builder(kernel).disk(Disk::file(system_disk())).memory(Size::mib(512)).console(console);
    let deadline = std::time::Instant::now() + TEST_TIMEOUT;
    loop {
        match vm.clone().start() {
            // Tests of another checkout have it.
            Err(e) if e.kind() == ErrorKind::ResourceBusy && std::time::Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            outcome => return Ok(outcome?),
        }
    }
}

/// A VM in which busybox loads what is packed and runs `script` as PID 1, under Debian's kernel, which finds everything by ACPI.
pub fn stock_guest(cmdline: &str, script: &str) -> Result<VmBuilder, Box<dyn Error>> {
    let script = format!("for module in /cofferdam.modules/*; do insmod $module; done\n{script}");
    let kernel = distribution("cloud-6.12")?.0.cmdline(cmdline).initramfs(busybox(&script));
    Ok(Vm::builder(kernel).memory(Size::mib(256)))
}

/// The root file system of Debian that `make setup` made.
pub fn debian() -> Image {
    Image::open(cache().join("images/debian-12.tar")).expect("run `make setup` first")
}

/// Runs a program of the host, which must succeed; what it printed.
pub fn host(line: &str) -> Result<String, Box<dyn Error>> {
    host_words(&line.split(' ').collect::<Vec<_>>())
}

/// The same with arguments that may have spaces in them.
pub fn host_words(words: &[&str]) -> Result<String, Box<dyn Error>> {
    let (program, arguments) = words.split_first().ok_or("no program")?;
    let output = std::process::Command::new(program).args(arguments).output()?;
    check!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a guest printed.
#[derive(Clone, Default)]
pub struct Printed(Arc<Mutex<Vec<u8>>>);

impl Printed {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    pub fn console(&self) -> Console {
        Console::writer(self.clone())
    }

    /// Waits until `word` was printed.
    pub fn wait_for(&self, word: &str) -> Outcome {
        self.wait_within(TEST_TIMEOUT, word)
    }

    /// The same, as long as `limit`.
    pub fn wait_within(&self, limit: Duration, word: &str) -> Outcome {
        let deadline = std::time::Instant::now() + limit;
        while !self.text().contains(word) {
            check!(std::time::Instant::now() < deadline, "{word} was never printed: {}", self.text());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An initramfs in which busybox runs `script` as PID 1.
pub fn busybox(script: &str) -> Initramfs {
    let program = std::fs::read("/bin/busybox").expect("busybox-static is not installed: run `make setup` first");
    let init = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\nmount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n{script}\n"
    );
    Initramfs::new()
        .directory("/bin", 0o755)
        .directory("/proc", 0o755)
        .directory("/sys", 0o755)
        .directory("/dev", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .file("/bin/busybox", 0o755, program)
        .file("/init", 0o755, init)
}

/// A VM in which busybox runs `script` as PID 1.
pub fn guest(script: &str) -> VmBuilder {
    Vm::builder(kernel().cmdline("console=hvc0 quiet").initramfs(busybox(script))).memory(Size::mib(128))
}

/// Runs `script` to the end of the machine; how it ended and what it printed.
pub fn run(builder: VmBuilder) -> Result<(Exit, String), Box<dyn Error>> {
    let printed = Printed::default();
    let vm = builder.console(printed.console()).start()?;
    let exit = match vm.wait_timeout(TEST_TIMEOUT) {
        Some(exit) => exit,
        None => {
            vm.kill();
            return Err(format!("it never ended: {}", vm.wait()).into());
        }
    };
    // The kernel's own messages, which begin with their time, come in between when something is slow.
    let text = printed.text().lines().filter(|line| !line.starts_with('[')).collect::<Vec<_>>().join("\n");
    Ok((exit, text))
}

/// How long what can be of any length shall be, where `COFFERDAM_SOAK` says so: seconds, rounds, MiB, thousands.
pub fn soak() -> Option<u64> {
    std::env::var("COFFERDAM_SOAK").ok()?.parse().ok()
}

/// How much of something long is done: all of it only when `COFFERDAM_SOAK` is set.
pub fn soaking(all: u64, usual: u64) -> u64 {
    if soak().is_some() { all } else { usual }
}

/// What says that this process runs one test alone.
const ALONE: &str = "COFFERDAM_TEST_ALONE";

/// Whether this process runs one test alone, for another.
pub fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// True in a process of its own, in which no other test comes in between. Elsewhere this runs the test `name` in such a
/// process, and fails as it does.
pub fn alone(name: &str) -> Result<bool, Box<dyn Error>> {
    if is_alone() {
        return Ok(true);
    }
    let output =
        std::process::Command::new(std::env::current_exe()?).args(["--exact", name]).env(ALONE, "1").output()?;
    check!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(false)
}

/// Bytes that this process has in memory.
pub fn resident() -> Result<u64, Box<dyn Error>> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).ok_or("no second field")?.parse()?;
    Ok(pages * 4096)
}

/// A layer in the directory for temporary files, which is memory in the lab: what lies on its `/` is slow.
pub fn layer() -> WritableLayer {
    WritableLayer::new(Size::gib(4)).scratch_dir(std::env::temp_dir())
}

/// A container of Debian with these settings.
pub fn debian_container() -> ContainerBuilder {
    Container::builder(debian()).kernel(kernel()).start_timeout(TEST_TIMEOUT).writable_layer(layer())
}

/// A container of the Debian with servers and clients of all kinds.
pub fn network_container() -> ContainerBuilder {
    let image = Image::open(cache().join("images/debian-12-network.tar")).expect("run `make setup` first");
    Container::builder(image).kernel(kernel()).start_timeout(TEST_TIMEOUT).writable_layer(layer())
}

/// A running container of Debian.
pub fn container() -> cofferdam::Result<Container> {
    debian_container().start()
}

/// A directory that goes away with its test.
pub struct Temp(PathBuf);

impl Temp {
    pub fn new() -> std::io::Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cofferdam-test-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A kernel of a few instructions: `code` at 1 MiB, entered at its start in 64-bit mode.
pub fn tiny_kernel(temp: &Temp, code: &[u8]) -> cofferdam::Result<Kernel> {
    let path: &Path = &temp.path("kernel");
    std::fs::write(path, tiny::elf(code))?;
    Kernel::open(path)
}

/// Code that maps 3 to 4 GiB, where devices are, and sets `rdi` to the first of them.
pub const MAP_DEVICES: &[u8] = &[
    0x48, 0xb8, 0x83, 0, 0, 0xc0, 0, 0, 0, 0, // mov rax, 0xc0000083
    0x48, 0xa3, 0x18, 0xa0, 0, 0, 0, 0, 0, 0, // mov [0xa018], rax
    0x0f, 0x20, 0xd9, 0x0f, 0x22, 0xd9, // mov rcx, cr3; mov cr3, rcx
    0xbf, 0, 0, 0, 0xd0, // mov edi, 0xd0000000
];

/// Where the rings of [`driver`]'s queue are: descriptors, available, used.
pub const RINGS: [u32; 3] = [0x20_0000, 0x20_1000, 0x20_2000];

/// Code that does what a driver does to start the `n`th device (of a VM without disks: console, entropy, balloon), with one
/// queue of `size` entries whose descriptors are at `descriptors`.
pub fn driver(n: u32, queue: u32, descriptors: u64, size: u32) -> Vec<u8> {
    let (low, high) = (descriptors as u32, (descriptors >> 32) as u32);
    let steps = [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, queue),
        (0x38, size),
        (0x80, low),
        (0x84, high),
    ];
    let more = [(0x90, RINGS[1]), (0xa0, RINGS[2]), (0x44, 1), (0x70, 15)];
    let mut code = MAP_DEVICES.to_vec();
    // mov edi, window
    code.push(0xbf);
    code.extend((0xd000_0000 + n * 0x1000).to_le_bytes());
    for (register, value) in steps.into_iter().chain(more) {
        // mov dword [rdi+register], value
        code.extend([[0xc7, 0x87].as_slice(), &u32::to_le_bytes(register), &u32::to_le_bytes(value)].concat());
    }
    code
}
