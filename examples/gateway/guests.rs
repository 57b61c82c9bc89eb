//! Guests by name: started for their first caller, stopped when they have had no caller for a while.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam::{Container, Process};

/// How long a guest may take to end in good order.
const GRACE: Duration = Duration::from_secs(5);

/// A container and the server in it.
pub(crate) struct Guest {
    pub(crate) container: Container,
    pub(crate) server: Process,
}

type Start = dyn Fn(&str) -> cofferdam::Result<Guest> + Send + Sync;

/// All of them.
pub(crate) struct Guests {
    places: HashMap<String, Arc<Place>>,
    start: Box<Start>,
    idle: Duration,
}

/// The guest of one name. The thread that holds the lock starts or stops the guest; other threads wait for it.
struct Place(Mutex<State>);

struct State {
    guest: Option<Arc<Guest>>,
    visits: usize,
    /// When the last one began or ended.
    since: Instant,
    starts: u64,
}

impl Place {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller's use of a guest. The guest is not stopped while there is one.
pub(crate) struct Visit {
    place: Arc<Place>,
    pub(crate) guest: Arc<Guest>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut state = self.place.state();
        (state.visits, state.since) = (state.visits - 1, Instant::now());
    }
}

impl Guests {
    pub(crate) fn new(
        names: impl IntoIterator<Item = String>,
        idle: Duration,
        start: impl Fn(&str) -> cofferdam::Result<Guest> + Send + Sync + 'static,
    ) -> Self {
        let place = || Place(Mutex::new(State { guest: None, visits: 0, since: Instant::now(), starts: 0 }));
        let places = names.into_iter().map(|name| (name.to_ascii_lowercase(), Arc::new(place()))).collect();
        Self { places, start: Box::new(start), idle }
    }

    /// The guest of that name, which is started if it does not run. `None`: there is no such name.
    pub(crate) fn visit(&self, name: &str) -> Option<cofferdam::Result<Visit>> {
        let place = self.places.get(name)?;
        let mut state = place.state();
        let alive = |guest: &Arc<Guest>| matches!(guest.server.try_wait(), Ok(None));
        let guest = match state.guest.take().filter(alive) {
            Some(guest) => guest,
            None => match (self.start)(name) {
                Ok(guest) => {
                    state.starts += 1;
                    Arc::new(guest)
                }
                Err(error) => return Some(Err(error)),
            },
        };
        state.guest = Some(guest.clone());
        (state.visits, state.since) = (state.visits + 1, Instant::now());
        Some(Ok(Visit { place: place.clone(), guest }))
    }

    /// Stops guests that have had no caller for the idle time; to be called now and then.
    pub(crate) fn stop_idle(&self) {
        for (name, place) in &self.places {
            // One that starts is wanted.
            let Ok(mut state) = place.0.try_lock() else { continue };
            if state.visits == 0
                && state.since.elapsed() >= self.idle
                && let Some(guest) = state.guest.take()
                && let Err(error) = guest.container.stop(GRACE)
            {
                eprintln!("gateway: {name} did not stop in good order: {error}");
            }
        }
    }

    /// How often a guest was started, and whether it runs.
    #[allow(dead_code, reason = "for those who watch it")]
    pub(crate) fn seen(&self, name: &str) -> Option<(u64, bool)> {
        let state = self.places.get(name)?.state();
        Some((state.starts, state.guest.is_some()))
    }
}
