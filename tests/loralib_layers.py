"""loralib 0.1.2 (https://github.com/microsoft/LoRA), as far as tests need it: `Linear`, `MergedLinear`, its state dict.

Its own arithmetic, without dropout, and without adding the update to the weight in eval mode (merge_weights=False).
Where the package is installed a test holds this record to it.

Copyright (c) Microsoft Corporation. MIT License.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, r: int, lora_alpha: int, fan_in_fan_out: bool = False):
        super().__init__(in_features, out_features)
        self.fan_in_fan_out = fan_in_fan_out
        self.lora_A = nn.Parameter(self.weight.new_zeros((r, in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((out_features, r)))
        self.scaling = lora_alpha / r
        if fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        def T(w: Tensor) -> Tensor:
            return w.transpose(0, 1) if self.fan_in_fan_out else w

        result = F.linear(x, T(self.weight), bias=self.bias)
        result += (x @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling
        return result


class MergedLinear(nn.Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: int,
        enable_lora: list[bool],
        fan_in_fan_out: bool = False,
    ):
        super().__init__(in_features, out_features)
        assert out_features % len(enable_lora) == 0, "The length of enable_lora must divide out_features"
        self.enable_lora = enable_lora
        self.fan_in_fan_out = fan_in_fan_out
        self.lora_A = nn.Parameter(self.weight.new_zeros((r * sum(enable_lora), in_features)))
        self.lora_B = nn.Parameter(
            self.weight.new_zeros((out_features // len(enable_lora) * sum(enable_lora), r))
        )  # weights for Conv1D with groups=sum(enable_lora)
        self.scaling = lora_alpha / r
        self.lora_ind = self.weight.new_zeros((out_features,), dtype=bool).view(len(enable_lora), -1)
        self.lora_ind[enable_lora, :] = True
        self.lora_ind = self.lora_ind.view(-1)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)

    def zero_pad(self, x: Tensor) -> Tensor:
        result = x.new_zeros((len(self.lora_ind), *x.shape[1:]))
        result[self.lora_ind] = x
        return result

    def merge_AB(self) -> Tensor:
        def T(w: Tensor) -> Tensor:
            return w.transpose(0, 1) if self.fan_in_fan_out else w

        delta_w = F.conv1d(self.lora_A.unsqueeze(0), self.lora_B.unsqueeze(-1), groups=sum(self.enable_lora)).squeeze(0)
        return T(self.zero_pad(delta_w))

    def forward(self, x: Tensor) -> Tensor:
        def T(w: Tensor) -> Tensor:
            return w.transpose(0, 1) if self.fan_in_fan_out else w

        result = F.linear(x, T(self.weight), bias=self.bias)
        result += x @ T(self.merge_AB().T) * self.scaling
        return result


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    my_state_dict = model.state_dict()
    if bias == "none":
        return {k: my_state_dict[k] for k in my_state_dict if "lora_" in k}
    if bias == "all":
        return {k: my_state_dict[k] for k in my_state_dict if "lora_" in k or "bias" in k}
    to_return = {}
    for k in my_state_dict:
        if "lora_" in k:
            to_return[k] = my_state_dict[k]
            bias_name = k.split("lora_")[0] + "bias"
            if bias_name in my_state_dict:
                to_return[bias_name] = my_state_dict[bias_name]
    return to_return
