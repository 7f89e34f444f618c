"""The real SmolLM2 learns 32 questions by heart from compressed passages: `python -m pytest -m long tests/e2e`."""

from pathlib import Path

import pytest
import yaml

from tests.tiny_training import read_metrics
from training.__main__ import main
from training.data_format import Row, RowPassage, write_rows

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "smollm2-cpu.yaml"
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
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    # Short passages: four tokens an embedding, so that what is to be learned is there to be read.
    values["model"]["compressor"] |= {"chunk_tokens": 64, "rates": [4], "allocation": "proportional"}
    values["model"]["generator"]["lora"]["dropout"] = 0.0
    values["data"] |= {"modes": {"compressed": 1.0}, "train": str(tmp_path / "facts.jsonl")}
    values["data"] |= {"dev": str(tmp_path / "facts.jsonl"), "dev_questions": 0}
    values["optimizer"] |= {"compressor_lr": 2e-4, "heads_lr": 1e-3, "generator_lr": 1e-3, "weight_decay": 0.0}
    values["loop"] |= {"batch_size": 8, "epochs": 15, "eval_every": 20, "save_every": 1000}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert max(line["f1_compressed"] for line in read_metrics(tmp_path / "run", "dev")) > 0.95
