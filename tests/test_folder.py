"""storage.folder: whole folders are read as transformers reads them, and every wrong one is named, with the way out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_folder
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from lora_scale.spec.errors import ModelError
from lora_scale.spec.layout import TensorEntry
from lora_scale.storage.folder import fingerprint, open_folder, sources, unused
from lora_scale.storage.weights import Reader, read_safetensors, write_safetensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 4888\n"


def write_model(folder: Path, dtype: str = "F32") -> Path:
    """A folder that `open_folder` accepts: three tensors in two files, and an index. Small enough to damage by hand."""
    folder.mkdir(exist_ok=True)
    size = {"F32": 4, "I8": 1}[dtype]
    edit(folder / "config.json", lambda _: {"model_type": "llama"})
    write_safetensors(
        folder / FIRST,
        [("model.embed_tokens.weight", dtype, (600, 2)), ("model.norm.weight", dtype, (2,))],
        [os.urandom(1200 * size), bytes(2 * size)],
    )
    write_safetensors(folder / SECOND, [("lm_head.weight", dtype, (600, 2))], [os.urandom(1200 * size)])
    files = {"model.embed_tokens.weight": FIRST, "model.norm.weight": FIRST, "lm_head.weight": SECOND}
    edit(folder / INDEX, lambda _: {"weight_map": files})
    return folder


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()) if path.exists() else None)))


def map_to(name: str, file: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / INDEX, lambda index: {"weight_map": {**index["weight_map"], name: file}})


def quantise(**config: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda c: {**c, "quantization_config": config})


def keep_only(*names: str) -> Callable[[Path], None]:
    """Deletes all but config.json and makes empty files of these names."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name != "config.json":
                path.unlink()
        for name in names:
            (folder / name).write_bytes(b"\0" * 16)

    return change


def without_config(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        keep_only(*names)(folder)
        (folder / "config.json").unlink()

    return change


def truncate(file: str, nbytes: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - nbytes)


def adapter(folder: Path) -> None:
    without_config("adapter_model.safetensors")(folder)
    edit(folder / "adapter_config.json", lambda _: {"base_model_name_or_path": "org/base"})


def hub_cache(folder: Path) -> None:
    shutil.rmtree(folder)
    for name in ("refs", "snapshots", "blobs"):
        (folder / name).mkdir(parents=True)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def linked_subfolder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "sub").symlink_to("../elsewhere")
    (folder / SECOND).rename(folder.parent / "elsewhere" / "w.safetensors")
    map_to("lm_head.weight", "sub/w.safetensors")(folder)


def second_copy(folder: Path) -> None:
    """norm.weight in both files, though the index names it once."""
    (folder / SECOND).unlink()
    specs = [("lm_head.weight", "F32", (600, 2)), ("model.norm.weight", "F32", (2,))]
    write_safetensors(folder / SECOND, specs, [bytes(4800), bytes(8)])


def remote_code(folder: Path) -> None:
    edit(folder / "config.json", lambda _: {"model_type": "mymodel", "auto_map": {"AutoConfig": "my.MyConfig"}})


