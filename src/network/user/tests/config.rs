//! What cannot work is refused.

use super::*;
use crate::error::ErrorKind;

#[test]
fn networks_that_cannot_work_are_refused() {
    let refused = |change: fn(&mut Config)| {
        let mut config = Config::new(Policy::deny_all());
        change(&mut config);
        UserStack::new(config).unwrap_err().kind()
    };
    let changes: [fn(&mut Config); 10] = [
        |c| c.mtu = 575,
        |c| c.prefix4 = 31,
        |c| c.prefix4 = 0,
        |c| c.guest4 = c.gateway4,
        |c| c.guest4 = Ipv4Addr::new(10, 0, 3, 15),
        |c| c.gateway4 = Ipv4Addr::LOCALHOST,
        |c| c.guest6 = c.gateway6,
        |c| c.guest6 = "fd00::1".parse().unwrap(),
        |c| c.guest_mac = crate::network::Mac::BROADCAST,
        |c| c.policy = Policy::deny_all().rule(Rule::allow_public().port(0)),
    ];
    for change in changes {
        assert_eq!(refused(change), ErrorKind::InvalidConfig);
    }
}
