//! Unusual files of an image, as the guest sees them.

use std::fs;
use std::path::Path;
use std::process::Command;

use cofferdam::{Container, Image, Kernel};

use crate::check_eq;
use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, cache, distribution, kernel, soak};
use crate::unusual_image::maker::{Made, archive};
use crate::unusual_image::{self, HOLEY, LINKS, MANY};

/// Everything unusual, as a guest with this kernel sees it.
fn look(kernel: Kernel, whole: bool) -> Outcome {
    let container =
        Container::builder(unusual_image::image(&cache(), false)).kernel(kernel).start_timeout(TEST_TIMEOUT).start()?;
    let run = |command: &str| -> Result<String, Box<dyn std::error::Error>> {
        let output =
            container.exec(["/bin/sh", "-c", command]).env("PATH", "/bin:/usr/bin").timeout(TEST_TIMEOUT).output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
    };
    run("/bin/busybox --install -s /bin")?;
    let stat = |path: &str| run(&format!("stat -c '%f %u:%g %h %s %Y' {path}"));
    check_eq!(run("stat -c '%f %u:%g %h %Y' /odd")?, "43ff 1000:1001 5 -5");
    check_eq!(stat("/odd/1910")?, "81a0 1000:1001 1 0 -1893456000");
    check_eq!(stat("/odd/fraction")?, "81a0 1000:1001 1 0 -2");
    check_eq!(run("stat -c %y /odd/fraction | cut -c 1-23")?, "1969-12-31 23:59:58.500");
    check_eq!(stat("/odd/2300")?, "81a0 1000:1001 1 0 10413792000");
    check_eq!(stat("/odd/setuid")?, "89ed 1000:1001 1 1 1600000000");
    check_eq!(stat("/odd/owner")?, "81a0 4294967294:3000000000 1 0 1600000000");
    check_eq!(run("stat -c '%F %t %T' /odd/device /odd/fifo")?, "character special file 12c f4240\nfifo 0 0");
    check_eq!(
        run("cat /odd/$(printf '\\377\\376'); cat /link/below /usr/lib/target")?,
        "not UTF-8below a linkthrough a link"
    );
    check_eq!(run("readlink /odd/long | wc -c")?, "4002");

    let attributes = "getfattr --absolute-names -d -m - -e hex";
    check_eq!(
        run(&format!("{attributes} /odd/xattr /odd/cap"))?,
        "# file: /odd/xattr\ntrusted.t=0x78\nuser.note=0x74776f0a6c696e6573\n\n\
         # file: /odd/cap\nsecurity.capability=0x0100000200040000000000000000000000000000"
    );
    check_eq!(run("getfattr --absolute-names --only-values -n user.large /odd/large | tr -d v | wc -c")?, "0");
    check_eq!(run("getfattr --absolute-names --only-values -n user.large /odd/large | wc -c")?, "60000");
    let list = "user::rwx\nuser:1000:r-x\ngroup::r--\nmask::r-x\nother::---";
    check_eq!(run("getfacl -ncpE /odd/acl")?, list);
    check_eq!(run("getfacl -ncpE -d /odd/default")?, list);
    check_eq!(run("stat -c %A /odd/acl")?, "-rwxr-x---");

    check_eq!(run("stat -c %s /odd/holey")?, HOLEY.to_string());
    // What is read around the pieces: the block before the first, the first, behind it, far behind, and the end.
    check_eq!(
        run("head -c 4096 /odd/holey | tr -d '\\000' | wc -c; head -c 9097 /odd/holey | tr -d '\\000' | wc -c")?,
        "0\n5000"
    );
    let byte = |at: u64| run(&format!("dd if=/odd/holey bs=1 skip={at} count=2 2>/dev/null | od -An -tu1"));
    check_eq!(byte((3 << 30) - 1)?.split_whitespace().collect::<Vec<_>>(), ["0", "2"]);
    check_eq!(byte(3 << 30)?.split_whitespace().collect::<Vec<_>>(), ["2", "0"]);
    check_eq!(byte(1 << 30)?.split_whitespace().collect::<Vec<_>>(), ["0", "0"]);
    check_eq!(run("tail -c 8 /odd/holey | od -An -tu1")?.split_whitespace().collect::<String>(), "02222222");
    check_eq!(run("tr -d '\\000' < /odd/zeros | wc -c; wc -c < /odd/zeros")?, "0\n1048576");

    // Reading these directories takes half a minute in the lab. Outside soak one kernel does it.
    if whole {
        check_eq!(run("ls /odd/many | wc -l; ls /odd/links | wc -l")?, format!("{MANY}\n{LINKS}"));
    }
    check_eq!(run("test -e /odd/many/49999 && echo last")?, "last");
    check_eq!(run("stat -c %h /odd/links/first; cat /odd/links/65999")?, format!("{LINKS}\nlinked"));
    // All of it can be written to.
    check_eq!(
        run(
            "echo more >> /odd/links/first && chmod 700 /odd/acl && rm /odd/many/7 && mv /odd/default /odd/moved && echo y"
        )?,
        "y"
    );
    check_eq!(run("sha256sum < /bin/busybox | cut -c 1-64")?, {
        let output = std::process::Command::new("sha256sum").arg("/bin/busybox").output()?;
        String::from_utf8_lossy(&output.stdout).chars().take(64).collect::<String>()
    });
    Ok(())
}

