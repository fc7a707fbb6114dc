"""The adapted layer against PEFT's, its initialisation, and which modules are chosen."""

import math
import re

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import FAMILIES
from tiny_models import TINY, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_scale.adapters.dropout import DropoutContext
from lora_scale.adapters.lora import LoRALinear, adapt, draw_a, file_name
from lora_scale.adapters.targets import by_pattern, fused_notes, select_targets
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)  # transformers

IDS = torch.arange(2 * 9).view(2, 9) * 7 % 61


def config(**values) -> LoraConfig:
    return LoraConfig.model_validate({"r": 4, "lora_alpha": 6.0, **values})


def fill(layers: dict[str, LoRALinear], seed: int = 1) -> None:
    """Both factors non-zero: with B = 0 the gradient of A is zero and half of the test is empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)


def peft_twin(model_type: str, ours: dict[str, LoRALinear], **values) -> nn.Module:
    """PEFT's model on an equal base, adapted at the same modules with the same factors."""
    names = "|".join(re.escape(name) for name in ours)
    twin = get_peft_model(
        tiny_model(model_type), PeftConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names, **values})
    )
    with torch.no_grad():
        for name, layer in peft_layers(twin).items():
            layer.lora_A["default"].weight.copy_(ours[name].lora_A)
            layer.lora_B["default"].weight.copy_(ours[name].lora_B)
    return twin


def peft_layers(model: nn.Module) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_outputs_and_gradients_equal_pefts_in_fp32(model_type: str) -> None:
    model = tiny_model(model_type)
    ours = adapt(model, config(target_modules=("all-linear",)), seed=0)
    fill(ours)
    twin = peft_twin(model_type, ours)
    assert peft_layers(twin).keys() == ours.keys()
    base = loss(tiny_model(model_type))
    theirs, mine = loss(twin), loss(model)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0.0)  # our update is added by the product that makes it
    assert abs(mine - base) > 1e-3, "the adapter does nothing: the comparison would be empty"
    mine.backward()
    theirs.backward()
    for name, layer in peft_layers(twin).items():
        pairs = ((ours[name].lora_A, layer.lora_A), (ours[name].lora_B, layer.lora_B))
        for factor, peft_factor in pairs:
            reference = peft_factor["default"].weight.grad
            assert reference.abs().max() > 0, name
            assert (factor.grad - reference).norm() <= 1e-5 * reference.norm(), name


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_and_rank_patterns_are_pefts(use_rslora: bool) -> None:
    patterns = {
        "rank_pattern": {r"layers\.1\..*q_proj": 2, "q_proj": 3, r"^model\.layers\.0\.mlp\.up_proj": 5},
        "alpha_pattern": {"self_attn.v_proj": 20.0, r".*up_proj": 1.5},
    }
    cfg = config(target_modules=("q", "v", "up_proj"), use_rslora=use_rslora, **patterns)
    ours = adapt(tiny_model("llama"), cfg, seed=0)
    twin = get_peft_model(
        tiny_model("llama"),
        PeftConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=use_rslora, **patterns
        ),
    )
    theirs = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in peft_layers(twin).items()}
    assert {name: (layer.r, layer.scaling) for name, layer in ours.items()} == theirs
    assert len(set(theirs.values())) == 5, theirs


