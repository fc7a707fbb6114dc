"""Adapters to and fro between this program, PEFT and plain transformers: a table of largest logit differences.

    python tests/interop.py                 the tiny families, and SmolLM2 where models/ has it
    python tests/interop.py llama gpt2      these only

Nothing stands in: adapters are trained by `lora-scale`'s own set-up and loop or by PEFT and torch, written by `export`
and `merge` as a user calls them, and read by the other side. All in fp32, so that a difference is a mistake.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from tiny import tiny_folder  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import config, start, train, write_rows  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

from lora_scale import cli  # noqa: E402
from lora_scale.parallel import checkpoint, world  # noqa: E402
from lora_scale.parallel.setup import Job  # noqa: E402
from lora_scale.parallel.world import World  # noqa: E402
from lora_scale.spec.families import family  # noqa: E402
from lora_scale.spec.servers import SERVERS  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "falcon")
SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"
STEPS = 3
TOLERANCE = 1e-5  # of the largest logit (of 1 at least), as `export` has it


@dataclass(frozen=True)
class Row:
    """Largest absolute differences of logits; `moved` is what the adapters do to the base's, at least."""

    base: str
    to_peft: float
    merged: float
    from_peft: float
    continued: float
    moved: float
    logit: float
    seconds: float
    served: str

    @property
    def equal(self) -> bool:
        worst = max(self.to_peft, self.merged, self.from_peft, self.continued)
        return worst <= TOLERANCE * max(1.0, self.logit) and self.moved > 1e-2


def base_of(name: str, folder: Path) -> Path:
    """An fp32 folder, so that merging rounds nothing away."""
    if name != "smollm2":
        return tiny_folder(folder / name, name, dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).save_pretrained(folder / name)
    for file in SMOLLM2.glob("*token*.json"):
        shutil.copy(file, folder / name)
    return folder / name


def run_of(base: Path, rows: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """A config of a tiny run that every family can do."""
    kind = plain(base).config.model_type
    row = family(kind)
    assert row is not None
    tree = config(base, rows, run, lora__target_modules=["all-linear"], train__max_steps=STEPS, data__packing=row.packs)
    tree["model"]["attention"] = "eager"  # Gemma 2 has no other
    for dotted, value in changes.items():
        tree[dotted] = value
    return tree


def plain(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=ids, use_cache=False).logits


def command(*arguments: object) -> None:
    """`lora-scale ...`, quietly: `merge` writes past Python's stdout."""
    sys.stdout.flush()
    screen, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with contextlib.suppress(SystemExit):
            cli.main([str(argument) for argument in arguments])
    finally:
        sys.stdout.flush()
        os.dup2(screen, 1)
        os.close(screen)
        os.close(nowhere)


def trained(job: Job, folder: Path, ids: Tensor, steps: int = STEPS) -> tuple[Path, Tensor]:
    """Train, save a checkpoint and export it: the folder, and the live model's logits at the end."""
    if steps:
        train(job, steps=steps)
    ours = logits(job.engine.ds, ids).clone()
    path = checkpoint.save(job.engine, job.state(steps, 0), folder, job.write_adapter_config, job.key)
    job.engine.ds.destroy()
    command("export", path, "--base", job.folder.path, "--out", folder / "export", "--no-verify")
    return folder / "export", ours


def train_with_peft(base: Path, out: Path, ids: Tensor) -> Tensor:
    """A few steps of PEFT and AdamW on random tokens, saved by PEFT; its logits."""
    torch.manual_seed(7)
    model = get_peft_model(plain(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return logits(model, ids)


def measure(here: World, name: str, place: Path) -> Row:
    begin = time.perf_counter()
    ids = torch.arange(2 * 16).view(2, 16) * 7 % 93 + 3
    base, rows = base_of(name, place), write_rows(place / "rows.jsonl")
    before = logits(plain(base), ids)

    exported, ours = trained(start(here, run_of(base, rows, place / "run")), place / "run", ids)
    theirs = logits(PeftModel.from_pretrained(plain(base), exported), ids)
    command("merge", exported, "--base", base, "--out", place / "merged")
    merged = logits(plain(place / "merged"), ids)

    peft_logits = train_with_peft(base, place / "peft", ids)
    tree = run_of(base, rows, place / "on", init_adapter=str(place / "peft"))
    job = start(here, tree)
    taken = logits(job.engine.ds, ids).clone()
    job.engine.ds.train()
    again, continued = trained(job, place / "on", ids)
    back = logits(PeftModel.from_pretrained(plain(base), again), ids)

    def off(one: Tensor, other: Tensor) -> float:
        return (one - other).abs().max().item()

    return Row(
        base=name,
        to_peft=off(ours, theirs),
        merged=off(theirs, merged),
        from_peft=off(peft_logits, taken),
        continued=off(continued, back),
        moved=min(off(ours, before), off(taken, before), off(continued, taken)),
        logit=max(t.abs().max().item() for t in (ours, theirs, continued)),
        seconds=time.perf_counter() - begin,
        served=", ".join(server for server in SERVERS if _serves(server, exported, base)),
    )


def _serves(server: str, exported: Path, base: Path) -> bool:
    """By the rules that `export` goes by; no server runs here."""
    from lora_scale.adapters.peft import read_adapter

    adapter = read_adapter(exported)
    kind = plain(base).config.model_type
    return not SERVERS[server].reasons(adapter.config, adapter.modules, adapter.max_rank, kind)


def matrix(names: list[str]) -> list[Row]:
    here = world.start(world.from_environment(), timeout_minutes=5.0)
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries say about each other
            rows.append(measure(here, name, Path(place)))
        row = rows[-1]
        cells = (row.to_peft, row.merged, row.from_peft, row.continued)
        print(f"| {name} | " + " | ".join(f"{cell:.1e}" for cell in cells), end="")
        print(f" | {row.moved:.1e} | {row.logit:.1f} | {row.served or 'none'} | {row.seconds:.0f} |", flush=True)
    world.stop()
    return rows


def main() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    names = sys.argv[1:] or [*FAMILIES, *(["smollm2"] if SMOLLM2.is_dir() else [])]
    print("Largest differences of logits, fp32; moved: what the adapter or the training changes, at least.\n")
    head = ("base", "ours -> PEFT", "merged -> plain", "PEFT -> ours", "PEFT -> ours -> PEFT", "moved", "largest logit")
    print(f"| {' | '.join(head)} | served by (rules) | s |\n|---|--:|--:|--:|--:|--:|--:|---|--:|")
    wrong = [row.base for row in matrix(names) if not row.equal]
    sys.exit(f"not equal: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
