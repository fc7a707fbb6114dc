"""The files of a model folder that are no weights: config, tokenizer, chat template, index, licence. Names only."""

from fnmatch import fnmatch
from pathlib import Path

from lora_scale.storage.hub import PATTERNS
from lora_scale.storage.recognise import INDEX

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""By any of these a folder has a tokenizer of its own."""

_TAKEN = (*(pattern for pattern in PATTERNS if pattern != "*.safetensors"), "*.py", "LICENSE*", "NOTICE*")
_LEFT = (
    *("adapter_config.json", "merge.json", "trainer_state.json"),  # not of the model
    *("*.bin.index.json", "*.msgpack.index.json", "*.h5.index.json"),  # of weights in other forms
)


def of_model(folder: Path) -> dict[str, Path]:
    """By name, what goes with the weights into a copy of the model: the README, which describes the base, does not."""
    return {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and any(fnmatch(file.name, pattern) for pattern in _TAKEN)
        and (file.name == INDEX or not any(fnmatch(file.name, pattern) for pattern in _LEFT))
    }


def of_tokenizer(folder: Path) -> dict[str, Path]:
    """By name, the tokenizer's files and the chat template, as far as the folder has them."""
    return {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
