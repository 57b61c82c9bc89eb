//! A switch with fake guests.

use super::fake_guest::FakeGuest;
use super::*;
use crate::network::wire::{self, Ethernet, IpPacket, Tcp};
use crate::network::{Offload, Offloads};

const TSO: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);

fn mac(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, n])
}

fn two() -> (Switch, FakeGuest, FakeGuest) {
    let switch = Switch::new();
    let [a, b] = [("a", 1), ("b", 2)].map(|(name, n)| FakeGuest::on(&switch, name, mac(n), TSO).unwrap());
    (switch, a, b)
}

fn itself(switch: &Switch) -> (Mac, IpAddr, IpAddr) {
    (switch.0.mac(), IpAddr::from(switch.0.address4(ITSELF)), switch.0.address6(ITSELF.into()).into())
}

#[test]
fn failed_join_names_its_cause_and_leaving_frees_the_name() {
    let switch = Switch::new();
    let join = |name: &str, n| FakeGuest::on(&switch, name, mac(n), TSO);
    let error = |name: &str, n| join(name, n).unwrap_err();
    for bad in ["", "-a", "a-", "a.b", "a b", "\u{e4}", &"x".repeat(64)] {
        assert_eq!(error(bad, 1).kind(), ErrorKind::InvalidConfig, "{bad}");
    }
    let mut first = join("Db-1", 1).unwrap();
    let taken = error("dB-1", 2);
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    assert_eq!(taken.to_string(), "joining the switch as \"dB-1\": another guest has the name");
    assert!(error("web", 1).to_string().contains("mac: another card has the address 02:00:00:00:00:01"));
    assert_eq!((switch.address("DB-1"), switch.names()), (Some(first.four), vec!["db-1".to_owned()]));
    first.leave();
    let again = join("db-1", 1).unwrap();
    assert_eq!((again.four, switch.address("db-1")), (first.four, Some(first.four)));
    drop(first);
    assert_eq!(switch.names().len(), 1, "one that has left takes nothing with it");
    drop(again);
    assert!(switch.names().is_empty());
    let mut places: Vec<_> = GUESTS.map(|n| switch.join(&format!("g{n}"), mac(n), 1500).unwrap()).collect();
    assert_eq!(switch.join("late", mac(255), 1500).unwrap_err().kind(), ErrorKind::ResourceExhausted);
    let free = places.remove(77).address4();
    assert_eq!(switch.join("late", mac(255), 1500).unwrap().address4(), free);
}

#[test]
fn packets_pass_whole_or_cut_as_the_other_agreed() {
    let (switch, mut a, mut b) = two();
    let mut plain = FakeGuest::on(&switch, "plain", mac(3), Offloads::none()).unwrap();
    let payload: Vec<u8> = (0..20_000u32).map(|n| (n * 7) as u8).collect();
    for four in [true, false] {
        let (frame, offload) = a.tcp(&b, four, &payload, Some(1400));
        a.send(&frame, offload);
        assert!(b.take() == [(frame, offload)], "as it was");
        let (frame, offload) = a.tcp(&plain, four, &payload, Some(1400));
        a.send(&frame, offload);
        let came = plain.take();
        let start = usize::from(offload.csum.unwrap().start);
        assert_eq!(came.len(), payload.len().div_ceil(1400));
        let mut back = Vec::new();
        for (bytes, offload) in came {
            assert_eq!(offload, Offload::default());
            let packet =
                IpPacket::parse(Ethernet::parse(&bytes).unwrap().kind, &bytes[14..], bytes.len() - 14).unwrap();
            let sum = wire::pseudo(packet.src, packet.dst, wire::TCP, packet.len) + wire::sum(&bytes[start..]);
            assert_eq!(wire::fold(sum), 0xffff);
            back.extend_from_slice(&bytes[start + 20..]);
        }
        assert!(back == payload);
        // Only a checksum is left, behind which there is something that is none of the packet.
        let (frame, offload) = a.tcp(&plain, four, b"hello", None);
        a.send(&[&frame[..], &[9; 5]].concat(), offload);
        let [(bytes, done)] = &plain.take()[..] else { panic!("one frame") };
        assert_eq!((bytes.len(), *done), (frame.len(), Offload::default()));
        let (src, dst) = (a.address(four), plain.address(four));
        assert_eq!(wire::fold(wire::pseudo(src, dst, wire::TCP, 25) + wire::sum(&bytes[start..])), 0xffff);
    }
    assert_eq!(a.stats().malformed + a.stats().spoofed + a.stats().unserved, 0);
}

