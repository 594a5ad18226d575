"""Which addresses may be fetched from: the public internet, and what the operator adds. Nothing is looked up here.

The ranges are those of IANA's special-purpose address registries (RFC 6890 and its updates), written out because the
standard library's own tables differ between Python releases.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

NOT_PUBLIC: tuple[IPNetwork, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "168.63.129.16/32",  # Azure's host, from inside every machine there
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)

# Every address whose owner hands credentials to whoever asks from inside, or that reaches the link alone: a name is
# never enough to open one of these.
METADATA: tuple[IPNetwork, ...] = tuple(
    ip_network(text)
    for text in (
        "169.254.0.0/16",  # AWS, Azure, GCP, OpenStack and most others
        "fe80::/10",
        "168.63.129.16/32",  # Azure
        "100.100.100.200/32",  # Alibaba
        "192.0.0.192/32",  # Oracle
        "fd00:ec2::/32",  # AWS
        "fd20:ce::254/128",  # GCP
    )
)

GLOBAL_UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class AddressRules:
    """What may be connected to beyond the public internet, and what of it may not.

    Attributes:
        internal_hosts: Names that may lead to addresses that are not public, metadata excepted (see `host_matches`).
        internal_networks: Networks that may be connected to whatever they are.
        denied_networks: Networks that may not, whatever else says so.
    """

    internal_hosts: tuple[str, ...] = ()
    internal_networks: tuple[IPNetwork, ...] = ()
    denied_networks: tuple[IPNetwork, ...] = ()

    def permits(self, host: str, address: IPAddress) -> bool:
        """Whether `address`, found by looking up `host`, may be connected to."""
        forms = (address, carried(address))
        if any(within(form, self.denied_networks) for form in forms):
            return False
        if is_public(address) or any(within(form, self.internal_networks) for form in forms):
            return True
        return host_matches(host, self.internal_hosts) and not any(within(form, METADATA) for form in forms)


def parse_address(text: str) -> IPAddress:
    """The address that `text` spells, as IPv4 if it is IPv4-mapped (`::ffff:a.b.c.d`).

    Raises:
        ValueError: It is not an address.
    """
    address = ip_address(text)
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def carried(address: IPAddress) -> IPAddress:
    """The IPv4 address that an IPv4-mapped, NAT64 (RFC 6052) or 6to4 address leads to; any other address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_public(address: IPAddress) -> bool:
    """Whether traffic to `address` ends at a unicast address of the public internet."""
    end = carried(address)
    return (isinstance(end, IPv4Address) or end in GLOBAL_UNICAST) and not within(end, NOT_PUBLIC)


def within(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(address in network for network in networks)


def host_matches(host: str, patterns: Iterable[str]) -> bool:
    """Whether `host` is one of `patterns`, or below one that begins with a dot (`.example.com`: `a.example.com`)."""
    name = host.lower().rstrip(".")
    return any(name.endswith(pattern) if pattern.startswith(".") else name == pattern for pattern in patterns)
