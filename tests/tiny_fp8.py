"""A tiny model's folder with its linear layers in fp8 blocks, and such a folder dequantised the plain way."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder
from torch import Tensor

BLOCK = 128
CUT = {"hidden_size": 160, "intermediate_size": 200}  # no size is a multiple of 128, some are less than it
WHOLE = {"hidden_size": 256, "intermediate_size": 384}


def quantised(weight: Tensor, scales: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp8 elements, and the scale of each block: of odd values, as a quantiser's are."""
    rows, columns = (-(-n // BLOCK) for n in weight.shape)
    factors = torch.empty(rows, columns)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            here = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            factors[i, j] = (weight[here].float().abs().max() / 448).to(scales).float()
            stored[here] = (weight[here].float() / factors[i, j]).to(torch.float8_e4m3fn)
    return stored, factors.to(scales)


def plain(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference, block after block: fp8 as fp32, times the scale in fp32, then rounded to `dtype`."""
    result = torch.empty(stored.shape, dtype=dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            result[here] = (stored[here].to(torch.float32) * scales[i, j].to(torch.float32)).to(dtype)
    return result


def fp8_folder(folder: Path, model_type: str = "llama", scales: torch.dtype = torch.float32, **config: Any) -> Path:
    """As `tiny_folder`, its decoder layers' linear weights in fp8 with `weight_scale_inv` beside them."""
    tiny_folder(folder, model_type, **config)
    for file in folder.glob("*.safetensors"):
        tensors = {}
        for name, weight in load_file(file).items():
            tensors[name] = weight
            if name.endswith("proj.weight"):
                tensors[name], tensors[f"{name}_scale_inv"] = quantised(weight, scales)
        save_file(tensors, file, {"format": "pt"})
    write_index(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def dequantised_folder(fp8: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The same base without blocks, every tensor of `dtype`."""
    shutil.copytree(fp8, folder)
    stored = read(fp8)
    for file in folder.glob("*.safetensors"):
        kept = [name for name in load_file(file) if not name.endswith("_scale_inv")]
        save_file({name: value(stored, name, dtype) for name in kept}, file, {"format": "pt"})
    write_index(folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def value(stored: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """What a tensor of the folder stands for, by the reference."""
    scales = stored.get(f"{name}_scale_inv")
    return stored[name].to(dtype) if scales is None else plain(stored[name], scales, dtype)


def write_index(folder: Path) -> None:
    places = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
