"""The learning rate of a step. Pure arithmetic: no optimizer and no state, so a resumed run needs nothing saved for it.

Equal to transformers' `get_{cosine,linear,constant}_schedule_with_warmup`, to the last bit.
"""

from math import cos, pi

from lora_scale.spec.config import TrainConfig


def learning_rate(step: int, total_steps: int, cfg: TrainConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0. The last step's is not yet 0: that comes after it."""
    return cfg.lr * _factor(step, total_steps, cfg)


def _factor(step: int, total_steps: int, cfg: TrainConfig) -> float:
    if step < cfg.warmup_steps:
        return step / cfg.warmup_steps
    decay_steps = max(1, total_steps - cfg.warmup_steps)
    match cfg.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, (total_steps - step) / decay_steps)
        case "cosine":
            progress = (step - cfg.warmup_steps) / decay_steps
            return max(0.0, 0.5 * (1.0 + cos(pi * progress)))
