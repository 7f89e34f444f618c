"""Streaming text: whole characters, exact stops, the pieces joined are the whole."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.text_stream import BROKEN, TextStream
from core.tokenization import encode, load_tokenizer

TEXTS = [
    "Plain words, and two  spaces.\n\nA new paragraph.",
    "Zażółć gęślą jaźń — naïve café",
    "日本語のテキスト。中文，한국어",
    "שלום עולם, مرحبا بالعالم\u200f",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, e\u0301 combined, \U0001f1eb\U0001f1f7",
    " leading and trailing space ",
]


@pytest.fixture(scope="module")
def byte_level(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerBase:
    """Shaped like Llama 2's and Mistral's: spaces are `▁`, unknown characters become bytes, one space is stripped."""
    characters = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    vocabulary = {piece: index for index, piece in enumerate(characters)}
    vocabulary |= {"▁t": len(vocabulary), "▁th": len(vocabulary) + 1}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "t"), ("▁t", "h")], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    chosen: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
    return chosen


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = encode(tokenizer, text).ids
    joined = "".join(pieces(tokenizer, ids))
    assert joined == decode(tokenizer, ids)
    assert joined.strip() == text.strip()  # Llama 2's kind takes a leading space for its own


@given(text=st.text(max_size=40))
def test_no_piece_is_broken(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = text.replace(BROKEN, "").replace("▁", "")
    ids = encode(tokenizer, text).ids
    got = pieces(tokenizer, ids)
    assert not any(BROKEN in piece for piece in got)
    assert "".join(got) == decode(tokenizer, ids)


@given(text=st.text(max_size=12), cut=st.integers(1, 30))
def test_an_answer_cut_inside_a_character_loses_only_that_character(
    byte_level: PreTrainedTokenizerBase, text: str, cut: int
) -> None:
    text = text.replace(BROKEN, "")
    answer = "".join(pieces(byte_level, encode(byte_level, text).ids[:cut]))
    assert text.startswith(answer)
    assert answer == decode(byte_level, encode(byte_level, text).ids[:cut]).rstrip(BROKEN)


@given(ids=st.lists(st.integers(5, 400), max_size=30))
def test_any_tokens_give_what_the_tokenizer_decodes(byte_level: PreTrainedTokenizerBase, ids: list[int]) -> None:
    # Random bytes: invalid ones in the middle are shown as the tokenizer shows them, unfinished ones at the end not.
    assert "".join(pieces(byte_level, ids)).rstrip(BROKEN) == decode(byte_level, ids).rstrip(BROKEN)


def test_special_tokens_leave_no_text(byte_level: PreTrainedTokenizerBase) -> None:
    start, bos = special_id(byte_level, "<|im_start|>"), special_id(byte_level, "<s>")
    words = encode(byte_level, "The river").ids
    assert "".join(pieces(byte_level, [start, *words, bos, *words])) == "The riverThe river"


@given(
    text=st.text(alphabet="ab🎉\n", max_size=20),
    stop=st.lists(st.text(alphabet="ab🎉\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_answer_ends_before_the_first_complete_stop_string(
    byte_level: PreTrainedTokenizerBase, text: str, stop: list[str]
) -> None:
    found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    expected = text[: min(found)[1]] if found else text
    assert "".join(pieces(byte_level, encode(byte_level, text).ids, tuple(stop))) == expected


def test_text_is_held_back_only_while_it_may_become_a_stop_string(byte_level: PreTrainedTokenizerBase) -> None:
    stream = TextStream(byte_level, ("Q:END",))
    given_text = [stream.push(token) for character in "aQ:ENx" for token in encode(byte_level, character).ids]
    assert given_text == ["a", "", "", "", "", "Q:ENx"]
    assert "".join(stream.push(token) for token in encode(byte_level, "y Q:END more").ids) == "y "
    assert stream.stopped
    assert stream.finish() == ""
