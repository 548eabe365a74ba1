//! Addresses that no service has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Azure's and Alibaba's metadata services, which are not link-local as the others are.
const METADATA: [Ipv4Addr; 2] = [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(100, 100, 100, 200)];
/// Amazon's, over IPv6.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Whether a service may be at an address: none is at one that is link-local (where clouds tell their machines, secrets among
/// it, who they are), that is known for metadata, or that is no host's at all, in none of its spellings.
pub fn may_serve(address: IpAddr) -> bool {
    let (v4, v6) = match address {
        IpAddr::V4(v4) => (Some(v4), None),
        IpAddr::V6(v6) => (embedded_v4(v6), Some(v6)),
    };
    let no_v4 =
        v4.is_some_and(|v4| v4.is_link_local() || v4.is_multicast() || v4.is_broadcast() || v4.octets()[0] == 0 || METADATA.contains(&v4));
    let no_v6 = v6.is_some_and(|v6| v6.is_unicast_link_local() || v6.is_multicast() || v6.is_unspecified() || v6 == METADATA_V6);
    !no_v4 && !no_v6
}

/// The IPv4 address that an IPv6 one stands for: mapped, compatible, or by the well-known prefix of NAT64.
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [.., a, b, c, d] = address.octets();
    let nat64 = address.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0];
    let compatible = address.segments()[..6] == [0; 6] && address.segments()[6] != 0;
    address.to_ipv4_mapped().or_else(|| (nat64 || compatible).then_some(Ipv4Addr::new(a, b, c, d)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_service_is_where_clouds_tell_secrets_however_it_is_spelled() {
        for address in [
            "169.254.169.254",
            "169.254.0.1",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "64:ff9b::169.254.169.254",
            "fe80::1",
            "febf::1",
            "fd00:ec2::254",
            "168.63.129.16",
            "::ffff:100.100.100.200",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ] {
            assert!(!may_serve(address.parse().unwrap()), "{address}");
        }
        for address in ["127.0.0.1", "::1", "10.0.0.1", "192.168.1.1", "fd00::1", "203.0.113.7", "::ffff:10.0.0.1", "2001:db8::1"] {
            assert!(may_serve(address.parse().unwrap()), "{address}");
        }
    }
}
