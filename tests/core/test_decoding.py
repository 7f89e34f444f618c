"""Continuous batching: every answer is the one it would be alone, whoever joins, leaves or fails meanwhile."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core import decoding, sampling
from core.decode_passes import read_prefix
from core.decoding import Completion, DecodeBatch, Event, generate
from core.decoding import Sequence as DecodedSequence
from core.errors import OverloadedError, TooLargeError
from core.generator import Generator
from core.kv_slots import CAPACITY_STEP
from core.prompts import Prompt
from core.sampling import GenerationOptions
from tests.tiny_generators import WINDOWED, load_tiny, prompt_of, stream, tiny_generator

ALL = ["tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3"]
GREEDY = GenerationOptions(max_new_tokens=12)
SAMPLED = GenerationOptions(max_new_tokens=12, temperature=1.3, top_k=40, top_p=0.95, seed=11)


@pytest.fixture(scope="module", params=[*ALL, *WINDOWED])
def generator(request: pytest.FixtureRequest) -> Generator:
    return tiny_generator(request.param, request.getfixturevalue)


@pytest.fixture(scope="module")
def qwen3(tiny_qwen3: Path) -> Generator:
    return load_tiny(tiny_qwen3)


def alone(generator: Generator, prompt: Prompt, options: GenerationOptions) -> Completion:
    return generate(generator, [prompt], [options])[0]


def test_greedy_tokens_are_those_of_transformers(generator: Generator) -> None:
    prompts = [prompt_of(generator, seed) for seed in range(5)]
    completions = generate(generator, prompts, [GREEDY] * 5)
    for prompt, completion in zip(prompts, completions, strict=True):
        spliced = generator.splice(prompt.ids[None], prompt.memory_mask[None], prompt.memory)
        expected = generator.model.generate(  # type: ignore[operator]  # a module's attribute may be a tensor
            inputs_embeds=spliced,
            attention_mask=torch.ones(1, prompt.tokens, dtype=torch.int64),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(generator.eos_ids),
            pad_token_id=0,
        )
        assert completion.token_ids == expected[0].tolist()
    assert len({tuple(completion.token_ids) for completion in completions}) > 1


@pytest.mark.parametrize("max_sequences", [1, 2, 8])
def test_batched_equals_one_by_one(generator: Generator, max_sequences: int) -> None:
    prompts = [prompt_of(generator, seed, blocks=seed % 4) for seed in range(6)]
    options = [GREEDY, SAMPLED] * 3
    together = generate(generator, prompts, options, max_sequences=max_sequences)
    assert together == [alone(generator, *pair) for pair in zip(prompts, options, strict=True)]


def test_padding_changes_nothing(qwen3: Generator) -> None:
    short, long = prompt_of(qwen3, 1), prompt_of(qwen3, 2, blocks=40)
    assert long.tokens > 3 * short.tokens
    batch = DecodeBatch(qwen3, 2, 1000)
    sequences = batch.add([short, long], [GREEDY, GREEDY])
    drain(batch)
    assert sequences[0].token_ids == alone(qwen3, short, GREEDY).token_ids


def test_prompts_prefilled_in_several_passes_keep_their_order(
    qwen3: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_of(qwen3, seed, blocks=seed) for seed in (1, 5, 0, 3)]
    expected = [alone(qwen3, prompt, GREEDY).token_ids for prompt in prompts]
    monkeypatch.setattr(decoding, "MAX_PREFILL_TOKENS", 2 * prompts[0].tokens)
    batch = DecodeBatch(qwen3, 4, 400)
    sequences = batch.add(prompts, [GREEDY] * 4)
    drain(batch)
    assert [sequence.token_ids for sequence in sequences] == expected


def damaged(generator: Generator) -> Prompt:
    """A long prompt whose memory embeddings are no numbers."""
    prompt = prompt_of(generator, 9, blocks=9)
    return replace(prompt, memory=torch.full_like(prompt.memory, torch.inf))


def test_numbers_that_overflow_stay_with_their_sequence(generator: Generator) -> None:
    long, short = prompt_of(generator, 2, blocks=12), prompt_of(generator, 1)
    options = GenerationOptions(max_new_tokens=30)
    for ending in (GenerationOptions(max_new_tokens=1), GREEDY):
        batch = DecodeBatch(generator, 3, 1000)
        (steady, _) = batch.add([long, damaged(generator)], [options, ending])
        for _ in range(ending.max_new_tokens):
            batch.step()
        assert batch.live == 1
        after = batch.add([short, short], [GREEDY, SAMPLED])  # in the slot that was left, beside one longer than it
        drain(batch)
        expected = [alone(generator, long, options), alone(generator, short, GREEDY), alone(generator, short, SAMPLED)]
        assert [each.token_ids for each in (steady, *after)] == [each.token_ids for each in expected]


@pytest.mark.parametrize("split", [1, 7])
def test_a_shared_prefix_changes_no_answer(generator: Generator, split: int) -> None:
    prompts = [prompt_of(generator, seed, blocks=seed) for seed in range(1, 5)]
    expected = [alone(generator, prompt, GREEDY).token_ids for prompt in prompts]
    prefix = read_prefix(generator, prompts[0].ids[:split].tolist())
    batch = DecodeBatch(generator, 4, 400, prefix)
    sequences = batch.add(prompts[:1], [GREEDY])
    batch.step()
    sequences += batch.add(prompts[1:], [GREEDY] * 3)
    drain(batch)
    assert [sequence.token_ids for sequence in sequences] == expected


def test_a_prompt_that_begins_otherwise_is_read_whole(qwen3: Generator) -> None:
    prompt = prompt_of(qwen3, 3, blocks=2)
    other = read_prefix(qwen3, [int(prompt.ids[0]) + 1, 5, 6])
    longer = read_prefix(qwen3, [*prompt.ids.tolist(), 7])
    for prefix in (other, longer):
        batch = DecodeBatch(qwen3, 1, 400, prefix)
        sequence = batch.add([prompt], [GREEDY])[0]
        drain(batch)
        assert sequence.token_ids == alone(qwen3, prompt, GREEDY).token_ids


def drain(batch: DecodeBatch) -> list[Event]:
    events: list[Event] = []
    while batch.live:
        events += batch.step()
    return events


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_joining_and_leaving_change_no_answer(qwen3: Generator, seed: int) -> None:
    schedule = random.Random(seed)
    kinds = [
        GenerationOptions(max_new_tokens=schedule.randint(1, 14), temperature=schedule.choice([0.0, 1.2]), seed=i)
        for i in range(8)
    ]
    prompts = [prompt_of(qwen3, i, blocks=schedule.randint(0, 9)) for i in range(8)]
    batch = DecodeBatch(qwen3, 3, 400)
    running: dict[int, DecodedSequence] = {}
    waiting, cancelled = list(range(8)), set()
    while waiting or batch.live:
        count = schedule.randint(0, min(batch.free_slots, len(waiting)))
        joining, waiting = waiting[:count], waiting[count:]
        added = batch.add([prompts[i] for i in joining], [kinds[i] for i in joining])
        running |= dict(zip(joining, added, strict=True))
        if running and schedule.random() < 0.25:  # before its first token, in the midst, or after its end
            chosen = schedule.choice(sorted(running))
            cancelled |= {chosen} if running[chosen].finish_reason is None else set()
            batch.cancel(running[chosen])
        batch.step()
    assert len(running) == 8
    for i, sequence in running.items():
        expected = alone(qwen3, prompts[i], kinds[i])
        if i in cancelled:
            assert sequence.token_ids == expected.token_ids[: len(sequence.token_ids)]
            assert sequence.finish_reason is None
        else:
            assert (sequence.token_ids, sequence.finish_reason) == (expected.token_ids, expected.finish_reason)


def test_slots_grow_while_sequences_run(qwen3: Generator) -> None:
    long = prompt_of(qwen3, 4, blocks=30)
    assert long.tokens > CAPACITY_STEP
    batch = DecodeBatch(qwen3, 4, 2000)
    first = batch.add([prompt_of(qwen3, 1)], [GREEDY])[0]
    batch.step()
    second = batch.add([long], [GREEDY])[0]
    drain(batch)
    assert first.token_ids == alone(qwen3, prompt_of(qwen3, 1), GREEDY).token_ids
    assert second.token_ids == alone(qwen3, long, GREEDY).token_ids


def test_an_idle_batch_gives_back_what_a_long_prompt_took(qwen3: Generator) -> None:
    batch = DecodeBatch(qwen3, 4, 8192)
    batch.add([prompt_of(qwen3, 4, blocks=200)], [GREEDY])
    drain(batch)
    held = batch.kv_bytes
    sequence = batch.add([prompt_of(qwen3, 1)], [GREEDY])[0]
    assert batch.kv_bytes < held / 4
    drain(batch)
    assert sequence.token_ids == alone(qwen3, prompt_of(qwen3, 1), GREEDY).token_ids


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_streamed_text_joined_is_the_whole(generator: Generator, options: GenerationOptions) -> None:
    prompt = prompt_of(generator, 3)
    events = list(stream(generator, prompt, options))
    completion = alone(generator, prompt, options)
    assert "".join(event.text for event in events) == completion.text
    assert [event.token_id for event in events] == completion.token_ids
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [completion.finish_reason]


def test_a_stop_string_across_tokens_ends_the_answer(qwen3: Generator) -> None:
    prompt, options = prompt_of(qwen3, 5), GenerationOptions(max_new_tokens=30, temperature=1.0, seed=2)
    events = list(stream(qwen3, prompt, options))
    whole = "".join(event.text for event in events)
    border = len("".join(event.text for event in events[:10]))
    stop = whole[border - 2 : border + 2]
    completion = alone(qwen3, prompt, GenerationOptions(max_new_tokens=30, temperature=1.0, seed=2, stop=(stop,)))
    assert len(stop) == 4
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"


def test_the_end_of_turn_ends_the_answer_and_leaves_no_text(qwen3: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(qwen3, 6)
    ids = alone(qwen3, prompt, SAMPLED).token_ids
    end = next(token for token in ids if ids.index(token) >= 3)
    monkeypatch.setattr(qwen3, "eos_ids", frozenset({end}))
    completion = alone(qwen3, prompt, SAMPLED)
    assert completion.token_ids == ids[: ids.index(end) + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == qwen3.tokenizer.decode(ids[: ids.index(end)]).rstrip("\ufffd")  # type: ignore[union-attr]


def test_the_end_of_a_room_ends_the_answer(qwen3: Generator) -> None:
    prompt = prompt_of(qwen3, 1)
    batch = DecodeBatch(qwen3, 1, prompt.tokens + 4)
    sequence = batch.add([prompt], [GREEDY])[0]
    drain(batch)
    assert sequence.token_ids == alone(qwen3, prompt, GREEDY).token_ids[:4]
    assert sequence.finish_reason == "length"


def test_a_cancelled_sequence_frees_its_slot_at_once(qwen3: Generator) -> None:
    batch = DecodeBatch(qwen3, 2, 200)
    first, second = batch.add([prompt_of(qwen3, 1), prompt_of(qwen3, 2)], [GREEDY, GREEDY])
    batch.step()
    batch.cancel(first)
    batch.cancel(first)
    assert (batch.live, batch.free_slots) == (1, 1)
    assert [event.sequence for event in batch.step()] == [second]
    assert len(first.token_ids) == 1


def test_what_does_not_fit_is_refused_and_changes_nothing(qwen3: Generator) -> None:
    batch = DecodeBatch(qwen3, 1, 60)
    with pytest.raises(TooLargeError, match=r"passages: the prompt has \d+ tokens; at most 59 fit") as caught:
        batch.add([prompt_of(qwen3, 1, blocks=30)], [GREEDY])
    assert caught.value.limit == 59
    with pytest.raises(OverloadedError, match="2 sequences need a slot; 1 are free"):
        batch.add([prompt_of(qwen3, 1)] * 2, [GREEDY] * 2)
    with pytest.raises(ValueError, match="2 prompts came with 1 options"):
        generate(qwen3, [prompt_of(qwen3, 1)] * 2, [GREEDY])
    assert (batch.live, batch.free_slots, batch.step()) == (0, 1, [])
    assert generate(qwen3, [], []) == []


class OutOfMemory(RuntimeError):
    """Stands for the hardware's."""


