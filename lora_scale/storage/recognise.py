"""Folders that look like a base model and are not one we read: each is named, with the way out.

Knows what other tools leave in a folder; opens nothing but small JSON files.
"""

import json
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, NoReturn

from lora_scale.spec.errors import ModelError
from lora_scale.spec.families import family
from lora_scale.storage import blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_QUANTISED = {  # quant_method: (what it is, the way out)
    "fp8": ("fp8 without weight_block_size", "its bf16 release"),
    "gptq": ("GPTQ integers", "the checkpoint it was quantised from"),
    "awq": ("AWQ integers", "the checkpoint it was quantised from"),
    "mxfp4": ("4-bit blocks with shared exponents", "a bf16 copy: from_pretrained with Mxfp4Config(dequantize=True)"),
    "bitsandbytes": ("bitsandbytes integers", "the checkpoint it was quantised from, or save model.dequantize()"),
    "compressed-tensors": ("compressed tensors", "the checkpoint it was quantised from"),
}


def refuse_file(path: Path) -> NoReturn:
    """`path` is a file, where a folder is expected."""
    if path.suffix == ".gguf":
        raise ModelError(f"{path} is a GGUF file; use the folder of the model's safetensors files")
    raise ModelError(f"{path} is a file; give the folder that holds config.json and the safetensors files")


def refuse_without_config(path: Path, names: Set[str]) -> NoReturn:
    """A folder without config.json."""
    if not names:
        raise ModelError(f"{path} is empty; a base model is a folder with config.json and safetensors files")
    refuse_adapter(path, names)
    if "model_index.json" in names:
        raise ModelError(f"{path} is a diffusers pipeline, not a language model")
    if {"refs", "snapshots"} <= names:
        raise ModelError(f"{path} is a repository in the hub's cache; give the folder {path}/snapshots/<commit> in it")
    if any(name.endswith(".gguf") for name in names):
        raise ModelError(f"{path} holds GGUF files; download the model's safetensors files and config.json")
    if "params.json" in names:
        raise ModelError(f"{path} is in its maker's own form (params.json); download the model in Hugging Face form")
    raise ModelError(f"{path} has no config.json; a base model is a folder with config.json and safetensors files")


def refuse_adapter(path: Path, names: Set[str]) -> None:
    """A PEFT adapter, or a checkpoint of ours, given as the base; a folder that also has a model's weights passes."""
    if "adapter_config.json" in names and not names & {INDEX, SINGLE}:
        raise ModelError(f"{path} is an adapter, not a base model; {_base_of(path)}")


def _base_of(path: Path) -> str:
    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return f"its base is {base}" if base else "give the model that it was trained on"


def refuse_quantised(path: Path, config: dict[str, Any], names: Set[str]) -> None:
    """A quantised base, by the config of transformers or by the file that another tool leaves; fp8 in blocks passes."""
    found = blocks.quantisation(config)
    if found and blocks.block_size(config) is None:
        keys = found if isinstance(found, dict) else {}
        old = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(keys) else "an unnamed method"
        method = str(keys.get("quant_method") or old)
        what, way_out = _QUANTISED.get(method, ("not plain weights", "the checkpoint it was quantised from"))
        raise ModelError(f"{path} is quantised with {method} ({what}), which is not read yet; use {way_out}")
    for name in sorted({"hf_quant_config.json", "quantize_config.json"} & names):
        raise ModelError(f"{path} is quantised ({name}), which is not read yet; use the checkpoint it was made from")


def refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    """A model whose Python code comes with it. One that transformers also has (phi3, falcon) passes and uses that."""
    model_type = config.get("model_type")
    if "auto_map" not in config or family(str(model_type)):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # slow, and hardly ever needed

    if model_type not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{path} needs Python code that comes with it (auto_map in config.json, model_type {model_type!r}); "
            f"read that code, then set model.trust_remote_code=true"
        )


def refuse_without_weights(path: Path, names: Set[str]) -> NoReturn:
    """A folder with config.json and neither an index nor one model.safetensors."""
    refuse_adapter(path, names)
    safetensors = sorted(name for name in names if name.endswith(".safetensors"))
    shards = [name for name in safetensors if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if shards:
        raise ModelError(f"{path} holds {shards[0]} but no {INDEX}; download that file too")
    if safetensors:
        raise ModelError(
            f"{path} holds {safetensors[0]} but no {SINGLE} and no {INDEX}; download the model's own files"
        )
    if pickles:
        raise ModelError(
            f"{path} holds its weights as pickles ({pickles[0]}), which can run code when read; convert them once with "
            f"transformers: AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_FOLDER)"
        )
    for suffix, what in ((".gguf", "GGUF"), (".h5", "TensorFlow"), (".msgpack", "Flax"), (".onnx", "ONNX")):
        if any(name.endswith(suffix) for name in names):
            raise ModelError(f"{path} holds {what} weights only; download the model's safetensors files")
    raise ModelError(f"{path} has a config.json but no safetensors files; the download may be incomplete")
