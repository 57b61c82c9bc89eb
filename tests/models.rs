//! Two protocols between threads, run in many thousand orders of their steps: how vCPUs are taken out of the guest, and
//! how closures reach the thread that owns a value.
//!
//! The files under test are the crate's own. Only the primitives beneath them are shuttle's, which decides at each step
//! whose turn it is; KVM and the loop's descriptor are modelled here.

#![allow(clippy::unwrap_used, reason = "a failure here is the model's")]

use shuttle::{sync, thread};

#[path = "../src/event_loop/mailbox.rs"]
#[allow(dead_code, reason = "a model uses what the protocol needs")]
mod mailbox;
#[path = "../src/vm/vcpu_gate.rs"]
#[allow(dead_code, unused_imports, reason = "a model uses what the protocol needs, and not the unit tests")]
mod vcpu_gate;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use mailbox::{Mailbox, Wake};
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::sync::{Arc, Condvar, Mutex, mpsc};
use vcpu_gate::{ExitRequest, Parked, VcpuAction, VcpuGate};

const ORDERS: usize = 5_000;

/// KVM_RUN as it meets signals: one that comes outside is gone without a trace, one inside ends it, and the flag keeps it
/// from beginning (KVM API, 5, `immediate_exit`).
#[derive(Default)]
struct Vcpu {
    immediate_exit: AtomicBool,
    inside: Mutex<bool>,
    signalled: Condvar,
    /// How often the guest really ran.
    entries: AtomicUsize,
    request: Mutex<Request>,
}

/// What another thread asks of a vCPU's: an answer by this way.
#[derive(Default)]
enum Request {
    #[default]
    Nothing,
    Answer(mpsc::Sender<()>),
    /// The thread has ended.
    Refused,
}

impl Vcpu {
    /// Returns only after a signal.
    fn run(&self) {
        let mut inside = self.inside.lock().unwrap();
        if self.immediate_exit.load(Ordering::SeqCst) {
            return;
        }
        self.entries.fetch_add(1, Ordering::SeqCst);
        *inside = true;
        while *inside {
            inside = self.signalled.wait(inside).unwrap();
        }
    }

    fn signal(&self) {
        *self.inside.lock().unwrap() = false;
        self.signalled.notify_all();
    }

    /// As `VcpuControl::kick` does.
    fn kick(&self) {
        self.request_exit();
        self.signal();
    }

    /// As the thread of a vCPU does.
    fn thread(&self, gate: &VcpuGate) {
        loop {
            match gate.next_action(self) {
                VcpuAction::End => {
                    *self.request.lock().unwrap() = Request::Refused;
                    return;
                }
                VcpuAction::Enter => self.run(),
                VcpuAction::Finish => {
                    self.run();
                    gate.park(|| self.serve());
                }
            }
        }
    }

    /// As `VcpuControl::serve` does.
    fn serve(&self) {
        let request = std::mem::take(&mut *self.request.lock().unwrap());
        if let Request::Answer(answer) = request {
            answer.send(()).unwrap();
        }
    }

    /// As `VcpuControl::ask` does; `None` when the thread has ended.
    fn ask(&self) -> Option<mpsc::Receiver<()>> {
        let mut request = self.request.lock().unwrap();
        let Request::Nothing = &*request else { return None };
        let (answer, wait) = mpsc::channel();
        *request = Request::Answer(answer);
        Some(wait)
    }
}

impl ExitRequest for Vcpu {
    fn request_exit(&self) {
        self.immediate_exit.store(true, Ordering::SeqCst);
    }

    fn clear_exit_request(&self) {
        self.immediate_exit.store(false, Ordering::SeqCst);
    }
}

struct Machine {
    gate: VcpuGate,
    vcpus: Vec<Vcpu>,
}

