"""One optimizer step through DeepSpeed. The only place where a DeepSpeed configuration key is written.

The loss of a step is the mean over all its target tokens, whatever rank and micro-batch they fell to: a mean of
per-batch means would weigh a token by the company it keeps.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters.dropout import DropoutContext
from lora_scale.parallel import zero3
from lora_scale.parallel.clock import PhaseClock
from lora_scale.parallel.world import World
from lora_scale.spec import cost, elsewhere
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.storage.packing import Batch
from lora_scale.storage.steps import Step

IGNORED = -100  # a label that carries no loss, as in torch and transformers


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did. `seconds` by phase: forward, backward (with its collectives), step."""

    loss: float  # mean over the step's target tokens on all ranks, in nats
    grad_norm: float  # global, before clipping
    seconds: dict[str, float]
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
    stage = cfg.parallel.zero_stage
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
        "gradient_clipping": cfg.train.max_grad_norm if stage or bf16_masters else 0.0,
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


def optimizer_for(model: nn.Module, cfg: RunConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with fewer than two dims (norms, biases) do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(zero3.shape(p)) >= 2], "weight_decay": cfg.train.weight_decay},
        {"params": [p for p in trainable if len(zero3.shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # an empty group breaks torch's own bookkeeping
    return torch.optim.AdamW(groups, lr=cfg.train.lr, betas=cfg.train.betas, eps=cfg.train.eps)


class Engine:
    """A DeepSpeed engine and what this run needs of it."""

    def __init__(
        self, model: nn.Module, cfg: RunConfig, world: World, config: dict[str, Any], dropout: DropoutContext | None
    ):
        self.cfg, self.world, self.dropout, self.config = cfg, world, dropout, config
        deepspeed = importlib.import_module("deepspeed")
        with _no_base_broadcast():
            self.ds, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer_for(model, cfg),
                config=config,
                dist_init_required=False,
            )
        self._can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.clock = PhaseClock(world.device)
        self.clips_itself = not config["gradient_clipping"]

    @property
    def module(self) -> nn.Module:
        return self.ds.module

    def train_step(self, step: Step, number: int, lr: float, stop: Callable[[], bool] = bool) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step with learning rate `lr`.

        `stop()` says whether this rank was asked to stop; the answer, for all ranks, comes with the loss.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(_mix(self.cfg.seed, number, self.world.rank))  # the base's own dropout, when it is not 0
        norm: float | None = None
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # loss, asked to stop
        for batch in step.micro_batches:
            with self.clock.phase("forward"):
                loss = self._loss_sum(batch, number)
                total[0] += loss.detach()
            with self.clock.phase("backward"):  # DeepSpeed averages gradients over ranks: give back the sum
                self.ds.backward(loss * (self.world.size / max(1, step.target_tokens)), scale_wrt_gas=False)
            with self.clock.phase("step"):
                norm = self._clip()
                self.ds.step()  # counts micro-batches; the optimizer steps at the last one
        if norm is None:
            norm = float(self.ds.get_global_grad_norm())
        total[1] = float(stop())
        own = total[:1].clone()
        dist.all_reduce(total)
        summed, asked, own_loss = torch.cat([total, own]).tolist()  # waits for the device: now the clock may be read
        return StepResult(summed / max(1, step.target_tokens), norm, self.clock.seconds(), asked > 0, own_loss)

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
        ids, labels, positions = (
            _to(a, self.world.device) for a in (batch.input_ids, batch.labels, batch.position_ids)
        )
        if self.dropout is not None:
            self.dropout.set(number, _to(batch.sample_ids, self.world.device), positions)
        kept = _positions_with_target(batch.labels)
        options: dict[str, Any] = {}
        if kept is not None and self._can_leave_out:
            kept_here = _to(kept, self.world.device)
            options, labels = {"logits_to_keep": kept_here}, labels[:, kept_here]
        logits = self.ds(input_ids=ids, position_ids=positions, use_cache=False, **options).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def _clip(self) -> float | None:
        """Stage 0 in fp32: DeepSpeed clips but does not tell the norm, so it is done here, on the averaged
        gradients."""
        if not self.clips_itself or self.cfg.parallel.zero_stage or not self.ds.is_gradient_accumulation_boundary():
            return None
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        limit = self.cfg.train.max_grad_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(parameters, limit))


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


def _positions_with_target(labels: np.ndarray) -> np.ndarray | None:
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
