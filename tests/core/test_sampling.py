"""Choosing tokens: exact probabilities, filters, and rows that do not see each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.errors import InvalidInputError
from core.sampling import GenerationOptions, RowSampler, choose_tokens, draw_uniforms

DRAWS = 4000


def chosen_shares(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Share of each token over evenly spread draws: its exact probability, up to 1 / DRAWS."""
    tokens = choose_tokens(
        logits.expand(DRAWS, -1),
        torch.full((DRAWS,), temperature),
        torch.full((DRAWS,), top_k),
        torch.full((DRAWS,), top_p),
        (torch.arange(DRAWS) + 0.5) / DRAWS,
    )
    return torch.bincount(tokens, minlength=logits.shape[-1]) / DRAWS


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_come_with_their_probabilities(logits: Tensor, temperature: float) -> None:
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(chosen_shares(logits, temperature), expected, atol=2 / DRAWS, rtol=0)


def test_temperature_zero_is_greedy(logits: Tensor) -> None:
    assert chosen_shares(logits, 0.0).argmax() == logits.argmax()
    assert chosen_shares(logits, 0.0).max() == 1


@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 1e-3])
def test_a_tiny_temperature_is_all_but_greedy(logits: Tensor, temperature: float) -> None:
    assert chosen_shares(logits, temperature)[logits.argmax()] == 1


def test_top_k_keeps_the_likeliest_tokens_in_proportion(logits: Tensor) -> None:
    kept = logits.topk(5).indices
    expected = torch.zeros(50).scatter(0, kept, logits[kept].softmax(-1))
    torch.testing.assert_close(chosen_shares(logits, 1.0, top_k=5), expected, atol=2 / DRAWS, rtol=0)


def test_top_p_keeps_the_smallest_set_that_holds_p(logits: Tensor) -> None:
    ordered, indices = logits.softmax(-1).sort(descending=True)
    count = int((ordered.cumsum(-1) < 0.6).sum()) + 1
    expected = torch.zeros(50).scatter(0, indices[:count], ordered[:count] / ordered[:count].sum())
    torch.testing.assert_close(chosen_shares(logits, 1.0, top_p=0.6), expected, atol=2 / DRAWS, rtol=0)


def test_the_likeliest_token_stays_however_small_top_p(logits: Tensor) -> None:
    assert chosen_shares(logits, 1.0, top_p=1e-6).argmax() == logits.argmax()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_no_draw_reaches_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    token = choose_tokens(
        logits, torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.tensor([uniform])
    )
    assert token.item() in (1, 2)


def test_whatever_is_drawn_there_is_such_a_token() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.nan, math.nan, math.nan]])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert choose_tokens(logits, torch.ones(2), zeros, torch.ones(2), torch.ones(2)).max() < 3


rows = st.tuples(st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 6), st.sampled_from([0.2, 0.8, 1.0]))


@given(options=st.lists(rows, min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_a_row_is_chosen_alone_as_in_a_batch(options: list[tuple[float, int, float]], seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(len(options), 30, generator=source), torch.rand(len(options), generator=source)
    temperature, top_k, top_p = (torch.tensor(column) for column in zip(*options, strict=True))
    together = choose_tokens(logits, temperature, top_k, top_p, uniforms)
    alone = [
        choose_tokens(*(each[i : i + 1] for each in (logits, temperature, top_k, top_p, uniforms))).item()
        for i in range(len(options))
    ]
    assert together.tolist() == alone


def test_a_seed_fixes_the_draws_and_none_does_not() -> None:
    assert torch.equal(draw_uniforms(7, 40)[:10], draw_uniforms(7, 10))
    assert not torch.equal(draw_uniforms(7, 10), draw_uniforms(8, 10))
    assert not torch.equal(draw_uniforms(None, 10), draw_uniforms(None, 10))


def test_a_moved_row_goes_on_as_it_was() -> None:
    sampler = RowSampler(3, 16, 20, torch.device("cpu"), torch.float32)
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    options = GenerationOptions(temperature=1.0, top_k=9, top_p=0.9, seed=5)
    sampler.join(0, logits, [4, 6], [GenerationOptions(), options])
    sampler.move(1, 2)
    sampler.move(2, 0)
    tokens = sampler.sample(2)
    assert tokens[0] == tokens[1]
    assert sampler.positions[0] == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2**31),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", ("x",) * 17),
    ],
)
def test_options_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        GenerationOptions(**{field: value})  # type: ignore[arg-type]  # wrong values are the point
    assert caught.value.field == field


def test_draws_take_memory_for_the_answers_there_are_and_not_for_those_there_could_be() -> None:
    """A model that names no positions has 2^31 of them."""
    sampler = RowSampler(4, 2**31, 20, torch.device("cpu"), torch.float32)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    short, long = (GenerationOptions(temperature=1.0, seed=5, max_new_tokens=count) for count in (2, 40))
    sampler.join(0, logits, [4, 4, 4], [GenerationOptions(), short, long])
    drawn = []
    for _ in range(40):
        drawn.append(sampler.sample(3).tolist())
        sampler.advance(logits)
    alone = RowSampler(1, 40, 20, torch.device("cpu"), torch.float32)
    alone.join(0, logits[2:], [4], [long])
    for _, _, token in drawn:
        assert alone.sample(1).tolist() == [token]
        alone.advance(logits[2:])
    assert [tokens[1] for tokens in drawn[:2]] == [
        int(choose_tokens(logits[1:2], torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1), draw[None]))
        for draw in draw_uniforms(5, 2)
    ]
