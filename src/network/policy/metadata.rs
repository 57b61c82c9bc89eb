//! Metadata services of clouds and clusters: credentials, identities, internal names.
//!
//! They trust all that can reach them, which is the host, and with it its guests. So each needs a rule of exactly its
//! address, or of a part of its range; a range around it does not count. Names are those of the operators'
//! documentation.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::OnceLock;

use super::Cidr;
use super::cidr::{four, six};

/// What denials call them.
pub(super) const WHAT: &str = "metadata";

/// The ranges, and whose they are.
const SERVICES: &[(Cidr, &str)] = &[
    // Amazon EC2 (instance metadata), and with the same address Google Cloud, Azure, Oracle Cloud, IBM Cloud, DigitalOcean,
    // Hetzner, OpenStack, Vultr, Linode.
    (four(169, 254, 169, 254, 32), "instance metadata"),
    (six([0xfd00, 0x0ec2, 0], 0, 32), "Amazon EC2 and EKS, services over IPv6"),
    (four(169, 254, 170, 2, 32), "Amazon ECS, credentials of tasks"),
    (four(169, 254, 170, 23, 32), "Amazon EKS, Pod Identity"),
    (six([0xfd20, 0x00ce, 0], 0x254, 128), "Google Cloud, metadata server over IPv6"),
    (four(168, 63, 129, 16, 32), "Azure, WireServer and host agent"),
    (four(100, 100, 100, 200, 32), "Alibaba Cloud, instance metadata"),
    (one([0xfd00, 0x0100, 0, 0, 0, 0, 0x0100, 0x0200]), "Alibaba Cloud, instance metadata over IPv6"),
    (one([0xfd00, 0x00c1, 0, 0, 0, 0, 0xa9fe, 0xa9fe]), "Oracle Cloud, instance metadata over IPv6"),
    (one([0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1]), "Linode, instance metadata over IPv6"),
    (four(192, 0, 0, 192, 32), "Oracle Cloud, instance metadata of older images"),
    (four(169, 254, 42, 42, 32), "Scaleway, instance metadata"),
    (six([0xfd00, 0x0042, 0], 0x42, 128), "Scaleway, instance metadata over IPv6"),
    (four(169, 254, 0, 23, 32), "Tencent Cloud, instance metadata"),
    (one([0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe]), "OpenStack, instance metadata over IPv6"),
    (four(161, 26, 0, 0, 16), "IBM Cloud, service endpoints"),
    (four(166, 8, 0, 0, 14), "IBM Cloud, service endpoints"),
    (four(169, 254, 20, 10, 32), "Kubernetes, node-local DNS"),
];

const fn one([a, b, c, d, e, f, g, h]: [u16; 8]) -> Cidr {
    Cidr::one(IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)))
}

/// The service that `address` belongs to, and its whole range.
pub(super) fn service(address: IpAddr) -> Option<(Cidr, &'static str)> {
    let known = SERVICES.iter().find(|(range, _)| range.contains(address)).copied();
    known.or_else(|| kubernetes().filter(|api| *api == address).map(|api| (Cidr::from(api), "Kubernetes, API server")))
}

/// The API server of the cluster that this process runs in, as the kubelet tells every container by its environment.
fn kubernetes() -> Option<IpAddr> {
    static API: OnceLock<Option<IpAddr>> = OnceLock::new();
    *API.get_or_init(|| std::env::var("KUBERNETES_SERVICE_HOST").ok().and_then(|text| text.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_is_found_at_its_first_and_in_no_other_range() {
        for (range, whose) in SERVICES {
            assert_eq!(service(range.first()), Some((*range, *whose)));
        }
        for other in ["169.254.169.253", "168.63.129.17", "8.8.8.8", "fe80::1", "fd00:ec3::1", "fd00:c1::1"] {
            assert_eq!(service(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn services_over_ipv6_are_found_by_the_addresses_of_their_documentation() {
        for (address, whose) in [
            ("fd00:ec2::254", "Amazon"),
            ("fd00:ec2::253", "Amazon"),
            ("fd00:ec2::123", "Amazon"),
            ("fd00:ec2::23", "Amazon"),
            ("fd00:c1::a9fe:a9fe", "Oracle"),
            ("fd00:a9fe:a9fe::1", "Linode"),
            ("fd00:100::100:200", "Alibaba"),
            ("fd20:ce::254", "Google"),
            ("fd00:42::42", "Scaleway"),
        ] {
            let found = service(address.parse().unwrap());
            assert!(found.is_some_and(|(_, name)| name.starts_with(whose)), "{address}: {found:?}");
        }
    }

    #[test]
    fn the_address_of_a_cluster_is_taken_from_the_environment() {
        // Of a process of its own, as it is read once.
        if let Ok(expected) = std::env::var("COFFERDAM_TEST_API") {
            let api = expected.parse().unwrap();
            assert_eq!(service(api), Some((Cidr::from(api), "Kubernetes, API server")));
            return;
        }
        let name = "network::policy::metadata::tests::the_address_of_a_cluster_is_taken_from_the_environment";
        for (set, api) in [("10.96.0.1", "10.96.0.1"), ("fd00:10:96::1", "fd00:10:96::1")] {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", name]).env("KUBERNETES_SERVICE_HOST", set).env("COFFERDAM_TEST_API", api);
            let child = child.output().unwrap();
            let said = String::from_utf8_lossy(&child.stdout);
            assert!(child.status.success() && said.contains(" 1 passed"), "{set}: {said}");
        }
    }
}
