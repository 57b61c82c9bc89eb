//! Images that others' tools have made, `guest/images`, against what `umoci` unpacks of them.

use super::local::open;
use super::umoci::{compare, ours};
use super::*;

/// One line of the list: an image in some form, and the layout with the same image.
struct Listed {
    file: PathBuf,
    name: String,
    layout: PathBuf,
    name_in_layout: String,
}

/// The images of a directory that `guest/images` has made.
fn listed(directory: &str) -> Vec<Listed> {
    let cache = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    let directory = PathBuf::from(cache.unwrap()).join("cofferdam/images").join(directory);
    let list = fs::read_to_string(directory.join("images"));
    let list = list.unwrap_or_else(|error| panic!("{}: {error}: run `make images` as root", directory.display()));
    let listed = |line: &str| {
        let [file, name, layout, name_in_layout] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        Listed {
            file: directory.join(file),
            name: name.to_owned(),
            layout: directory.join(layout),
            name_in_layout: name_in_layout.to_owned(),
        }
    };
    list.lines().map(listed).collect()
}

/// Compares all images of a directory; their number, and that of archives beside.
fn compare_all(directory: &str) -> (usize, usize) {
    let (mut images, mut archives) = (0, 0);
    for Listed { file, name, layout, name_in_layout } in listed(directory) {
        let temp = Temp::new();
        let image = open(&temp, &file).select(&name);
        if file == layout {
            let source = format!("{}:{name}", layout.to_str().unwrap());
            assert!(compare(&image, &source, &temp.0.join("bundle")) > 1, "{source} is empty");
            images += 1;
        } else {
            let other = open(&temp, &layout).select(&name_in_layout);
            assert!(ours(&image) == ours(&other), "{}: {name} is not what {} has", file.display(), layout.display());
            archives += 1;
        }
    }
    (images, archives)
}

#[test]
fn images_of_other_tools_are_unpacked_as_by_umoci() {
    assert_eq!(compare_all("foreign"), (6, 2));
    // To make those upon a Debian takes minutes: `make soak` does.
    if std::env::var_os("COFFERDAM_SOAK").is_some() {
        assert_eq!(compare_all("foreign-debian"), (7, 3));
    }
}
