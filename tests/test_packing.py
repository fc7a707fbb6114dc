"""Blocks: every document once, nothing across the borders, and transformers sees the borders that we mean."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_documents import documents_of

from lora_scale.storage.packing import EMPTY, Blocks, pack

SEQ_LEN = 16
LENGTHS = st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=60)


def documents_in(blocks: Blocks, block: int) -> list[int]:
    return blocks.order[blocks.starts[block] : blocks.starts[block + 1]].tolist()


@settings(deadline=None)
@given(lengths=LENGTHS, packing=st.booleans())
def test_every_document_is_in_one_block_and_fits(lengths: list[int], packing: bool) -> None:
    blocks = pack(documents_of(lengths, SEQ_LEN), packing)
    per_block = [documents_in(blocks, block) for block in range(len(blocks))]
    assert sorted(document for block in per_block for document in block) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in block) <= SEQ_LEN for block in per_block)
    assert packing or per_block == [[document] for document in range(len(lengths))]


def naive_best_fit_decreasing(lengths: list[int]) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(SEQ_LEN - length)
    return len(rooms)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    assert len(pack(documents_of(lengths, SEQ_LEN))) == naive_best_fit_decreasing(lengths)


@settings(deadline=None)
@given(lengths=LENGTHS, packing=st.booleans())
def test_blocks_are_what_a_plain_loop_makes(lengths: list[int], packing: bool) -> None:
    documents = documents_of(lengths, SEQ_LEN)
    blocks = pack(documents, packing)
    for block in range(len(blocks)):
        ids, labels, positions, samples = [], [], [], []
        for document in documents_in(blocks, block):
            part = slice(documents.offsets[document], documents.offsets[document + 1])
            tokens, trained = documents.ids[part].tolist(), documents.trained[part].tolist()
            ids += tokens
            labels += [t if loss else -100 for t, loss in zip(tokens[1:], trained[1:], strict=True)] + [-100]
            positions += range(len(tokens))
            samples += [document] * len(tokens)
        padding = SEQ_LEN - len(ids)
        batch = blocks.get(block)
        assert batch.input_ids.tolist() == [ids + [documents.pad_id] * padding]
        assert batch.labels.tolist() == [labels + [-100] * padding]
        assert batch.position_ids.tolist() == [positions + list(range(padding))]
        assert batch.sample_ids.tolist() == [samples + [-1] * padding]
        assert all(array.dtype == np.int64 for array in (batch.input_ids, batch.labels, batch.position_ids))
        assert blocks.n_tokens[block] == SEQ_LEN - padding
        assert blocks.n_targets[block] == (batch.labels != -100).sum() > 0


def test_blocks_side_by_side_are_the_blocks() -> None:
    blocks = pack(documents_of([9, 8, 7, 6, 5], SEQ_LEN))
    batch = blocks.batch([1, EMPTY, 0])
    for row, block in enumerate((1, EMPTY, 0)):
        for field in dataclasses.fields(batch):
            assert (getattr(batch, field.name)[row] == getattr(blocks.get(block), field.name)[0]).all()


def test_efficiency_is_the_part_that_is_not_padding() -> None:
    documents = documents_of([10, 6, 8], SEQ_LEN)
    assert pack(documents).efficiency == 24 / 32
    assert pack(documents, packing=False).efficiency == 24 / 48
    assert pack(documents).stats()["packing_efficiency"] == 0.75


def test_a_million_documents_fill_their_blocks() -> None:
    """Also that it ends: a quadratic packing would run for hours (this takes about 2 s)."""
    lengths = np.random.default_rng(0).integers(2, 700, 1_000_000)
    documents = dataclasses.replace(
        documents_of([2], 1024), offsets=np.concatenate(([0], np.cumsum(lengths))), lines=np.arange(len(lengths))
    )
    assert pack(documents).efficiency > 0.999


def test_the_fingerprint_covers_tokens_loss_and_layout() -> None:
    documents = documents_of([10, 6, 8, 3, 3], SEQ_LEN)
    fingerprint = pack(documents).fingerprint()
    assert fingerprint == pack(documents_of([10, 6, 8, 3, 3], SEQ_LEN)).fingerprint()
    assert fingerprint.startswith("sha256:")

    ids, trained = documents.ids.copy(), documents.trained.copy()
    ids[-1] += 1
    trained[1] = not trained[1]
    moved = documents.offsets.copy()
    moved[1] += 1
    others = [
        pack(dataclasses.replace(documents, ids=ids)),
        pack(dataclasses.replace(documents, trained=trained)),
        dataclasses.replace(pack(documents), documents=dataclasses.replace(documents, offsets=moved)),
        dataclasses.replace(pack(documents), order=pack(documents).order[::-1]),
        pack(dataclasses.replace(documents, pad_id=0)),
        pack(dataclasses.replace(documents, seq_len=SEQ_LEN + 1)),
        pack(documents, packing=False),
    ]
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_the_fingerprint_does_not_cover_where_the_file_lies(tmp_path) -> None:
    documents = documents_of([10, 6], SEQ_LEN)
    assert pack(dataclasses.replace(documents, path=tmp_path)).fingerprint() == pack(documents).fingerprint()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_model_sees_each_document_of_a_block_as_if_alone(attention: str, packing: bool) -> None:
    """The loss of a batch of blocks is the sum of the documents' losses taken apart, and so are the logits."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large, so that one token more in the attention shows
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    documents = documents_of([9, 7, 8, 5, 2, 16, 2], SEQ_LEN)
    blocks = pack(documents, packing)
    batch = blocks.batch(range(len(blocks)))
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            use_cache=False,  # with a cache transformers does not look for documents: attention would cross
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), ignore_index=-100, reduction="sum"
        )
        apart = 0.0
        for document in range(len(documents)):
            part = slice(documents.offsets[document], documents.offsets[document + 1])
            ids = torch.from_numpy(documents.ids[part].astype(np.int64))
            alone = model(input_ids=ids[None]).logits[0]
            # fp32 sums in another order; a token too many in the attention changes logits by more than 0.1
            torch.testing.assert_close(
                logits[torch.from_numpy(batch.sample_ids) == document], alone, rtol=1e-4, atol=1e-4
            )
            trained = torch.from_numpy(documents.trained[part])[1:]
            apart += torch.nn.functional.cross_entropy(alone[:-1][trained], ids[1:][trained], reduction="sum")
    torch.testing.assert_close(loss, apart, rtol=1e-5, atol=0)
