//! Volumes: disks that outlive containers, and directories that are shared by many.

use std::fs;

use cofferdam::disk::{Tmpfs, Volume, VolumeStore};
use cofferdam::{Container, ErrorKind, Image, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, debian_container};
use crate::{check, check_eq};

/// Runs a line of a shell and returns what it printed, with its errors.
fn shell(container: &Container, line: &str) -> cofferdam::Result<String> {
    let output = container.exec(["sh", "-c", &format!("exec 2>&1; {line}")]).timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

pub fn volumes_outlive_containers_and_have_one_writer() -> Outcome {
    let temp = Temp::new()?;
    let store = VolumeStore::new(temp.path("volumes"));
    let volume = || Volume::named("data").store(&store).size(Size::mib(100));
    let missing = debian_container().volume("/data", volume().read_only(true)).start().map(drop);
    let missing = missing.err().ok_or("a volume that is missing was mounted")?;
    check!(missing.kind() == ErrorKind::NotFound && missing.to_string().contains("\"data\""), "{missing}");

    let writer = debian_container().volume("/srv/data", volume()).tmpfs(Tmpfs::new("/srv/data/memory")).start()?;
    let write = "echo kept > /srv/data/file && ln -s file /srv/data/link && echo gone > /srv/data/memory/file";
    check_eq!(shell(&writer, write)?, "");
    check_eq!(shell(&writer, "stat -f -c %T /srv/data /srv/data/memory")?, "ext2/ext3\ntmpfs");
    let busy = debian_container().volume("/data", volume().read_only(true)).start().map(drop);
    let busy = busy.err().ok_or("a volume in use was mounted")?;
    check!(busy.kind() == ErrorKind::ResourceBusy && busy.to_string().contains("this process"), "{busy}");
    check_eq!(store.remove("data").map_err(|error| error.kind()), Err(ErrorKind::ResourceBusy));
    check_eq!(store.copy("data", "other").map_err(|error| error.kind()), Err(ErrorKind::ResourceBusy));
    check!(matches!(writer.stop(TEST_TIMEOUT)?, cofferdam::Exit::PowerOff { .. }));
    drop(writer);

    let reader = || debian_container().volume("/data", volume().read_only(true)).start();
    let (one, two) = (reader()?, reader()?);
    for reader in [&one, &two] {
        check_eq!(shell(reader, "cat /data/link; ls /data/memory")?, "kept");
        check!(shell(reader, "echo x > /data/file")?.contains("Read-only"));
    }
    let busy = debian_container().volume("/data", volume()).start().map(drop).map_err(|error| error.kind());
    check_eq!(busy, Err(ErrorKind::ResourceBusy));
    // What is read can be copied.
    store.copy("data", "snapshot")?;
    let names: Vec<_> = store.list()?.into_iter().map(|it| (it.name, it.size)).collect();
    check_eq!(names, [("data".to_owned(), Size::mib(128)), ("snapshot".to_owned(), Size::mib(128))]);
    drop((one, two));
    store.remove("data")?;
    let snapshot = Volume::named("snapshot").store(&store);
    let container = debian_container().volume("/data", snapshot).start()?;
    check_eq!(shell(&container, "cat /data/file")?, "kept");
    Ok(())
}

pub fn volumes_of_killed_containers_recover_and_volumes_grow() -> Outcome {
    let temp = Temp::new()?;
    let store = VolumeStore::new(temp.path("volumes"));
    let volume = |size| Volume::named("data").store(&store).size(size);
    let small = debian_container().volume("/data", volume(Size::mib(128))).start()?;
    check_eq!(shell(&small, "mkdir /data/dir && echo kept > /data/dir/file && sync")?, "");
    small.kill();
    small.wait();
    drop(small);
    let unclean = debian_container().volume("/data", volume(Size::mib(128)).read_only(true)).start().map(drop);
    let unclean = unclean.err().ok_or("a volume that was not unmounted was only read")?;
    check!(unclean.kind() == ErrorKind::InvalidState && unclean.to_string().contains("not unmounted"), "{unclean}");

    // By more groups than there is room to describe beside those that there were.
    let large = debian_container().volume("/data", volume(Size::gib(20))).start()?;
    check_eq!(shell(&large, "cat /data/dir/file")?, "kept");
    let mib: u64 = shell(&large, "df -BM --output=size /data | tail -n 1 | tr -dc 0-9")?.parse()?;
    check!((19_000..20_480).contains(&mib), "{mib} MiB");
    check_eq!(shell(&large, "dd if=/dev/zero of=/data/more bs=1M count=200 status=none && sync")?, "");
    large.stop(TEST_TIMEOUT)?;
    drop(large);
    // It stays as large when less is asked for, and was unmounted.
    let again = debian_container().volume("/data", volume(Size::mib(128)).read_only(true)).start()?;
    check_eq!(shell(&again, "stat -c %s /data/more; cat /data/dir/file")?, "209715200\nkept");
    check!(shell(&again, "dmesg | grep -i 'ext4.*error'")?.is_empty());
    drop(again);
    // A link that it has left on the volume leads no mount elsewhere, and its devices and set-user-ID programs are files.
    let leave =
        "ln -s /usr/lib /data/link && mknod -m 666 /data/zero c 1 5 && cp /usr/bin/id /data/id && chmod 4755 /data/id";
    let trap = debian_container().volume("/data", volume(Size::gib(20))).start()?;
    check_eq!(shell(&trap, leave)?, "");
    let denied = trap.exec(["sh", "-c", "/data/id -u; head -c 1 /data/zero 2>&1"]).user("daemon").output()?;
    let denied = String::from_utf8_lossy(&denied.stdout).into_owned();
    check!(denied.starts_with("1\n") && denied.contains("Permission denied"), "{denied}");
    trap.stop(TEST_TIMEOUT)?;
    drop(trap);
    let led = debian_container().volume("/data", volume(Size::gib(20))).tmpfs("/data/link/x").start().map(drop);
    let led = led.err().ok_or("a mount followed a link of the volume")?;
    check!(led.kind() == ErrorKind::GuestFailed && led.to_string().contains("/data/link/x"), "{led}");
    Ok(())
}

pub fn directories_are_volumes_of_many_containers() -> Outcome {
    let temp = Temp::new()?;
    let directory = temp.path("dataset");
    fs::create_dir_all(directory.join("sub"))?;
    fs::write(directory.join("sub/file"), "shared")?;
    let image = Image::open(&directory)?;
    let start = || debian_container().volume("/dataset", image.clone()).start();
    let (one, two) = (start()?, start()?);
    for container in [&one, &two] {
        check_eq!(shell(container, "cat /dataset/sub/file")?, "shared");
        check!(shell(container, "touch /dataset/x")?.contains("Read-only"));
    }
    Ok(())
}

pub fn a_kept_layer_is_what_the_next_container_begins_with() -> Outcome {
    let temp = Temp::new()?;
    let store = VolumeStore::new(temp.path("volumes"));
    let layer = || Volume::named("box").store(&store).size(Size::mib(128));
    let builder = || debian_container().keep_layer(layer()).extra_host("db", [10, 1, 2, 3]);
    let first = builder().start()?;
    check_eq!(shell(&first, "echo kept > /root/file && rm /etc/motd && mkdir /var/new")?, "");
    check_eq!(builder().start().map(drop).map_err(|error| error.kind()), Err(ErrorKind::ResourceBusy));
    first.stop(TEST_TIMEOUT)?;
    drop(first);
    let second = builder().start()?;
    check_eq!(
        shell(&second, "cat /root/file; ls -d /var/new; ls /etc/motd; grep -c 10.1.2.3 /etc/hosts")?,
        "kept\n/var/new\nls: cannot access '/etc/motd': No such file or directory\n1"
    );
    second.kill();
    second.wait();
    drop(second);
    let larger = debian_container().keep_layer(layer().size(Size::gib(1))).start()?;
    check_eq!(shell(&larger, "cat /root/file")?, "kept");
    let mib: u64 = shell(&larger, "df -BM --output=size / | tail -n 1 | tr -dc 0-9")?.parse()?;
    check!((900..1_024).contains(&mib), "{mib} MiB");
    drop(larger);
    let directory = temp.path("other");
    fs::create_dir_all(directory.join("sub"))?;
    let other = Container::builder(Image::open(&directory)?).keep_layer(layer()).start().map(drop);
    let other = other.err().ok_or("a layer of another image was taken")?;
    check!(other.kind() == ErrorKind::Incompatible && other.to_string().contains("keep_layer"), "{other}");
    Ok(())
}
