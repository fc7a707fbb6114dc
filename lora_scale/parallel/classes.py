"""Sequence classification by an encoder: a document's class stands where a completion would, as its last token.

So rows, blocks, steps and checkpoints know nothing of classes: a row trains one token, its last, whose number is the
class. The encoder sees what stands before that token, and its head's logits are of classes. The folder decides: its
config.json names a class of transformers for sequence classification, and its files hold the head.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.parallel.vocabulary import IGNORED
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, DataError
from lora_scale.spec.states import keeps_base_flat
from lora_scale.storage.dataset import Documents
from lora_scale.storage.folder import ModelFolder

ENCODERS = ("bert", "roberta", "deberta-v2")
_HEAD = "ForSequenceClassification"


def in_folder(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config.json is of an encoder that classifies."""
    named = config.get("architectures") or [""]
    return config.get("model_type") in ENCODERS and str(named[0]).endswith(_HEAD)


def in_model(model: nn.Module) -> bool:
    return type(model).__name__.endswith(_HEAD)


def check_config(cfg: RunConfig, model_type: str) -> None:
    """What is not built for encoders is refused before anything is read."""
    apart = model_type == "deberta-v2" and keeps_base_flat(cfg)  # it reads an embedding's weight without calling it
    for wrong, key, value, way_out in (
        (cfg.method != "lora", "method", cfg.method, "method=lora"),
        (cfg.data.packing, "data.packing", "true", "data.packing=false: one document a block"),
        (cfg.parallel.tensor_parallel_size > 1, "parallel.tensor_parallel_size", "more than 1", "it to 1"),
        (cfg.eval.generate is not None, "eval.generate", cfg.eval.generate, "it to nothing"),
        (apart, "parallel.base_engine", "flat", "parallel.base_engine=deepspeed"),
        (cfg.recompute == "auto", "recompute", "auto", "recompute=all or recompute=none"),
        (cfg.activation_offloading != "none", "activation_offloading", cfg.activation_offloading, "it to none"),
    ):
        if wrong:
            raise ConfigError(f"{key} is {value}, but {cfg.model.path} is an encoder that classifies; set {way_out}")


def check_documents(documents: Documents, folder: ModelFolder) -> None:
    """Every document must train its last token only, and that must be a class."""
    count = len(folder.config.get("id2label") or "01")  # transformers leaves out its default of two
    last = documents.offsets[1:] - 1
    wrong = np.flatnonzero((documents.n_targets != 1) | ~documents.trained[last].astype(bool))
    if len(wrong):
        raise DataError(
            f"document {wrong[0]} trains {documents.n_targets[wrong[0]]} tokens, but an encoder learns one class of "
            'each: give rows of {"input_ids": [..., class], "labels": [-100, ..., class]}'
        )
    wrong = np.flatnonzero(documents.ids[last] >= count)
    if len(wrong):
        number = documents.ids[last][wrong[0]]
        raise DataError(f"document {wrong[0]} has class {number}, but {folder.path} has {count}: 0 to {count - 1}")


def loss_sum(forward: Callable[..., Any], ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch's documents, fp32, shape (). A row without one counts nothing."""
    seen = (labels != IGNORED).long().flip(1).cummax(1).values.flip(1)  # up to where the class is to be told
    seen[:, 0] = 1  # attention over nothing is not a number
    logits = forward(input_ids=ids, attention_mask=seen).logits
    return F.cross_entropy(logits.float(), labels.max(dim=1).values, ignore_index=IGNORED, reduction="sum")
