"""Rows to label, and a real tiny teacher that can be watched and killed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import PromptConfig
from core.generator import Generator
from training.data_format import Row, RowPassage
from training.journal import Journal
from training.labelling import LabelConfig, label_rows
from training.teachers import LocalTeacher, TeacherAnswer


def row(index: int, **changes: Any) -> Row:
    passages = (
        RowPassage(f"The river number {index} rises in the Alps.", "Rivers", relevance=1.0),
        RowPassage("Bread is made of flour.", relevance=0.0),
    )
    values: dict[str, Any] = {"passages": passages, "answers": ("the Alps",)} | changes
    return Row(f"r{index}", f"Where does river {index} rise?", **values)


ROWS = [row(index) for index in range(7)]


class CountingTeacher:
    """A local teacher that notes what it is asked, and fails when it has been asked `lives` times."""

    def __init__(self, generator: Generator, top_k: int = 0, lives: int = 1000, max_new_tokens: int = 12) -> None:
        self._teacher = LocalTeacher(generator, PromptConfig(), max_new_tokens, top_k)
        self._lives = lives
        self.asked: list[str] = []

    def answer(self, rows: Sequence[Row]) -> list[TeacherAnswer]:
        if self._lives == 0:
            raise KeyboardInterrupt
        self._lives -= 1
        self.asked += [row.id for row in rows]
        return self._teacher.answer(rows)


def label(
    folder: Path,
    teacher: CountingTeacher,
    rows: Sequence[Row] = ROWS,
    *,
    logits: bool = True,
    block: int = 2,
    must_contain_gold: bool = False,
) -> list[Row]:
    with Journal(folder / "journal", {"teacher": "tiny"}) as journal:
        return label_rows(
            rows,
            LabelConfig(teacher="tiny", must_contain_gold=must_contain_gold),
            teacher,
            None,
            journal,
            block=block,
            logits=folder / "logits" if logits else None,
            tokenizer="t",
        )
