//! [`BlobServers`]: which servers may be asked for one blob.

use std::sync::{Mutex, PoisonError};

/// Which servers of a session were asked for one blob, and which are asked no more. Their numbers are those of the session.
#[derive(Debug)]
pub(super) struct BlobServers(Mutex<Vec<ServerState>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ServerState {
    Unused,
    /// It has sent a part.
    Used,
    /// It has not the blob, or has sent wrong bytes.
    Excluded,
}

impl BlobServers {
    pub fn new(count: usize) -> Self {
        Self(Mutex::new(vec![ServerState::Unused; count]))
    }

    /// The first server from `from` on, around, that may be asked. `from` itself where all are excluded.
    pub fn next(&self, from: usize) -> usize {
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = states.len().max(1);
        let mut candidates = (0..count).map(|n| from.wrapping_add(n) % count);
        candidates.find(|n| states.get(*n) != Some(&ServerState::Excluded)).unwrap_or(from % count)
    }

    /// Remembers that a server sends the blob.
    pub fn used(&self, server: usize) {
        self.set(server, ServerState::Used);
    }

    /// Asks a server no more. Returns whether another one is left.
    pub fn exclude(&self, server: usize) -> bool {
        self.set(server, ServerState::Excluded);
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        states.iter().any(|state| *state != ServerState::Excluded)
    }

    /// Asks no more a server that has sent a part of wrong bytes. Returns whether there is one to be asked next.
    ///
    /// Where several have sent parts, the last of them is asked once more, alone. The registry itself is behind its mirrors.
    pub fn distrust(&self) -> bool {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut used: Vec<_> = states.iter_mut().filter(|state| **state == ServerState::Used).collect();
        if used.len() > 1
            && let Some(last) = used.pop()
        {
            *last = ServerState::Unused;
        }
        let any = !used.is_empty();
        used.into_iter().for_each(|state| *state = ServerState::Excluded);
        any && states.iter().any(|state| *state != ServerState::Excluded)
    }

    fn set(&self, server: usize, to: ServerState) {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = states.get_mut(server).filter(|state| **state != ServerState::Excluded) {
            *state = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_with_wrong_bytes_are_asked_no_more() {
        let servers = BlobServers::new(3);
        assert_eq!([servers.next(0), servers.next(2), servers.next(4)], [0, 2, 1]);
        servers.used(1);
        assert!(servers.distrust());
        assert_eq!([servers.next(0), servers.next(1), servers.next(2)], [0, 2, 2]);
        servers.used(1);
        assert!(servers.exclude(2) && !servers.exclude(0));
        assert_eq!([servers.next(1), servers.next(5)], [1, 2], "all are excluded");
        assert!(!servers.distrust());
    }

    #[test]
    fn mirror_that_breaks_off_behind_a_wrong_byte_does_not_discredit_the_registry() {
        let servers = BlobServers::new(2);
        servers.used(0);
        servers.used(1);
        assert!(servers.distrust());
        assert_eq!(servers.next(0), 1);
        servers.used(1);
        assert!(!servers.distrust());
    }

    #[test]
    fn distrust_without_a_use_is_no_reason_to_ask_again() {
        let servers = BlobServers::new(2);
        assert!(!servers.distrust());
        servers.used(0);
        assert!(servers.distrust() && !servers.distrust());
        servers.used(1);
        assert!(!servers.distrust());
    }
}
