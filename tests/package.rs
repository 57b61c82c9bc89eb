//! The package is complete by itself: its pages link to files that are in it, and nowhere else.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What `cargo package` takes.
fn packaged() -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["package", "--list", "--allow-dirty", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo package --list: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// The targets of a page's links, without those to other sites and to places of the page itself.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let files = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
    // Code such as `[f](x)` is no link: those have no spaces and no quotes.
    files.map(|target| target.split('#').next().unwrap()).filter(|target| !target.contains([' ', '"'])).collect()
}

/// A path as seen from the root of the package; `None` if it leads outside.
fn resolve(page: &str, link: &str) -> Option<String> {
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[test]
fn pages_link_to_what_is_in_the_package() {
    let files = packaged();
    let (mut problems, mut count) = (Vec::new(), 0);
    for page in files.iter().filter(|file| file.ends_with(".md")) {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        for link in links(&text) {
            count += 1;
            let there = resolve(page, link).is_some_and(|path| {
                files.contains(&path)
                    || files.range(format!("{path}/")..).next().is_some_and(|it| it.starts_with(&format!("{path}/")))
            });
            if !there {
                problems.push(format!("{page} links to {link}, which is not in the package"));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(files.contains("README.md") && count > 15, "{count} links were found");
}

#[test]
fn a_link_out_of_the_package_is_found() {
    assert_eq!(links("[a](b.md#c), [d](https://e), [f](#g) and [h](../i)"), ["b.md", "../i"]);
    assert_eq!(resolve("docs/guide.md", "../README.md").as_deref(), Some("README.md"));
    assert_eq!(resolve("README.md", "../elsewhere"), None);
}
