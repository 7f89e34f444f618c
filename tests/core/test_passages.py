"""Chunking: nothing dropped, every budget kept, cut at sentence ends where possible, in any script."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.errors import InvalidInputError
from core.passages import Chunk, Passage, chunk_passage
from core.tokenization import encode, load_tokenizer
from tests.tiny_models import TEXT

FAMILY = "👩‍👩‍👧"
SCRIPTS = [
    "莱茵河发源于瑞士阿尔卑斯山。它向北流经德国！",
    "ينبع نهر الراين من جبال الألب السويسرية. هل يتدفق شمالا؟ ",
    "राइन नदी स्विस आल्प्स से निकलती है। ",
    f"{FAMILY}🇨🇭",
    "e\u0301\u0323 a\u0308 ",
    "\u200b\u00ad",
    "\x00\x07",
    "---- ",
    '."',
    "a",
    "\n",
    "Dr. Who said: “Go!” (Twice.) 3.14 … ",
]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module", params=["same", "bert", "modernbert"])
def compressor(
    request: pytest.FixtureRequest, llama: PreTrainedTokenizerBase, tiny_bert: Path, tiny_modernbert: Path
) -> PreTrainedTokenizerBase:
    folders = {"bert": tiny_bert, "modernbert": tiny_modernbert}
    return llama if request.param == "same" else load_tokenizer(folders[request.param])


def check_chunks(
    passage: Passage, chunks: list[Chunk], tokens: PreTrainedTokenizerBase, same: bool, budget: int
) -> None:
    """What is true of the chunks of every passage."""
    content = passage.content
    whole = encode(tokens, content)
    assert [token for chunk in chunks for token in chunk.generator_ids] == whole.ids
    assert [span for chunk in chunks for span in chunk.generator_spans] == whole.spans
    assert "".join(content[chunk.start : chunk.end] for chunk in chunks) == content
    assert all(before.end == after.start for before, after in pairwise(chunks))
    # No character is torn: byte-level tokens of one emoji are in one chunk.
    assert all(before.generator_spans[-1][1] <= after.generator_spans[0][0] for before, after in pairwise(chunks))
    for chunk in chunks:
        assert 1 <= len(chunk.generator_ids) <= budget
        assert 1 <= len(chunk.compressor_ids) <= budget
        assert len(chunk.compressor_index) == len(chunk.generator_ids)
        assert 0 <= min(chunk.compressor_index) <= max(chunk.compressor_index) < len(chunk.compressor_ids)
        if same:
            assert chunk.compressor_ids == chunk.generator_ids
            assert chunk.compressor_index == list(range(len(chunk.generator_ids)))


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
mixed_text = st.lists(st.sampled_from([*SCRIPTS, *TEXT.split(". ")]), min_size=1, max_size=12).map("".join)


@given(text=any_text | mixed_text, title=st.sampled_from(["", "Rhine", "莱茵河"]), budget=st.integers(4, 40))
def test_nothing_is_dropped_and_budgets_hold(
    llama: PreTrainedTokenizerBase, compressor: PreTrainedTokenizerBase, text: str, title: str, budget: int
) -> None:
    passage = Passage(text, title)
    if not passage.content.strip():
        return
    chunks = chunk_passage(passage, 3, llama, compressor, budget)
    assert {chunk.passage for chunk in chunks} == {3}
    check_chunks(passage, chunks, llama, compressor is llama, budget)


@pytest.mark.parametrize("unit", [*SCRIPTS, "The Rhine rises in the Alps. It flows north! "])
def test_long_passages_take_little_time(llama: PreTrainedTokenizerBase, tiny_bert: Path, unit: str) -> None:
    compressor = load_tokenizer(tiny_bert)
    passage = Passage("The Rhine. " + unit * (100_000 // len(unit.encode())))
    start = time.process_time()
    chunks = chunk_passage(passage, 0, llama, compressor, 128)
    assert time.process_time() - start < 10  # measured: under 1 s; quadratic work would take minutes
    check_chunks(passage, chunks, llama, False, 128)


def test_cuts_are_at_sentence_ends(llama: PreTrainedTokenizerBase, compressor: PreTrainedTokenizerBase) -> None:
    text = TEXT.strip().replace("\n", " ")
    chunks = chunk_passage(Passage(text), 0, llama, compressor, 96)
    assert len(chunks) > 4
    for chunk in chunks[:-1]:
        assert text[: chunk.end].rstrip()[-1] in ".?"
        assert (
            chunk.end == len(text) or text[chunk.end - 1 : chunk.end + 1].strip() != text[chunk.end - 1 : chunk.end + 1]
        )


@pytest.mark.parametrize(
    ("sentence", "end"),
    [
        ("莱茵河发源于瑞士。", "。"),
        ("She said: “Go now!” ", "!”"),
        ("هل يتدفق شمالا؟ ", "؟"),
        ("नदी है। ", "।"),
        ("line\n", "\n"),
    ],
)
def test_sentence_ends_of_other_scripts(llama: PreTrainedTokenizerBase, sentence: str, end: str) -> None:
    budget = 2 * len(encode(llama, sentence).ids) + 3
    chunks = chunk_passage(Passage(sentence * 9), 0, llama, llama, budget)
    for chunk in chunks[:-1]:
        assert (sentence * 9)[: chunk.end].rstrip(" ").endswith(end)


def test_without_sentences_words_stay_whole_and_chunks_even(llama: PreTrainedTokenizerBase) -> None:
    text = " the" * 200
    assert len(encode(llama, text).ids) == 200
    chunks = chunk_passage(Passage(text), 0, llama, llama, 64)
    assert [len(chunk.generator_ids) for chunk in chunks] == [50, 50, 50, 50]
    long = " Netherlands" * 60
    for chunk in chunk_passage(Passage(long), 0, llama, llama, 32)[:-1]:
        assert long[: chunk.end].rstrip().endswith("Netherlands")


def test_one_chunk_where_one_is_enough(llama: PreTrainedTokenizerBase) -> None:
    text = "One. Two. Three."
    (chunk,) = chunk_passage(Passage(text), 0, llama, llama, len(encode(llama, text).ids))
    assert (chunk.start, chunk.end) == (0, len(text))


def test_each_generator_token_is_read_from_the_word_that_covers_it(
    llama: PreTrainedTokenizerBase, tiny_bert: Path
) -> None:
    bert = load_tokenizer(tiny_bert)
    content = TEXT.strip()
    for chunk in chunk_passage(Passage(content), 0, llama, bert, 64):
        pieces = [piece.removeprefix("##") for piece in bert.convert_ids_to_tokens(chunk.compressor_ids)]
        for (start, end), index in zip(chunk.generator_spans, chunk.compressor_index, strict=True):
            first = content[start:end].lstrip()[:1].lower()
            if first:  # the token is not white space alone
                assert first in pieces[index]


def test_a_generator_token_of_many_compressor_tokens_keeps_the_budget(tiny_bert: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    passage = Passage(f"Above {'-' * 100} below")
    chunks = chunk_passage(passage, 0, words, load_tokenizer(tiny_bert), 32)
    assert [len(chunk.generator_ids) for chunk in chunks] == [1, 1, 1]
    assert [len(chunk.compressor_ids) for chunk in chunks][1] == 32


def test_a_last_token_over_the_budget_is_a_chunk_as_it_is(tiny_bert: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    for text, chunks in (("#" * 80, 1), (f"Above {'#' * 80}", 2)):
        found = chunk_passage(Passage(text), 0, words, load_tokenizer(tiny_bert), 64)
        assert [len(chunk.generator_ids) for chunk in found] == [1] * chunks
        assert (len(found[-1].compressor_ids), found[-1].end) == (64, len(text))


def test_what_the_encoder_cannot_see_still_has_a_token_to_read(llama: PreTrainedTokenizerBase, tiny_bert: Path) -> None:
    bert = load_tokenizer(tiny_bert)
    assert encode(bert, "\u200b\u200d\x07").ids == []
    (chunk,) = chunk_passage(Passage("\u200b\u200d\x07"), 0, llama, bert, 32)
    assert chunk.compressor_ids == [bert.unk_token_id]
    assert set(chunk.compressor_index) == {0}


def test_the_title_is_read_first() -> None:
    assert Passage("Text.", title="Title").content == "Title\nText."
    assert Passage("Text.").content == "Text."


@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000"])
def test_an_empty_passage_is_refused_by_its_name(llama: PreTrainedTokenizerBase, text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        chunk_passage(Passage(text), 5, llama, llama, 32)
    assert caught.value.field == "passages.5.text"
