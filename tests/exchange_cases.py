"""Exchanges of tokens on ranks of this machine, many in a row, with ranks that are late at random."""

import random
import time
from typing import Any

import torch
import torch.distributed as dist

from lora_scale.parallel import exchange
from lora_scale.parallel.world import World

SIZES = ((6, 16), (6, 16), (10, 24), (4, 8))  # tokens of a rank, features; the slots grow once


def exchanges(here: World, rounds: int) -> dict[str, Any]:
    """How the ranks exchanged, and every exchange whose result was wrong."""
    group = dist.group.WORLD
    way, note = exchange.choose(here, group)
    draw, late, wrong = random.Random(5), random.Random(here.rank), []
    for number in range(rounds):
        tokens, features = draw.choice(SIZES)
        wanted = torch.randn(here.size, here.size * tokens, features, generator=torch.Generator().manual_seed(number))
        _dawdle(here, late)
        if draw.random() < 0.5:
            own = wanted[here.rank, :tokens].to(here.device)
            y, arrivals = way.gather(own)
            found = torch.empty_like(y)
            for first, rows, wait in arrivals:
                wait()
                _dawdle(here, late)
                found[first : first + rows] = y[first : first + rows]
            right = wanted[:, :tokens].flatten(0, 1)
        else:
            summing = way.summing(tokens, features, wanted.new_empty(0, device=here.device))
            for index, (rank, room) in enumerate(summing.rooms):
                room.copy_(wanted[here.rank, rank * tokens : (rank + 1) * tokens])
                _dawdle(here, late)
                summing.send(index)
            found = summing.result()
            right = wanted[:, here.rank * tokens : (here.rank + 1) * tokens].sum(0)
        if not torch.allclose(found.cpu(), right, rtol=0, atol=1e-6):
            wrong.append(number)
    return {"way": type(way).__name__, "note": note, "wrong": wrong}


def _dawdle(here: World, late: random.Random) -> None:
    if late.random() < 0.2:
        seconds = 0.002 * late.random()
        if here.device.type == "cuda":
            torch.cuda._sleep(round(seconds * 1.7e9))
        else:
            time.sleep(seconds)