@pytest.mark.parametrize(
    "pattern", ["q_proj", "proj", r"layers\.0", "0.self_attn.q_proj", ".*q_proj", "^q_proj", "(k|q)_proj"]
)
@pytest.mark.parametrize("name", ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.xq_proj"])
def test_a_pattern_matches_as_in_peft(pattern: str, name: str) -> None:
    from peft.utils.other import get_pattern_key

    assert (by_pattern({pattern: 3}, name, 8) == 3) == (get_pattern_key([pattern], name) == pattern)


def test_delta_weight_is_what_the_forward_pass_adds() -> None:
    torch.manual_seed(0)
    for base in (nn.Linear(12, 20), Conv1D(20, 12)):
        layer = LoRALinear(base, "x", r=3, lora_alpha=5.0)
        fill({"x": layer})
        x = torch.randn(7, 12)
        y = layer(x)
        with torch.no_grad():
            base.weight += layer.delta_weight()
        # Two fp32 sums of 12 and 3 products in another order: a few units in the last place of values near 10.
        torch.testing.assert_close(layer.base_layer(x), y, rtol=0, atol=20 * 2**-24 * y.abs().max().item())


def test_bf16_error_is_at_most_twice_that_of_plain_bf16() -> None:
    """The ratio rule: against fp64, our error must be near what bf16 arithmetic itself gives, and better than none."""
    torch.manual_seed(0)
    base = nn.Linear(256, 192, bias=False).bfloat16()
    layer = LoRALinear(base, "x", r=8, lora_alpha=16.0)
    with torch.no_grad():
        layer.lora_A.normal_(std=0.1)
        layer.lora_B.normal_(std=0.1)
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    upstream = torch.randn(64, 192)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        a, b = (f.detach().to(dtype).requires_grad_() for f in (layer.lora_A, layer.lora_B))
        x_in = x.detach().to(dtype).requires_grad_()
        y = x_in @ base.weight.detach().to(dtype).T + 2.0 * (x_in @ a.T @ b.T)
        y.backward(upstream.to(dtype))
        return tuple(t.double() for t in (y.detach(), x_in.grad, a.grad, b.grad))

    y = layer(x)
    y.backward(upstream.bfloat16())
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    ours = tuple(t.double() for t in (y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for mine, plain, exact in zip(ours, run(torch.bfloat16), run(torch.float64), strict=True):
        assert 0 < (mine - exact).norm() <= 2 * (plain - exact).norm()


def test_bf16_is_as_near_to_fp32_as_peft_under_autocast() -> None:
    """PEFT keeps fp32 factors too (autocast_adapter_dtype), and rounds in other places."""
    model = tiny_model("llama").bfloat16()
    ours = adapt(model, config(target_modules=("q", "v")), seed=0)
    fill(ours)
    twin = peft_twin("llama", ours).bfloat16()
    theirs = peft_layers(twin)
    for name, layer in theirs.items():
        with torch.no_grad():
            layer.lora_A["default"].weight = nn.Parameter(ours[name].lora_A.detach().clone())
            layer.lora_B["default"].weight = nn.Parameter(ours[name].lora_B.detach().clone())
    x = torch.randn(2, 9, 32).bfloat16()
    for name, layer in theirs.items():
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = layer(x)
        exact = layer.float()(x.float())
        assert 0 < (ours[name](x) - exact).norm() <= 1.1 * (under_autocast - exact).norm()


def test_the_draw_of_a_depends_on_seed_and_name_only() -> None:
    model = tiny_model("llama")
    few = adapt(tiny_model("llama"), config(), seed=3)
    torch.manual_seed(99)
    many = adapt(model, config(target_modules=("all-linear",)), seed=3)
    for name, layer in few.items():
        assert torch.equal(layer.lora_A, many[name].lora_A)
        assert not layer.lora_B.any()
    factors = [layer.lora_A for layer in many.values()] + [
        adapt(tiny_model("llama"), config(), seed=4)[next(iter(few))].lora_A
    ]
    assert len({tuple(f.flatten().tolist()) for f in factors}) == len(factors)


def test_the_draw_stays_the_same_for_good() -> None:
    """A repeated run starts from the same adapter on any machine and with any version of torch."""
    expected = [
        [-0.4707370400428772, 0.26627910137176514, -0.33897697925567627, 0.2332223653793335],
        [0.2600444555282593, -0.205058753490448, 0.15996623039245605, -0.14994966983795166],
    ]
    drawn = draw_a(0, "model.layers.0.self_attn.q_proj", 2, 4, "kaiming")
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=2**-22, atol=0)  # a rounding of the last bit is free


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_distribution_of_a_is_pefts(init: str) -> None:
    r, features = 16, 4096
    ours = draw_a(0, "x", r, features, init)
    peft = get_peft_model(
        nn.Sequential(nn.Linear(features, 8)),
        PeftConfig(r=r, target_modules=["0"], init_lora_weights=True if init == "kaiming" else "gaussian"),
    )
    theirs = peft_layers(peft)["0"].lora_A["default"].weight.detach()
    # 65,536 draws: the standard deviation is known to 0.3 %, a uniform's largest value to far better.
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.015)
    assert ours.std() == pytest.approx(1 / r if init == "gaussian" else 1 / math.sqrt(3 * features), rel=0.015)
    if init == "kaiming":
        assert ours.abs().max() == pytest.approx(1 / math.sqrt(features), rel=1e-3)
    else:
        assert ours.abs().max() > 3.5 / r
    assert abs(ours.mean()) < 4 * ours.std() / math.sqrt(r * features)


def test_adapters_are_real_while_the_base_is_on_meta() -> None:
    meta = adapt(tiny_model("llama", device="meta"), config(), seed=3)
    real = adapt(tiny_model("llama"), config(), seed=3)
    assert all(layer.base_layer.weight.is_meta for layer in meta.values())
    for name, layer in meta.items():
        assert torch.equal(layer.lora_A, real[name].lora_A) and layer.lora_B.device.type == "cpu"


def test_only_the_factors_train_and_files_keep_their_names() -> None:
    model = tiny_model("qwen2")
    in_files = {name for name, _ in model.named_parameters()}
    ours = adapt(model, config(), seed=0)
    assert list(ours) == [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in ours for factor in ("lora_A", "lora_B")}
    frozen = {file_name(name) for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == in_files


def test_recomputation_and_ranks_see_the_same_dropout() -> None:
    """Gradients with activation recomputation equal those without, bit for bit, and a batch's rows can be split."""

    def gradients(rows: slice, recompute: bool, step: int = 5) -> list[Tensor]:
        model = tiny_model("llama")
        context = DropoutContext(seed=1)
        ours = adapt(model, config(dropout=0.5, target_modules=("q", "v", "mlp")), seed=0, context=context)
        fill(ours)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        samples = torch.tensor([[11] * 9, [12] * 9])[rows]
        context.set(step, samples, torch.arange(9).expand_as(samples))
        logits = model(input_ids=IDS[rows], use_cache=False).logits
        logits.square().sum().backward()
        return [factor.grad for layer in ours.values() for factor in (layer.lora_A, layer.lora_B)]

    both = gradients(slice(0, 2), recompute=False)
    assert all(g.abs().max() > 0 for g in both)
    for one, other in zip(both, gradients(slice(0, 2), recompute=True), strict=True):
        assert torch.equal(one, other)
    apart = zip(gradients(slice(0, 1), False), gradients(slice(1, 2), False), strict=True)
    for whole, (first, second) in zip(both, apart, strict=True):
        assert (first + second - whole).norm() <= 1e-5 * whole.norm()  # the same fp32 sum in another order
    assert not any(torch.equal(a, b) for a, b in zip(both, gradients(slice(0, 2), False, step=6), strict=True))


@pytest.mark.parametrize("model_type", TINY)
def test_every_family_trains_with_dropout(model_type: str) -> None:
    model = tiny_model(model_type)
    context = DropoutContext(seed=1)
    ours = adapt(model, config(dropout=0.3, target_modules=("all-linear",)), seed=0, context=context)
    fill(ours)
    losses = []
    for step in (0, 0, 1):
        context.set(step, torch.zeros_like(IDS), torch.arange(9).expand_as(IDS))
        losses.append(loss(model))
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in ours.values())


def test_no_dropout_in_eval_mode() -> None:
    model = tiny_model("llama")
    fill(adapt(model, config(dropout=0.5), seed=0, context=DropoutContext(seed=1)))
    model.eval()
    plain = tiny_model("llama")
    fill(adapt(plain, config(), seed=0))
    assert torch.equal(loss(model), loss(plain))


@pytest.mark.parametrize(
    ("model_type", "target", "ends"),
    [
        ("llama", "q", {"q_proj"}),
        ("llama", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("llama", "self_attn.v_proj", {"v_proj"}),
        ("llama", r"re:.*layers\.[0-3]\..*[kv]_proj", {"k_proj", "v_proj"}),
        (
            "llama",
            r"re:model\.layers\..*",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("gpt2", "v", {"c_attn"}),
        ("gpt2", "o", {"attn.c_proj"}),
        ("gpt2", "mlp", {"c_fc", "mlp.c_proj"}),
        ("falcon", "k", {"query_key_value"}),
        ("phi3", "mlp", {"gate_up_proj", "down_proj"}),
        ("gemma3_text", "o", {"o_proj"}),
    ],
)
def test_targets_by_role_name_and_expression(model_type: str, target: str, ends: set[str]) -> None:
    model = tiny_model(model_type)
    chosen = select_targets(model, config(target_modules=(target,)))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    assert list(chosen) == [name for name in linear if any(name.endswith("." + end) for end in ends)]
    assert len(chosen) == 2 * len(ends) and set(chosen.values()) == {(4, 6.0)}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((), "lora.target_modules is empty"),
        (
            ("qq_proj",),
            "'qq_proj', which matches no module (did you mean 'q_proj'?); this model has self_attn.q_proj x2",
        ),
        (("proj",), "'proj', which matches no module"),
        (
            ("embed_tokens",),
            "model.embed_tokens (Embedding) is no linear layer; only those are adapted: this model has",
        ),
        (("mlp", "self_attn"), "model.layers.0.self_attn (LlamaAttention) is no linear layer"),
        (("re:.*norm",), "model.layers.0.input_layernorm (LlamaRMSNorm) is no linear layer"),
        (("re:.*nothing",), "'re:.*nothing', which matches no module"),
        (("re:(",), "'re:(', which is no regular expression"),
        (("q", "lm_head"), "names lm_head, whose weight is the input embedding's too"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named(target: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        select_targets(tiny_model("llama", tie_word_embeddings=True), config(target_modules=target))
    assert "\n" not in str(caught.value)


def test_the_error_lists_what_there_is_with_counts_and_shapes() -> None:
    with pytest.raises(ConfigError, match=re.escape("h.0.x")) as caught:
        select_targets(tiny_model("gpt2"), config(target_modules=("h.0.x",)))
    listed = str(caught.value).partition("this model has ")[2]
    assert listed == (
        "attn.c_attn x2 (32 -> 96), attn.c_proj x2 (32 -> 32), mlp.c_fc x2 (32 -> 128), mlp.c_proj x2 (128 -> 32), "
        "lm_head x1 (32 -> 64)"
    )


def test_an_untied_output_embedding_may_be_adapted_by_name_but_is_not_in_all_linear() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    assert "lm_head" not in select_targets(model, config(target_modules=("all-linear",)))
    assert list(select_targets(model, config(target_modules=("lm_head",)))) == ["lm_head"]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "what"), [("k_proj", "matches none of the 4 adapted"), ("(", "is no regular expr")]
)
def test_a_pattern_that_does_nothing_is_an_error(key: str, pattern: str, what: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"lora.{key} has {pattern!r}, which {what}")):
        select_targets(tiny_model("llama"), config(target_modules=("q", "v"), **{key: {pattern: 2}}))


def test_a_role_of_an_unknown_family_asks_for_names() -> None:
    model = tiny_model("llama")
    model.config.model_type = "newllama"
    with pytest.raises(ConfigError, match=r"the role 'q', for which type 'newllama' has no known linear layer; name"):
        select_targets(model, config(target_modules=("q",)))
    assert len(select_targets(model, config(target_modules=("q_proj",)))) == 2


@pytest.mark.parametrize(
    ("model_type", "targets", "notes"),
    [
        ("llama", ("q", "v"), []),
        ("phi3", ("q", "v"), ["qkv_proj holds k as well as v: one adapter covers all of it"]),
        ("gpt2", ("v",), ["attn.c_attn holds q, k as well as v: one adapter covers all of it"]),
        ("falcon", ("q", "k", "v"), []),
        ("falcon", ("all-linear",), []),
    ],
)
def test_fused_projections_are_not_adapted_silently(
    model_type: str, targets: tuple[str, ...], notes: list[str]
) -> None:
    assert fused_notes(tiny_model(model_type), config(target_modules=targets)) == notes