#[test]
fn spoofed_sources_are_dropped() {
    let (switch, mut a, mut b) = two();
    let (its_mac, ..) = itself(&switch);
    let mut send = |frame: &[u8]| {
        let before = a.stats();
        a.send(frame, Offload::default());
        let after = a.stats();
        let dropped = after.spoofed + after.unserved + after.fragments + after.malformed + after.too_large
            - (before.spoofed + before.unserved + before.fragments + before.malformed + before.too_large);
        assert_eq!((dropped, a.take().len()), (1, 0));
    };
    let (four, six) = (IpAddr::from(b.four), IpAddr::from(b.six));
    let other = FakeGuest::on(&switch, "other", mac(9), TSO).unwrap();
    let good = |to, dst| FakeGuest::udp(&other, to, dst, (5, 5), b"x");
    // The card of another, and the address of another.
    send(&good(b.mac, four));
    for dst in [four, six] {
        let mut frame = good(b.mac, dst);
        frame[6..12].copy_from_slice(&mac(1).0);
        send(&frame);
    }
    // The same guest, to make frames of.
    let a_says = FakeGuest::on(&Switch::new(), "a", mac(1), TSO).unwrap();
    // To another's card with an address that no guest has, and the other way round.
    send(&a_says.udp(b.mac, [10, 0, 3, 200].into(), (5, 5), b"x"));
    send(&a_says.udp(mac(77), four, (5, 5), b"x"));
    // Broadcasts, multicasts, outside.
    for dst in ["10.0.3.255", "224.0.0.1", "ff02::1", "255.255.255.255", "1.1.1.1", "2001:db8::1"] {
        send(&a_says.udp(Mac::BROADCAST, dst.parse().unwrap(), (5, 5), b"x"));
        send(&a_says.udp(its_mac, dst.parse().unwrap(), (5, 5), b"x"));
    }
    // What only the network's servers say.
    send(&a_says.udp(b.mac, four, (67, 68), b"lease"));
    send(&a_says.udp(b.mac, six, (547, 546), b"lease"));
    for (dst, protocol, kinds) in [(four, wire::ICMP, &[5, 9][..]), (six, wire::ICMPV6, &[130, 134, 136, 137])] {
        for kind in kinds {
            let message = [*kind, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
            let head = a_says.ip(b.mac, dst, protocol, message.len());
            let mut frame = [head.as_slice(), &message].concat();
            let at = head.len();
            let covered = if dst.is_ipv4() { 0 } else { wire::pseudo(six_of(&a_says), dst, protocol, message.len()) };
            let check = !wire::fold(covered + wire::sum(&message));
            frame[at + 2..at + 4].copy_from_slice(&check.to_be_bytes());
            send(&frame);
        }
    }
    // The same in fragments, fragments of segments, and those for the switch.
    for (dst, redirect) in [(four, 5), (six, 137)] {
        send(&fragment(&a_says, b.mac, dst, wire::UDP, 0, &[0, 67, 0, 68, 5, 0, 0, 0]));
        send(&fragment(&a_says, b.mac, dst, icmp_of(dst), 0, &[redirect; 8]));
        send(&fragment(&a_says, b.mac, dst, wire::TCP, 24, &[0; 8]));
    }
    send(&fragment(&a_says, its_mac, itself(&switch).1, wire::UDP, 0, &[0, 5, 0, 53, 5, 0, 0, 0]));
    // What is too large without being cut, other kinds of frames, and an ARP answer without a question.
    send(&a_says.udp(b.mac, four, (5, 5), &[0; 3000]));
    send(&[&b.mac.0[..], &mac(1).0, &[0x81, 0, 0, 0]].concat());
    let poison = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &mac(1).0, &b.four.octets(), &b.mac.0, &b.four.octets()].concat();
    send(&[&Mac::BROADCAST.0[..], &mac(1).0, &[8, 6], &poison].concat());
    assert!(b.take().is_empty());
}

