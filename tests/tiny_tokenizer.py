"""A tokenizer of a given size in a folder, made in a few milliseconds: byte-level BPE with SmolLM2's special tokens and
chat template, so that what holds for it holds for the real one."""

import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = (
    "a small program that shows the weather of the day in the terminal\nSummary:",
    "the library reads and writes files of the old format, and the new one\nSummary: reads files",
    "this package contains the data for the game; it needs the program itself\nYou are a helpful AI assistant",
)


def write_tokenizer(
    folder: Path, vocab_size: int, bos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Save tokenizer.json and tokenizer_config.json with exactly `vocab_size` ids (at least 72).

    From 300 ids on every byte has a token; below, only lower-case ASCII has, and the rest is <unk>. `bos` makes the
    tokenizer put <|endoftext|> before every text by itself, as Llama 3's does. Ids that training does not fill
    are <filler_0>, <filler_1>, ...
    """
    from transformers import PreTrainedTokenizerFast

    assert vocab_size >= 72, "the small alphabet has 68 characters"
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    alphabet = (
        every_byte if vocab_size >= 300 else [*string.ascii_lowercase, *string.digits, *"ASYI .,;:!?()-'/+\u0120\u010a"]
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fillers = [f"<filler_{number}>" for number in range(vocab_size - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([AddedToken(filler, normalized=False) for filler in fillers])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
    assert len(fast) == vocab_size
    fast.save_pretrained(folder)
    return folder
