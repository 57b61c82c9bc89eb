//! [`NetSpec`]: the description of a network card as plain data.

use super::live::{LivePart, LivePartId, LiveParts, SwitchPlace, take};
use super::path::HostPath;
use crate::error::Result;
use crate::network::{Capture, CaptureSink, ConnectionLimit, Mac, Policy};
use crate::size::Size;
use crate::virtio::net::NetLimit;
use crate::vm::net::{Net, NetSettings, NetSource, PortForward, SwitchAttachment};

/// A card, with the names of what it is connected by.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct NetSpec {
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub queues: u32,
    pub limit: NetLimit,
    pub capture: Option<CaptureSpec>,
    pub source: NetSourceSpec,
}

/// What carries a card's frames.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(in crate::vm) enum NetSourceSpec {
    User(Box<UserSource>),
    /// A tap by its name.
    Tap(String),
    TapFiles(Vec<LivePartId>),
    Socket(LivePartId),
    Switch(SwitchSpec),
    Backend(LivePartId),
}

/// A user-mode network.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct UserSource {
    pub policy: Policy,
    pub ports: Vec<PortForward>,
    pub connection_limit: ConnectionLimit,
    /// The guest's 127.0.0.1 can be reached.
    pub loopback: bool,
}

/// A place on a switch, and the guest's name there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct SwitchSpec {
    pub port: LivePartId,
    pub name: String,
}

/// What of a card's frames is recorded, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct CaptureSpec {
    pub sink: CaptureSinkSpec,
    pub snap: usize,
    pub max: Size,
}

/// Where a capture goes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(in crate::vm) enum CaptureSinkSpec {
    File(HostPath),
    Writer(LivePartId),
}

impl NetSpec {
    /// Returns what of the host's is opened by its name, if anything is.
    pub(super) fn opens(&self) -> Option<String> {
        let capture = self.capture.as_ref().and_then(|capture| match &capture.sink {
            CaptureSinkSpec::File(path) => Some(path.display().to_string()),
            CaptureSinkSpec::Writer(_) => None,
        });
        match &self.source {
            NetSourceSpec::Tap(name) => Some(format!("tap {name}")),
            NetSourceSpec::User(_)
            | NetSourceSpec::TapFiles(_)
            | NetSourceSpec::Socket(_)
            | NetSourceSpec::Switch(_)
            | NetSourceSpec::Backend(_) => capture,
        }
    }

    pub(super) fn split(Net { settings, source }: Net, live: &mut LiveParts) -> Self {
        let NetSettings { mac, mtu, queues, limit, capture } = settings;
        let source = match source {
            NetSource::User(source) => NetSourceSpec::User(source),
            NetSource::Tap(name) => NetSourceSpec::Tap(name),
            NetSource::TapFiles(files) => {
                NetSourceSpec::TapFiles(files.into_iter().map(|file| live.add(LivePart::TapFile(file))).collect())
            }
            NetSource::Socket(fd) => NetSourceSpec::Socket(live.add(LivePart::Socket(fd))),
            NetSource::Switch(SwitchAttachment { switch, name, place }) => {
                let port = live.add(LivePart::SwitchPort(SwitchPlace { switch, lease: place }));
                NetSourceSpec::Switch(SwitchSpec { port, name })
            }
            NetSource::Custom(backend) => NetSourceSpec::Backend(live.add(LivePart::Backend(backend))),
        };
        let capture = capture.map(|capture| CaptureSpec::split(capture, live));
        Self { mac, mtu, queues, limit, capture, source }
    }

    pub(super) fn join(self, live: &mut LiveParts) -> Result<Net> {
        let Self { mac, mtu, queues, limit, capture, source } = self;
        let source = match source {
            NetSourceSpec::User(source) => NetSource::User(source),
            NetSourceSpec::Tap(name) => NetSource::Tap(name),
            NetSourceSpec::TapFiles(ids) => {
                NetSource::TapFiles(ids.into_iter().map(|id| take!(live, id, TapFile)).collect::<Result<_>>()?)
            }
            NetSourceSpec::Socket(id) => NetSource::Socket(take!(live, id, Socket)?),
            NetSourceSpec::Switch(SwitchSpec { port, name }) => {
                let SwitchPlace { switch, lease } = take!(live, port, SwitchPort)?;
                NetSource::Switch(SwitchAttachment { switch, name, place: lease })
            }
            NetSourceSpec::Backend(id) => NetSource::Custom(take!(live, id, Backend)?),
        };
        let capture = capture.map(|capture| capture.join(live)).transpose()?;
        Ok(Net { settings: NetSettings { mac, mtu, queues, limit, capture }, source })
    }
}

impl CaptureSpec {
    fn split(Capture { sink, snap, max }: Capture, live: &mut LiveParts) -> Self {
        let sink = match sink {
            CaptureSink::File(path) => CaptureSinkSpec::File(HostPath::new(path)),
            CaptureSink::Writer(writer) => CaptureSinkSpec::Writer(live.add(LivePart::CaptureWriter(writer))),
        };
        Self { sink, snap, max }
    }

    fn join(self, live: &mut LiveParts) -> Result<Capture> {
        let Self { sink, snap, max } = self;
        let sink = match sink {
            CaptureSinkSpec::File(path) => CaptureSink::File(path.into()),
            CaptureSinkSpec::Writer(id) => CaptureSink::Writer(take!(live, id, CaptureWriter)?),
        };
        Ok(Capture::of(sink).snap_len(snap).max_size(max))
    }
}
