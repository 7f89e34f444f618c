"""The real SmolLM2 learns 32 questions by heart from compressed passages: `python -m pytest -m long tests/e2e`.

Both stages of the demo checkpoint in small, by its shipped settings; some minutes on one core.
"""

from pathlib import Path

import pytest

from tests.tiny_training import read_metrics
from training.__main__ import main
from training.data_format import Row, RowPassage, write_rows

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SHARED = [  # short rows and a short prompt; four tokens an embedding, so that what is to be learned is there to be read
    "model.compressor.chunk_tokens=32",
    "model.compressor.query_tokens=64",
    "model.compressor.rates=[4]",
    "model.compressor.allocation=proportional",
    "model.prompt.system=Answer briefly.",
    "data.dev_questions=0",
    "data.empty_share=0.0",
    "loop.batch_size=8",
    "loop.log_every=4",
    "optimizer.weight_decay=0.0",
]
ALIGN = ["optimizer.compressor_lr=5e-4", "optimizer.heads_lr=2e-3", "loop.epochs=20", "loop.eval_every=40"]
JOINT = [
    "data.modes={compressed: 1.0}",
    "optimizer.compressor_lr=1e-4",
    "optimizer.heads_lr=5e-4",
    "optimizer.generator_lr=1e-3",
    "loop.epochs=10",
    "loop.eval_every=8",
]
HOUSES = {
    "Alder": "Aarhus",
    "Birch": "Bergen",
    "Cedar": "Cadiz",
    "Damson": "Delft",
    "Elm": "Essen",
    "Fir": "Faro",
    "Ginkgo": "Ghent",
    "Hazel": "Horsens",
    "Ivy": "Izmir",
    "Juniper": "Jena",
    "Kapok": "Kiel",
    "Larch": "Leeds",
    "Maple": "Malmo",
    "Nutmeg": "Nantes",
    "Olive": "Odense",
    "Pine": "Porto",
}


def make_facts() -> list[Row]:
    """32 questions: for each house its town and its year, beside a passage about another house."""
    rows = []
    houses = list(HOUSES.items())
    for number, (name, town) in enumerate(houses):
        year = 1700 + (number * 37) % 290
        other, elsewhere = houses[(number + 5) % len(houses)]
        passages = (
            RowPassage(f"{name} House stands in {town}. It was built in {year} by a merchant.", relevance=1.0),
            RowPassage(f"{other} House stands in {elsewhere} and has two floors.", relevance=0.0),
        )
        rows.append(Row(f"town-{number}", f"Where does {name} House stand?", passages, (town,)))
        rows.append(Row(f"year-{number}", f"When was {name} House built?", passages, (str(year),)))
    return rows


@pytest.mark.long
def test_32_examples_are_learned_by_heart_in_compressed_mode(smollm2: Path, minilm: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "facts.jsonl", make_facts())
    data = [f"data.train={tmp_path / 'facts.jsonl'}", f"data.dev={tmp_path / 'facts.jsonl'}"]
    align, joint = tmp_path / "align", tmp_path / "joint"
    stage = ["train", str(CONFIGS / "smollm2-cpu-align.yaml"), "--out", str(align)]
    assert main([*stage, *data, *SHARED, *ALIGN]) == 0
    stage = ["train", str(CONFIGS / "smollm2-cpu.yaml"), "--out", str(joint), f"start={align / 'best'}"]
    assert main([*stage, *data, *SHARED, *JOINT]) == 0
    assert read_metrics(joint, "dev")[-1]["f1_compressed"] > 0.95
