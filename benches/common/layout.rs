//! OCI image layouts for benches.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Takes a file as a blob of the layout; its descriptor.
fn blob(layout: &Path, file: &Path, kind: &str) -> serde_json::Value {
    let path = file.to_str().expect("UTF-8");
    let digest = run("sha256sum", &[path]).split_whitespace().next().expect("a digest").to_owned();
    let size = fs::metadata(file).expect("a file").len();
    let blob = layout.join("blobs/sha256").join(&digest);
    if fs::hard_link(file, &blob).is_err() {
        fs::copy(file, &blob).expect("a copy");
    }
    serde_json::json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": format!("sha256:{digest}"), "size": size })
}

fn document(layout: &Path, content: &serde_json::Value, kind: &str) -> serde_json::Value {
    let file = layout.join("document");
    fs::write(&file, content.to_string()).expect("a file");
    let descriptor = blob(layout, &file, kind);
    fs::remove_file(file).expect("a file");
    descriptor
}

/// A layer with one small file in a directory of its own.
pub fn small_layer(dir: &Path, number: usize) -> PathBuf {
    let (tree, tar) = (dir.join(format!("tree-{number}")), dir.join(format!("layer-{number}.tar")));
    fs::create_dir_all(tree.join(format!("opt/{number}"))).expect("a directory");
    fs::write(tree.join(format!("opt/{number}/file")), number.to_string()).expect("a file");
    run("tar", &["-C", tree.to_str().expect("UTF-8"), "-cf", tar.to_str().expect("UTF-8"), "opt"]);
    tar
}

/// Makes a layout of one image of these uncompressed layers, the lowest first.
pub fn make(layout: &Path, layers: &[PathBuf]) {
    fs::create_dir_all(layout.join("blobs/sha256")).expect("a directory");
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
    let layers: Vec<_> = layers.iter().map(|layer| blob(layout, layer, "layer.v1.tar")).collect();
    let ids: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
    let rootfs = serde_json::json!({ "type": "layers", "diff_ids": ids });
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs });
    let config = document(layout, &config, "config.v1+json");
    let kind = "manifest.v1+json";
    let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": layers });
    let manifest = document(layout, &manifest, kind);
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(layout.join("index.json"), index.to_string()).expect("a file");
}