impl Machine {
    fn start(vcpus: usize) -> (Arc<Self>, Vec<thread::JoinHandle<()>>) {
        let vcpus = (0..vcpus).map(|_| Vcpu::default()).collect();
        let machine = Arc::new(Self { gate: VcpuGate::default(), vcpus });
        let run = |n: usize| {
            let machine = machine.clone();
            thread::spawn(move || machine.vcpus[n].thread(&machine.gate))
        };
        let threads = (0..machine.vcpus.len()).map(run).collect();
        (machine, threads)
    }

    fn kick(&self) {
        self.vcpus.iter().for_each(Vcpu::kick);
    }

    fn end(&self) {
        self.gate.shut_down();
        self.kick();
    }

    fn pause(&self) -> Parked {
        self.gate.close();
        self.kick();
        // The model never times out: a pause that would never come is a deadlock, which shuttle reports.
        self.gate.wait_parked(self.vcpus.len(), Instant::now() + Duration::from_secs(1_000_000))
    }

    fn entries(&self) -> usize {
        self.vcpus.iter().map(|vcpu| vcpu.entries.load(Ordering::SeqCst)).sum()
    }
}

fn an_end_reaches_every_vcpu() {
    let (machine, threads) = Machine::start(2);
    let other = machine.clone();
    let racing = thread::spawn(move || other.end());
    machine.end();
    threads.into_iter().chain([racing]).for_each(|thread| thread.join().unwrap());
}

fn a_paused_machine_stands_still_and_goes_on() {
    let (machine, threads) = Machine::start(2);
    for _ in 0..2 {
        assert_eq!(machine.pause(), Parked::All);
        let before = machine.entries();
        thread::yield_now();
        assert_eq!(machine.entries(), before, "a paused guest ran");
        machine.gate.open();
    }
    machine.end();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn an_end_during_a_pause_frees_everybody() {
    let (machine, threads) = Machine::start(2);
    let other = machine.clone();
    let pausing = thread::spawn(move || {
        assert!(matches!(other.pause(), Parked::All | Parked::Gone));
    });
    machine.end();
    threads.into_iter().chain([pausing]).for_each(|thread| thread.join().unwrap());
    assert_eq!(machine.pause(), Parked::Gone);
}

fn parked_vcpus_answer_each_request_or_have_ended() {
    let (machine, threads) = Machine::start(2);
    assert_eq!(machine.pause(), Parked::All);
    let ask = |machine: &Machine| -> Vec<_> {
        let waits: Vec<_> = machine.vcpus.iter().filter_map(Vcpu::ask).collect();
        machine.gate.request();
        waits
    };
    for _ in 0..2 {
        ask(&machine).into_iter().for_each(|wait| wait.recv().unwrap());
    }
    let other = machine.clone();
    let ending = thread::spawn(move || other.end());
    // A request that is not served is dropped: a wait without an end is a deadlock, which shuttle reports.
    ask(&machine).into_iter().for_each(|wait| _ = wait.recv());
    threads.into_iter().chain([ending]).for_each(|thread| thread.join().unwrap());
}

/// An eventfd: a counter that the loop's thread waits for.
#[derive(Default)]
struct Counter {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Counter {
    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.changed.wait(count).unwrap();
        }
    }
}

impl Wake for Counter {
    fn wake(&self) {
        *self.count.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    fn clear(&self) {
        *self.count.lock().unwrap() = 0;
    }
}

#[derive(Default)]
struct Value {
    closures: usize,
    /// Descriptors that were looked at.
    looked: usize,
}

type Shared = Arc<Mailbox<Value, Counter>>;

/// As `event::run`, with one descriptor that is always ready.
fn run(mailbox: &Shared, looked: &AtomicUsize) -> Value {
    let mut value = Value::default();
    'ended: loop {
        mailbox.waker().wait();
        value.looked += 1;
        looked.store(value.looked, Ordering::SeqCst);
        if !mailbox.serve(&mut value) {
            break;
        }
        while mailbox.is_suspended() {
            mailbox.waker().wait();
            if !mailbox.serve(&mut value) {
                break 'ended;
            }
        }
    }
    mailbox.end();
    value
}

