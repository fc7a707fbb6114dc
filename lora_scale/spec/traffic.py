"""What a step sends over each kind of link on clusters of many nodes, and where that stops a layout from scaling. On
paper: formulas with named sources, nothing of it measured beyond two GPUs.

Each data-parallel rank takes one pass a step: the work of a GPU stays, the global batch grows (weak scaling).

    base over all ranks   two all-gathers a pass; of each, a GPU receives from other nodes what these keep (ZeRO,
                          arXiv 1910.02054)
    base on each node     the same within the node only (ZeRO++'s hpZ, arXiv 2306.10209)
    tensor parallel       a node, or as little of it as holds the base, computes one layer together (Megatron-LM,
                          arXiv 1909.08053); exchanges stay within it
    adapter's gradients   in each, one all-reduce a step over the data-parallel ranks: 2 (n - 1) / n of their fp32 bytes
                          (Patarasuk and Yuan, 2009) and 2 log2 n latencies (Thakur and others, 2005)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

from lora_scale.spec import cost, planning, search, speed
from lora_scale.spec.cost import FP32
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.hardware import Gpu
from lora_scale.spec.planning import Job
from lora_scale.spec.states import grid_of

LATENCY = 10e-6  # seconds of one message between nodes; assumed
SIZES = (64, 128, 256, 512, 1024)  # GPUs
SCALES = 0.9  # of its own speed without a network: below, a layout is said to have stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """One layout on one number of GPUs; bytes of a GPU and step."""

    layout: str
    gpus: int
    tokens_a_step: int
    network: int  # received from other nodes: base and adapter's gradients
    node: int  # received from GPUs of its own node
    work: float  # seconds of the pass, exchanges within the node included
    waits: float  # seconds for the network that nothing hides

    @property
    def efficiency(self) -> float:
        return self.work / (self.work + self.waits)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_a_step / (self.work + self.waits)


def clusters(job: Job, gpu: Gpu, gpus_per_node: int, sizes: tuple[int, ...] = SIZES) -> Iterator[Cluster]:
    """Each layout that fits, on each number of GPUs that is whole nodes."""
    for name, changes in _layouts(job, gpus_per_node):
        for gpus in (size for size in sizes if size % gpus_per_node == 0 and size > gpus_per_node):
            if (found := _cluster(name, changes, job, gpu, gpus, gpus_per_node)) is not None:
                yield found


def _layouts(job: Job, gpus_per_node: int) -> Iterator[tuple[str, dict[str, object]]]:
    yield "base over all ranks", {"zero_stage": 3, "base_sharding": "world"}
    yield "base on each node", {"zero_stage": 3, "base_sharding": "node"}
    for tp in (size for size in range(2, gpus_per_node + 1) if gpus_per_node % size == 0):
        shares = job.cfg.data.seq_len % tp == 0
        yield f"tensor parallel {tp}", {"zero_stage": 0, "tensor_parallel_size": tp, "sequence_parallel": shares}


def _cluster(
    name: str, changes: dict[str, object], job: Job, gpu: Gpu, gpus: int, gpus_per_node: int
) -> Cluster | None:
    """None where it does not fit, or the model cannot be cut so."""
    plain = {"tensor_parallel_size": 1, "sequence_parallel": False, "base_sharding": "world", **changes}
    micro, tp = job.cfg.train.micro_batch_size, int(str(plain["tensor_parallel_size"]))
    cfg = job.cfg.model_copy(
        update={
            "parallel": job.cfg.parallel.model_copy(update=plain),
            "train": job.cfg.train.model_copy(update={"global_batch_size": micro * gpus // tp}),
        }
    )
    try:
        here = planning.job_of(job.model, cfg, grid_of(job.model, cfg, gpus, gpus_per_node), job.work)
    except ConfigError:
        return None
    fitting = search.least_recompute(here, gpu.memory_gib * (1 - search.SPARE))
    if fitting is None:
        return None
    local = gpus_per_node // tp
    alone = grid_of(job.model, cfg, gpus_per_node, gpus_per_node)  # one node: nothing is waited for but its own links
    parts = (job.model, fitting.cfg, alone, job.work, fitting.parts)
    work = speed.seconds_of_pass(*parts, gpu, gpus_per_node).total
    base = cost.ITEMSIZE[cfg.precision] * cost.total(job.model) // tp
    zero3, over = cfg.parallel.zero_stage == 3, gpus // tp if cfg.parallel.base_sharding == "world" else local
    gathered = 2 * base * (over - min(local, over)) // over if zero3 else 0
    adapter = 2 * FP32 * cost.numel(here.parts.trained) * (gpus // tp - 1) // (gpus // tp)
    waits = max(0.0, gathered / speed.NETWORK - work)  # gathers are issued ahead and hide behind the work
    waits += adapter / speed.NETWORK + 2 * log2(max(2, gpus // gpus_per_node)) * LATENCY
    exchanged = 8 * len(here.parts.layers) * _hidden(here) * (tp - 1) // tp if tp > 1 else 0
    inside = 2 * base * (min(local, over) - 1) // over if zero3 else 0
    return Cluster(
        layout=name,
        gpus=gpus,
        tokens_a_step=cfg.train.global_batch_size * cfg.data.seq_len,
        network=gathered + adapter,
        node=inside + exchanged,
        work=work,
        waits=waits,
    )


def _hidden(job: Job) -> int:
    """Bytes of the hidden states of a pass."""
    cfg = job.cfg
    return cfg.train.micro_batch_size * cfg.data.seq_len * job.model.hidden * cost.ITEMSIZE[cfg.precision]


def ends(found: list[Cluster]) -> dict[str, int | None]:
    """For each layout the smallest number of GPUs at which it has stopped scaling; None where it has not."""
    names = dict.fromkeys(one.layout for one in found)
    stopped = {name: [one.gpus for one in found if one.layout == name and one.efficiency < SCALES] for name in names}
    return {name: min(sizes, default=None) for name, sizes in stopped.items()}
