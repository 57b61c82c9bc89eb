//! [`Watch`]: which calls were made of a guest, and which took longer than they may.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use super::list;
use crate::check;
use crate::fixture::Outcome;

pub type Answer = Result<(), Box<dyn Error + Send + Sync>>;

/// What the lab, where a second of the host's may be short, is given beyond a bound.
pub fn slack() -> Duration {
    if std::env::var_os("COFFERDAM_IN_LAB").is_some() { Duration::from_secs(8) } else { Duration::from_secs(1) }
}

pub fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which calls were made, which have not returned, and what was wrong with them.
#[derive(Default)]
pub struct Watch {
    pub made: Mutex<BTreeSet<&'static str>>,
    under_way: Mutex<BTreeMap<(&'static str, Instant), Duration>>,
    pub wrong: Mutex<Vec<String>>,
}

impl Watch {
    /// Makes a call that must be back by `bound`.
    pub fn call<T>(&self, name: &'static str, bound: Duration, call: impl FnOnce() -> T) -> T {
        assert!(list::WAITING.contains(&name), "{name} is not in the list");
        self.timed(name, bound, call)
    }

    /// Makes a call that does not wait.
    pub fn at_once<T>(&self, name: &'static str, call: impl FnOnce() -> T) -> T {
        assert!(list::AT_ONCE.contains(&name), "{name} is not in the list");
        self.timed(name, Duration::ZERO, call)
    }

    pub fn timed<T>(&self, name: &'static str, bound: Duration, call: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        lock(&self.under_way).insert((name, begin), bound);
        let answer = call();
        lock(&self.under_way).remove(&(name, begin));
        lock(&self.made).insert(name);
        self.took(name, begin.elapsed(), bound);
        answer
    }

    pub fn took(&self, name: &str, time: Duration, bound: Duration) {
        if time >= bound + slack() {
            lock(&self.wrong).push(format!("{name} took {time:?} instead of {bound:?}"));
        }
    }

    /// Calls that wait too long already and are not back.
    pub fn overdue(&self) -> Vec<&'static str> {
        let under_way = lock(&self.under_way);
        let late = under_way.iter().filter(|((_, begin), bound)| begin.elapsed() > **bound + 2 * slack());
        late.map(|((name, _), _)| *name).collect()
    }
}

/// Threads that call, each by itself: an embedder has many, and what one waits for holds no other up.
pub struct Callers(Arc<Watch>, Vec<JoinHandle<()>>);

impl Callers {
    pub fn new(watch: &Arc<Watch>) -> Self {
        Self(watch.clone(), Vec::new())
    }
}

impl Callers {
    pub fn spawn(&mut self, what: &'static str, calls: impl FnOnce(&Watch) -> Answer + Send + 'static) {
        let watch = self.0.clone();
        self.1.push(spawn(move || {
            if let Err(error) = calls(&watch) {
                lock(&watch.wrong).push(format!("{what}: {error}"));
            }
        }));
    }

    /// Waits until all are back, or one is overdue.
    pub fn join(&mut self) -> Outcome {
        while let Some(at) = self.1.iter().position(|thread| !thread.is_finished()) {
            let late = self.0.overdue();
            check!(late.is_empty(), "not back: {late:?}; {:?}", lock(&self.0.wrong));
            self.1.drain(..at);
            sleep(Duration::from_millis(20));
        }
        for thread in self.1.drain(..) {
            thread.join().map_err(|_| "a caller panicked")?;
        }
        Ok(())
    }

    /// The same of those that wait for an end that has come.
    pub fn join_within(&mut self, bound: Duration) -> Outcome {
        let begin = Instant::now();
        while self.1.iter().any(|thread| !thread.is_finished()) {
            check!(begin.elapsed() < bound + slack(), "not back after the end: all but {:?}", lock(&self.0.made));
            sleep(Duration::from_millis(20));
        }
        self.join()
    }
}
