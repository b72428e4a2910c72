"""Which addresses of the network a list of URLs from strangers may reach: those of the public internet.

A URL of such a list can name this machine, the cluster's services or the cloud's metadata: by address, by a name that resolves
to one, or through a redirect. So what counts is the address that a socket is about to connect to.
"""

import errno
import ipaddress
import socket
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")


class PrivateAddress(OSError):
    """Refused: not of the public internet."""

    def __init__(self, host: str) -> None:
        super().__init__(errno.EACCES, f"{host} is not a public address")


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; also False for what is no IP address in its usual form."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if inner := _embedded(ip):
            return all(map(is_public, inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def _embedded(ip: ipaddress.IPv6Address) -> list[str]:
    """IPv4 addresses that packets to this one are sent on to."""
    if ip.ipv4_mapped:
        return [str(ip.ipv4_mapped)]
    if ip.sixtofour:
        return [str(ip.sixtofour)]
    if ip.teredo:
        return [str(part) for part in ip.teredo]
    if ip in _IPV4_COMPATIBLE or any(ip in network for network in _NAT64):
        return [str(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))]
    return []


def is_literal(host: str) -> bool:
    """Whether a URL's host is an address, in whichever form: `2130706433` and `127.1` are loopback to a resolver."""
    return ":" in host or host.rpartition(".")[2].isdigit() or host.rpartition(".")[2].lower().startswith("0x")


class PublicResolver(AbstractResolver):
    """Names to public addresses only.

    Raises:
        PrivateAddress: a name has no others.
    """

    def __init__(self, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        public = [one for one in found if is_public(one["host"])]
        if found and not public:
            raise PrivateAddress(host)
        return public

    async def close(self) -> None:
        await self._inner.close()


def public_socket(addr_info: Any) -> socket.socket:
    """A socket for aiohttp to connect with: the last look at the address, whichever way it came.

    Raises:
        PrivateAddress: it is not public.
    """
    family, kind, proto, _, address = addr_info
    if not is_public(address[0]):
        raise PrivateAddress(str(address[0]))
    return socket.socket(family=family, type=kind, proto=proto)
