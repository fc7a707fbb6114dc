"""Runs that only look like training are stopped, each with the step and the tensor or rows; runs that train are not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_folder
from tiny_models import tiny_model
from torch import Tensor, nn
from training import config, start, write_rows

from lora_scale.adapters import tokens
from lora_scale.adapters.lora import LoRALinear, adapt, adapted_layers
from lora_scale.parallel import checkpoint, grid, guards, masters
from lora_scale.parallel.engine import StepResult
from lora_scale.parallel.guards import LearningGuard
from lora_scale.parallel.setup import Job
from lora_scale.parallel.world import World
from lora_scale.spec.config import LoraConfig, ParallelConfig
from lora_scale.spec.errors import TrainingError
from lora_scale.spec.schedule import learning_rate

# --- one process, a model of two layers and torch's own optimizer ----------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 5), "v_proj": nn.Linear(5, 4)})
    adapt(model, LoraConfig(r=2, target_modules=("q_proj", "v_proj")), seed=0)
    return model


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What the guard asks of an engine."""
    ds = SimpleNamespace(module=model, optimizer=optimizer)
    place = grid.make(ParallelConfig(), World("none", 0, 1, 0))
    return SimpleNamespace(ds=ds, parts=lambda: masters.parts(ds, place, {}))


def guarded(model: nn.Module, lrs: list[float], targets: list[int] | None = None) -> LearningGuard:
    """Train on noise with these learning rates, and let the guard look after every step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1.0, weight_decay=0.0)
    guard = LearningGuard(engine_of(model, optimizer))
    layers = list(model.values()) if isinstance(model, nn.ModuleDict) else [model]
    for number, lr in enumerate(lrs, start=1):
        out = torch.randn(3, 6, generator=torch.Generator().manual_seed(number))
        for layer in layers:
            out = layer(out)
        optimizer.zero_grad()
        out.square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        guard.after_step(number, lr, (targets or [9] * len(lrs))[number - 1])
    return guard


def without(factor: str) -> Callable[[LoRALinear, Tensor], Tensor]:
    """A layer's forward in which one factor takes part without a gradient."""

    def forward(self: LoRALinear, x: Tensor) -> Tensor:
        a, b = (t.detach() if factor == name else t for name, t in (("lora_A", self.lora_A), ("lora_B", self.lora_B)))
        return self.base_layer(x) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * self.scaling

    return forward


def break_layer(model: nn.Module, name: str, forward: Callable[[LoRALinear, Tensor], Tensor]) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, LoRALinear)
    layer.forward = forward.__get__(layer)  # type: ignore[method-assign]


def test_a_run_that_trains_passes() -> None:
    assert guarded(two_layers(), [1e-3] * 3).idle == ()


def test_warm_up_that_begins_at_zero_passes() -> None:
    guarded(two_layers(), [0.0, 1e-4, 2e-4, 3e-4])


def test_a_rate_that_moves_nothing_is_taken_for_none() -> None:
    """A run that only measures losses: at 1e-12 most of lora_A stays as it is to the bit."""
    guarded(two_layers(), [1e-12, 1e-12, 1e-12])


def test_a_step_without_targets_is_not_judged() -> None:
    model = two_layers()
    for name in ("q_proj", "v_proj"):
        break_layer(model, name, lambda self, x: self.base_layer(x) + 0.0 * (self.lora_A.sum() + self.lora_B.sum()))
    guarded(model, [1e-3, 1e-3], targets=[0, 0])
    with pytest.raises(TrainingError, match="step 1: 2 of 2 trainable tensors"):
        guarded(model, [1e-3])


def test_b_without_a_gradient_is_named_at_the_first_step_with_a_learning_rate() -> None:
    model = two_layers()
    break_layer(model, "v_proj", without("lora_B"))
    with pytest.raises(
        TrainingError, match=r"^step 2: 1 of 2 trainable tensors had no gradient .* first v_proj\.lora_B; "
    ):
        guarded(model, [0.0, 1e-3])


def test_a_that_never_moves_is_named_at_the_second() -> None:
    model = two_layers()
    break_layer(model, "q_proj", without("lora_A"))
    with pytest.raises(
        TrainingError, match=r"^step 3: 1 of 4 trainable tensors had no gradient .* first q_proj\.lora_A; "
    ):
        guarded(model, [0.0, 1e-3, 1e-3])


