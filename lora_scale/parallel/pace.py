"""Which rank or link is slow. In a synchronous run all ranks' steps take equally long, whoever is late: so each rank
times a fixed piece of work of its own, and a round trip to the first rank's host."""

import socket
import time
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist

EVERY = 10  # steps between measurements, which take some milliseconds
FIRST = 2  # the step of the first
ROUNDS = 5
SIDE = {"cpu": 192, "cuda": 2048}  # of the square matrices that are multiplied
SLOW_WORK = 1.7  # times the median; on shared CPUs 1.8 is seen by chance, hence twice in a row
SLOW_REPLY, LEAST_REPLY = 5.0, 0.005  # times the median, and seconds; hosts of one room answer below 0.001


@dataclass
class Pace:
    """Measures now and then, and remembers which host has been named."""

    device: torch.device
    hosts: list[str] = field(default_factory=list)  # of every rank
    _before: set[str] = field(default_factory=set)  # slow the last time
    _named: set[str] = field(default_factory=set)

    def measure(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """(figures for the step's row, lines for the screen). Collective in the steps that are measured."""
        if dist.get_world_size() == 1 or step % EVERY != FIRST:
            return {}, []
        if not self.hosts:
            told: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told, socket.gethostname())
            self.hosts = told
        mine = torch.tensor([_work(self.device), _reply()], dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in self.hosts]
        dist.all_gather(everyone, mine)
        work, reply = zip(*(pair.tolist() for pair in everyone), strict=True)
        found = slow(self.hosts, work, reply)
        lasting = {name: text for name, text in found.items() if name in self._before}  # twice: no passing neighbour
        news = [text for name, text in lasting.items() if name not in self._named]
        self._before, self._named = set(found), set(lasting)
        ratio = max(work) / median(work)
        row = {
            "work_ms": [round(seconds * 1e3, 3) for seconds in work],
            "reply_ms": [round(seconds * 1e3, 3) for seconds in reply],
            "slowest_rank": work.index(max(work)),
            "slowest_by_median": round(ratio, 3),
        }
        return {"pace": row}, [f"slow     {text}" for text in news]


def slow(hosts: list[str], work: tuple[float, ...], reply: tuple[float, ...]) -> dict[str, str]:
    """Who is slow, by what is slow: {"rank 3": words, "link of node-b": words}."""
    found = {}
    usual = median_low(work)
    for rank, seconds in enumerate(work):
        if seconds > SLOW_WORK * usual:
            found[f"rank {rank}"] = (
                f"rank {rank} on {hosts[rank]}: {seconds / usual:.1f} times the median for the same work; every "
                "step waits for it"
            )
    near = median_low(reply)
    for host in dict.fromkeys(hosts):
        its = min(seconds for seconds, where in zip(reply, hosts, strict=True) if where == host)
        if its > LEAST_REPLY and its > SLOW_REPLY * near:
            found[f"link of {host}"] = (
                f"link between {host} and {hosts[0]}: {its * 1e3:.0f} ms for a round trip; every step waits for it"
            )
    return found


def _work(device: torch.device) -> float:
    """Seconds of a fixed product on this rank's device, the fastest of a few: one interruption is no slowness."""
    side = SIDE[device.type]
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _reply() -> float:
    """Seconds of a round trip to the store at the first rank, which is plain TCP: the fastest of a few."""
    store = dist.distributed_c10d._get_default_store()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        store.add("lora-scale/pace", 0)
        times.append(time.perf_counter() - began)
    return min(times)
