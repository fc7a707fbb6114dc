"""The ranks as a grid, data parallel x tensor parallel, and its process groups. Knows no model.

Ranks of one tensor-parallel group are adjacent, so that they share a node. Each group is one column or row of the grid:

    tensor_parallel_size 2, 6 ranks:   dp 0: ranks 0 1    dp 1: ranks 2 3    dp 2: ranks 4 5
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lora_scale.parallel.world import World
from lora_scale.spec.config import ParallelConfig
from lora_scale.spec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Grid:
    """This rank's place and its groups; a group of all ranks is torch's default one."""

    world: World
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: Any
    dp_group: Any
    base_group: Any  # the ranks that ZeRO-3 partitions the base over
    own_group: Any  # this rank alone
    copies_group: Any = None  # one rank of each node, which keep the same of the base: the first reads for all of them


def alone() -> Grid:
    """One process without process groups, which reads a whole model."""
    return Grid(World("none", 0, 1, 0), 0, 1, 0, 1, None, None, None, None)


def check(cfg: ParallelConfig, world_size: int) -> None:
    """ConfigError unless the ranks make whole tensor-parallel groups."""
    if world_size % cfg.tensor_parallel_size:
        raise ConfigError(
            f"parallel.tensor_parallel_size is {cfg.tensor_parallel_size}, which does not divide this job's "
            f"{world_size} ranks; start a multiple of {cfg.tensor_parallel_size} ranks, or set it to 1"
        )


def make(cfg: ParallelConfig, world: World) -> Grid:
    """Collective over all ranks."""
    check(cfg, world.size)
    tp = cfg.tensor_parallel_size
    tp_rank, dp_rank = world.rank % tp, world.rank // tp
    row = list(range(tp_rank, world.size, tp))
    nodes = _nodes(world) if cfg.base_sharding == "node" else [list(range(world.size))]
    node = next(node for node in nodes if world.rank in node)
    copies = _copies(row, nodes, world.rank) if cfg.load_from == "one_node" else []
    return Grid(
        world=world,
        tp_rank=tp_rank,
        tp_size=tp,
        dp_rank=dp_rank,
        dp_size=world.size // tp,
        tp_group=_group(list(range(dp_rank * tp, (dp_rank + 1) * tp)), world.size),
        dp_group=_group(row, world.size),
        base_group=_group([rank for rank in row if rank in node], world.size),
        own_group=_group([world.rank], world.size),
        copies_group=_group(copies, world.size) if copies else None,
    )


def _copies(row: list[int], nodes: list[list[int]], rank: int) -> list[int]:
    """Of the ranks of `row`, those with this rank's place in their node."""
    parts = [[member for member in row if member in node] for node in nodes]
    if len({len(part) for part in parts}) > 1:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ConfigError(
            f"parallel.load_from is one_node, but the nodes cut the base into different numbers of parts ({sizes}); "
            "set parallel.load_from=every_node"
        )
    place = next(part.index(rank) for part in parts if rank in part)
    return [part[place] for part in parts]


def _nodes(world: World) -> list[list[int]]:
    """The ranks of each node: a launcher numbers a node's ranks in a row, and the first has local rank 0."""
    local_ranks: list[Any] = [None] * world.size
    dist.all_gather_object(local_ranks, world.local_rank)
    nodes: list[list[int]] = []
    for rank, local_rank in enumerate(local_ranks):
        if local_rank == 0:
            nodes.append([])
        if not nodes or local_rank != len(nodes[-1]):
            raise ConfigError(
                f"parallel.base_sharding is node, but the ranks' local ranks are {local_ranks}: each node's must be "
                "0, 1, 2, ... in a row; set parallel.base_sharding=world"
            )
        nodes[-1].append(rank)
    return nodes


def _group(ranks: list[int], world_size: int) -> Any:
    """The group of these ranks, made by them alone: a thousand ranks do not wait for a thousand groups."""
    if len(ranks) == world_size:
        return dist.group.WORLD
    return dist.new_group(ranks, use_local_synchronization=True)


class Mpu:
    """What DeepSpeed asks of a grid, by Megatron's names."""

    def __init__(self, grid: Grid):
        self._grid = grid

    def get_model_parallel_rank(self) -> int:
        return self._grid.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.tp_size

    def get_model_parallel_group(self) -> Any:
        return self._grid.tp_group

    def get_data_parallel_rank(self) -> int:
        return self._grid.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._grid.dp_size

    def get_data_parallel_group(self) -> Any:
        return self._grid.dp_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._grid.dp_group)

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
