"""Questions that share a text prompt: losses and gradients as if each were alone, and no question sees another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig

from core.config import Mode
from core.kv_slots import AttentionMasks
from core.pipeline import passage_text_ids
from tests.tiny_generators import WINDOWED, tiny_generator
from tests.tiny_training import gradients, make_config, make_objective, make_rows
from training.batches import background_tokens, example_tokens, find_siblings, make_example, question_tokens
from training.config import LossConfig, TrainConfig
from training.data_format import Row
from training.objective import Objective
from training.packing import pack, packed_mask
from training.task import over_prompt_limit


def sharing_rows() -> list[Row]:
    """Two passages that three and two questions are about, and one that only one is."""
    bases = make_rows(3)
    extra = [
        replace(bases[0], id="a1", query="Which town holds it?", answers=("Warsaw",)),
        replace(bases[0], id="a2", query="What kind of thing is number 0, in one word?", answers=("a train",)),
        replace(bases[1], id="b1", query="In which country does it rest tonight?", answers=("Germany, it says",)),
    ]
    return [*bases, *extra]


def text_config(generator: Path, questions: int) -> TrainConfig:
    data = {"passages": 2, "modes": {"text": 1.0}, "text_questions": questions}
    return make_config(generator, loss={"relevance": 0.0}, data=data)


def test_siblings_are_the_rows_with_the_same_relevant_passages() -> None:
    rows = sharing_rows()
    assert find_siblings(rows) == [[3, 4], [5], [], [0, 4], [0, 3], [1]]
    unjudged = [replace(row, passages=tuple(replace(p, relevance=None) for p in row.passages)) for row in rows]
    assert find_siblings(unjudged) == [[]] * 6


@pytest.mark.parametrize("mode", ["compressed", "hybrid", "text"])
def test_an_example_costs_what_is_computed_of_it(tiny_llama: Path, mode: Mode) -> None:
    config = text_config(tiny_llama, 9)
    config = replace(config, data=replace(config.data, modes={mode: 1.0}), loss=LossConfig())
    objective, _ = make_objective(config)
    rows = sharing_rows()
    for index, row in enumerate(rows):
        sharing = [rows[other] for other in find_siblings(rows)[index]]
        example = make_example(objective.model, row, config.data, config.loss, "k", siblings=sharing)
        real, most = objective([example]).real, max(map(len, passage_text_ids(example.request)))
        slack = most if mode == "hybrid" else 0  # scores decide which passage is shown
        assert real <= example_tokens(objective.model, example) <= real + slack
    unasked = LossConfig(answer=0.0)  # the generator does not run
    objective = Objective(objective.model, unasked, 4000)
    example = make_example(objective.model, rows[0], config.data, unasked, "k")
    assert example_tokens(objective.model, example) == objective([example]).real


def test_the_longest_of_the_questions_must_be_within_the_limit(tiny_llama: Path) -> None:
    config = text_config(tiny_llama, 2)
    model = make_objective(config)[0].model
    rows = sharing_rows()
    long = replace(rows[3], query="word " * 50)
    alone, short, together = (
        make_example(model, rows[0], config.data, config.loss, "k", siblings=siblings)
        for siblings in ([], [rows[3]], [long])
    )
    most = next(limit for limit in range(1000) if not over_prompt_limit(model, together, limit))
    assert over_prompt_limit(model, together, most - 1)
    own = background_tokens(model, alone.request, alone.rows, "text") + question_tokens(model, together.questions[1])
    assert most == own
    assert not over_prompt_limit(model, alone, most - 40)
    assert not over_prompt_limit(model, short, most - 40)


def test_a_text_example_takes_as_many_siblings_as_allowed(tiny_llama: Path) -> None:
    rows = sharing_rows()
    objective, _ = make_objective(text_config(tiny_llama, 2))

    def queries(questions: int, mode: Mode, key: str = "k") -> list[str]:
        config = text_config(tiny_llama, questions)
        data = replace(config.data, modes={mode: 1.0})
        made = make_example(objective.model, rows[0], data, config.loss, key, siblings=[rows[3], rows[4]])
        return [question.query for question in made.questions]

    assert queries(1, "text") == [rows[0].query]
    assert {tuple(queries(2, "text", str(key))) for key in range(20)} == {
        (rows[0].query, rows[3].query),
        (rows[0].query, rows[4].query),
    }
    assert sorted(queries(9, "text")) == sorted(rows[index].query for index in (0, 3, 4))
    assert queries(9, "hybrid") == queries(9, "compressed") == [rows[0].query]


def test_an_example_without_its_relevant_passages_has_no_questions(tiny_llama: Path) -> None:
    config = text_config(tiny_llama, 3)
    objective, _ = make_objective(config)
    data = replace(config.data, empty_share=1.0)
    rows = sharing_rows()
    assert make_example(objective.model, rows[0], data, config.loss, "k", siblings=rows[3:5]).questions == []


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama", *WINDOWED])
def test_sharing_a_prompt_changes_neither_losses_nor_gradients(
    name: str, matrix: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    generator = tiny_generator(name, request.getfixturevalue)
    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    config = text_config(tmp_path, 9)
    objective, parameters = make_objective(config)
    if not matrix:
        objective.generator.model.set_attn_implementation("sdpa")
    rows, siblings = sharing_rows(), find_siblings(sharing_rows())
    shared = [
        make_example(objective.model, rows[i], config.data, config.loss, f"k{i}", None, [rows[j] for j in siblings[i]])
        for i in range(3)
    ]
    assert [len(example.questions) for example in shared] == [3, 2, 1]
    alone = [
        replace(example, questions=[question], request=replace(example.request, query=question.query))
        for example in shared
        for question in example.questions
    ]
    (one, one_sums), (other, other_sums) = (gradients(objective, parameters, made, config) for made in (shared, alone))
    assert one_sums["count_answer"] == other_sums["count_answer"]
    assert one_sums["sum_answer"] == pytest.approx(other_sums["sum_answer"], rel=1e-4)
    assert one_sums["real"] < other_sums["real"]
    compared = 0
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, atol=2e-5, rtol=1e-3)
            compared += bool(a.any())
    assert compared > 4


def test_a_packed_sequence_by_hand() -> None:
    prefix, shown = torch.tensor([5, 6, 7]), torch.tensor([False, True, False])
    packed = pack(prefix, shown, [([10, 11], [12, 13]), ([20], [21])])
    assert packed.ids.tolist() == [5, 6, 7, 10, 11, 12, 13, 20, 21]
    assert packed.memory_mask.tolist() == [False, True] + [False] * 7
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4]
    assert packed.predictors.tolist() == [4, 5, 7]
    short = pack(prefix[:1], shown[:1], [([10], [11])])
    positions = torch.tensor([packed.positions.tolist(), [0, 1, 2, *[0] * 6]])

    def looks_of(window: int) -> Tensor:
        mask = packed_mask(
            [packed, short], positions, AttentionMasks(MistralConfig(sliding_window=window), torch.float32)
        )
        assert isinstance(mask, Tensor)
        assert mask.shape == (2, 1, 9, 9)
        return (mask == 0).squeeze(1)

    looks = looks_of(9)
    assert looks[0, 8].nonzero().flatten().tolist() == [0, 1, 2, 7, 8]
    assert looks[0, 5].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert looks[1, 2].nonzero().flatten().tolist() == [0, 1, 2]
    assert looks[1, 8].any()  # padding: never read, but a row of nothing would be not a number
    assert looks_of(3)[0, 8].nonzero().flatten().tolist() == [2, 7, 8]
