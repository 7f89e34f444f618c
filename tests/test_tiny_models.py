"""The tests' own models are the same in every session, so that a rare failure can be had again."""

import hashlib
import json
from pathlib import Path

VOCABULARY = "a929a09d862a7c2d5d399c7f87ca03d1bc5bc42886ab937bac421e84902be0c9"


def test_the_encoders_vocabulary_is_the_same_in_every_process(tiny_bert: Path) -> None:
    vocabulary = json.loads((tiny_bert / "tokenizer.json").read_text())["model"]["vocab"]
    digest = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
    assert (len(vocabulary), digest) == (600, VOCABULARY)
