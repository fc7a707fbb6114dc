"""scripts/make_checkpoint.py: what it writes is what transformers loads, and no slice of a tensor repeats another."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_scale.storage.folder import fingerprint, open_folder
from lora_scale.storage.weights import read_safetensors


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_checkpoint", Path(__file__).parent.parent / "scripts/make_checkpoint.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_transformers_loads_it(script: ModuleType, tmp_path: Path, dtype: str) -> None:
    script.main(["tiny", str(tmp_path), "--layers", "2", "--dtype", dtype, "--files", "3", "--jobs", "1"])
    folder = open_folder(tmp_path)
    assert len(folder.files) == 3
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert str(model.dtype) == f"torch.{script.TORCH_NAMES[dtype]}"
    for name, parameter in model.named_parameters():
        values = parameter.detach().float()
        if values.ndim == 1:
            assert values.min() >= 1 and values.max() < 1.125 and values.unique().numel() > 8
        else:
            assert values.abs().min() >= 2**-9 and values.abs().max() < 2**-5, name
            assert 0.01 < values.std() < 0.02 and abs(values.mean()) < 0.001
            rows = values.view(torch.int32)
            assert rows.unique(dim=0).shape == rows.shape, name  # no two rows and, below, no two columns are equal
            assert rows.unique(dim=1).shape == rows.shape, name
    assert model(torch.arange(16)[None]).logits.isfinite().all()


def test_files_do_not_change_the_values(script: ModuleType, tmp_path: Path) -> None:
    arguments = ["--layers", "1", "--jobs", "1", "--files"]
    script.main(["tiny", str(tmp_path / "one"), *arguments, "1"])
    script.main(["tiny", str(tmp_path / "four"), *arguments, "4"])
    one, four = open_folder(tmp_path / "one"), open_folder(tmp_path / "four")
    assert [file.name for file in one.files] == ["model.safetensors"]
    assert len(four.files) == 4
    for name, entry in one.tensors.items():
        other = four.tensors[name]
        first = Path(entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert first == Path(other.file).read_bytes()[other.offset : other.offset + other.nbytes], name
    script.main(["tiny", str(tmp_path / "again"), *arguments, "4"])
    assert fingerprint(open_folder(tmp_path / "again")) == fingerprint(four)


@pytest.mark.parametrize("preset, billions", [("8b", 7.2), ("30b", 32.5), ("100b", 100.7)])
def test_presets_have_the_sizes_of_the_records(script: ModuleType, preset: str, billions: float) -> None:
    """llama-7.2b, llama-32.5b and llama-100.7b, held to a meta model of transformers' own."""
    from transformers import AutoConfig

    n_layers = script.PRESETS[preset][2]
    settings = script.config(preset, n_layers, "BF16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert script.parameters(preset, n_layers) == wanted
    assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e9, 1) == billions


@pytest.mark.parametrize("n_files", [1, 2, 3, 7, 21])
def test_files_are_of_about_equal_size(script: ModuleType, n_files: int) -> None:
    shapes = script.parameters("tiny", 2)
    groups = script.split(shapes, n_files)
    assert len(groups) == n_files and all(groups)
    assert {name: shape for group in groups for name, shape in group.items()} == shapes


def test_writing_twice_replaces(script: ModuleType, tmp_path: Path) -> None:
    for layers in ("1", "2"):
        script.main(["tiny", str(tmp_path), "--layers", layers, "--files", "2", "--jobs", "1"])
    assert "model.layers.1.mlp.up_proj.weight" in read_safetensors(open_folder(tmp_path).files[1])[0]


def test_what_is_not_chosen_is_a_hole(script: ModuleType, tmp_path: Path) -> None:
    """The same headers, the same bytes of the chosen tensors, zeros elsewhere, which take no room."""
    arguments = ["1b", "--layers", "1", "--jobs", "1", "--files", "2"]
    script.main([*arguments, str(tmp_path / "whole")])
    script.main([*arguments, str(tmp_path / "holes"), "--only", "q_proj", "v_proj"])
    whole, holes = open_folder(tmp_path / "whole"), open_folder(tmp_path / "holes")
    assert holes.tensors.keys() == whole.tensors.keys()
    for name, entry in holes.tensors.items():
        other = whole.tensors[name]
        assert (entry.offset, entry.nbytes, entry.shape) == (other.offset, other.nbytes, other.shape)
        found = Path(entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            assert found == Path(other.file).read_bytes()[other.offset : other.offset + other.nbytes], name
        else:
            assert not any(found), name
    sizes = [file.stat() for file in holes.files]
    assert sum(s.st_size for s in sizes) == sum(file.stat().st_size for file in whole.files)
    chosen = sum(e.nbytes for n, e in holes.tensors.items() if n.endswith(("q_proj.weight", "v_proj.weight")))
    assert sum(512 * s.st_blocks for s in sizes) < chosen + (1 << 20)
