"""Dropout masks that are a pure function of (seed, step, module, global sample, position, feature).

No generator and no state: any rank, any grid and any recomputation asks for the same mask and gets it, on CPU and on
GPU bit for bit. Knows nothing of models, layers or process groups.

How: the five coarse values are hashed to 64 bits a token, once; each (token, feature) cell then costs two 32-bit
multiplications and a comparison, after the "lowbias32" finaliser (https://github.com/skeeto/hash-prospector).
Peak memory above the mask itself (1 byte a cell) is two int32 buffers of at most `_CHUNK_CELLS` cells, 32 MiB.
"""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from lora_scale.spec.errors import ConfigError

_CHUNK_CELLS = 1 << 22
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # torch's int32 is signed; products wrap either way
_ODD_1 = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's increment
_ODD_2 = 0xD1342543DE82EF95 - (1 << 64)  # a multiplier of Steele and Vigna's table (https://arxiv.org/abs/2001.05304)


@dataclass(slots=True)  # slots: a misspelt attribute is an error, not a mask that never changes
class DropoutContext:
    """Which tokens the current micro-batch holds; one per model, shared by its layers, set by the training loop.

    It must keep its values until the micro-batch's backward pass is over: recomputed layers ask it again.
    """

    seed: int
    step: int = 0
    sample_ids: Tensor | None = None
    """(batch, sequence), integer, on the activations' device: the same document has the same number on every rank."""
    position_ids: Tensor | None = None
    """(batch, sequence): the place of the token in its document."""

    def set(self, step: int, sample_ids: Tensor, position_ids: Tensor) -> None:
        assert sample_ids.shape == position_ids.shape, (sample_ids.shape, position_ids.shape)
        self.step, self.sample_ids, self.position_ids = step, sample_ids, position_ids

    def drop(self, x: Tensor, module: str, probability: float, first_feature: int = 0) -> Tensor:
        """`x` (batch, sequence, features) with zeros where the mask says so, the rest times 1 / (1 - probability).

        `x` may also be (batch * sequence, features). A rank that holds features [a, b) of it passes first_feature=a and
        gets its slice of the whole result.
        """
        tokens = self._tokens(module)
        if x.shape[:-1] == (tokens.numel(),):  # OPT's MLP works on (batch * sequence, features)
            tokens = tokens.flatten()
        if x.shape[:-1] != tokens.shape:
            raise ConfigError(
                f"lora.dropout is {probability}, but {module} sees its tokens as {tuple(x.shape[:-1])}, the batch is "
                f"{tuple(tokens.shape)}: which mask belongs to which token is not known; set lora.dropout=0"
            )
        mask = keep_mask(tokens, first_feature, x.shape[-1], probability)
        return torch.where(mask, x, 0.0) * (1.0 / (1.0 - probability))

    def _tokens(self, module: str) -> Tensor:
        """64-bit hashes of (seed, step, module, sample, position), shaped like the batch."""
        assert self.sample_ids is not None and self.position_ids is not None, "the loop has set no batch"
        digest = blake2b(f"{self.seed}/{self.step}/{module}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        return _mix64(self.sample_ids.long() * _ODD_1 + self.position_ids.long() * _ODD_2 + key)


def keep_mask(tokens: Tensor, first_feature: int, features: int, probability: float) -> Tensor:
    """Bool (*tokens.shape, features), True where the value stays; `tokens` are int64 hashes."""
    assert 0.0 < probability < 1.0, probability
    threshold = round(probability * (1 << 32)) - (1 << 31)  # on the signed scale of the hash
    columns = torch.arange(first_feature, first_feature + features, dtype=torch.int64, device=tokens.device)
    columns = _low32(_mix64(columns + _ODD_1))
    keys = tokens.reshape(-1, 1)
    low, high = _low32(keys), _low32(keys >> 32)
    mask = torch.empty(keys.shape[0], features, dtype=torch.bool, device=tokens.device)
    rows = max(1, _CHUNK_CELLS // features)
    for start in range(0, keys.shape[0], rows):
        part = slice(start, start + rows)
        cells = columns ^ low[part]
        cells *= _MULTIPLIER_1
        cells ^= (cells >> 15).bitwise_and_(0x1FFFF)  # >> keeps the sign; the mask makes it a logical shift
        cells += high[part]
        cells *= _MULTIPLIER_2
        torch.ge(cells, threshold, out=mask[part])
    return mask.view(*tokens.shape, features)


def _mix64(z: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 with wrapping products."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _low32(z: Tensor) -> Tensor:
    """The low 32 bits as int32, without a conversion that overflows (whose result C++ leaves to the platform)."""
    return (((z & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