fn start() -> (Shared, Arc<AtomicUsize>, thread::JoinHandle<Value>) {
    let (mailbox, looked) = (Arc::new(Mailbox::new(Counter::default())), Arc::new(AtomicUsize::new(0)));
    let (theirs, seen) = (mailbox.clone(), looked.clone());
    (mailbox, looked, thread::spawn(move || run(&theirs, &seen)))
}

fn closures_are_run_or_refused_but_never_lost() {
    let (mailbox, _, owner) = start();
    let post = |mailbox: Shared| {
        thread::spawn(move || {
            let (answer, wait) = mpsc::sync_channel(1);
            let request = move |value: &mut Value| {
                value.closures += 1;
                let _ = answer.send(());
            };
            match mailbox.post(Box::new(request)) {
                // Taken: it is run, even if another thread closes the mailbox meanwhile.
                Ok(()) => wait.recv().map(|()| 1).unwrap(),
                Err(mailbox::Closed) => 0,
            }
        })
    };
    let posters: Vec<_> = (0..3).map(|_| post(mailbox.clone())).collect();
    mailbox.close();
    let answered: usize = posters.into_iter().map(|poster| poster.join().unwrap()).sum();
    assert_eq!(owner.join().unwrap().closures, answered);
}

fn a_held_loop_runs_closures_and_looks_at_nothing_else() {
    let (mailbox, looked, owner) = start();
    let (held, wait) = mpsc::sync_channel(1);
    if mailbox.suspend(held) == Ok(true) {
        wait.recv().unwrap();
    }
    let before = looked.load(Ordering::SeqCst);
    let (answer, answered) = mpsc::sync_channel(1);
    assert_eq!(mailbox.post(Box::new(move |_| answer.send(()).unwrap())), Ok(()));
    answered.recv().unwrap();
    assert_eq!(looked.load(Ordering::SeqCst), before, "a held loop looked at a descriptor");
    mailbox.resume();
    mailbox.close();
    assert!(owner.join().unwrap().looked >= before);
}

fn a_loop_that_ends_while_it_is_asked_to_hold_frees_who_waits() {
    let (mailbox, _, owner) = start();
    let other = mailbox.clone();
    let asking = thread::spawn(move || {
        let (held, wait) = mpsc::sync_channel(1);
        if other.suspend(held) == Ok(true) {
            // The owner answers when it holds, or drops the sender when it ends.
            let _ = wait.recv();
        }
    });
    mailbox.close();
    asking.join().unwrap();
    owner.join().unwrap();
}

fn main() -> ExitCode {
    let models: [(&str, fn()); 7] = [
        ("an_end_reaches_every_vcpu", an_end_reaches_every_vcpu),
        ("a_paused_machine_stands_still_and_goes_on", a_paused_machine_stands_still_and_goes_on),
        ("an_end_during_a_pause_frees_everybody", an_end_during_a_pause_frees_everybody),
        ("parked_vcpus_answer_each_request_or_have_ended", parked_vcpus_answer_each_request_or_have_ended),
        ("closures_are_run_or_refused_but_never_lost", closures_are_run_or_refused_but_never_lost),
        ("a_held_loop_runs_closures_and_looks_at_nothing_else", a_held_loop_runs_closures_and_looks_at_nothing_else),
        (
            "a_loop_that_ends_while_it_is_asked_to_hold_frees_who_waits",
            a_loop_that_ends_while_it_is_asked_to_hold_frees_who_waits,
        ),
    ];
    let trial = |(name, model): (&str, fn())| {
        Trial::test(name, move || {
            // By chance, and with few changes of turn, which is where rare orders hide.
            shuttle::check_random(model, ORDERS);
            shuttle::check_pct(model, ORDERS, 3);
            Ok(())
        })
    };
    libtest_mimic::run(&Arguments::from_args(), models.into_iter().map(trial).collect()).exit_code()
}
