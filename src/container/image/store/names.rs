//! What pulled images are called, each name a file of the store.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::super::oci::Digest;
use super::{FILE_MODE, Shelf, Store, private_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::AtomicFile;

/// Names that are listed, and how large the file of one is.
const MAX_NAMES: usize = 100_000;
const MAX_NAME: u64 = 64 << 10;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct NameRecord {
    /// In full, as a reference is displayed.
    pub reference: String,
    /// The index or manifest that it named when it was pulled.
    pub root: Digest,
    pub root_size: u64,
    pub root_type: String,
    /// The manifest and the configuration of the image for this platform.
    pub manifest: Digest,
    pub config: Digest,
    pub platform: String,
    /// Unpacked, the lowest first.
    pub layers: Vec<Digest>,
    #[serde(default)]
    pub pinned: bool,
}

impl Store {
    fn names(&self) -> Result<Shelf> {
        self.disks.within("names")
    }

    /// What a name stands for, if it was pulled.
    ///
    /// # Errors
    /// What reading its file fails with.
    pub(in super::super) fn name(&self, reference: &str) -> Result<Option<NameRecord>> {
        let record = read(&self.names()?, &name_file(reference))?.map(|(record, _)| record);
        Ok(record.filter(|record| record.reference == reference))
    }

    /// Gives a name, whatever it stood for before. This counts as a use.
    ///
    /// # Errors
    /// What writing it fails with.
    pub(in super::super) fn set_name(&self, record: &NameRecord) -> Result<()> {
        let names = self.names()?;
        let doing = || format!("writing to {}", names.shown.display());
        let bytes = serde_json::to_vec(record).map_err(io::Error::from).doing(doing)?;
        if bytes.len() as u64 > MAX_NAME {
            let what = format!("{} takes {} bytes as a name, more than {MAX_NAME}", record.reference, bytes.len());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        write(&names, &name_file(&record.reference), &bytes).doing(doing)
    }

    /// Takes a name away, and says whether it was there.
    pub(in super::super) fn remove_name(&self, reference: &str) -> Result<bool> {
        let names = self.names()?;
        match fs::remove_file(names.path().join(name_file(reference))) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).doing(|| format!("removing {reference}")),
        }
    }

    /// Remembers that an image is used now. A failure changes what is removed first, and nothing else.
    pub(in super::super) fn touch(&self, reference: &str) {
        self.touch_at(reference, SystemTime::now());
    }

    pub(in super::super) fn touch_at(&self, reference: &str, now: SystemTime) {
        let touch = || {
            let file = private_file(&self.names()?.directory, &name_file(reference))?;
            Ok(file.set_modified(now)?)
        };
        let outcome: Result<()> = touch();
        if let Err(error) = outcome {
            log::debug!("the use of {reference} is not remembered: {error}");
        }
    }

    /// All names in order, and when each was used last.
    ///
    /// # Errors
    /// What reading the directory or one of its files fails with; `ResourceExhausted` for too many of them.
    pub(in super::super) fn all_names(&self) -> Result<Vec<(NameRecord, SystemTime)>> {
        let names = self.names()?;
        let mut found = Vec::new();
        for file in names.files(MAX_NAMES)? {
            found.extend(read(&names, &file)?.filter(|(record, _)| file == name_file(&record.reference)));
        }
        found.sort_by(|(a, _), (b, _)| a.reference.cmp(&b.reference));
        Ok(found)
    }
}

/// A reference may be longer than the name of a file.
fn name_file(reference: &str) -> String {
    Digest::sha256(reference.as_bytes()).hex().to_owned()
}

/// A record, and when it was used last. One that is no record counts as absent.
///
/// One that cannot be read does not: its layers would be taken for layers that no caller needs.
fn read(names: &Shelf, file: &str) -> Result<Option<(NameRecord, SystemTime)>> {
    let doing = || format!("reading {}", names.shown.join(file).display());
    let mut bytes = Vec::new();
    let file = match private_file(&names.directory, file) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.doing(doing())),
    };
    let used = file.metadata().doing(doing)?.modified().doing(doing)?;
    file.take(MAX_NAME + 1).read_to_end(&mut bytes).doing(doing)?;
    if bytes.len() as u64 > MAX_NAME {
        return Ok(None);
    }
    Ok(serde_json::from_slice(&bytes).ok().map(|record| (record, used)))
}

/// Writes a file that is seen whole or not at all, in the place of one that is there.
fn write(names: &Shelf, file: &str, bytes: &[u8]) -> Result<()> {
    let folder = names.path();
    let path: &Path = &folder.join(file);
    for _ in 0..3 {
        let draft = AtomicFile::new(&folder, FILE_MODE)?;
        draft.file().write_all(bytes)?;
        draft.file().sync_all()?;
        let published = if path.exists() { draft.replace(path) } else { draft.publish(path) };
        match published {
            // Another process was quicker, or took it away.
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {}
            outcome => return Ok(outcome?),
        }
    }
    Err(Error::new(ErrorKind::ResourceBusy, "other processes write the same name again and again"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::super::oci::MAX_LAYERS;
    use super::*;

    pub(in super::super) struct Temp(pub Store);

    impl Temp {
        pub(in super::super) fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("cofferdam-{name}-{}", std::process::id()));
            Self(Store::open(Some(dir)).unwrap())
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0.disks.shown);
        }
    }

    pub(in super::super) fn record(reference: &str, config: &[u8]) -> NameRecord {
        NameRecord {
            reference: reference.into(),
            root: Digest::sha256(b"root"),
            root_size: 4,
            root_type: String::new(),
            manifest: Digest::sha256(b"manifest"),
            config: Digest::sha256(config),
            platform: "linux".into(),
            layers: Vec::new(),
            pinned: false,
        }
    }

    #[test]
    fn name_of_an_image_with_the_most_layers_is_kept() {
        let temp = Temp::new("large-names");
        let mut large = record("r/large:1", b"x");
        large.layers = vec![format!("sha512:{}", "0".repeat(128)).parse().unwrap(); MAX_LAYERS];
        temp.0.set_name(&large).unwrap();
        assert_eq!(temp.0.name("r/large:1").unwrap(), Some(large.clone()));
        large.layers = vec![large.layers[0].clone(); 4 * MAX_LAYERS];
        assert_eq!(temp.0.set_name(&large).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(temp.0.name("r/large:1").unwrap().map(|it| it.layers.len()), Some(MAX_LAYERS));
    }

    #[test]
    fn name_stands_for_what_was_pulled_last() {
        let temp = Temp::new("names");
        let store = &temp.0;
        assert_eq!(store.name("r/b:1").unwrap(), None);
        for it in [record("r/b:1", b"old"), record("r/a:1", b"x"), record("r/b:1", b"new")] {
            store.set_name(&it).unwrap();
        }
        assert_eq!(store.name("r/b:1").unwrap(), Some(record("r/b:1", b"new")));
        let all = || store.all_names().unwrap().into_iter().map(|(it, _)| it.reference).collect::<Vec<_>>();
        assert_eq!(all(), ["r/a:1", "r/b:1"]);
        // What is no record is passed over.
        fs::write(store.names().unwrap().path().join("x"), "{}").unwrap();
        assert_eq!(all().len(), 2);
        assert!(store.remove_name("r/b:1").unwrap() && !store.remove_name("r/b:1").unwrap());
        assert_eq!(all(), ["r/a:1"]);
    }
}
