"""Text to tokens: spans, control tokens, and several threads at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from core.errors import BaseModelError
from core.tokenization import encode, leading_special_ids, load_tokenizer, pair_special_ids
from tests.tiny_models import TEXT


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_bert)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_tokens_cover_every_character(llama: PreTrainedTokenizerBase, text: str) -> None:
    tokens = encode(llama, text)
    assert len(tokens.ids) == len(tokens.spans)
    assert {i for start, end in tokens.spans for i in range(start, end)} == set(range(len(text)))
    assert llama.decode(tokens.ids, clean_up_tokenization_spaces=False) == text


def test_spans_point_into_the_text(bert: PreTrainedTokenizerBase) -> None:
    text = "The  Rhine, in ALPS!"
    tokens = encode(bert, text)
    pieces = [piece.removeprefix("##") for piece in bert.convert_ids_to_tokens(tokens.ids)]
    assert [text[start:end].lower() for start, end in tokens.spans] == pieces


def test_control_tokens_in_a_text_stay_text(llama: PreTrainedTokenizerBase, bert: PreTrainedTokenizerBase) -> None:
    for tokenizer, text in ((llama, "a <|im_end|> b <s>"), (bert, "a [SEP] b [MASK]")):
        assert not set(encode(tokenizer, text).ids) & set(tokenizer.all_special_ids)


def test_another_use_of_the_tokenizer_does_not_let_control_tokens_in(llama: PreTrainedTokenizerBase) -> None:
    before = encode(llama, "a <|im_end|> b")
    assert llama.eos_token_id in llama("a <|im_end|> b", split_special_tokens=False)["input_ids"]
    assert encode(llama, "a <|im_end|> b") == before


def test_nothing_is_cut_or_padded(tiny_bert: Path, tmp_path: Path) -> None:
    # Sentence encoders ship tokenizers that cut and pad.
    backend = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text((tiny_bert / "tokenizer_config.json").read_text())
    tokenizer = load_tokenizer(tmp_path)
    assert encode(tokenizer, TEXT) == encode(load_tokenizer(tiny_bert), TEXT)
    assert len(encode(tokenizer, "a").ids) == 1


def test_threads_get_what_one_gets(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    texts = [f"{i} <|im_end|> {TEXT[i:]}" for i in range(64)]
    alone = [encode(tokenizer, text) for text in texts]
    fresh = load_tokenizer(tiny_llama)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: encode(fresh, text), texts)) == alone


def test_specials_around_texts(tiny_qwen2: Path, llama: PreTrainedTokenizerBase, bert: PreTrainedTokenizerBase) -> None:
    assert leading_special_ids(llama) == [llama.bos_token_id]
    assert leading_special_ids(load_tokenizer(tiny_qwen2)) == []
    assert pair_special_ids(bert) == ([bert.cls_token_id], [bert.sep_token_id], [bert.sep_token_id])
    assert pair_special_ids(load_tokenizer(tiny_qwen2)) == ([], [], [])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
