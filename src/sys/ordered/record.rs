//! What this thread writes and syncs, in order, for models of a loss of power.

use std::cell::RefCell;

use imago::io_buffers::IoVector;

#[derive(Debug, Clone)]
pub(crate) enum WriteEvent {
    /// Bytes of one sector.
    Wrote(u64, Vec<u8>),
    Synced,
}

thread_local! {
    static EVENTS: RefCell<Vec<WriteEvent>> = const { RefCell::new(Vec::new()) };
}

/// All since it was asked last.
pub(crate) fn taken() -> Vec<WriteEvent> {
    EVENTS.take()
}

pub(crate) fn wrote(mut offset: u64, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(bytes.len().min(512 - (offset % 512) as usize));
        EVENTS.with_borrow_mut(|events| events.push(WriteEvent::Wrote(offset, now.to_vec())));
        offset += now.len() as u64;
        bytes = later;
    }
}

pub(crate) fn synced() {
    EVENTS.with_borrow_mut(|events| events.push(WriteEvent::Synced));
}

/// What is about to be written.
pub(super) fn bytes(vector: &IoVector<'_>) -> Vec<u8> {
    let mut all = vec![0; vector.len() as usize];
    vector.copy_into_slice(&mut all);
    all
}
