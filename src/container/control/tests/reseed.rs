//! Requests for new random numbers.

use super::*;
use crate::proto::SEED_SIZE;

fn reseed(client: &mut ControlClient, limit: Duration) -> mpsc::Receiver<Result<()>> {
    let (reply, answer) = Reply::detached(limit);
    client.reseed(&[7; SEED_SIZE], reply);
    answer
}

/// The numbers of the requests among what the host has sent.
fn requests(sent: &[u8]) -> Vec<u32> {
    let mut decoder = Decoder::new(crate::proto::FROM_HOST_MAX);
    let (mut input, mut numbers) = (sent, Vec::new());
    while let Some(frame) = decoder.next(&mut input).unwrap() {
        if FromHost::parse(&frame).unwrap() == Some(FromHost::Reseed { seed: &[7; SEED_SIZE] }) {
            numbers.push(frame.stream);
        }
    }
    numbers
}

#[test]
fn each_request_gets_its_own_answer() {
    let (mut client, far) = client();
    let answers = [(); 3].map(|()| reseed(&mut client, Duration::from_secs(60)));
    let (number, _state, _answer) = spawn(&mut client, None);
    for stranger in [number, 0, 99] {
        client.session.handle_message(stranger, &FromGuest::Reseeded { errno: 0 }).unwrap();
    }
    assert_eq!(client.session.dropped.count, 3);
    for (asked, errno) in [(2, 0), (1, 1), (3, 0)] {
        client.session.handle_message(asked, &FromGuest::Reseeded { errno }).unwrap();
    }
    let [first, second, third] = answers.map(|answer| answer.try_recv().unwrap());
    assert!(second.is_ok() && third.is_ok());
    let refused = first.unwrap_err();
    assert!(
        refused.kind() == ErrorKind::GuestFailed && refused.to_string().contains("Operation not permitted"),
        "{refused}"
    );
    drop(client);
    assert_eq!(requests(&sent_to(&far)), [1, 2, 3]);
}

#[test]
fn unanswered_requests_do_not_add_up_and_end_with_the_conversation() {
    let (mut client, _far) = client();
    // A caller that has given up has nothing sent, and one that gives up later is forgotten.
    assert_eq!(reseed(&mut client, Duration::ZERO).try_recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    for _ in 0..20 {
        drop(reseed(&mut client, Duration::from_millis(1)));
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(client.session.reseeds.len() <= 1);
    let waiting = reseed(&mut client, Duration::from_secs(60));
    client.session.end("it is over");
    let ended = waiting.try_recv().unwrap().unwrap_err();
    assert!(ended.kind() == ErrorKind::InvalidState && client.session.reseeds.is_empty(), "{ended}");
    let late = reseed(&mut client, Duration::from_secs(60));
    assert_eq!(late.try_recv().unwrap().unwrap_err().kind(), ErrorKind::InvalidState);
}