#[test]
fn fragments_of_datagrams_pass_as_they_are() {
    let (_switch, mut a, mut b) = two();
    for dst in [IpAddr::from(b.four), b.six.into()] {
        for frame in [
            fragment(&a, b.mac, dst, wire::UDP, 0, &[0, 5, 0, 5, 5, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
            fragment(&a, b.mac, dst, wire::UDP, 16, &[9; 1000]),
            fragment(&a, b.mac, dst, icmp_of(dst), 8, &[5; 8]),
        ] {
            a.send(&frame, Offload::default());
            assert!(b.take() == [(frame, Offload::default())]);
        }
    }
}

/// A fragment, not the last.
fn fragment(from: &FakeGuest, to: Mac, dst: IpAddr, protocol: u8, offset: usize, bytes: &[u8]) -> Vec<u8> {
    let addrs = wire::AddressPair { src: from.address(dst.is_ipv4()), dst };
    let fragment = wire::Fragment { id: 3, offset, more: true };
    [
        wire::FrameBuilder::fragment(wire::MacPair { src: from.mac, dst: to }, addrs, protocol, bytes.len(), fragment)
            .as_slice(),
        bytes,
    ]
    .concat()
}

fn icmp_of(dst: IpAddr) -> u8 {
    if dst.is_ipv4() { wire::ICMP } else { wire::ICMPV6 }
}

fn six_of(guest: &FakeGuest) -> IpAddr {
    guest.address(false)
}

#[test]
fn neighbours_are_named_by_the_switch() {
    let (switch, mut a, mut b) = two();
    let (its_mac, its_four, its_six) = itself(&switch);
    let arp = |asked: Ipv4Addr, from: Ipv4Addr| {
        let body = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac(1).0, &from.octets(), &[0; 6], &asked.octets()].concat();
        [&Mac::BROADCAST.0[..], &mac(1).0, &[8, 6], &body].concat()
    };
    let IpAddr::V4(its_four) = its_four else { panic!("of the fourth version") };
    for (asked, answer) in
        [(b.four, Some(b.mac)), (its_four, Some(its_mac)), (a.four, None), ([10, 0, 3, 99].into(), None)]
    {
        a.send(&arp(asked, a.four), Offload::default());
        let came = a.take();
        assert_eq!(came.first().map(|(bytes, _)| Mac(bytes[22..28].try_into().unwrap())), answer, "{asked}");
    }
    let IpAddr::V6(its_six) = its_six else { panic!("of the sixth version") };
    for (asked, answer) in [(b.six, Some(b.mac)), (its_six, Some(its_mac)), (a.six, None)] {
        // To the group of the asked, and to its card, as who had the answer before does.
        for (to, dst) in [(Mac([0x33, 0x33, 0xff, 0, 0, 2]), "ff02::1:ff00:2".parse().unwrap()), (b.mac, asked)] {
            let mut message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &asked.octets(), &[1, 1], &mac(1).0].concat();
            let covered = wire::pseudo(a.six.into(), dst.into(), wire::ICMPV6, message.len());
            let check = !wire::fold(covered + wire::sum(&message));
            message[2..4].copy_from_slice(&check.to_be_bytes());
            let head = a.ip(to, dst.into(), wire::ICMPV6, message.len());
            a.send(&[head.as_slice(), &message].concat(), Offload::default());
            let came = a.take();
            let told = came.first().map(|(bytes, _)| Mac(bytes[54 + 26..54 + 32].try_into().unwrap()));
            assert_eq!(told, answer, "{asked}");
        }
    }
    assert!(b.take().is_empty());
}