def int8_weights(folder: Path) -> None:
    shutil.rmtree(folder)
    write_model(folder, "I8")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "{} does not exist"),
    "a file": (a_file, "{} is a file; give the folder that holds config.json and the safetensors files"),
    "empty": (
        without_config(),
        "{} is empty; a base model is a folder with config.json and safetensors files",
    ),
    "no config.json": (
        without_config("tokenizer.json"),
        "{} has no config.json; a base model is a folder with config.json and safetensors files",
    ),
    "config.json cut": (
        write("config.json", '{"model_type": '),
        "{}/config.json is not valid JSON (Expecting value: line 1 column 16 (char 15)); download it again",
    ),
    "config.json a list": (
        write("config.json", "[1]"),
        "{}/config.json does not hold a JSON object; download it again",
    ),
    "adapter": (adapter, "{} is an adapter, not a base model; its base is org/base"),
    "adapter of nobody": (
        without_config("adapter_config.json"),
        "{} is an adapter, not a base model; give the model that it was trained on",
    ),
    "hub cache": (
        hub_cache,
        "{} is a repository in the hub's cache; give the folder {}/snapshots/<commit> in it",
    ),
    "diffusers": (without_config("model_index.json"), "{} is a diffusers pipeline, not a language model"),
    "Meta's form": (
        without_config("params.json", "consolidated.00.pth"),
        "{} is in its maker's own form (params.json); download the model in Hugging Face form",
    ),
    "GGUF without config": (
        without_config("model-Q4_K_M.gguf"),
        "{} holds GGUF files; download the model's safetensors files and config.json",
    ),
    "GGUF": (keep_only("model-Q4_K_M.gguf"), "{} holds GGUF weights only; download the model's safetensors files"),
    "pickles": (
        keep_only("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        "{} holds its weights as pickles (pytorch_model-00001-of-00002.bin), which can run code when read; convert "
        "them once with transformers: AutoModelForCausalLM.from_pretrained('{}').save_pretrained(NEW_FOLDER)",
    ),
    "TensorFlow": (
        keep_only("tf_model.h5"),
        "{} holds TensorFlow weights only; download the model's safetensors files",
    ),
    "no weights": (keep_only(), "{} has a config.json but no safetensors files; the download may be incomplete"),
    "no index": (
        lambda folder: (folder / INDEX).unlink(),
        f"{{}} holds {FIRST} but no {INDEX}; download that file too",
    ),
    "another name": (
        keep_only("consolidated.safetensors"),
        f"{{}} holds consolidated.safetensors but no model.safetensors and no {INDEX}; download the model's own files",
    ),
    "two sets of weights": (
        lambda folder: shutil.copy(folder / FIRST, folder / "model.safetensors") and None,
        "{} holds both model.safetensors and an index of other files; remove the one that is out of date",
    ),
    "git-LFS pointer": (
        write(SECOND, LFS),
        f"{{}}/{SECOND} is a git-LFS pointer, not the weights; run `git lfs pull` in its folder",
    ),
    "index without map": (
        write(INDEX, '{"metadata": {}}'),
        f"{{}}/{INDEX} has no weight_map of tensor names to file names; download it again",
    ),
    "index that goes up": (
        map_to("lm_head.weight", "../other/model.safetensors"),
        f"{{}}/{INDEX} names '../other/model.safetensors', which is outside its folder; do not use this model",
    ),
    "index with an absolute path": (
        map_to("lm_head.weight", "/etc/passwd"),
        f"{{}}/{INDEX} names '/etc/passwd', which is outside its folder; do not use this model",
    ),
    "index through a linked folder": (
        linked_subfolder,
        f"{{}}/{INDEX} names 'sub/w.safetensors', which is outside its folder; do not use this model",
    ),
    "index with a NUL": (
        map_to("lm_head.weight", "a\0b"),
        f"{{}}/{INDEX} names 'a\\x00b', which is outside its folder; do not use this model",
    ),
    "a file missing": (
        lambda folder: (folder / SECOND).unlink(),
        f"{{}} lacks {SECOND} of the 2 files of its index; download it again",
    ),
    "tensor not in its file": (
        map_to("model.layers.0.mlp.up_proj.weight", SECOND),
        f"{{}}/{SECOND}: lacks model.layers.0.mlp.up_proj.weight, which the index puts there; "
        "download the folder again",
    ),
    "tensor not in the index": (
        lambda folder: edit(folder / INDEX, lambda i: i["weight_map"].pop("model.norm.weight") and i),
        f"{{}}/{FIRST}: holds model.norm.weight, which the index does not name; download the folder again",
    ),
    "tensor in two files": (
        second_copy,
        f"{{}}/{SECOND}: tensor 'model.norm.weight' is also in {FIRST}; download the folder again",
    ),
    "a file cut": (
        truncate(SECOND, 100),
        f"{{}}/{SECOND}: is truncated: its header describes 4888 bytes, the file has 4788; copy or download it again",
    ),
    "remote code": (
        remote_code,
        "{} needs Python code that comes with it (auto_map in config.json, model_type 'mymodel'); "
        "read that code, then set model.trust_remote_code=true",
    ),
    "fp8": (
        quantise(quant_method="fp8"),
        "{} is quantised with fp8 (fp8 without weight_block_size), which is not read yet; use its bf16 release",
    ),
    "gptq": (
        quantise(quant_method="gptq", bits=4),
        "{} is quantised with gptq (GPTQ integers), which is not read yet; use the checkpoint it was quantised from",
    ),
    "awq": (
        quantise(quant_method="awq", bits=4),
        "{} is quantised with awq (AWQ integers), which is not read yet; use the checkpoint it was quantised from",
    ),
    "mxfp4": (
        quantise(quant_method="mxfp4"),
        "{} is quantised with mxfp4 (4-bit blocks with shared exponents), which is not read yet; use a bf16 copy: "
        "from_pretrained with Mxfp4Config(dequantize=True)",
    ),
    "bitsandbytes of old": (
        quantise(load_in_4bit=True),
        "{} is quantised with bitsandbytes (bitsandbytes integers), which is not read yet; use the checkpoint it was "
        "quantised from, or save model.dequantize()",
    ),
    "a new method": (
        quantise(quant_method="sinq"),
        "{} is quantised with sinq (not plain weights), which is not read yet; use the checkpoint it was quantised "
        "from",
    ),
    "modelopt": (
        write("hf_quant_config.json", "{}"),
        "{} is quantised (hf_quant_config.json), which is not read yet; use the checkpoint it was made from",
    ),
    "int8 weights": (
        int8_weights,
        f"{{}}/{FIRST}: model.embed_tokens.weight is I8; use a checkpoint in bf16, fp16 or fp32",
    ),
}