def test_a_tensor_the_optimizer_does_not_move_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a gradient and moments, but keeps its value, as when an optimizer steps a stale copy."""
    model = two_layers()
    layer = model.get_submodule("q_proj")
    monkeypatch.setattr(guards.masters.Part, "view", _stale_view(layer.lora_B, guards.masters.Part.view))
    with pytest.raises(TrainingError, match=r"step 1: 1 of 2 .* did not move, first q_proj\.lora_B; "):
        guarded(model, [1e-3])


def _stale_view(parameter: nn.Parameter, view: Callable[..., Tensor]) -> Callable[..., Tensor]:
    old = parameter.detach().clone()

    def stale(part: Any, optimizer: Any, what: str) -> Tensor:
        is_it = part.parameter is parameter and what == guards.masters.VALUE
        return old.view(-1) if is_it else view(part, optimizer, what)

    return stale


def test_experts_without_tokens_are_listed_not_refused() -> None:
    experts = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(3)])
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = LearningGuard(engine_of(model, optimizer))
    experts[1](torch.randn(2, 6)).square().sum().backward()
    optimizer.step()
    guard.after_step(1, 1e-3, 4)
    assert guard.idle == ("mlp.experts.0.weight", "mlp.experts.2.weight")


def test_new_tokens_that_no_row_has_are_listed_not_refused() -> None:
    model = tiny_model("llama")
    tokens.insert(model.requires_grad_(False), [7])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    guard = LearningGuard(engine_of(model, optimizer))
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    optimizer.step()
    guard.after_step(1, 1e-3, 3)
    assert guard.idle == ("model.embed_tokens.token_adapter.trainable_tokens_delta",)


@pytest.mark.parametrize(("lr", "moves"), [(1e-9, False), (1e-6, True)])
def test_a_step_too_small_for_fp32_is_no_fault(lr: float, moves: bool) -> None:
    """Norm weights begin at 1.0, where the next fp32 number is 1.2e-7 away: early warm-up of full fine-tuning."""
    norm = nn.LayerNorm(6, bias=False)
    before = norm.weight.detach().clone()
    guarded(norm, [lr])
    assert (not torch.equal(norm.weight, before)) is moves


def test_beyond_the_watched_elements_the_gradient_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MAX_WATCHED", 1)
    guarded(two_layers(), [1e-3, 1e-3])
    model = two_layers()
    break_layer(model, "v_proj", without("lora_B"))
    with pytest.raises(TrainingError, match=r"first v_proj\.lora_B"):
        guarded(model, [1e-3])


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (
            (float("nan"), 1.0),
            "step 7: loss is nan; rank 0 had a.jsonl, line 4. Lower train.lr, or look at these rows",
        ),
        (
            (2.0, float("inf")),
            "step 7: gradient norm is inf; rank 0 had a.jsonl, line 4. Lower train.lr, or look at these rows",
        ),
    ],
)
def test_what_is_not_finite_is_named(figures: tuple[float, float], message: str) -> None:
    loss, norm = figures
    with pytest.raises(TrainingError) as error:
        guards.check_finite(7, StepResult(loss, norm, dict, 0.0, own_loss=loss), "a.jsonl, line 4")
    assert str(error.value) == message
    guards.check_finite(7, StepResult(2.0, 1.0, dict, 0.0), "a.jsonl, line 4")


# --- two ranks, the whole engine ------------------------------------------------------------------------------------


class _Explode(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("inf")


def _exploding(self: LoRALinear, x: Tensor) -> Tensor:
    y = self.base_layer(x)
    return y + _Explode.apply(F.linear(F.linear(x, self.lora_A), self.lora_B)) * self.scaling


Q0 = "model.layers.0.self_attn.q_proj"


def _break(job: Job, how: str) -> None:
    ways = {"b": without("lora_B"), "a": without("lora_A"), "gradient": _exploding}
    if how in ways:
        break_layer(job.engine.module, Q0, ways[how])


def stopped_by(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What each broken run is stopped with, within three steps; "" for one that is not."""
    found = {}
    for how, tree in trees.items():
        job = start(here, tree, randomise=False)
        assert Q0 in adapted_layers(job.engine.module)
        _break(job, how)
        found[how] = ""
        try:
            _steps(job, 3)
            if how == "save":
                adapted_layers(job.engine.module)[Q0].lora_A.ds_shape = torch.Size((0, 32))  # type: ignore[attr-defined]
                folder = Path(tree["run_dir"]) / "checkpoints"
                checkpoint.save(job.engine, job.state(3, 0), folder, job.write_adapter_config, job.key)
        except TrainingError as error:
            found[how] = str(error)
        assert not list(Path(tree["run_dir"]).glob("checkpoints/*"))
        job.engine.ds.destroy()
    return found


def _steps(job: Job, count: int) -> None:
    guard, total = LearningGuard(job.engine), job.data.plan.total_steps
    for number in range(count):
        step, lr = job.data.plan.step(number), learning_rate(number, total, job.cfg.train)
        result = job.engine.train_step(step, number, lr)
        guards.check_finite(number + 1, result, step.names)
        guard.after_step(number + 1, lr, step.target_tokens)


UNLUCKY = 95  # a token whose embedding is broken; only one row has it


def _broken_base(folder: Path, source: Path) -> Path:
    """The same model with an embedding of infinities for one token."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("embed_tokens.weight"):
                tensor[UNLUCKY] = float("inf")
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.ranks
def test_two_ranks_under_zero_3_are_stopped(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model", dtype=torch.float32), tmp_path / "rows.jsonl"
    write_rows(rows, count=9, vocab=UNLUCKY)
    with rows.open("a") as file:
        file.write(f'{{"input_ids": [5, 6, {UNLUCKY}, 7, 8]}}\n')
    # lr 0 in the first step (warm-up), packing off so that a block is a row, and a batch of all rows
    changes = {"data__packing": False, "train__global_batch_size": 10, "train__max_grad_norm": 0.0}
    trees = {how: config(model, rows, tmp_path / how, **changes) for how in ("sound", "a", "b", "gradient", "save")}
    trees["loss"] = config(_broken_base(tmp_path / "broken", model), rows, tmp_path / "loss", **changes)
    everyone = run_ranks(2, "test_guards:stopped_by", trees, folder=tmp_path / "ranks")
    assert everyone[0] == everyone[1]
    found = everyone[0]
    assert found["sound"] == ""
    end = "; the model does not train as configured"
    text = "step {}: 1 of {} trainable tensors had no gradient or did not move, first {}" + end
    assert found["b"] == text.format(2, 8, f"{Q0}.lora_B")
    assert found["a"] == text.format(3, 16, f"{Q0}.lora_A")
    assert found["loss"].startswith("step 1: loss is nan; rank ") and found["loss"].count("; rank ") == 1, found["loss"]
    assert " 10. Lower train.lr" in found["loss"], f"the unlucky row, the last, is not named: {found['loss']}"
    assert found["gradient"].startswith("step 1: gradient norm is ") and found["gradient"].count("; rank ") == 2
    assert found["save"].endswith(f"is not written: {Q0}.lora_A and 0 others have no elements"), found["save"]
