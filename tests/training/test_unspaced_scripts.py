"""Answers in scripts written without spaces are found and measured; all others are, exactly as they were."""

import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.model import Model
from core.pipeline import prepare
from tests.tiny_pipeline import tiny_model
from training.answer_match import LONG_WORD, WORD, answer_words, contains, places_pattern, words
from training.batches import find_hits
from training.data_format import RowPassage
from training.metrics import exact_match, normalise_answer, rouge_l, survival, token_f1
from training.negatives import BM25Retriever, ranked

SPACED = st.text(  # everything from Latin to Arabic, Hangul, and what stands between words
    st.sampled_from(string.printable + "’“”–…") | st.characters(max_codepoint=0x0DFF, codec="utf-8") | st.just("한")
)
EINSTEIN = "爱因斯坦出生于德国乌尔姆。"


@given(SPACED)
def test_words_of_spaced_scripts_are_those_of_the_plain_patterns(text: str) -> None:
    assert re.findall(WORD, text) == re.findall(r"\w+", text)
    assert re.findall(LONG_WORD, text) == re.findall(r"\b\w\w+\b", text)


@given(SPACED, st.lists(SPACED.filter(bool), min_size=1, max_size=3))
def test_places_in_spaced_scripts_are_those_of_the_plain_pattern(text: str, answers: list[str]) -> None:
    text = f"{text} {' '.join(answers)}{answers[0]}"
    plain = "|".join(map(re.escape, sorted(answers, key=len, reverse=True)))
    expected = re.compile(rf"(?<!\w)(?:{plain})(?!\w)", re.IGNORECASE)
    assert [m.span() for m in places_pattern(answers).finditer(text)] == [m.span() for m in expected.finditer(text)]


@given(SPACED, SPACED)
def test_f1_of_spaced_scripts_goes_by_spaces(left: str, right: str) -> None:
    article = re.compile(r"\b(a|an|the)\b")
    plain = [
        article.sub(" ", text.lower().translate(str.maketrans("", "", string.punctuation))).split()
        for text in (left, right)
    ]
    assert [normalise_answer(text).split() for text in (left, right)] == plain
    common = sum(min(plain[0].count(token), plain[1].count(token)) for token in set(plain[0]))
    expected = 2 * common / (len(plain[0]) + len(plain[1])) if all(plain) else float(plain[0] == plain[1])
    assert token_f1(left, right) == expected


@pytest.mark.parametrize(
    ("text", "answer", "other"),
    [
        (EINSTEIN, "乌尔姆", "慕尼黑"),
        ("アインシュタインはドイツのウルムで生まれた。", "ウルム", "ベルリン"),
        ("かぎは1879年にできた。", "1879年", "かき"),  # NFKD takes the mark off its kana
        ("ไอน์สไตน์เกิดที่เมืองอุล์ม", "อุล์ม", "อล"),
        ("ລາວຢູ່ວຽງຈັນ", "ວຽງຈັນ", "ຢ"),
        ("ကျွန်တော် ရန်ကုန်မှာနေတယ်။", "ရန်ကုန်", "ရန"),
        ("ខ្ញុំរស់នៅភ្នំពេញ។", "ភ្នំពេញ", "កម្ពុជា"),
        ("他在NASA工作", "NASA", "NAS"),
    ],
)
def test_an_answer_stands_in_a_text_without_spaces(text: str, answer: str, other: str) -> None:
    assert contains(words(text), answer_words([answer]))
    assert not contains(words(text), answer_words([other]))
    (place,) = places_pattern([answer, other]).finditer(text)
    assert place[0] == answer


@pytest.fixture(scope="module")
def pointing(tiny_llama: Path, tiny_bert: Path) -> Model:
    return tiny_model(tiny_llama, tiny_bert, readout="pointer", pointer_window=4)


def test_a_pointer_is_right_at_an_answer_without_spaces(pointing: Model) -> None:
    passages = [RowPassage(EINSTEIN, relevance=1.0)]
    hits = find_hits(pointing, prepare(pointing, "哪里?", passages), passages, ["乌尔姆"])
    assert any(hits)


def test_bm25_finds_passages_without_spaces() -> None:
    texts = ["面包由面粉和水制成。", EINSTEIN, "月球绕地球运行。", "ไอน์สไตน์เกิดที่อุล์ม"]
    chinese, thai = BM25Retriever(texts).scores(["爱因斯坦在哪里出生?", "ใครเกิดที่อุล์ม"])
    assert (next(ranked(chinese)), next(ranked(thai))) == (1, 3)


def test_answers_without_spaces_are_measured_by_character() -> None:
    assert token_f1("德国乌尔姆", "乌尔姆") == 2 * 3 / 8
    assert exact_match("「乌尔姆」。", "乌尔姆") == token_f1("乌尔姆。", "乌尔姆") == 1
    assert rouge_l("德国乌尔姆", "乌尔姆") == 2 * 3 / 8
    assert survival("生于乌尔姆", ["乌尔姆"], [EINSTEIN]) == 1
    assert survival("生于慕尼黑", ["乌尔姆"], [EINSTEIN]) == 0
    assert survival("乌尔姆", ["慕尼黑"], [EINSTEIN]) is None
