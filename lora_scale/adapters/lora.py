"""LoRA layers of one process: the adapted layer, its initialisation, and putting it into a model.

Knows no process group and no file. Which modules are adapted: `adapters.targets`; PEFT's names: `adapters.peft`.

Arithmetic: the factors are fp32 and are cast to the activations' dtype for compute; the update is added by the product
that makes it, so in fp32 outputs and gradients equal PEFT's but for the last bits. In bf16 PEFT
(autocast_adapter_dtype=True, its default) does the same under torch.autocast, with one rounding more; without autocast
it casts x to fp32 instead and multiplies there, which costs several times more and is not done here.
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters import lean, marks, tokens
from lora_scale.adapters.dropout import DropoutContext
from lora_scale.adapters.targets import features, select_targets
from lora_scale.adapters.update import updated
from lora_scale.spec.config import LoraConfig

_BASE = ".base_layer."


class LoRALinear(nn.Module):
    """y = W x + scaling * B A x with W frozen; around an nn.Linear or transformers' Conv1D.

    Sizes are read here only: later the base's weight may be replaced, partitioned or gathered by hooks. The forward
    touches `lora_A`, `lora_B` and calls `base_layer`, nothing else, because ZeRO-3 gathers exactly these around it.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        dropout: float = 0.0,
        context: DropoutContext | None = None,
    ) -> None:
        super().__init__()
        assert dropout == 0.0 or context is not None, "dropout needs a DropoutContext"
        self.base_layer = base_layer.requires_grad_(False)
        self.name = name
        self.in_features, self.out_features = features(base_layer)
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = scaling(r, lora_alpha, use_rslora)
        self.dropout = dropout
        self.context = context
        self.first_feature = 0  # of the input, in the whole layer's: other than 0 where lora_A is cut
        # fp32: bf16 loses small updates. CPU: the base may be on meta, the factors are real from the start.
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, dtype=torch.float32, device="cpu"))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device="cpu"))  # (out, r)
        # Where training began, if not at zero (`adapters.principal`): the update is B A - start_B start_A. Buffers:
        # ZeRO-3 leaves them whole on every rank.
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)
        self.whole_start: tuple[Tensor, Tensor] | None = None  # on the rank that writes checkpoints, on the CPU

    def begin_at(self, a: Tensor, b: Tensor, *, keep_whole: bool) -> None:
        """Begin at these whole factors, with an update of exactly zero."""
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        self.start_A, self.start_B = a.clone(), b.clone()
        self.whole_start = (a, b) if keep_whole else None

    @property
    def remakes_input(self) -> bool:
        """Whether backward makes the input again by `marks.origin`, and nothing keeps it."""
        return self.start_A is None

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if self.start_A is None or self.start_B is None:
            return a, b
        # one product of twice the rank: the large terms cancel in its accumulator, not between two rounded results
        return torch.cat([a, self.start_A.to(dtype)]), torch.cat([b, -self.start_B.to(dtype)], 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.context is not None and self.dropout > 0.0 and self.training:
            x = lean.dropped(x, self._drop)
        if self.start_A is None:
            return updated(y, x, self.lora_A, self.lora_B, self.scaling)
        a, b = self._factors(x.dtype)
        return y + F.linear(F.linear(x, a), b) * self.scaling

    def _drop(self, x: Tensor) -> Tensor:
        assert self.context is not None
        return self.context.drop(x, self.name, self.dropout, self.first_feature)

    def delta_weight(self) -> Tensor:
        """What merging adds to the base's weight, in the weight's own layout (Conv1D: (in, out)), fp32."""
        a, b = self._factors(torch.float32)
        delta = (b @ a) * self.scaling
        return delta if isinstance(self.base_layer, nn.Linear) else delta.T

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, dropout={self.dropout}"


class DoRALinear(LoRALinear):
    """DoRA (https://arxiv.org/abs/2402.09353): each row of W + scaling * B A is brought to a length that trains.

    y = m / n * (W x + scaling * B A x) + bias, n the rows' present lengths, constant to autograd as in the paper's
    section 4.3. n^2 = |w|^2 + 2 s b (W A^T) + s^2 b (A A^T) b^T, row by row: no update as large as W is formed. The
    forward reads the base layer's weight beside it, so under ZeRO-3 both must be gathered as one.
    """

    def __init__(self, base_layer: nn.Module, name: str, **options: Any) -> None:
        super().__init__(base_layer, name, **options)
        ones = torch.ones(self.out_features, dtype=torch.float32, device="cpu")
        self.lora_magnitude_vector = nn.Parameter(ones)  # m, (out,); PEFT's name
        self.squares: Tensor  # |w|^2 of the whole base's rows, (out,)
        self.register_buffer("squares", ones.clone(), persistent=False)
        self.sum_parts: Callable[[Tensor], Tensor] = marks.itself  # over ranks that have a part of the input features

    @property
    def remakes_input(self) -> bool:
        return False

    def begin_at_norms(self, squares: Tensor) -> None:
        """Begin at the base's own lengths; `squares` (out,), fp32, are theirs."""
        self.squares = squares
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        bias: Any = self.base_layer.bias
        share = getattr(self.base_layer, "share", 1.0)  # of a bias that trains
        plain = y if bias is None else y - share * bias.to(y.dtype)
        a, b = self._factors(x.dtype)
        ratio = self.lora_magnitude_vector / self._norms()
        update = F.linear(F.linear(x, a), b) * self.scaling
        return y + (ratio - 1).to(y.dtype) * plain + ratio.to(y.dtype) * update  # ratio is near 1: bf16 has no digits

    @torch.no_grad()
    def _norms(self) -> Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        weight = weight if isinstance(self.base_layer, nn.Linear) else weight.T
        a, b, s = self.lora_A, self.lora_B, self.scaling
        parts = self.sum_parts(torch.cat([(weight @ a.T.to(weight.dtype)).float(), a @ a.T]))
        cross, square = parts[: len(b)], parts[len(b) :]
        return (self.squares + 2 * s * (cross * b).sum(1) + s * s * ((b @ square) * b).sum(1)).sqrt()


def row_squares(weight: Tensor) -> Tensor:
    """Squared lengths of the rows of a weight (out, in), fp32."""
    return weight.float().square().sum(1)


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """The factor before B A."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def draw_a(seed: int, name: str, r: int, in_features: int, init: Literal["kaiming", "gaussian"]) -> Tensor:
    """The starting lora_A of module `name`: (r, in_features), fp32, CPU; a function of these arguments only."""
    digest = blake2b(f"{seed}/{name}/lora_A".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    factor = torch.empty(r, in_features, dtype=torch.float32, device="cpu")
    if init == "gaussian":
        return nn.init.normal_(factor, std=1 / r, generator=generator)
    return nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)  # nn.Linear's and PEFT's default


def adapt(model: nn.Module, cfg: LoraConfig, seed: int, context: DropoutContext | None = None) -> dict[str, LoRALinear]:
    """Freeze `model`, wrap the target layers in place and let new tokens train; the layers by name, in module order.

    The base may be on meta. `context` is the one the training loop sets; without it one is made if dropout needs it.
    """
    targets = select_targets(model, cfg)
    if context is None and cfg.dropout > 0.0:
        context = DropoutContext(seed)
    model.requires_grad_(False)
    adapted = {}
    for name, (r, alpha) in targets.items():
        base = model.get_submodule(name)
        layer = (DoRALinear if cfg.use_dora else LoRALinear)(
            base,
            name,
            r=r,
            lora_alpha=alpha,
            use_rslora=cfg.use_rslora,
            dropout=cfg.dropout,
            context=context,
        )
        with torch.no_grad():
            layer.lora_A.copy_(draw_a(seed, name, r, layer.in_features, cfg.init_A))
        if isinstance(layer, DoRALinear) and isinstance(base.weight, Tensor) and not base.weight.is_meta:
            layer.begin_at_norms(row_squares(base.weight if isinstance(base, nn.Linear) else base.weight.T))
        layer.train(model.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        adapted[name] = layer
    tokens.insert(model, cfg.trainable_token_indices)
    return adapted


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by module name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def file_name(parameter_name: str) -> str:
    """The name of a base parameter of an adapted model in the base's own files."""
    return parameter_name.replace(_BASE, ".")  # twice in a layer that a method of `baselines` holds
