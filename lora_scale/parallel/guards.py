"""Checks that stop a run that only looks like training: nothing moves, or something is not finite. On by default."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.adapters import tokens
from lora_scale.parallel import masters
from lora_scale.parallel.engine import Engine, StepResult
from lora_scale.spec.errors import TrainingError

MAX_NAMED = 4  # ranks in one message
MAX_WATCHED = 64 << 20  # elements of which a copy is kept for two steps, 256 MiB a rank; adapters are smaller
LEAST_RATE = 1e-9  # below this nothing is meant to move: a run that only measures


class LearningGuard:
    """After the first optimizer step with a learning rate every lora_B must have had a gradient and moved; every lora_A
    from the second such step (with B = 0 the gradient of A is zero in the first). Full fine-tuning: each one,
    at the first.

    A gradient shows in Adam's first moment; it alone is judged beyond MAX_WATCHED, and where all values are so large
    that fp32 rounds such a learning rate away. A rate below LEAST_RATE is taken for none. Experts may see no token in a
    step, and a batch none of the new tokens: they are listed, not refused.
    """

    def __init__(self, engine: Engine):
        self._ds = engine.ds
        self._parts = engine.parts()
        self._before: dict[str, Tensor] | None = {}
        watched = 0
        for p in self._parts:
            if (watched := watched + p.numel) <= MAX_WATCHED:
                self._before[p.name] = self._value(p)
        self._steps = 0
        self.idle: tuple[str, ...] = ()

    def after_step(self, number: int, lr: float, target_tokens: int) -> None:
        """Collective while the guard is active: two steps that had a learning rate and target tokens."""
        if self._before is None or lr < LEAST_RATE or target_tokens == 0:
            return
        self._steps += 1
        checked = [p for p in self._parts if self._steps > 1 or not p.name.endswith("lora_A")]
        if (idle := self._without(checked, lr)) and (stuck := [name for name in idle if not _may_idle(name)]):
            raise TrainingError(
                f"step {number}: {len(stuck)} of {len(checked)} trainable tensors had no gradient or did not move, "
                f"first {stuck[0]}; the model does not train as configured"
            )
        self.idle = tuple(idle)
        if self._steps == 2:
            self._before = None  # seen to work: give the copies back

    def _without(self, parts: list[masters.Part], lr: float) -> list[str]:
        """Names of the tensors of which no rank saw a gradient and a change. One collective."""
        optimizer = masters.torch_optimizer(self._ds)
        flags = torch.zeros(len(parts), 2, dtype=torch.int32)
        for i, p in enumerate(parts):
            if p.numel:
                flags[i, 0] = int(p.view(optimizer, "exp_avg").any())
                flags[i, 1] = int(self._moved(p, lr))
        flags = flags.to(parts[0].parameter.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [p.name for p, (gradient, moved) in zip(parts, flags.tolist(), strict=True) if not (gradient and moved)]

    def _moved(self, part: masters.Part, lr: float) -> bool:
        """Whether this rank's run changed, if that can be seen: Adam's first steps are of size lr."""
        assert self._before is not None
        before = self._before.get(part.name)
        if before is None or before.abs().min() * torch.finfo(torch.float32).eps > lr:
            return True
        return not torch.equal(self._value(part), before)

    def _value(self, part: masters.Part) -> Tensor:
        return part.view(masters.torch_optimizer(self._ds), masters.VALUE).clone()


def _may_idle(name: str) -> bool:
    return ".experts." in name or name.endswith(f".{tokens.DELTA}")


def check_finite(number: int, result: StepResult, names: str) -> None:
    """Stop at a loss or gradient norm that is not finite, naming the step, the rank and its rows. All ranks agree.

    A gradient is reduced before anyone looks at it, so only a loss leads to one rank; else all ranks' rows are suspect.
    """
    figures = {"loss": result.loss, "gradient norm": result.grad_norm}
    what = next((name for name, value in figures.items() if not math.isfinite(value)), None)
    if what is None:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (math.isfinite(result.own_loss), names))
    suspects = [rank for rank, (finite, _) in enumerate(everyone) if not finite] or list(range(len(everyone)))
    rows = "; ".join(f"rank {rank} had {everyone[rank][1]}" for rank in suspects[:MAX_NAMED])
    rest = f"; and {len(suspects) - MAX_NAMED} more ranks" if len(suspects) > MAX_NAMED else ""
    way_out = "Lower train.lr, or look at these rows"
    raise TrainingError(f"step {number}: {what} is {figures[what]}; {rows}{rest}. {way_out}")