def failing(call: Callable[..., Tensor], fail_at: set[int]) -> Callable[..., Tensor]:
    count = iter(range(1000))

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if next(count) in fail_at:
            raise OutOfMemory
        return call(*args, **kwargs)

    return wrapped


def drain_despite_failures(batch: DecodeBatch) -> int:
    failures = 0
    while batch.live:
        try:
            batch.step()
        except OutOfMemory:
            failures += 1
    return failures


@pytest.mark.parametrize("method", ["hidden_states", "next_logits"])
def test_a_failed_pass_loses_no_sequence(qwen3: Generator, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [alone(qwen3, prompt_of(qwen3, seed), SAMPLED).token_ids for seed in (1, 2)]
    monkeypatch.setattr(decoding, "MAX_PREFILL_TOKENS", 1)  # a pass for each prompt
    monkeypatch.setattr(qwen3, method, failing(getattr(qwen3, method), {2, 4, 6}))
    batch = DecodeBatch(qwen3, 3, 200)
    first = batch.add([prompt_of(qwen3, 1)], [SAMPLED])[0]  # pass 0
    with pytest.raises(OutOfMemory):
        batch.add([prompt_of(qwen3, 2)] * 2, [SAMPLED] * 2)  # passes 1 and 2
    assert batch.live == 1
    second = batch.add([prompt_of(qwen3, 2)], [SAMPLED])[0]  # pass 3
    assert drain_despite_failures(batch) == 2
    assert [first.token_ids, second.token_ids] == expected


def test_a_failed_choice_repeats_no_pass(qwen3: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(qwen3, prompt_of(qwen3, 1), SAMPLED).token_ids
    monkeypatch.setattr(sampling, "choose_tokens", failing(sampling.choose_tokens, {1, 3}))
    batch = DecodeBatch(qwen3, 1, 200)
    sequence = batch.add([prompt_of(qwen3, 1)], [SAMPLED])[0]
    assert drain_despite_failures(batch) == 2
    assert sequence.token_ids == expected
