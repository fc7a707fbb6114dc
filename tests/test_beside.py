"""Several adapters on one base in one process: each learns to the bit what it learns alone, resumes, and is refused by
name where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import tiny_folder
from training import config, write_rows

from lora_scale.parallel.world import World
from lora_scale.spec import together
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, InterruptedRunError
from lora_scale.storage.runlog import read_metrics

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {},
    "whole": {"parallel__zero_stage": 0, "recompute": "all"},
    "zero2": {"parallel__zero_stage": 2, "train__micro_batch_size": 3},
    "tp": {"parallel__zero_stage": 0, "parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True},
}
OTHER = {"lora__r": 2, "lora__use_rslora": True, "seed": 9, "train__max_steps": 5, "train__lr": 1e-2}


class Stop:
    """Asked to stop once so many steps of all runs have begun."""

    in_loop = False

    def __init__(self, after: int):
        self.left = after

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def train(here: World, trees: list[dict[str, Any]], stop_after: int = 10**6) -> bool:
    """A run and those beside it, as `lora-scale train` does it; whether they came to their end."""
    from lora_scale.commands import train as command
    from lora_scale.parallel.pulse import Pulse
    from lora_scale.storage.console import Console

    runs = []
    for tree in trees:
        folder = Path(tree["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.yaml"
        path.write_text(json.dumps(tree))
        runs.append((RunConfig.model_validate(tree), path))
    (cfg, path), *others = runs
    screen = Console(rank=1)  # silent
    asked = command.Asked(0.0, ignore_plan=True, beside=tuple(others))
    log = cfg.run_dir / f"pulse-{here.rank}.txt"
    with Pulse(here.rank, screen, log, 600) as pulse:
        try:
            command.run(cfg, path, here, screen, Stop(stop_after), pulse, "token", asked)  # type: ignore[arg-type]
        except InterruptedRunError:
            return False
    return True


def run_cases(here: World, cases: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """Each alone, both together, and both together with an interruption after three steps of all."""
    ends = {}
    for name, trees in cases.items():
        print(name, flush=True)
        for tree in trees:
            ends[f"{name} alone"] = train(here, [_at(tree, "alone")])
        ends[f"{name} together"] = train(here, [_at(tree, "together") for tree in trees])
        again = [_at(tree, "again") for tree in trees]
        ends[f"{name} interrupted"] = not train(here, again, stop_after=3)
        ends[f"{name} resumed"] = train(here, again)
    return ends


def _at(tree: dict[str, Any], how: str) -> dict[str, Any]:
    return {**tree, "run_dir": f"{tree['run_dir']}-{how}"}


def learned(folder: Path) -> tuple[list[float], list[float], bytes]:
    """Losses and norms by step, and the adapter."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    last = max((folder / "checkpoints").glob("step-*"), key=lambda path: path.name)
    (adapter,) = last.rglob("adapter_model.safetensors")
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], adapter.read_bytes()


@pytest.mark.ranks
def test_each_learns_what_it_learns_alone(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    rows, others = write_rows(tmp_path / "rows.jsonl"), write_rows(tmp_path / "others.jsonl", count=40, seed=5)
    cases = {}
    for name, layout in LAYOUTS.items():
        first = config(model, rows, tmp_path / f"{name}-first", **layout, train__max_steps=4)
        second = config(model, others, tmp_path / f"{name}-second", **{**layout, **OTHER})
        cases[name] = [first, second]
    ends = run_ranks(2, "test_beside:run_cases", cases, folder=tmp_path)
    assert all(ends[0].values()) and ends[0] == ends[1], ends
    for trees in cases.values():
        for tree in trees:
            alone = learned(Path(_at(tree, "alone")["run_dir"]))
            assert len(alone[0]) in (4, 5)
            for how in ("together", "again"):
                found = learned(Path(_at(tree, how)["run_dir"]))
                assert found == alone, f"{tree['run_dir']}, {how}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "bf16"},
            "precision is bf16 in the run of .*b, which trains beside one with fp32; make them equal",
        ),
        ({"lora__target_modules": ["q"]}, r"lora.target_modules is \('q',\) in the run of"),
        ({"parallel__zero_stage": 0}, "parallel is .* make them equal"),
        ({"lora__dropout": 0.1}, "lora.dropout is 0.1, but .*b trains beside another run: only plain factors can"),
        ({"method": "full"}, "method is full, but .*b trains beside another run: only method=lora can; run it alone"),
        ({"run_dir": "a"}, "run_dir is a in both runs; give each its own"),
    ],
)
def test_what_cannot_train_beside_is_refused(changes: dict[str, Any], message: str) -> None:
    first = RunConfig.model_validate(config(Path("m"), Path("rows"), Path("a")))
    place = Path(changes.pop("run_dir", "b"))
    other = RunConfig.model_validate(config(Path("m"), Path("rows"), place, **changes))
    with pytest.raises(ConfigError, match=message):
        together.check_all([first, other])
    together.check_all([first])


def test_stock_zero3_is_refused() -> None:
    trees = [config(Path("m"), Path("rows"), Path(name), parallel__base_engine="deepspeed") for name in ("a", "b")]
    with pytest.raises(ConfigError, match=r"parallel.base_engine is deepspeed, but a trains beside"):
        together.check_all([RunConfig.model_validate(tree) for tree in trees])
