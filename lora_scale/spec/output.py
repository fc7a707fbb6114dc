"""The loss of a frozen output layer, a few tokens at a time: for which runs, and how many. No torch."""

from math import ceil

from lora_scale.spec.config import RunConfig
from lora_scale.spec.cost import FP32

OUTPUT_LAYER = "lm_head"
FAMILIES = (  # what their output layer gives are the logits: nothing is done to them behind it
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "gemma3_text",
)
LARGEST = 640 << 20  # bytes of logits and what is computed from them: 2,048 tokens of 32,000 words in bf16
EVEN = 128  # tokens: a chunk is a multiple of that, for the sake of the products' tiles


def in_chunks(model_type: str, is_tied: bool, cfg: RunConfig, softcap: float | None = None) -> bool:
    """Whether the loss is computed with its gradient, chunk by chunk, as the output layer's weight stays the same."""
    if cfg.kernels != "auto" or cfg.method != "lora" or model_type not in FAMILIES or softcap is not None:
        return False
    trains = OUTPUT_LAYER in cfg.lora.modules_to_save or (is_tied and cfg.lora.trainable_token_indices)
    return not trains


def chunk(tokens: int, words: int, width: int) -> int:
    """Tokens of a chunk, for so many words of this rank's vocabulary and so many bytes an element."""
    most = max(1, LARGEST // (words * bytes_of_a_word(width)) // EVEN) * EVEN
    share = ceil(tokens / max(1, ceil(tokens / most)))
    return min(tokens, ceil(share / EVEN) * EVEN)


def bytes_of_a_word(width: int, is_cut: bool = False) -> int:
    """Of a token in its chunk: the logit as it comes, and its logarithm in fp32, beside the logit in fp32 where it is
    not. Of a cut vocabulary the two in fp32 are one."""
    return width + FP32 + (FP32 if width < FP32 and not is_cut else 0)
