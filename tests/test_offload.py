"""Activations that wait in host memory: which layers', what of them, and that nothing of the arithmetic changes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_activations import BLOCKS, LENGTH, built, forward, run_config
from tiny import tiny_folder
from training import Trace, assert_equal, config, reference, write_rows
from training import run_cases as run_as_they_are

from lora_scale.parallel import offload, recompute
from lora_scale.parallel.world import World
from lora_scale.spec import activations, memory, named, planning, search
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.kept import offloaded_layers
from lora_scale.spec.shapes import architecture
from lora_scale.spec.states import Grid

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")

LAYERS = 6
SMALL = 24 * BLOCKS * LENGTH  # bytes: numbers a row and a head and A x are below, k and v of the tiny model above


class Watched(offload.Offloading):
    """Host memory, counted."""

    def __init__(self, smallest: int):
        super().__init__(torch.device("cpu"), smallest)
        self.taken = 0

    def _pin(self, nbytes: int) -> torch.Tensor:
        self.taken += nbytes
        return super()._pin(nbytes)


def gradients(cfg: RunConfig, offloading: offload.Offloading | None, passes: int = 2) -> dict[str, torch.Tensor]:
    model, _ = built("llama", LAYERS, cfg)
    layers = recompute.decoder_layers(model)
    if offloading:
        offloading.attach(layers, offloaded_layers(cfg, LAYERS))
    for name, p in sorted(model.named_parameters()):
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    for _ in range(passes):
        forward(model).float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", ["all", 1, 3])
@pytest.mark.parametrize("changes", [{}, {"targets": ["q", "k", "v", "o", "mlp"], "dropout": 0.1}, {"recompute": 1}])
def test_gradients_are_the_same_bits(which: str | int, changes: dict[str, Any]) -> None:
    cfg = run_config(**{"recompute": "none", "activation_offloading": which, **changes})
    watched = Watched(SMALL)
    found, wanted = gradients(cfg, watched), gradients(cfg, None)
    assert watched.taken and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0 and torch.equal(found[name], gradient), name


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "o", "mlp"]])
def test_host_memory_is_what_the_formula_says(targets: list[str]) -> None:
    """Exact; a second pass takes no more."""
    cfg = run_config(recompute="none", activation_offloading=3, targets=targets)
    watched = Watched(SMALL)
    gradients(cfg, watched, passes=1)
    once = watched.taken
    again = Watched(SMALL)
    gradients(cfg, again, passes=3)
    shape = built("llama", LAYERS, cfg)[1]
    layers = activations.layers(shape, cfg)
    each = {layer: BLOCKS * LENGTH * activations.kept(shape, layer, cfg, masked=False) for layer in layers}
    assert once == again.taken == memory.offloaded(shape, cfg, layers, each, 1)


def test_memory_is_given_back_two_layers_later() -> None:
    cfg = run_config(recompute="none", activation_offloading="all")
    model, _ = built("llama", LAYERS, cfg)
    watched, layers = Watched(SMALL), recompute.decoder_layers(model)
    watched.attach(layers, offloaded_layers(cfg, LAYERS))
    most: list[int] = []
    layers[-1].register_forward_pre_hook(lambda *_: most.append(len(watched._leaving)))
    layers[3].register_forward_pre_hook(lambda *_: most.append(len(watched._leaving)))
    loss = forward(model).float().square().mean()
    assert most == [1, 0]
    loss.backward()


def test_an_error_inside_a_layer_leaves_nothing_behind() -> None:
    cfg = run_config(recompute="none", activation_offloading="all")
    model, _ = built("llama", LAYERS, cfg)
    watched, layers = Watched(SMALL), recompute.decoder_layers(model)
    watched.attach(layers, offloaded_layers(cfg, LAYERS))

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        forward(model)
    handle.remove()
    x = torch.ones(SMALL, requires_grad=True)
    taken = watched.taken
    (x * x).sum().backward()
    assert watched.taken == taken and not watched._inside, "tensors saved outside of the layers went to the host"
    forward(model).float().square().mean().backward()


def test_which_layers() -> None:
    def chosen(layers: int, **changes: Any) -> tuple[int, ...]:
        return offloaded_layers(run_config(**changes), layers)

    assert chosen(8, recompute="none", activation_offloading="all") == (0, 1, 2, 3, 4, 5)
    assert chosen(8, recompute=2, activation_offloading="all") == (2, 3, 4, 5)
    assert chosen(8, recompute="none", activation_offloading=3) == (0, 2, 4)
    assert chosen(8, recompute="none") == chosen(8, recompute="all", activation_offloading="all") == ()
    for count in range(89):
        found = chosen(90, recompute="none", activation_offloading=count)
        gaps = {b - a for a, b in pairwise(found)}
        assert len(found) == count and (not gaps or max(gaps) - min(gaps) <= 1) and max(found, default=0) < 88
    with pytest.raises(ConfigError, match="activation_offloading is 7; 8 decoder layers with recompute = none leave 6"):
        chosen(8, recompute="none", activation_offloading=7)
    with pytest.raises(ValueError, match="activation_offloading is all and method is full"):
        run_config(method="full", activation_offloading="all")


def test_auto_offloads_before_it_recomputes_and_no_more_than_fits() -> None:
    model = architecture(named.shape("llama-100.7b"))

    def settled(limit: float, **changes: Any) -> planning.Job:
        tree = {
            "model": {"path": "x"},
            "data": {"train": "x", "seq_len": 4096},
            "run_dir": "x",
            "train": {"max_steps": 2, "global_batch_size": 2},
        }
        cfg = RunConfig.model_validate(tree | {"recompute": "auto", "activation_offloading": "auto"} | changes)
        return search.settled(planning.job_of(model, cfg, Grid(2)), limit)

    roomy, tight = settled(139.0), settled(122.0)
    assert roomy.cfg.recompute == "none" and 30 < roomy.cfg.activation_offloading < 60
    one_less = roomy.cfg.model_copy(update={"activation_offloading": roomy.cfg.activation_offloading - 1})
    limit = 139.0 * (1 - search.SPARE) * memory.GIB
    assert (
        planning.predicted(roomy).needed <= limit < planning.predicted(planning.job_of(model, one_less, Grid(2))).needed
    )
    assert 0 < tight.cfg.recompute < 60 and planning.predicted(tight).pinned > 10 * memory.GIB
    assert settled(1000.0).cfg.activation_offloading == "none"
    assert settled(139.0, activation_offloading="none").cfg.recompute > 40
    assert settled(139.0, recompute="none").cfg == roomy.cfg
    assert settled(139.0, activation_offloading=20).cfg.activation_offloading == 20


CASES: dict[str, dict[str, Any]] = {
    "stage 3": {},
    "stage 3, two blocks a pass": {"train__micro_batch_size": 3},
    "stage 3, one layer of each kind": {"recompute": 1, "activation_offloading": 1},
    "stage 3 by DeepSpeed": {"parallel__base_engine": "deepspeed"},
    "tensor parallel": {"parallel__zero_stage": 0, "parallel__tensor_parallel_size": 2},
    "tensor parallel, sequence parallel": {
        "parallel__zero_stage": 0,
        "parallel__tensor_parallel_size": 2,
        "parallel__sequence_parallel": True,
    },
}


def run_cases(here: World, cases: dict[str, dict[str, Any]]) -> dict[str, Trace]:
    """With no tensor too small to leave."""
    offload.SMALLEST = 1
    return run_as_they_are(here, cases)


@pytest.mark.ranks
def test_losses_and_gradients_equal_one_process(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4)
    rows = write_rows(tmp_path / "rows.jsonl")
    trees = {
        name: config(model, rows, tmp_path / "run", **{"activation_offloading": "all", **changes})
        for name, changes in CASES.items()
    }
    wanted = reference(trees["stage 3"])
    for name, trace in run_ranks(2, "test_offload:run_cases", trees, folder=tmp_path)[0].items():
        try:
            assert_equal(trace, wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.gpu
def test_gradients_are_the_same_bits_on_a_gpu() -> None:
    """Copies beside the computation, memory used again at once: what comes too late or too early would be wrong."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2}
    cfg = run_config(recompute="none", activation_offloading="all")
    ids = torch.arange(2048, device="cuda").view(2, 1024) % 60

    def found(offloading: bool) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = built("llama", 12, cfg, head_dim=128, **sizes)[0].cuda()
        model.config._attn_implementation = "eager"  # flash attention adds in an order that changes
        for name, p in sorted(model.named_parameters()):
            if name.endswith("lora_B"):
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).to(p) * 0.1
        if offloading:
            one = offload.Offloading(torch.device("cuda"), 1 << 16)
            one.attach(recompute.decoder_layers(model), offloaded_layers(cfg, 12))
        seen = []
        for _ in range(4):
            model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        return seen

    for with_host, without in zip(found(True), found(False), strict=True):
        for name, gradient in without.items():
            assert gradient.norm() > 0 and torch.equal(with_host[name], gradient), name