@pytest.mark.parametrize("damage, message", WRONG.values(), ids=WRONG)
def test_wrong_folders(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_model(tmp_path / "base")
    open_folder(folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        open_folder(folder)
    assert str(caught.value) == message.replace("{}", str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("secret", ["", "config.json", INDEX, SECOND])
def test_forbidden_files_are_named(tmp_path: Path, secret: str) -> None:
    folder = write_model(tmp_path / "base")
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):  # one level more under pytest-xdist
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    (folder / secret).chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # nobody: permissions do not bind root
        with pytest.raises(ModelError, match=rf"^{folder / secret}: cannot be read: Permission denied$"):
            open_folder(folder)
    finally:
        if root:
            os.seteuid(0)
        (folder / secret).chmod(0o755)


def test_remote_code_is_used_only_where_it_is_needed(tmp_path: Path) -> None:
    """A model type that transformers has itself needs no code of the folder's; another one needs the user's word."""
    folder = write_model(tmp_path / "base")
    for model_type in ("phi3", "olmo2"):  # one with a row in `families`, one without
        edit(folder / "config.json", lambda _, t=model_type: {"model_type": t, "auto_map": {"AutoConfig": "c.C"}})
        assert open_folder(folder).config["model_type"] == model_type
    remote_code(folder)
    assert open_folder(folder, trust_remote_code=True).config["model_type"] == "mymodel"


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """Every file of a snapshot is a link to ../../blobs; the index and the files are inside all the same."""
    model = write_model(tmp_path / "plain")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for path in model.iterdir():
        shutil.copy(path, snapshot.parents[1] / "blobs" / path.name.encode().hex())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name.encode().hex()}")
    linked, plain = open_folder(snapshot), open_folder(model)
    assert [file.name for file in linked.files] == [FIRST, SECOND]
    assert fingerprint(linked) == fingerprint(plain)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    (folder / FIRST).rename(folder / "model.safetensors")
    (folder / SECOND).unlink()
    (folder / INDEX).unlink()
    found = open_folder(str(folder))
    assert found.files == (folder / "model.safetensors",)
    assert (found.nbytes, len(found.tensors)) == (4808, 2)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """4 MB of weights in two files: opening and the fingerprint stay under 20 kB, each header read once."""
    folder = tmp_path / "base"
    folder.mkdir()
    edit(folder / "config.json", lambda _: {"model_type": "llama"})
    names = {"a.weight": FIRST, "b.weight": SECOND}
    edit(folder / INDEX, lambda _: {"weight_map": names})
    for name, file in names.items():
        write_safetensors(folder / file, [(name, "F32", (500, 1000))], [bytes(2_000_000)])
    before = _rchar()
    found = open_folder(folder)
    opened = _rchar()
    fingerprint(found)
    assert found.nbytes == 4_000_000
    small = sum(len((folder / name).read_bytes()) for name in ("config.json", INDEX))
    assert opened - before < small + 2 * 200 + 500  # 500: reading the count itself
    assert 2 * 512 <= _rchar() - opened < 4000


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_fingerprint_survives_a_moved_folder(tmp_path: Path) -> None:
    before = fingerprint(open_folder(write_model(tmp_path / "base")))
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert fingerprint(open_folder(tmp_path / "moved")) == before
    assert before.startswith("sha256:") and len(before) == 7 + 64


@pytest.mark.parametrize("change", ["a weight", "a norm", "the dtype", "a shape", "a name", "the order"])
def test_fingerprint_sees(tmp_path: Path, change: str) -> None:
    folder = write_model(tmp_path / "base")
    before = fingerprint(open_folder(folder))
    content = (folder / FIRST).read_bytes()
    start = read_safetensors(folder / FIRST)[0]["model.embed_tokens.weight"].offset
    embed, norm = content[start : start + 4800], content[start + 4800 :]
    specs = [("model.embed_tokens.weight", "F32", (600, 2)), ("model.norm.weight", "F32", (2,))]
    if change == "a weight":
        embed = embed[:2400] + bytes([embed[2400] ^ 1]) + embed[2401:]
    if change == "a norm":
        norm = b"\1" + norm[1:]
    if change == "the dtype":
        specs = [("model.embed_tokens.weight", "F32", (600, 2)), ("model.norm.weight", "F16", (4,))]
    if change == "a shape":
        specs[0] = ("model.embed_tokens.weight", "F32", (2, 600))
    if change == "a name":
        specs[1] = ("model.morn.weight", "F32", (2,))
        map_to("model.morn.weight", FIRST)(folder)
        edit(folder / INDEX, lambda i: i["weight_map"].pop("model.norm.weight") and i)
    (folder / FIRST).unlink()
    pairs = list(zip(specs, (embed, norm), strict=True))[:: -1 if change == "the order" else 1]
    write_safetensors(folder / FIRST, [spec for spec, _ in pairs], [data for _, data in pairs])
    assert fingerprint(open_folder(folder)) != before


def test_fingerprint_does_not_see_outside_its_samples(tmp_path: Path) -> None:
    """Said in its docstring; here so that nobody takes it for a check of damage."""
    folder = write_model(tmp_path / "base")
    before = fingerprint(open_folder(folder))
    with open(folder / FIRST, "r+b") as file:
        file.seek(read_safetensors(folder / FIRST)[0]["model.embed_tokens.weight"].offset)
        file.write(b"\xff\xff")
    assert fingerprint(open_folder(folder)) == before


# Which file tensors make a parameter

DENSE = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "falcon", "bloom", "opt", "gpt_neox"]


