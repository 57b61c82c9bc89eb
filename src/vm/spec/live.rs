//! [`LiveParts`]: what of a VM's description is not data.
//!
//! Its one table also says how each kind is handed over to another process.
#![cfg_attr(not(test), allow(dead_code, reason = "so far tests alone ask how a part is handed over"))]

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use crate::boot::{Initramfs, LoadedKernel, Modules};
use crate::error::{Error, ErrorKind, Result};
use crate::network::{AddressLease, Switch};
use crate::vm::net::CustomBackend;

/// A writer of the embedder's. It may block, and is called on a thread of its own.
pub(in crate::vm) type Writer = Arc<Mutex<dyn Write + Send>>;

/// A card's place on a switch of this process.
#[derive(Clone)]
pub(in crate::vm) struct SwitchPlace {
    pub switch: Switch,
    /// It was taken before the VM is started.
    pub lease: Option<Arc<AddressLease>>,
}

/// How a live part comes into another process, which has no authority of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vm) enum Handover {
    /// As a descriptor (unix(7), `SCM_RIGHTS`).
    Descriptor,
    /// As one end of a pipe or socket, whose other end a thread of the embedder's process serves.
    Pump,
    /// Not at all: the embedder's process does beforehand what it is for.
    Stays,
}

/// Makes the kinds of live parts of their table, so that none is without a handover.
macro_rules! live_parts {
    ($($(#[$meta:meta])* $kind:ident($part:ty): $handover:ident, $how:literal;)*) => {
        /// One live part, under its kind.
        #[derive(Clone)]
        pub(in crate::vm) enum LivePart {
            $($(#[$meta])* $kind($part),)*
        }

        /// The kinds of live parts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(in crate::vm) enum LivePartKind {
            $($kind,)*
        }

        impl LivePart {
            pub(in crate::vm) fn kind(&self) -> LivePartKind {
                match self {
                    $(Self::$kind(_) => LivePartKind::$kind,)*
                }
            }
        }

        impl LivePartKind {
            /// All kinds, in the order of the table.
            pub(in crate::vm) const ALL: &[Self] = &[$(Self::$kind,)*];

            /// How a part of this kind is handed over.
            pub(in crate::vm) fn handover(self) -> Handover {
                match self {
                    $(Self::$kind => Handover::$handover,)*
                }
            }

            /// What is handed over, in words.
            pub(in crate::vm) fn how(self) -> &'static str {
                match self {
                    $(Self::$kind => $how,)*
                }
            }
        }
    };
}

live_parts! {
    /// A kernel that was opened: the sealed image that VMs map.
    KernelImage(Arc<LoadedKernel>): Descriptor, "the image, which is a sealed memory file";
    /// Archives and files for the first root file system. They may be large.
    Initramfs(Initramfs): Descriptor, "one archive of all of it, in a sealed memory file";
    /// A directory of modules.
    Modules(Modules): Stays, "what the devices need is packed into the initramfs first";
    /// What takes the console's output.
    ConsoleWriter(Writer): Pump, "a pipe; a thread gives what comes to the writer";
    /// An image that the embedder has opened.
    DiskFile(Arc<File>): Descriptor, "the open file";
    /// A tap that the embedder has opened, for one pair of queues.
    TapFile(Arc<File>): Descriptor, "the open tap, of one pair of queues";
    /// A socket whose peer carries frames.
    Socket(Arc<OwnedFd>): Descriptor, "the socket";
    /// A place among guests of this process.
    SwitchPort(SwitchPlace): Pump, "a socket of frames; a thread moves them between it and the switch";
    /// What makes backends of the embedder's.
    Backend(CustomBackend): Pump, "a socket of frames; a thread moves them between it and the backend";
    /// What takes a card's recorded frames.
    CaptureWriter(Writer): Pump, "a pipe; a thread gives what comes to the writer";
}

impl fmt::Debug for LivePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)
    }
}

/// The name of a live part in the spec that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LivePartId(u32);

#[cfg(test)]
impl LivePartId {
    pub(super) fn nth(n: u32) -> Self {
        Self(n)
    }
}

/// The live parts of one VM. Each is named once by its spec.
#[derive(Debug, Default)]
pub struct LiveParts(Vec<Option<LivePart>>);

impl LiveParts {
    /// Adds a part, and returns its name.
    pub(in crate::vm) fn add(&mut self, part: LivePart) -> LivePartId {
        self.0.push(Some(part));
        LivePartId(self.0.len() as u32 - 1)
    }

    /// Takes the part of this name out. [`take`](super::take) is simpler to call.
    ///
    /// # Errors
    /// `Corrupt` when there is none, or it is of another kind, or was taken before.
    pub(in crate::vm) fn take<T>(
        &mut self,
        LivePartId(n): LivePartId,
        wanted: LivePartKind,
        get: impl FnOnce(LivePart) -> Option<T>,
    ) -> Result<T> {
        let corrupt = |why: String| Error::new(ErrorKind::Corrupt, format!("live part {n}, a {wanted:?}: {why}"));
        let part = usize::try_from(n).ok().and_then(|n| self.0.get_mut(n));
        let part = part.ok_or_else(|| corrupt("there is none".into()))?;
        let part = part.take().ok_or_else(|| corrupt("it is named twice".into()))?;
        let kind = part.kind();
        get(part).ok_or_else(|| corrupt(format!("it is a {kind:?}")))
    }

    #[cfg(test)]
    pub(super) fn kinds(&self) -> Vec<LivePartKind> {
        self.0.iter().flatten().map(LivePart::kind).collect()
    }

    /// Checks that all parts were taken.
    ///
    /// # Errors
    /// `Corrupt` names one that its spec does not name.
    pub(in crate::vm) fn finish(self) -> Result<()> {
        let left = self.0.iter().enumerate().find_map(|(n, part)| Some((n, part.as_ref()?)));
        left.map_or(Ok(()), |(n, part)| {
            Err(Error::new(ErrorKind::Corrupt, format!("live part {n}, a {part:?}: the spec does not name it")))
        })
    }
}

/// Takes a part of this kind: `take!(live, id, DiskFile)`.
macro_rules! take {
    ($live:expr, $id:expr, $kind:ident) => {{
        use crate::vm::spec::live::{LivePart, LivePartKind};
        $live.take($id, LivePartKind::$kind, |part| match part {
            LivePart::$kind(part) => Some(part),
            _ => None,
        })
    }};
}
pub(super) use take;
