"""The policy's rules: what is read, and how each passage is shown, under any bound."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.policy import Candidate, Choice, Policy, Size, TokenCosts, choose, estimate, overall, plan

COSTS = TokenCosts(compressor_s=0.001, prefill_s=0.01)
LONG = Size(text=128, memory=8, compressor=160)
SHORT = Size(text=10, memory=8, compressor=42)
FRAME = [50, 54, 58, 62, 66]


def modes(choices: dict[int, Choice]) -> list[str]:
    return [choices[i].mode for i in range(len(choices))]


def reasons(choices: dict[int, Choice]) -> list[str]:
    return [choices[i].reason for i in range(len(choices))]


def candidates(*relevance: float, text: int | None = 100, memory: int | None = 8) -> list[Candidate]:
    """Best first, as the policy takes them."""
    made = [Candidate(i, each, text, memory) for i, each in enumerate(relevance)]
    return sorted(made, key=lambda each: -(each.relevance or 0))


def test_named_modes_show_every_passage_as_asked() -> None:
    passages = candidates(0.2, 0.9, 0.5)
    for mode, hybrid_top, shown in (
        ("text", None, ["text"] * 3),
        ("compressed", None, ["compressed"] * 3),
        ("hybrid", 1, ["compressed", "hybrid", "compressed"]),
        ("hybrid", 2, ["compressed", "hybrid", "hybrid"]),
        ("hybrid", 9, ["hybrid"] * 3),
        ("hybrid", 0, ["compressed"] * 3),
    ):
        policy = Policy(mode, hybrid_top)  # type: ignore[arg-type]  # a tuple's literals
        assert modes(choose(policy, passages, FRAME, None, 0.5)) == shown


def test_what_does_not_fit_is_dropped_least_relevant_first() -> None:
    passages = candidates(0.2, 0.9, 0.5)
    two = FRAME[2] + 2 * 8
    chosen = choose(Policy("compressed", max_prompt_tokens=two), passages, FRAME, two, 0.5)
    assert modes(chosen) == ["dropped", "compressed", "compressed"]
    assert chosen[0] == Choice("dropped", "over_budget", 0)
    one_less = choose(Policy("compressed", max_prompt_tokens=two - 1), passages, FRAME, two - 1, 0.5)
    assert modes(one_less) == ["dropped", "compressed", "dropped"]
    text = choose(Policy("text", max_prompt_tokens=160), passages, FRAME, 160, 0.5)
    assert modes(text) == ["dropped", "text", "dropped"]


def test_one_that_does_not_fit_makes_room_for_a_smaller_one() -> None:
    passages = [Candidate(0, 0.9, 100, 90), Candidate(1, 0.1, 20, 8)]
    chosen = choose(Policy("compressed", max_prompt_tokens=70), passages, FRAME, 70, 0.5)
    assert modes(chosen) == ["dropped", "compressed"]


def test_auto_spends_the_bound_on_text_for_the_relevant() -> None:
    passages = candidates(0.2, 0.9, 0.7)
    policy = Policy("auto", max_prompt_tokens=1000)
    chosen = choose(policy, passages, FRAME, 1000, 0.5)
    assert (modes(chosen), reasons(chosen)) == (["compressed", "hybrid", "hybrid"], ["pays", "relevant", "relevant"])
    assert chosen[1].tokens == 100 + 8
    one_text = FRAME[3] + 100 + 3 * 8
    assert modes(choose(policy, passages, FRAME, one_text, 0.5)) == ["compressed", "hybrid", "compressed"]
    assert modes(choose(policy, passages, FRAME, one_text - 1, 0.5)) == ["compressed"] * 3
    # Without a bound of the caller's there is nothing to spend.
    assert modes(choose(Policy("auto"), passages, FRAME, 1000, 0.5)) == ["compressed"] * 3


def test_auto_passes_short_passages_through_as_text() -> None:
    passages = [Candidate(0, 0.9, 8, 8), Candidate(1, 0.5, 100, 8), Candidate(2, None, 10, None)]
    chosen = choose(Policy("auto"), passages, FRAME, None, 0.5)
    assert (modes(chosen), reasons(chosen)) == (["text", "compressed", "text"], ["no_gain", "pays", "no_gain"])


def test_irrelevant_passages_are_dropped_where_that_is_asked_for() -> None:
    passages = candidates(0.2, 0.9, 0.5)
    chosen = choose(Policy("text", min_relevance=0.5), passages, FRAME, None, 0.5)
    assert chosen[0] == Choice("dropped", "below_min_relevance", 0)
    assert modes(chosen) == ["dropped", "text", "text"]


def test_embeddings_without_text_stay_compressed() -> None:
    passages = candidates(0.2, 0.9, text=None)
    for mode in ("hybrid", "auto"):
        chosen = choose(Policy(mode, 2, 1000), passages, FRAME, 1000, 0.1)
        assert set(reasons(chosen)) == {"no_text"}
        assert set(modes(chosen)) == {"compressed"}


def test_hybrid_says_what_it_had_no_room_to_show_as_text() -> None:
    passages = candidates(0.9, 0.2)
    chosen = choose(Policy("hybrid", 1, 80), passages, FRAME, 80, 0.5)
    assert chosen[0] == Choice("compressed", "over_budget", 8)


def test_hybrid_has_the_best_as_text_before_it_keeps_the_embeddings_of_the_others() -> None:
    passages = candidates(0.2, 0.9, 0.5)
    for room, shown in (
        (FRAME[1] + 8 + 100 - 1, ["compressed", "compressed", "compressed"]),
        (FRAME[1] + 8 + 100, ["dropped", "hybrid", "dropped"]),
        (FRAME[2] + 8 + 100 + 8, ["dropped", "hybrid", "compressed"]),
        (FRAME[3] + 8 + 100 + 8 + 8, ["compressed", "hybrid", "compressed"]),
    ):
        assert modes(choose(Policy("hybrid", 1, room), passages, FRAME, room, 0.5)) == shown


sizes = st.builds(
    lambda index, relevance, text, memory: Candidate(index, relevance, text, memory),
    st.just(0),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 300)),
    st.integers(1, 40),
)


@given(
    mode=st.sampled_from(["compressed", "text", "hybrid", "auto"]),
    passages=st.lists(sizes, max_size=12),
    room=st.integers(50, 1000),
    min_relevance=st.floats(0, 1),
)
def test_no_prompt_is_over_its_bound(mode: Any, passages: list[Candidate], room: int, min_relevance: float) -> None:
    passages = [replace(each, index=i) for i, each in enumerate(passages)]
    best_first = sorted(passages, key=lambda each: -(each.relevance or 0))
    frame = [50 + 4 * i for i in range(len(passages) + 1)]
    chosen = choose(Policy(mode, 2, room, min_relevance), best_first, frame, room, 0.5)
    shown = [choice for choice in chosen.values() if choice.mode != "dropped"]
    used = frame[len(shown)] + sum(choice.tokens for choice in shown)
    assert used <= room
    assert set(chosen) == set(range(len(passages)))
    for passage in passages:
        choice = chosen[passage.index]
        taken = {"text": passage.text or 0, "compressed": passage.memory or 0, "dropped": 0}
        taken["hybrid"] = taken["text"] + taken["compressed"]
        assert choice.tokens == taken[choice.mode]
        if choice.mode == "dropped" and mode == "compressed" and (passage.relevance or 0) >= min_relevance:
            # It would not have fitted beside the more relevant ones.
            ahead = [p.memory or 0 for p in best_first[: best_first.index(passage)] if chosen[p.index].tokens]
            assert frame[len(ahead) + 1] + sum(ahead) + (passage.memory or 0) > room


def test_costs_decide_what_auto_compresses() -> None:
    each = [LONG, SHORT]
    chosen = plan(Policy("auto"), {16: each}, FRAME[:3], None, COSTS)
    assert (chosen.read, chosen.reason) == (frozenset({0}), "costs")
    dear = plan(Policy("auto"), {16: each}, FRAME[:3], None, TokenCosts(0.01, 0.001))
    assert dear.read == frozenset()
    cheap = plan(Policy("auto"), {16: each}, FRAME[:3], None, TokenCosts(0.0, 0.001))
    assert cheap.read == frozenset({0, 1})


def test_estimates_are_lengths_times_costs() -> None:
    got = estimate([LONG, SHORT], 54, COSTS)
    assert got is not None
    assert got.text_s == pytest.approx(0.01 * (54 + 128 + 10))
    assert got.compressed_s == pytest.approx(0.001 * (160 + 42) + 0.01 * (54 + 16))
    assert got.hybrid_s == pytest.approx(0.001 * 160 + 0.01 * (54 + 8 + 10))
    assert estimate([LONG], 54, None) is None


def test_relevance_is_asked_for_where_something_may_have_to_go() -> None:
    dear = TokenCosts(0.01, 0.001)
    each = [LONG, SHORT]
    fits = FRAME[2] + 128 + 10
    assert plan(Policy("auto", None, fits), {16: each}, FRAME[:3], fits, dear).read == frozenset()
    over = plan(Policy("auto", None, fits - 1), {16: each}, FRAME[:3], fits - 1, dear)
    assert (over.read, over.reason) == (frozenset({0, 1}), "relevance")
    wanted = plan(Policy("auto", min_relevance=0.1), {16: each}, FRAME[:3], None, dear)
    assert (wanted.read, wanted.reason) == (frozenset({0, 1}), "relevance")
    for mode in ("compressed", "text", "hybrid"):
        asked = plan(Policy(mode), {16: each}, FRAME[:3], None, dear)
        assert (asked.read, asked.reason) == (frozenset({0, 1}), "asked")


def test_a_bound_makes_auto_take_a_coarser_rate() -> None:
    at = {4: [Size(128, 32, 190)] * 4, 8: [Size(128, 16, 170)] * 4, 16: [Size(128, 8, 160)] * 4}

    def rate(room: int) -> int:
        return plan(Policy("auto", max_prompt_tokens=room), at, FRAME, room, COSTS).rate

    assert rate(FRAME[4] + 4 * 32) == 4
    assert rate(FRAME[4] + 4 * 32 - 1) == 8
    assert rate(FRAME[4] + 4 * 8) == 16
    assert rate(FRAME[0]) == 16  # nothing fits: the coarsest drops least
    assert plan(Policy("compressed", max_prompt_tokens=60), at, FRAME, 60, COSTS).rate == 4


def test_what_came_compressed_is_not_read_again() -> None:
    given_ = Size(text=None, memory=8, compressor=0)
    for mode in ("compressed", "auto"):
        assert plan(Policy(mode), {16: [given_, LONG]}, FRAME[:3], None, COSTS).read == frozenset({1})


def test_what_the_choices_amount_to() -> None:
    text, memory = Choice("text", "asked", 9), Choice("compressed", "asked", 4)
    gone = Choice("dropped", "over_budget", 0)
    assert overall([text, gone]) == "text"
    assert overall([memory]) == "compressed"
    assert overall([text, memory, gone]) == "hybrid"
    assert overall([gone]) is None
