"""The rules of addresses, by table: one range left open is a way into the operator's network."""

from ipaddress import ip_address, ip_network

import pytest

from renderer.addresses import AddressRules, carried, host_matches, is_public, parse_address

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "100.63.255.255",
    "100.128.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "169.253.255.255",
    "191.255.255.255",
    "192.0.1.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "168.63.129.15",
    "2606:4700::1111",
    "2a00:1450:4001::1",
    "2001:4860:4860::8888",
    "64:ff9b::8.8.8.8",
    "2002:808:808::1",
    "::ffff:8.8.8.8",
]

NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.255",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "168.63.129.16",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:0:a00:1::1",
    "2001:2::1",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2002:a9fe:a9fe::1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("text", PUBLIC)
def test_an_address_of_the_public_internet_may_be_connected_to(text: str) -> None:
    assert is_public(ip_address(text))
    assert AddressRules().permits("any.test", parse_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_an_address_of_any_other_range_may_not(text: str) -> None:
    assert not is_public(ip_address(text))
    assert not AddressRules().permits("any.test", parse_address(text))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("64:ff9b::10.0.0.1", "10.0.0.1"),
        ("2002:a00:1::5", "10.0.0.1"),
        ("2606:4700::1111", "2606:4700::1111"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_an_address_that_carries_an_ipv4_address_is_judged_by_it(text: str, end: str) -> None:
    assert carried(ip_address(text)) == ip_address(end)


def test_a_mapped_address_is_parsed_as_the_ipv4_address_that_it_is() -> None:
    assert parse_address("::ffff:7f00:1") == ip_address("127.0.0.1")


@pytest.mark.parametrize("text", ["", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "localhost", "1.2.3.4.5"])
def test_what_is_no_plain_address_is_not_parsed_as_one(text: str) -> None:
    with pytest.raises(ValueError, match="does not appear to be"):
        parse_address(text)


@pytest.mark.parametrize("text", ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3"])
def test_an_internal_network_may_be_connected_to_in_every_spelling(text: str) -> None:
    rules = AddressRules(internal_networks=(ip_network("10.1.0.0/16"),))
    assert rules.permits("any.test", ip_address(text))
    assert not rules.permits("any.test", ip_address("10.2.0.1"))


@pytest.mark.parametrize("text", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"])
def test_a_denied_network_may_not_be_connected_to_whatever_else_allows_it(text: str) -> None:
    rules = AddressRules(("store.test",), (ip_network("8.8.8.0/24"),), (ip_network("8.8.8.8/32"),))
    assert not rules.permits("store.test", ip_address(text))
    assert rules.permits("store.test", ip_address("8.8.8.9"))


def test_a_denied_ipv6_prefix_covers_a_nat64_of_the_operators_own() -> None:
    rules = AddressRules(denied_networks=(ip_network("2a00:64::/96"),))
    assert not rules.permits("any.test", ip_address("2a00:64::10.0.0.1"))


@pytest.mark.parametrize("text", ["10.0.0.1", "100.64.0.1", "127.0.0.1", "fd12::1", "64:ff9b::10.0.0.1"])
def test_an_internal_host_may_lead_to_a_private_address_and_no_other_host_may(text: str) -> None:
    rules = AddressRules(internal_hosts=("store.test",))
    assert rules.permits("Store.test.", ip_address(text))
    assert not rules.permits("store.test.evil.example", ip_address(text))


@pytest.mark.parametrize(
    "text",
    ["169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254", "fe80::1"],
)
def test_a_name_is_never_enough_for_a_metadata_service(text: str) -> None:
    assert not AddressRules(internal_hosts=("store.test",)).permits("store.test", ip_address(text))
    named = AddressRules(internal_networks=(ip_network(f"{text}/{ip_address(text).max_prefixlen}"),))
    assert named.permits("store.test", ip_address(text))


@pytest.mark.parametrize(
    ("host", "pattern", "matches"),
    [
        ("a.example.com", "a.example.com", True),
        ("A.EXAMPLE.com", "a.example.com", True),
        ("a.example.com.", "a.example.com", True),
        ("b.a.example.com", "a.example.com", False),
        ("a.example.com", ".example.com", True),
        ("b.a.example.com", ".example.com", True),
        ("example.com", ".example.com", False),
        ("evilexample.com", ".example.com", False),
        ("example.com.evil.test", ".example.com", False),
        ("", "example.com", False),
    ],
)
def test_a_host_matches_itself_or_a_dotted_suffix(host: str, pattern: str, matches: bool) -> None:
    assert host_matches(host, (pattern,)) is matches
