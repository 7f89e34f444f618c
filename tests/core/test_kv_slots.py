"""Keys and values take what was asked for and little more, and a request that memory cannot meet leaves no trace."""

from pathlib import Path

import pytest
import torch

from core.decoding import DecodeBatch, generate
from core.generator import Generator
from core.kv_slots import CAPACITY_STEP, KVSlots
from core.sampling import GenerationOptions
from tests.tiny_generators import load_tiny, prompt_of

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
POSITION_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * 4
IMPOSSIBLE = 1 << 44  # positions: no machine has room for them
GREEDY = GenerationOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Generator:
    return load_tiny(tiny_llama)


def fill(slots: KVSlots, rows: int, length: int) -> None:
    """A prefill of `rows` sequences, each of its own number."""
    numbers = torch.arange(1.0, rows + 1)[:, None, None, None].expand(rows, HEADS, length, HEAD_DIM)
    slots.begin_prefill(0)
    for layer in range(LAYERS):
        slots.update(numbers, -numbers, layer)


def read(slots: KVSlots, rows: int, length: int) -> torch.Tensor:
    """Keys of the first `rows` slots at positions [0, length): a decode step writes zeros behind them."""
    new = torch.zeros(rows, HEADS, 1, HEAD_DIM)
    slots.begin_decode(torch.full((rows,), length), length + 1)
    return [slots.update(new, new, layer)[0] for layer in range(LAYERS)][-1][:, 0, :length, 0]


def test_sequences_that_join_one_by_one_take_a_quarter_more_at_most() -> None:
    slots = KVSlots(LAYERS, 64, 8192)
    slots.reserve(1, 1000)
    fill(slots, 1, 100)
    sizes = set()
    for rows in range(1, 65):
        slots.reserve(rows, 1000)
        assert rows <= slots.slots <= 1.25 * rows
        assert slots.bytes == slots.slots * 1024 * POSITION_BYTES
        sizes.add(slots.slots)
    assert len(sizes) < 20


def test_a_longer_sequence_makes_only_what_is_live_longer() -> None:
    slots = KVSlots(LAYERS, 64, 8192)
    slots.reserve(40, 200)
    fill(slots, 40, 100)
    slots.reserve(2, 3000)
    assert slots.bytes == 2 * -(-3000 // CAPACITY_STEP) * CAPACITY_STEP * POSITION_BYTES
    assert torch.equal(read(slots, 2, 100), torch.tensor([[1.0], [2.0]]).expand(2, 100))


def test_a_batch_holds_what_its_sequences_were_promised(llama: Generator) -> None:
    batch = DecodeBatch(llama, 64, 8192)
    prompt = prompt_of(llama, 1)
    for count, positions in ((16, 1000), (1, 1100)):
        batch.add([prompt] * count, [GenerationOptions(max_new_tokens=positions - prompt.tokens)] * count)
        batch.step()
    config = llama.model.config
    position = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert batch.kv_bytes == 17 * 1152 * position


@pytest.mark.parametrize("wanted", [(5, IMPOSSIBLE), (IMPOSSIBLE, 128)])
def test_what_memory_cannot_meet_is_not_asked_for_again(wanted: tuple[int, int]) -> None:
    slots = KVSlots(LAYERS, IMPOSSIBLE, IMPOSSIBLE)
    slots.reserve(4, 128)
    fill(slots, 4, 100)
    held = slots.bytes
    with pytest.raises(RuntimeError, match=r"alloc|memory|size"):
        slots.reserve(*wanted)
    assert (slots.slots, slots.capacity, slots.bytes) == (4, 128, held)
    slots.reserve(5, 256)
    assert slots.bytes == 5 * 256 * POSITION_BYTES
    assert torch.equal(read(slots, 4, 100), torch.arange(1.0, 5)[:, None].expand(4, 100))


def test_a_first_prompt_that_fails_halfway_keeps_no_memory(llama: Generator) -> None:
    expected = generate(llama, [prompt_of(llama, 1)], [GREEDY])[0].token_ids
    batch = DecodeBatch(llama, 8, 400)

    def fail(*_: object) -> None:
        raise MemoryError

    with llama.model.get_decoder().layers[-1].register_forward_pre_hook(fail), pytest.raises(MemoryError):
        batch.add([prompt_of(llama, 1)] * 2, [GREEDY] * 2)
    assert (batch.live, batch.kv_bytes) == (0, 0)
    sequence = batch.add([prompt_of(llama, 1)], [GREEDY])[0]
    while batch.live:
        batch.step()
    assert sequence.token_ids == expected
