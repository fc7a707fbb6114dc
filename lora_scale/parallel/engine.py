"""One optimizer step through DeepSpeed. The only place where a DeepSpeed configuration key is written.

The loss of a step is the mean over all its target tokens, whatever rank and micro-batch they fell to: a mean of
per-batch means would weigh a token by the company it keeps.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from lora_scale.parallel import classes, documents, gradients, masters, memory, tensor_parallel, vocabulary, zero3
from lora_scale.parallel.clock import PhaseClock, exposed
from lora_scale.parallel.grid import Grid, Mpu
from lora_scale.parallel.vocabulary import IGNORED
from lora_scale.spec import cost, elsewhere, states
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
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
    stop: bool = False  # some rank was asked to stop; every rank sees the same
    own_loss: float = 0.0  # this rank's summed loss: not finite where its own rows made it so


def ds_config(
    cfg: RunConfig, accumulation: int, layer_numel: int, trainable_numel: int, layers: Sequence[str]
) -> dict[str, Any]:
    """DeepSpeed's configuration of this run.

    `layer_numel` is the largest decoder layer's size in elements and `layers` the class names of decoder layers: each
    is gathered as one, a prefetch bucket holds the next one, and nothing waits for reuse. Nothing is "persistent":
    DeepSpeed drops and re-gathers such parameters one by one at every step. The gradient bucket is allocated at once,
    so it is sized to what trains.
    """
    stage = states.deepspeed_stage(cfg, trainable_numel)
    full = cfg.method == "full"
    bf16_masters = full and cfg.precision == "bf16"  # adapters are fp32 themselves and need no second copy
    if bf16_masters and stage == 0:
        raise ConfigError(
            "method is full in bf16 with parallel.zero_stage = 0, which keeps no fp32 copy of the weights; use "
            "stage 1, 2 or 3"
        )
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": cost.reduce_bucket(trainable_numel),
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": layer_numel,
            "stage3_max_live_parameters": 3 * layer_numel,
            "stage3_max_reuse_distance": 0,
            "leaf_module": {"classes": list(layers)},
        }
    ours = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_itself(cfg) else cfg.train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16_masters},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
    return _merged(ours, passed_through(cfg))


def passed_through(cfg: RunConfig) -> dict[str, Any]:
    """`engine.deepspeed`: what DeepSpeed is told beside what this config says."""
    given = cfg.engine.deepspeed
    if isinstance(given, dict):
        return given
    try:
        tree = json.loads(given.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed is {given}, which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed is {given}, which is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"engine.deepspeed is {given}, which holds no JSON object")
    if told := elsewhere.refused(tree):
        raise ConfigError("\n".join(f"{given}: {line}" for line in told))
    return tree


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `base`, section by section."""
    both = {name: _merged(base[name], more[name]) for name in base.keys() & more.keys() if isinstance(more[name], dict)}
    return {**base, **more, **both}


def clips_itself(cfg: RunConfig) -> bool:
    """Whether `parallel.gradients` finishes the gradients. DeepSpeed knows no tensor that is whole on each rank while
    its gradient is not, and at stage 0 it does not tell the norm; full fine-tuning beyond that stage is all its own."""
    return cfg.method != "full" or cfg.parallel.zero_stage == 0


def optimizer_for(model: nn.Module, cfg: RunConfig, uneven: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with fewer than two dims (norms, biases) do not decay.

    A group's `lr_ratio` is its learning rate over the schedule's: other than 1 for lora_B in LoRA+. What tensor
    parallelism cuts into `uneven` shards is apart: ZeRO-1 and 2 lay a group end to end, and the other groups must be
    partitioned alike on the ranks that sum parts of a gradient.
    """
    members: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}  # no empty group: it breaks torch's bookkeeping
    for name, p in model.named_parameters():
        if p.requires_grad:
            lr_ratio = cfg.train.loraplus_lr_ratio if name.endswith(".lora_B") else 1.0
            members.setdefault((len(zero3.shape(p)) >= 2, lr_ratio, name in uneven), []).append(p)
    groups = [
        {
            "params": found,
            "weight_decay": cfg.train.weight_decay if decays else 0.0,
            "lr_ratio": lr_ratio,
        }
        for (decays, lr_ratio, _), found in members.items()
    ]
    return torch.optim.AdamW(groups, lr=cfg.train.lr, betas=cfg.train.betas, eps=cfg.train.eps)


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
        self._vocabulary = Part(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        self._can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._parts = self.parts() if clips_itself(cfg) else []
        self.clock, self.tracked = PhaseClock(self.world.device), memory.Tracked(self.ds)
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
        returned waits for the device, which is still at work.

        `stop()` says whether this rank was asked to stop; the answer, for all ranks, comes with the loss.
        `meanwhile()` is called once, when a GPU has its first work of this step.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        torch.manual_seed(_mix(self.cfg.seed, number, self.grid.dp_rank))  # the base's own dropout, when it is not 0
        norm: Tensor | None = None
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # loss, asked to stop
        for batch in step.micro_batches:
            with self.clock.phase("forward"):
                loss = self._loss_sum(batch, number)
                total[0] += loss.detach()
            if batch is step.micro_batches[0]:
                meanwhile()
            with self.clock.phase("backward"):  # DeepSpeed averages gradients over ranks: give back the sum
                self.ds.backward(loss * (self.grid.dp_size / max(1, step.target_tokens)), scale_wrt_gas=False)
            with self.clock.phase("step"):
                if self._parts and self.ds.is_gradient_accumulation_boundary():
                    limit = self.cfg.train.max_grad_norm
                    norm = gradients.finish(self.ds, self._parts, self._shared, self._alike, self.grid, limit)
                self.ds.step()  # counts micro-batches; the optimizer steps at the last one
        if norm is None:
            norm = torch.as_tensor(self.ds.get_global_grad_norm(), device=self.world.device)
        total[1] = float(stop())
        own = total[:1].clone()
        with self.clock.phase("step"), exposed(self.world.device):  # for the slowest rank
            dist.all_reduce(total)
        return partial(self._result, step, torch.cat([total, own, norm.double().view(1)]))

    def _result(self, step: Step, found: Tensor) -> StepResult:
        summed, asked, own_loss, grad_norm = found.tolist()  # waits for the device: now the clock may be read
        mean = summed / self.grid.tp_size / max(1, step.target_tokens)  # a tensor-parallel group has one loss
        return StepResult(mean, grad_norm, self.clock.take(), asked > 0, own_loss)

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
        logits = self.ds(input_ids=ids, position_ids=places, use_cache=False, **options).logits.flatten(0, 1)
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
    return torch.from_numpy(array).to(device, non_blocking=True)


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_000_003 + rank