#[test]
fn the_switch_leases_advertises_and_answers() {
    let (switch, mut a, b) = two();
    let (its_mac, its_four, its_six) = itself(&switch);
    // DHCP: an offer of its own address, with a resolver and without a router.
    let mut discover = vec![1, 1, 6, 0];
    discover.resize(28, 0);
    discover.extend(mac(1).0);
    discover.resize(236, 0);
    discover.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    a.send(&a.udp(its_mac, its_four, (68, 67), &discover), Offload::default());
    let [(offer, _)] = &a.take()[..] else { panic!("one offer") };
    assert_eq!(&offer[42 + 16..42 + 20], &a.four.octets());
    let options = &offer[42 + 240..];
    let has = |wanted: &[u8]| options.windows(wanted.len()).any(|window| window == wanted);
    assert!(has(&[6, 4, 10, 0, 3, 1]) && !has(&[3, 4, 10, 0, 3, 1]), "{options:?}");
    // A router that is no way out, with the prefix.
    let mut message = vec![133, 0, 0, 0, 0, 0, 0, 0];
    let all: IpAddr = "ff02::2".parse().unwrap();
    let check = !wire::fold(wire::pseudo(a.six.into(), all, wire::ICMPV6, 8) + wire::sum(&message));
    message[2..4].copy_from_slice(&check.to_be_bytes());
    let head = a.ip(Mac([0x33, 0x33, 0, 0, 0, 2]), all, wire::ICMPV6, 8);
    a.send(&[head.as_slice(), &message].concat(), Offload::default());
    let [(advertised, _)] = &a.take()[..] else { panic!("one advertisement") };
    assert_eq!((advertised[54], &advertised[60..62]), (134, &[0, 0][..]));
    let prefix = &a.six.octets()[..8];
    assert!(advertised.windows(8).any(|window| window == prefix));
    // Names.
    let query = |name: &[u8], kind: u8| [b"\0\x07\x01\0\0\x01\0\0\0\0\0\0", name, &[0, 0, kind, 0, 1]].concat();
    let mut ask = |dst: IpAddr, name: &[u8], kind| {
        a.send(&a.udp(its_mac, dst, (999, 53), &query(name, kind)), Offload::default());
        let came = a.take();
        let [(bytes, _)] = &came[..] else { panic!("one answer") };
        let question = Question::parse(&query(name, kind)).unwrap();
        let at = if dst.is_ipv4() { 42 } else { 62 };
        assert!(question.is_answered(&query(name, kind), 7, &bytes[at..]));
        let found = dns::answers(&question, &bytes[at..]).unwrap();
        (found.code, found.addresses)
    };
    assert_eq!(ask(its_four, b"\x01B", 1), (0, vec![b.four.into()]));
    assert_eq!(ask(its_six, b"\x01b", 28), (0, vec![b.six.into()]));
    assert_eq!(ask(its_four, b"\x01b", 16), (0, vec![]));
    assert_eq!(ask(its_four, b"\x01c", 1), (3, vec![]));
    assert_eq!(ask(its_four, b"\x01b\x02me", 1), (3, vec![]));
    drop(b);
    assert_eq!(ask(its_four, b"\x01b", 1), (3, vec![]));
    // It answers pings.
    let echo = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    let head = a.ip(its_mac, its_four, wire::ICMP, 8);
    a.send(&[head.as_slice(), &echo].concat(), Offload::default());
    assert_eq!(a.take().first().map(|(bytes, _)| bytes[34]), Some(0));
    // Those that are larger than its packets in fragments.
    for (len, answers) in [(1480, 1), (1481, 2)] {
        let echo = [&echo[..], &vec![0; len - 8]].concat();
        let head = a.ip(its_mac, its_four, wire::ICMP, len);
        a.send(&[head.as_slice(), &echo].concat(), Offload::default());
        assert_eq!(a.take().len(), answers, "{len}");
    }
}

#[test]
fn flood_by_one_guest_does_not_block_others() {
    let (switch, mut a, mut b) = two();
    let mut c = FakeGuest::on(&switch, "c", mac(3), TSO).unwrap();
    let (frame, offload) = a.tcp(&b, true, &[7; 60_000], Some(1400));
    (0..200).for_each(|_| a.send(&frame, offload));
    let (late, late_offload) = c.tcp(&b, true, b"c", None);
    c.send(&late, late_offload);
    let dropped = b.stats().overflowed;
    assert!((180..200).contains(&dropped), "{dropped}");
    let came = b.take();
    assert!(came.len() as u64 == 201 - dropped && came.last().unwrap().0[..late.len()] == late);
    let segments = Tcp::parse(&came[0].0[34..], 60_020).unwrap();
    assert_eq!((segments.seq, b.stats().received_frames), (7, came.len() as u64));
    // One whose card does not run gets nothing.
    b.leave();
    a.send(&frame, offload);
    assert!(b.take().is_empty() && a.stats().unserved == 1);
}

