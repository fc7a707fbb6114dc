"""One optimizer step through DeepSpeed.

The loss of a step is the mean over all its target tokens, whatever rank and micro-batch they fell to: a mean of
per-batch means would weigh a token by the company it keeps.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters.dropout import DropoutContext
from lora_scale.parallel import (
    classes,
    documents,
    gradients,
    losses,
    masters,
    memory,
    tensor_parallel,
    vocabulary,
    zero3,
)
from lora_scale.parallel.clock import Moment, PhaseClock, exposed, wait
from lora_scale.parallel.deepspeed_config import clips_itself, optimizer_for
from lora_scale.parallel.grid import Grid, Mpu
from lora_scale.parallel.vocabulary import IGNORED
from lora_scale.spec.config import RunConfig
from lora_scale.spec.splits import Part, Split
from lora_scale.storage.packing import Batch
from lora_scale.storage.steps import Step


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did. `seconds()` by phase: data, forward, backward, step, and `collectives`, the time of
    these three in which this rank waited for others; many events are read for it (`PhaseClock.take`)."""

    loss: float  # mean over the step's target tokens on all ranks, in nats
    grad_norm: float  # global, before clipping
    seconds: Callable[[], dict[str, float]]
    ended: Moment  # on the device's clock: seconds between steps are between these
    stop: bool = False  # some rank was asked to stop; every rank sees the same
    own_loss: float = 0.0  # this rank's summed loss: not finite where its own rows made it so


