"""This host's addresses and interfaces, as the kernel tells them. No torch."""

import contextlib
import fcntl
import os
import random
import socket
import struct
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from lora_scale.spec.errors import ConfigError

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_BELOW = 12000  # ports under that range to choose from
SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interfaces() -> dict[str, str]:
    """IPv4 address by interface, in the kernel's order, the loopback left out."""
    found = {}
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found[name] = address
    return found


def address_of(name: str) -> str | None:
    """The first IPv4 address of a host's name as this host resolves it; None where it does not."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def towards(address: str) -> str | None:
    """The interface through which this host reaches `address`, by the routing table; nothing is sent."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        mine = probe.getsockname()[0]
    return next((name for name, own in interfaces().items() if own == mine), None)


def own_address(env: Mapping[str, str] = os.environ) -> str:
    """The address at which other hosts reach this one: of the chosen interface, of the host's name, or the first.

    Debian gives the host's name the address 127.0.1.1, which means another machine on every machine.
    """
    there = interfaces()
    for setting in SETTINGS:
        for name in env.get(setting, "").split(","):
            if name in there:
                return there[name]
    named = address_of(socket.gethostname())
    if named and not named.startswith("127."):
        return named
    return next(iter(there.values()), "127.0.0.1")


def free_port() -> int:
    """A TCP port that was free on this host a moment ago, and that the kernel gives to nobody who asks for just any:
    until the job's first rank listens there, connections come and go."""
    low = _lowest_ephemeral()
    below = random.SystemRandom().sample(range(max(low - _BELOW, 1024), low), 64) if low > 1024 + _BELOW else []
    for port in [*below, 0]:
        with closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise ConfigError("no TCP port is free on this host")


def _lowest_ephemeral() -> int:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):  # no Linux, or no /proc
        return 32768
