"""Where forwards may lead: the rules of an account and of a key, and what they say to a request.

Nothing is allowed until it is named. Pure: names are looked up by forward.py, and what was found
comes back here, so that a name cannot lead to an address that nobody named.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass

_PLACE = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s/]+)):(\*|[0-9]{1,5}(?:-[0-9]{1,5})?)")

ANY = "*"


class ForbiddenError(Exception):
    """A forward that no rule allows. The text says which list lacks what; it is for the client, too."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rule: HOST:PORT, HOST:LOW-HIGH or HOST:*, where HOST may be *."""

    text: str
    host: str
    low: int = 0
    high: int = 65535

    def allows(self, host: str, port: int) -> bool:
        """Whether a request as it was asked is named by this rule."""
        return self.low <= port <= self.high and self.host in (ANY, _plain(host))

    def names(self, address: str, port: int) -> bool:
        """Whether the rule names this address itself (or all), not only a name that leads there."""
        named = self.host == ANY or _plain(address) == self.host
        named = named or (self.host == "localhost" and _ip(address).is_loopback)
        return named and self.low <= port <= self.high


def parse_place(text: str) -> Place:
    """Parse a rule. Raises ValueError that says what a rule looks like."""
    match = _PLACE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not HOST:PORT, [IPV6]:PORT, HOST:LOW-HIGH or HOST:*")
    if match[1] is not None:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise ValueError(f"{text!r}: {match[1]} is not an IPv6 address") from None
    if "*" in match[0].rpartition(":")[0] and match[2] != ANY:
        raise ValueError(f"{text!r}: * stands for a whole host, not for a part of its name")
    if match[2] and re.fullmatch(r"[0-9.]+|0[xX].*", match[2]) and not is_address(match[2]):
        raise ValueError(f"{text!r}: write the address with its four numbers")
    low, _, high = ("0", "", "65535") if match[3] == ANY else match[3].partition("-")
    numbers = int(low), int(high or low)
    if not numbers[0] <= numbers[1] <= 65535:
        raise ValueError(f"{text!r} has no port between {low} and {high or low}; 65535 is the last")
    return Place(text, _plain(match[1] or match[2]), *numbers)


def is_address(text: str) -> bool:
    """Whether the text is an IP address."""
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _plain(host: str) -> str:
    """One spelling for each host: names in small letters, addresses as the library writes them."""
    try:
        return str(_ip(host))
    except ValueError:
        return host.lower().rstrip(".")


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address; the IPv4 one where it is only wrapped for a socket."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
        *("fd00:ec2::254/128", "fd20:ce::254/128"),
        "fec0::/10",
        "64:ff9b::/96",
    )
]
"""This host, metadata services, and what leads to IPv4 by a gateway, beside what Python knows."""


def _is_special(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is no ordinary host: loopback, link-local (169.254.169.254!) and the like."""
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.sixtofour, *(ip.teredo or ())]
        if any(_is_special(address) for address in inner if address is not None):
            return True
    known = (ip.is_loopback, ip.is_link_local, ip.is_unspecified, ip.is_multicast, ip.is_reserved)
    return any(known) or any(ip in network for network in _SPECIAL if network.version == ip.version)


def check_asked(kind: str, account: Collection[str], key: Collection[str] | None, host: str, port: int) -> str:  # fmt: skip
    """The rule that allows a forward as it was asked. Raises ForbiddenError.

    kind: permit_open or permit_listen, for the words. key: the key's own rules; None: it has none.
    """
    rule = _first(account, host, port)
    if rule is None:
        raise ForbiddenError(f"{kind} of the account does not name {_show(host, port)}")
    if key is not None and _first(key, host, port) is None:
        raise ForbiddenError(
            f"{kind.replace('_', '')} of the key does not name {_show(host, port)}"
        )
    return rule


def check_found(
    account: Collection[str], key: Collection[str] | None, host: str, address: str, port: int
) -> None:
    """Whether what a name was found to be may be connected to. Raises ForbiddenError.

    Addresses that are no ordinary host must be named themselves: by the account, and by the key if
    it has rules.
    """
    if not _is_special(_ip(address)):
        return
    for rules in (account, key):
        if rules is not None and not any(parse_place(rule).names(address, port) for rule in rules):
            raise ForbiddenError(f"{host} leads to {address}, which no rule names")


def check_path(kind: str, account: Collection[str], path: str) -> str:
    """The rule that allows a unix socket: its path, or *. Raises ForbiddenError."""
    if not path.startswith("/"):
        raise ForbiddenError(f"{path!r} is not an absolute path")
    for rule in account:
        if rule in (ANY, path):
            return rule
    raise ForbiddenError(f"{kind} of the account does not name {path}")


def _first(rules: Collection[str], host: str, port: int) -> str | None:
    return next((rule for rule in rules if parse_place(rule).allows(host, port)), None)


def _show(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
