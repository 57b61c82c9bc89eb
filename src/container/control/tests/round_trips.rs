//! A caller that starts a program asks the channel's thread once, and has a deadline.

use super::*;
use crate::event_loop::ROUND_TRIPS;
use std::thread;

/// The agent's thread, and the shim's end of its stream.
fn agent() -> (Loop<ControlClient>, UnixStream) {
    let (client, far) = client();
    let looped = Loop::start("agent", |sources| {
        client.watch(&sources).unwrap();
        client
    });
    (looped.unwrap(), far)
}

/// A shim that starts each program that it is asked for, with this number of its own. Returns how many.
fn obliging(mut far: UnixStream) -> thread::JoinHandle<usize> {
    thread::spawn(move || {
        let (mut decoder, mut buffer, mut count) = (Decoder::new(crate::proto::FROM_HOST_MAX), [0; 512], 0);
        while let Ok(n @ 1..) = far.read(&mut buffer) {
            let mut input = &buffer[..n];
            while let Some(request) = decoder.next(&mut input).unwrap() {
                if let Some(FromHost::Spawn(_)) = FromHost::parse(&request).unwrap() {
                    count += 1;
                    far.write_all(&frame(request.stream, &FromGuest::Spawned { pid: 7 })).unwrap();
                }
            }
        }
        count
    })
}

#[test]
fn a_start_is_one_round_trip() {
    let (agent, far) = agent();
    let shim = obliging(far);
    for number in 1..=3 {
        let before = ROUND_TRIPS.get();
        assert_eq!(start_program(&agent.remote(), program(None).unwrap().0, None).unwrap(), number);
        assert_eq!(ROUND_TRIPS.get() - before, 1);
    }
    drop(agent);
    assert_eq!(shim.join().unwrap(), 3);
}

#[test]
fn a_caller_that_gives_up_owns_nothing() {
    let (agent, far) = agent();
    let (request, state) = program(None).unwrap();
    // The shim says nothing for so long.
    let begin = Instant::now();
    // A second of it is the shim's, unless the thread comes to it later.
    let limit = KILL_MARGIN + Duration::from_secs(1);
    let error = start_program(&agent.remote(), request, Some(limit)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(begin.elapsed() < limit + Duration::from_secs(5), "{:?}", begin.elapsed());
    // It has ended for the host, and starts all the same.
    assert_eq!(state.wait(Some(begin + START_TIMEOUT)).unwrap().unwrap().signal(), Some(9));
    (&far).write_all(&frame(1, &FromGuest::Spawned { pid: 7 })).unwrap();
    while agent.remote().with(|client| client.session.dropped.count).unwrap() == 0 {
        assert!(begin.elapsed() < START_TIMEOUT, "the late answer is read");
    }
    drop(agent);
    assert_eq!(kills(&sent_to(&far), 1), 1, "it was killed by its number");
}

#[test]
fn a_start_that_the_thread_comes_to_too_late_is_not_asked_for() {
    let (agent, far) = agent();
    let (hang, come_back) = mpsc::channel::<()>();
    agent.remote().post(move |_| assert!(come_back.recv().is_err())).unwrap();
    let (request, _state) = program(None).unwrap();
    let error = start_program(&agent.remote(), request, Some(Duration::from_millis(20))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(hang);
    agent.remote().with(|client| assert!(client.session.processes.is_empty())).unwrap();
    drop(agent);
    assert!(sent_to(&far).is_empty(), "the shim has no such request");
}

#[test]
fn a_start_with_too_little_time_left_is_refused() {
    let (mut client, far) = client();
    let (reply, answer) = Reply::detached(KILL_MARGIN);
    client.start(&program(None).unwrap().0, reply);
    assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    // One that a busy thread comes to late has less time than others.
    let (reply, answer) = Reply::detached(KILL_MARGIN + Duration::from_secs(5));
    client.start(&program(None).unwrap().0, reply);
    pass(&mut client, Duration::from_secs(5));
    assert!(matches!(answer.try_recv(), Err(mpsc::TryRecvError::Empty)), "it is killed, and that has its own time");
    pass(&mut client, KILL_MARGIN);
    assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    drop(client);
    assert_eq!(kills(&sent_to(&far), 1), 1);
}

#[test]
fn a_signal_that_the_thread_comes_to_too_late_is_not_sent() {
    let (it, far) = agent();
    let limit = Duration::from_millis(20);
    let (hang, come_back) = mpsc::channel::<()>();
    it.remote().post(move |_| assert!(come_back.recv().is_err())).unwrap();
    let error = signal_process(&it.remote(), 1, 1, Some(limit)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(hang);
    signal_process(&it.remote(), 1, 15, None).unwrap();
    drop(it);
    let mut one = Vec::new();
    FromHost::Signal { signo: 15, group: false }.encode(1, &mut one).unwrap();
    assert_eq!(sent_to(&far), one, "the second alone");
}

#[test]
fn an_answer_between_the_deadline_and_the_callers_leaving_is_cleaned_up() {
    // Taken by the channel, but not by its caller: what follows the time-out finds the program by its state.
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
    drop(answer);
    client.disown(&state);
    // Again, and for one that the channel does not know: nothing happens.
    client.disown(&ProcessShared::new().unwrap());
    pass(&mut client, KILL_MARGIN);
    assert_eq!(now(&state).unwrap().signal(), Some(9));
    drop(client);
    assert_eq!(kills(&sent_to(&far), number), 1);
}

#[test]
fn a_channel_that_has_ended_refuses_starts_at_once() {
    let (agent, far) = agent();
    drop(far);
    let begin = Instant::now();
    let refused = loop {
        // Its thread learns of the end some time soon.
        match start_program(&agent.remote(), program(None).unwrap().0, Some(KILL_MARGIN * 2)) {
            Err(error) if error.kind() == ErrorKind::InvalidState => break true,
            _ if begin.elapsed() > Duration::from_secs(20) => break false,
            _ => {}
        }
    };
    assert!(refused);
    let remote = agent.remote();
    drop(agent);
    let error = start_program(&remote, program(None).unwrap().0, None).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidState && error.to_string().contains("container has ended"), "{error}");
}
