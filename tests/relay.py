"""A slow link in user space, since not every kernel has netem: frames between two interfaces, each so much later.

    python tests/relay.py v1 r1 0.02        run in the switch's network namespace by tests/hosts.py

Also `offload NAME`: let no interface leave checksums and large frames to hardware that a relay is not.
"""

import contextlib
import fcntl
import heapq
import select
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946  # linux/sockios.h
OFF = (0x17, 0x1F, 0x24)  # linux/ethtool.h: STXCSUM, STSO, SGSO
ALL = 0x0003  # linux/if_ether.h: ETH_P_ALL
OUTGOING = 4  # linux/if_packet.h: what we have sent ourselves


def offload(name: str) -> None:
    import array

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in OFF:
            value = array.array("B", struct.pack("II", command, 0))
            fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP", name.encode(), value.buffer_info()[0]))


def relay(one: str, other: str, seconds: float) -> None:
    """Until one of them is down."""
    ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL)) for _ in range(2)]
    for end, name in zip(ends, (one, other), strict=True):
        end.bind((name, ALL))
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select(ends, [], [], pause)
        for end in ready:
            frame, place = end.recvfrom(65536)
            if place[2] != OUTGOING:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + seconds, count, 1 - ends.index(end), frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(waiting)
            ends[to].send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "offload":
        offload(sys.argv[2])
    else:
        with contextlib.suppress(OSError):
            relay(sys.argv[1], sys.argv[2], float(sys.argv[3]))