class Engine:
    """A DeepSpeed engine and what this run needs of it."""

    def __init__(
        self,
        model: nn.Module,
        cfg: RunConfig,
        grid: Grid,
        config: dict[str, Any],
        dropout: DropoutContext | None,
        splits: Mapping[str, Split],
    ):
        self.cfg, self.grid, self.world, self.dropout, self.config = cfg, grid, grid.world, dropout, config
        self._splits = tensor_parallel.trained_splits(model, splits)
        self._shared = tensor_parallel.shared_elements(model, splits, grid, cfg.parallel.sequence_parallel)
        self._alike = tensor_parallel.alike(model, splits, self._shared) if grid.tp_size > 1 else frozenset()
        uneven = [name for name, split in self._splits.items() if not split.is_even(grid.tp_size)]
        deepspeed = importlib.import_module("deepspeed")
        deepspeed.utils.groups.mpu = None  # DeepSpeed would ask that of a run before this one in this process
        with _no_base_broadcast():
            self.ds, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer_for(model, cfg, uneven),
                config=config,
                dist_init_required=False,
                mpu=Mpu(grid) if grid.tp_size > 1 else None,
            )
        self._head = losses.let_head_tell_loss(model, cfg, grid)
        self._vocabulary = Part(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        self._can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._parts = self.parts() if clips_itself(cfg) else []
        self.clock, self.tracked = PhaseClock(self.world.device), memory.Tracked(self.ds)
        self._ahead: Tensor | None = None  # loss of a step's first micro-batch
        if self.ds.zero_optimization_stage():
            zero3.around_waits(self.ds, partial(exposed, self.world.device))
        else:
            gradients.look_at_trained_only(self.ds, grid)

    def parts(self) -> list[masters.Part]:
        """This rank's run of every trainable tensor."""
        return masters.parts(self.ds, self.grid, self._splits)

    @property
    def module(self) -> nn.Module:
        return self.ds.module

    def train_step(self, step: Step, number: int, lr: float, stop: Callable[[], bool] = bool) -> StepResult:
        """One whole step: `start_step`, and the wait for what it did."""
        return self.start_step(step, number, lr, stop)()

    def start_step(
        self,
        step: Step,
        number: int,
        lr: float,
        stop: Callable[[], bool] = bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Callable[[], StepResult]:
        """Forward and backward over this rank's micro-batches, then one optimizer step with learning rate `lr`; what is
        returned waits for the device, which is still at work. The first forward pass may be done already (`begin`).

        `stop()` says whether this rank was asked to stop; the answer, for all ranks, comes with the loss.
        `meanwhile()` is called once, when a GPU has its first work of this step.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        if self._ahead is None:
            self.begin(step, number)
        norm: Tensor | None = None
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # loss, asked to stop
        for batch in step.micro_batches:
            loss, self._ahead = self._forward(batch, number) if self._ahead is None else self._ahead, None
            if batch is step.micro_batches[0]:
                meanwhile()
            with self.clock.phase("backward"):  # DeepSpeed averages gradients over ranks: give back the sum
                total[0] += loss.detach()
                self.ds.backward(loss * (self.grid.dp_size / max(1, step.target_tokens)), scale_wrt_gas=False)
            with self.clock.phase("step"):
                if self._parts and self.ds.is_gradient_accumulation_boundary():
                    limit = self.cfg.train.max_grad_norm
                    norm = gradients.finish(self.ds, self._parts, self._shared, self._alike, self.grid, limit)
                self.ds.step()  # counts micro-batches; the optimizer steps at the last one
        if norm is None:
            norm = torch.as_tensor(self.ds.get_global_grad_norm(), device=self.world.device)
        total[1].fill_(float(stop()))  # not copied from the host: the device may be waited for then
        own = total[:1].clone()
        with self.clock.phase("step"), exposed(self.world.device):  # for the slowest rank
            dist.all_reduce(total)
        found = torch.empty(4, dtype=torch.float64, pin_memory=self.world.device.type == "cuda")
        found.copy_(torch.cat([total, own, norm.double().view(1)]), non_blocking=True)
        return partial(self._result, step, found, self.clock.take(), self.clock.now())

    def _result(self, step: Step, found: Tensor, seconds: Callable[[], dict[str, float]], ended: Moment) -> StepResult:
        wait(ended)  # and for nothing that was begun after it
        summed, asked, own_loss, grad_norm = found.tolist()
        mean = summed / self.grid.tp_size / max(1, step.target_tokens)  # a tensor-parallel group has one loss
        return StepResult(mean, grad_norm, seconds, ended, asked > 0, own_loss)

    def begin(self, step: Step, number: int) -> None:
        """Forward over the first micro-batch of the step that comes next, before anyone has waited for the last one: a
        GPU then has work while its processor reads, checks and tells what came of that. Nothing but a step may follow;
        if none does (the last one was to be the last), `forget`."""
        torch.manual_seed(_mix(self.cfg.seed, number, self.grid.dp_rank))  # the base's own dropout, when it is not 0
        self._ahead = self._forward(step.micro_batches[0], number)

    @property
    def has_begun(self) -> bool:
        return self._ahead is not None

    def forget(self) -> None:
        """What was begun is not wanted."""
        self._ahead = None

    def _forward(self, batch: Batch, number: int) -> Tensor:
        with self.clock.phase("forward"):
            return self._loss_sum(batch, number)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over the target tokens of all ranks' batches. Every rank gives equally many."""
        self.module.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with torch.no_grad():
            for batch in batches:
                sums[0] += self._loss_sum(batch, 0).double()
                sums[1] += int((batch.labels != IGNORED).sum())
        self.module.train()
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def _loss_sum(self, batch: Batch, number: int) -> Tensor:
        """Cross-entropy summed over the batch's target tokens, fp32, shape ()."""
        if self.cfg.model.attention == "documents":
            documents.tell(batch.position_ids, self.world.device)
        ids, labels, places = (_to(x, self.world.device) for x in (batch.input_ids, batch.labels, batch.position_ids))
        if self.dropout is not None:
            self.dropout.set(number, _to(batch.sample_ids, self.world.device), places)
        if classes.in_model(self.module):
            return classes.loss_sum(self.ds, ids, labels)
        kept = positions_with_target(batch.labels)
        options: dict[str, Any] = {}
        if kept is not None and self._can_leave_out:
            kept_here = _to(kept, self.world.device)
            options, labels = {"logits_to_keep": kept_here}, labels[:, kept_here]
        options |= {"input_ids": ids, "position_ids": places, "use_cache": False}
        if self._head is not None:
            self._head.labels = labels.flatten()
            return self.ds(**options).logits  # the loss
        logits = self.ds(**options).logits.flatten(0, 1)
        if self.grid.tp_size > 1:
            first, _ = self._vocabulary.span(self.grid.tp_rank, self.grid.tp_size)
            return vocabulary.cross_entropy(logits, labels.flatten(), first, self.grid.tp_group)
        return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@contextmanager
def _no_base_broadcast() -> Iterator[None]:
    """DeepSpeed's stages 0-2 send the whole model from rank 0; here every rank has read the same file and drawn the
    same factors."""
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    original = engine._broadcast_model
    engine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        engine._broadcast_model = original


def positions_with_target(labels: np.ndarray) -> np.ndarray | None:
    """Positions that carry loss in some row of the batch: logits of the others are not needed. None where that is
    most of them."""
    kept = np.flatnonzero((labels != IGNORED).any(axis=0))
    if len(kept) > 0.9 * labels.shape[1]:
        return None
    return kept if len(kept) else np.zeros(1, dtype=np.int64)  # an empty block: every rank takes part all the same


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    here = torch.from_numpy(array)
    if device.type == "cuda":  # from other memory the copy waits for what was begun
        here = here.pin_memory()
    return here.to(device, non_blocking=True)


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_000_003 + rank
