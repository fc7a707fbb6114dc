"""The learning rate is transformers', bit for bit, at every step of every schedule."""

import pytest
import torch
from transformers import get_scheduler

from lora_scale.spec.config import TrainConfig
from lora_scale.spec.schedule import learning_rate

THEIR_NAME = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("schedule", THEIR_NAME)
@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 30], ids="warmup{}".format)
@pytest.mark.parametrize("total", [1, 20, 173], ids="total{}".format)
def test_every_step_equals_transformers(schedule: str, warmup: int, total: int) -> None:
    cfg = TrainConfig(max_steps=total, lr=3e-4, schedule=schedule, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.lr)
    theirs = get_scheduler(THEIR_NAME[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 3):  # past the end too: a resumed run may ask
        assert learning_rate(step, total, cfg) == theirs.get_last_lr()[0], step
        optimizer.step()
        theirs.step()


def test_warmup_starts_at_zero_and_reaches_the_peak() -> None:
    cfg = TrainConfig(max_steps=10, lr=1e-3, warmup_steps=4)
    assert learning_rate(0, 10, cfg) == 0.0
    assert learning_rate(4, 10, cfg) == 1e-3
    assert learning_rate(10, 10, cfg) == 0.0
    assert learning_rate(9, 10, cfg) > 0.0