/// The digest of these bytes, as images name it, and where a layout has them.
fn blob(layout: &Path, bytes: &[u8]) -> Result<String, Box<dyn std::error::Error>> {
    let new = layout.join("new");
    fs::write(&new, bytes)?;
    let output = Command::new("sha256sum").arg(&new).output()?;
    let digest: String = String::from_utf8_lossy(&output.stdout).chars().take(64).collect();
    fs::rename(new, layout.join("blobs/sha256").join(&digest))?;
    Ok(format!(r#""digest":"sha256:{digest}","size":{}"#, bytes.len()))
}

/// A layout of one image with these layers.
fn write_layout(layout: &Path, layers: &[Vec<u8>]) -> Outcome {
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let of_type =
        |media_type: &str, blob: &str| format!(r#"{{"mediaType":"application/vnd.oci.image.{media_type}",{blob}}}"#);
    let blobs: Vec<String> = layers.iter().map(|tar| blob(layout, tar)).collect::<Result<_, _>>()?;
    let digests = blobs.iter().filter_map(|blob| blob.split('"').nth(3)).map(|digest| format!("\"{digest}\""));
    let digests = digests.collect::<Vec<_>>().join(",");
    let config = format!(
        r#"{{"os":"linux","config":{{"Cmd":["/bin/sh"]}},"rootfs":{{"type":"layers","diff_ids":[{digests}]}}}}"#
    );
    let config = of_type("config.v1+json", &blob(layout, config.as_bytes())?);
    let layers = blobs.iter().map(|blob| of_type("layer.v1.tar", blob)).collect::<Vec<_>>().join(",");
    let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layers}]}}"#);
    let manifest = of_type("manifest.v1+json", &blob(layout, manifest.as_bytes())?);
    fs::write(layout.join("index.json"), format!(r#"{{"schemaVersion":2,"manifests":[{manifest}]}}"#))?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

pub fn layers_are_one_root_file_system() -> Outcome {
    let temp = Temp::new()?;
    let content = |seed: u8| (0..3_000_000u32).map(|n| (n / 7) as u8 ^ seed).collect::<Vec<u8>>();
    let lower = [
        Made::file("bin/busybox", fs::read("/bin/busybox")?).mode(0o755),
        Made::symlink("bin/sh", "busybox"),
        Made::file("data/lower", content(1)),
        Made::file("data/removed", "x"),
        Made::file("data/replaced", "lower"),
    ];
    let upper = [
        Made::file("data/upper", content(2)),
        Made::file("data/.wh.removed", ""),
        Made::file("data/replaced", "upper"),
        Made::link("linked", "data/lower"),
        Made::file("holey", [vec![1; 4096], vec![2; 10]].concat()).sparse(&[(8192, 4096), (1 << 30, 10)], 2 << 30),
    ];
    write_layout(&temp.path("layout"), &[archive(&lower), archive(&upper)])?;
    let image = Image::open(temp.path("layout"))?.cache_dir(temp.path("cache"));
    check_eq!(image.config()?.cmd, ["/bin/sh"]);
    let container = Container::builder(image).kernel(kernel()).start_timeout(TEST_TIMEOUT).start()?;
    let run = |command: &str| -> Result<String, Box<dyn std::error::Error>> {
        let output = container.exec(["/bin/sh", "-c", command]).env("PATH", "/bin").timeout(TEST_TIMEOUT).output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
    };
    run("/bin/busybox --install -s /bin")?;
    check_eq!(run("ls /data")?, "lower\nreplaced\nupper");
    check_eq!(run("cat /data/replaced")?, "upper");
    check_eq!(run("stat -c '%h %s' /linked /data/lower")?, "2 3000000\n2 3000000");
    let sum = |bytes: &[u8]| -> Result<String, Box<dyn std::error::Error>> {
        fs::write(temp.path("sum"), bytes)?;
        let output = Command::new("sha256sum").arg(temp.path("sum")).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).chars().take(64).collect())
    };
    for (path, seed) in [("/data/lower", 1), ("/data/upper", 2)] {
        check_eq!(run(&format!("sha256sum < {path} | cut -c 1-64"))?, sum(&content(seed))?);
    }
    check_eq!(
        run("stat -c %s /holey; tail -c +1073741825 /holey | head -c 12 | od -An -tu1 | tr -s ' '")?,
        "2147483648\n 2 2 2 2 2 2 2 2 2 2 0 0"
    );
    Ok(())
}

pub fn unusual_files_are_intact() -> Outcome {
    look(kernel(), true)
}

pub fn unusual_files_are_intact_with_debian_kernels() -> Outcome {
    look(distribution("generic")?.0, soak().is_some())
}

pub fn unusual_files_are_intact_with_a_newer_debian_kernel() -> Outcome {
    look(distribution("cloud-6.12")?.0, soak().is_some())
}
