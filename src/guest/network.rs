//! The network cards that the host describes.

use super::alloc::ffi::CString;
use super::alloc::vec::Vec;
use super::control::Failure;
use super::files;
use super::mount;
use super::sys::{self, Errno, Fd};
use crate::proto::{BootConfig, Network, Stage};

/// Sets the kernel's switches for the cards, as long as /proc is there.
///
/// It does not ask the link for IPv6 addresses, nor for duplicates of them (RFC 4862, 5.4 and 5.5). Either takes
/// seconds, in which a program's packets would leave by another card, with that card's address. What a gateway sends
/// to 127.0.0.1 arrives there, as published ports lead to services on that address too.
pub(super) fn set_switches(config: &BootConfig<'_>) {
    for network in config.networks.iter() {
        set_switch(b"ipv6", network.card, b"/accept_dad", b"0");
        set_switch(b"ipv6", network.card, b"/accept_ra", b"0");
        if network.gateway4 != [0; 4] {
            set_switch(b"ipv4", network.card, b"/route_localnet", b"1");
        }
    }
}

/// Switches on the loopback interface, and the cards that the host names with their addresses and routes.
pub(super) fn set_up(config: &BootConfig<'_>) -> Result<(), Failure> {
    let failure = |errno| Failure::new(Stage::Other, errno, &[b"setting up the network"]);
    let socket = match sys::interface_socket() {
        Ok(socket) => socket,
        // A kernel without internet sockets, which only a machine with a network needs.
        Err(errno) => return if config.networks.is_empty() { Ok(()) } else { Err(failure(errno)) },
    };
    let _ = sys::interface_up(&socket, b"lo");
    // A kernel may have no IPv6.
    let socket6 = sys::interface_socket6().ok();
    config.networks.iter().try_for_each(|network| set_up_card(&socket, socket6.as_ref(), &network)).map_err(failure)
}

fn set_up_card(socket: &Fd, socket6: Option<&Fd>, network: &Network) -> Result<(), Errno> {
    let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix4)).unwrap_or(0).to_be_bytes();
    let mut name = Vec::new();
    card_name(network.card, &mut name);
    sys::set_address(socket, &name, network.address4, mask)?;
    sys::interface_up(socket, &name)?;
    if network.gateway4 != [0; 4] {
        sys::set_gateway(socket, network.gateway4)?;
    }
    let Some(socket6) = socket6 else { return Ok(()) };
    let index = sys::interface_index(socket, &name)?;
    match sys::set_address6(socket6, index, network.address6) {
        // IPv6 is switched off, by `ipv6.disable_ipv6=1` for instance, or the card's MTU is below 1280 (RFC 8200, 5).
        Err(Errno::EACCES | Errno::EINVAL) => return Ok(()),
        outcome => outcome?,
    }
    if network.gateway6 == [0; 16] { Ok(()) } else { sys::set_gateway6(socket6, index, network.gateway6) }
}

fn set_switch(family: &[u8], card: u8, switch: &[u8], value: &[u8]) {
    let mut path = Vec::from(b"/proc/sys/net/");
    path.extend_from_slice(family);
    path.extend_from_slice(b"/conf/");
    card_name(card, &mut path);
    path.extend_from_slice(switch);
    // A kernel without the switch, or without IPv6, serves on other addresses all the same.
    if let Ok(path) = CString::new(path) {
        let _ = files::write(None, &path, value);
    }
}

/// What the kernel calls a card.
fn card_name(card: u8, name: &mut Vec<u8>) {
    name.extend_from_slice(b"eth");
    mount::decimal(card, name);
}