/// A message of ICMPv6 behind one more header of this kind.
fn hidden(guest: &FakeGuest, to: &FakeGuest, extension: u8, message: &[u8]) -> Vec<u8> {
    let header = [wire::ICMPV6, 0, 0, 0, 0, 0, 0, 0];
    let head = guest.ip(to.mac, to.six.into(), extension, header.len() + message.len());
    [head.as_slice(), &header, message].concat()
}

#[test]
fn unparsed_extension_headers_are_dropped() {
    let (_switch, mut a, mut b) = two();
    let advertisement = [136, 0, 0, 0, 0x20, 0, 0, 0, 1, 2, 3, 4];
    // Routing, authentication, mobility, host identity, shim6.
    for extension in [43, 51, 135, 139, 140] {
        let frame = hidden(&a, &b, extension, &advertisement);
        a.send(&frame, Offload::default());
        assert!(b.take().is_empty(), "{extension}");
    }
    assert_eq!(a.stats().spoofed, 5);
    // More than are skipped: the last of them stands for what it hides.
    let options: Vec<u8> = (0..5).flat_map(|n| [if n < 4 { 60 } else { wire::ICMPV6 }, 0, 1, 4, 0, 0, 0, 0]).collect();
    let head = a.ip(b.mac, b.six.into(), 60, options.len() + advertisement.len());
    a.send(&[head.as_slice(), &options, &advertisement].concat(), Offload::default());
    assert!(b.take().is_empty());
    // What is no known header passes: ESP is the end of what can be seen.
    let frame = hidden(&a, &b, 50, b"sealed");
    a.send(&frame, Offload::default());
    assert_eq!(b.take().len(), 1);
}

#[test]
fn forwarded_bytes_are_the_checked_bytes() {
    let (_switch, a, b) = two();
    let memory = crate::memory::GuestMemory::anonymous(&[(crate::memory::GuestAddress(0), 0x1000)]).unwrap();
    let head = a.ip(b.mac, b.four.into(), wire::ICMP, 8);
    let checked = [head.as_slice(), &[8, 0, 0xf7, 0xfd, 0, 1, 0, 1]].concat();
    // Since then the guest has made a redirect of it.
    let mut changed = checked.clone();
    changed[34] = 5;
    memory.write(crate::memory::GuestAddress(0), &changed).unwrap();
    let pieces = [memory.segment(crate::memory::GuestAddress(0), changed.len()).unwrap()];
    let frame = crate::network::Frame::new(&memory, &pieces, Offload::default());
    let packet = IpPacket::parse(wire::IPV4, &checked[14..], checked.len() - 14).unwrap();
    let passing = super::pass::Passing { packet, agreed: TSO, mtu: 1500 };
    let Ok(packets) = passing.packets(frame, &checked) else { panic!("an echo request passes") };
    assert!(packets[0].bytes == checked);
}

#[test]
fn frames_that_a_driver_has_no_buffers_for_do_not_reach_it() {
    let (_switch, mut a, mut b) = two();
    let (frame, offload) = a.tcp(&b, true, &[7; 20_000], Some(1400));
    let (small, small_offload) = a.tcp(&b, true, b"small", None);
    a.send(&frame, offload);
    a.send(&small, small_offload);
    // Another driver takes over before they were taken.
    b.agree(Offloads::CSUM);
    let came = b.take();
    assert!(came == [(small, small_offload)] && b.stats().overflowed == 1);
    // The bell still rings.
    a.send(&frame, offload);
    assert_eq!(b.take().len(), 20_000usize.div_ceil(1400));
    // Larger than a driver without mergeable buffers has room for.
    b.agree(TSO);
    for (len, passes) in [(65_550, 1), (65_551, 0), (65_589, 0)] {
        let (frame, offload) = a.tcp(&b, false, &vec![7; len - wire::ETHERNET - 40 - 20], Some(1400));
        a.send(&frame, offload);
        assert_eq!((frame.len(), b.take().len()), (len, passes));
    }
    assert_eq!(a.stats().too_large, 2);
}
