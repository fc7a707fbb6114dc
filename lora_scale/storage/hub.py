"""From `model.path` to a folder on this machine: the only door to huggingface_hub, and shut for a folder."""

import os
import re
from pathlib import Path

from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import ModelError

PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
"""What a base needs: weights, configs and tokenizer. `*.py` only with `trust_remote_code`."""

OTHER_FORMS = ("*/*", "consolidated*")
"""Left out: folders with the same weights in other forms (onnx/, original/), and Mistral's own second copy."""


def is_name(text: str) -> bool:
    """`org/name`, as the hub calls a model."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith((".", "-"))


def commit_of(path: Path) -> str | None:
    """Which commit a folder of the hub's cache is (models--org--name/snapshots/<commit>); None for other folders."""
    match = re.search(r"models--[^/]+/snapshots/([0-9a-f]{40})$", str(path))
    return match[1] if match else None


def stay_offline() -> None:
    """From here on this process asks no hub, also not from inside libraries: hundreds of ranks would."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def resolve(model: ModelConfig, only_cached: bool = False) -> Path:
    """The folder of `model.path`; a name on the hub is downloaded, or taken from the hub's cache (once a machine)."""
    path = Path(model.path).expanduser()
    if path.exists():
        return path
    if model.path.startswith(("/", ".", "~")) or model.path.count("/") > 1:
        raise ModelError(f"model.path is {model.path}, which does not exist")
    from huggingface_hub import constants, errors, snapshot_download

    name = f"model.path is {model.path}, which is no folder here"
    at = f" at revision {model.revision}" if model.revision else ""
    try:
        folder = snapshot_download(
            model.path,
            revision=model.revision,
            allow_patterns=[*PATTERNS, *(["*.py"] if model.trust_remote_code else [])],
            ignore_patterns=list(OTHER_FORMS),
            local_files_only=only_cached,
        )
    except errors.GatedRepoError as error:
        raise ModelError(f"{name}, and gated on the hub; ask for access on its page, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name}, and the hub has no revision {model.revision} of it; see model.revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name}, and the hub has no such model, or only a private one (`hf auth login`)") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if only_cached:
            way_out = "`lora-scale prepare` with the same config fetches it; training itself uses no network"
            raise ModelError(f"{name}{at}; the hub's cache does not hold it here: {way_out}") from error
        why = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "unreachable"
        raise ModelError(f"{name}{at}; the hub is {why} and its cache does not hold it: download it first") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{name}, and no name that the hub allows") from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{name}; the hub answers: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise ModelError(
            f"{name}; its download failed: {os.strerror(error.errno) if error.errno else error}"
        ) from error
    return Path(folder)
