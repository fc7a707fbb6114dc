"""Work of minutes on one rank while the others wait in no collective: a collective would time out, and burn a core.

The outcome travels through the job's own key-value store, in which every rank has met already.
"""

import base64
import itertools
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lora_scale.spec.errors import LoraScaleError, TrainingError

T = TypeVar("T")
POLL = 0.2  # seconds between questions
_numbers = itertools.count()  # every rank makes the same calls in the same order


def first_rank_works(fn: Callable[[], T]) -> T:
    """Call fn on rank 0 and give every rank its result, or its exception, however long that takes.

    The result travels pickled, inside the job's own store only: keep it small.
    """
    name = f"lora-scale/waiting/{next(_numbers)}"
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        outcome: list[Any] = [None, None]
        try:
            outcome[0] = fn()
        except LoraScaleError as error:
            outcome[1] = error
        except Exception as error:
            outcome[1] = TrainingError(f"{type(error).__name__}: {error}")
            store.set(name, _packed(outcome))
            raise
        store.set(name, _packed(outcome))
    else:
        while not store.check([name]):
            time.sleep(POLL)
        outcome = pickle.loads(base64.b64decode(store.get(name)))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _packed(outcome: list[Any]) -> str:
    return base64.b64encode(pickle.dumps(outcome)).decode()