def read(entries: list[TensorEntry]) -> bytes:
    with Reader() as reader:
        parts = []
        for entry in entries:
            parts.append(bytearray(entry.nbytes))
            reader.read_into(entry.whole(), parts[-1])
    return b"".join(parts)


@pytest.mark.parametrize("model_type", [*DENSE, "qwen3_moe", "mixtral"])
def test_every_parameter_is_what_from_pretrained_loads(tmp_path: Path, model_type: str) -> None:
    """The bytes of the sources, end to end, are what transformers' own loader gives; and no tensor is left over."""
    tiny_folder(tmp_path, model_type, torch.float32, files=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    folder, used = open_folder(tmp_path), []
    tied = dict(model.all_tied_weights_keys)
    for name, parameter in model.named_parameters():
        found = sources(folder, name, tuple(parameter.shape), model.base_model_prefix, tied)
        assert read(found) == parameter.detach().contiguous().numpy().tobytes(), name
        used += found
    assert unused(folder, used, tied) == []


@pytest.mark.parametrize("model_type, prefix", [("llama", "model"), ("gpt2", "transformer")])
def test_prefix_of_the_base_model(tmp_path: Path, model_type: str, prefix: str) -> None:
    """A checkpoint saved from the base model has no prefix (as GPT-2 on the hub); one with it fits a bare base too."""
    causal = AutoModelForCausalLM.from_config(tiny_config(model_type, tie_word_embeddings=True))
    causal.base_model.save_pretrained(tmp_path / "bare")
    causal.save_pretrained(tmp_path / "causal")
    bare, full = open_folder(tmp_path / "bare"), open_folder(tmp_path / "causal")
    assert not any(name.startswith(prefix + ".") for name in bare.tensors)
    tied = dict(causal.all_tied_weights_keys)
    for name, parameter in causal.named_parameters():
        want = parameter.detach().contiguous().numpy().tobytes()
        assert read(sources(bare, name, tuple(parameter.shape), prefix, tied)) == want
        assert read(sources(full, name.removeprefix(prefix + "."), tuple(parameter.shape), prefix, tied)) == want


def test_tied_embeddings_are_found_under_either_name(tmp_path: Path) -> None:
    """A file may hold the one or the other; where it holds both, each parameter gets its own."""
    folder = write_model(tmp_path / "base")
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    both = open_folder(folder)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert [entry.name for entry in sources(both, name, (600, 2), "model", tied)] == [name]
    (folder / SECOND).unlink()
    edit(folder / INDEX, lambda i: i["weight_map"].pop("lm_head.weight") and i)
    (found,) = sources(open_folder(folder), "lm_head.weight", (600, 2), "model", tied)
    assert found.name == "model.embed_tokens.weight"
    (folder / FIRST).unlink()
    write_safetensors(folder / FIRST, [("lm_head.weight", "F32", (600, 2))], [bytes(4800)])
    edit(folder / INDEX, lambda _: {"weight_map": {"lm_head.weight": FIRST}})
    (found,) = sources(open_folder(folder), "model.embed_tokens.weight", (600, 2), "model", tied)
    assert found.name == "lm_head.weight"


def test_a_missing_tensor_is_named_with_its_neighbours(tmp_path: Path) -> None:
    folder = open_folder(write_model(tmp_path))
    with pytest.raises(ModelError) as caught:
        sources(folder, "model.norms.weight", (2,), "model")
    assert str(caught.value) == (
        f"{tmp_path} has no tensor for model.norms.weight, which the model of config.json needs; "
        f"nearest: model.norm.weight, model.embed_tokens.weight"
    )


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = open_folder(write_model(tmp_path))
    with pytest.raises(ModelError) as caught:
        sources(folder, "lm_head.weight", (512, 2), "model")
    assert str(caught.value) == (
        f"{tmp_path / SECOND}: lm_head.weight has shape (600, 2), but the model of config.json needs (512, 2) for "
        f"lm_head.weight; config.json belongs to another model"
    )


def test_wrong_experts_are_named(tmp_path: Path) -> None:
    tiny_folder(tmp_path, "mixtral", torch.float32, files=2, intermediate_size=48)
    folder = open_folder(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert len(sources(folder, name, (4, 96, 32), "model")) == 8
    for shape in ((4, 90, 32), (4, 96, 30), (3, 96, 30)):
        with pytest.raises(
            ModelError, match=r"w1.weight has shape [68] x \(48, 32\), but .* needs \(\d, 9\d, 3\d\) for"
        ):
            sources(folder, name, shape, "model")
    with pytest.raises(ModelError, match=f"has no tensor for {name}"):  # a fifth expert
        sources(folder, name, (5, 96, 32), "model")


def test_integer_tensors_make_no_parameter(tmp_path: Path) -> None:
    """An integer buffer in a file is harmless until a parameter wants it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    specs = [("ids", "I64", (4,)), ("w.weight", "F32", (2,))]
    write_safetensors(tmp_path / "model.safetensors", specs, [bytes(32), bytes(8)])
    folder = open_folder(tmp_path)
    with pytest.raises(ModelError, match="ids is I64; use a checkpoint in bf16, fp16 or fp32"):
        sources(folder, "ids", (4,))


def test_unused_tensors_are_listed_without_the_harmless_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    names = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "model.vision.weight",
        "lm_head.weight",
        "model.norm.weight",
    ]
    write_safetensors(tmp_path / "model.safetensors", [(name, "F32", (1,)) for name in names], [bytes(4)] * len(names))
    folder = open_folder(tmp_path)
    used = sources(folder, "model.norm.weight", (1,))
    assert unused(folder, used) == ["model.vision.weight", "lm_head.weight"]
    assert unused(folder, used, {"lm_head.weight": "model.embed_tokens.weight"}) == ["model.vision.weight"]
