"""DeepSpeed's private form of a ZeRO-3 parameter, made without a collective. The only module that knows its fields.

`deepspeed.zero.Init` makes a parameter whole on every rank, broadcasts it from rank 0, and then cuts it. A checkpoint
on disk makes all three unnecessary: a partition is one contiguous run of the flattened parameter, so a rank can read
its own.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


class Partitioner:
    """Turns meta parameters into ZeRO-3 parameters whose partition this rank has allocated and will fill."""

    def __init__(self, ds_config: dict[str, Any], dtype: torch.dtype, group: Any):
        module = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
        swapper = importlib.import_module("deepspeed.runtime.swap_tensor.partitioned_param_swapper")
        self._free_param = module.free_param
        self._available = swapper.PartitionedParamStatus.AVAILABLE
        # not entered: used as a converter only
        self._init = module.Init(config_dict_or_path=ds_config, dtype=dtype, data_parallel_group=group)

    @property
    def rank(self) -> int:
        return self._init.rank

    @property
    def size(self) -> int:
        return self._init.dp_world_size

    def partition_numel(self, numel: int) -> int:
        """Elements a rank keeps of a tensor of `numel`: the last partitions are padded."""
        return -(-numel // self.size)

    def adopt(self, shape: tuple[int, ...], partition: Tensor, requires_grad: bool) -> nn.Parameter:
        """A ZeRO-3 parameter of that shape whose partition on this rank is `partition` (flat, to be filled)."""
        assert partition.numel() == self.partition_numel(prod(shape))
        # a stand-in of the right shape that holds one element: DeepSpeed records shape and size from it
        stand_in = torch.empty(1, dtype=partition.dtype, device=self._init.local_device).expand(shape)
        adopted = nn.Parameter(stand_in, requires_grad=requires_grad)
        self._init._convert_to_deepspeed_param(adopted)
        assert self._init._aligned_size(adopted) == partition.numel() * self.size
        partition.requires_grad_(False)
        partition.ds_numel = partition.numel()  # type: ignore[attr-defined]
        partition.status = self._available  # type: ignore[attr-defined]
        partition.final_location = None  # type: ignore[attr-defined]
        adopted.ds_tensor = partition  # type: ignore[attr-defined]
        adopted.ds_numel_aligned = partition.numel() * self.size  # type: ignore[attr-defined]
        self._free_param(adopted)
        return adopted


def partition_over(parameter: nn.Parameter, group: Any) -> None:
    """Have DeepSpeed partition this parameter over `group`, by default the one of the first that it finds. A group of
    this rank alone leaves it whole: never gathered, never reduced. To be called before DeepSpeed converts it."""
    parameter.ds_zero_partition_process_group = group  # type: ignore[attr-defined]


def around_waits(ds: Any, during: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter `during()` wherever DeepSpeed's stages 1 to 3 let the computation wait for other ranks: for the weights of
    the module that is next, and at the end of backward for the gradients."""
    reduces = (ds.optimizer, "independent_gradient_partition_epilogue")
    # stage 1 with DeepSpeed's bf16 on has another optimizer, whose gradients the engine reduces
    owners = [reduces if hasattr(*reduces) else (ds, "buffered_allreduce_fallback")]
    if hasattr(ds.optimizer, "parameter_offload"):  # stage 3
        owners.append((ds.optimizer.parameter_offload.get_param_coordinator(), "fetch_sub_module"))
    for owner, name in owners:
        setattr(owner, name, _around(getattr(owner, name), during))


def _around(function: Callable[..., Any], during: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with during():
            return function(*args, **kwargs)

    return wrapped


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether it is a ZeRO-3 parameter already."""
    return hasattr(parameter, "ds_id")


def group_size(parameter: nn.Parameter) -> int:
    """How many ranks share the partitions of a ZeRO-3 parameter."""
    return parameter.ds_zero_partition_world_size  # type: ignore[attr-defined]


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where this rank holds a partition of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where this rank holds a partition of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
