"""scripts/fp32_losses.py: transformers' own losses in fp32, with one module's weights in memory at a time."""

import math
from pathlib import Path

import fp32_losses
import pytest
import torch
from tiny import tiny_folder
from transformers import AutoModelForCausalLM

from lora_scale.storage.folder import open_folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_losses_are_transformers_and_no_weight_stays(kind: str, tmp_path: Path) -> None:
    """Also for tied embeddings and Conv1D; the checkpoint is bf16."""
    folder = open_folder(tiny_folder(tmp_path / "model", kind))
    rows = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    wanted = [float(whole(input_ids=row[None], labels=row[None]).loss.detach()) for row in rows]
    assert fp32_losses.losses(folder, rows.tolist(), torch.device("cpu")) == pytest.approx(wanted, rel=1e-6)
    model = fp32_losses.streamed(folder, torch.device("cpu"))
    model(input_ids=rows)
    assert all(p.is_meta for p in model.parameters())


def test_the_best_peer_is_what_is_plain() -> None:
    ours = {"name": "a", "who": "lora_scale", "losses": [1.0, 2.002, 7.0]}  # more steps than the reference has
    peers = [{"name": n, "who": "peft", "losses": [1 + e, 2 + e]} for n, e in (("b", 0.001), ("c", -0.004))]
    found = fp32_losses.judged([1.0, 2.0], [ours, *peers])
    assert [one["over_plain"] for one in found] == pytest.approx([math.sqrt(2), 1.0, 4.0])
    assert fp32_losses.table(found).splitlines()[2] == "| a | 1.41e-03 | 1.41 |"
    assert fp32_losses.judged([1.0, 2.0], [ours])[0]["over_plain"] is None
