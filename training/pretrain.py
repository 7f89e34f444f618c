"""`pretrain`: auto-encoding and continuation on plain text, through the one training loop.

Half of the examples ask for the compressed text word for word, the others for what follows it (COCOM, arXiv
2407.09252 sec. 3.2; OSCAR app. J). An `encoder` compressor with the memory readout needs it: its projection begins
random, and the generator cannot read it. Knows no questions and no answers.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from core.errors import ConfigError
from core.model import Model
from core.passages import Passage, chunk_passage
from core.pipeline import prepare, rows_of
from core.tokenization import encode
from training.arguments import check_file
from training.batches import Question, TrainExample
from training.config import TrainConfig
from training.data_format import check_string, number_lines, parse_json_line, parse_string
from training.data_quality import ReadPolicy, ReadReport, parse_records
from training.dev import dev_losses
from training.objective import Objective
from training.task import Task, over_prompt_limit
from training.train import add_run_arguments, run_task

Kind = Literal["autoencoding", "continuation"]

# Several wordings each: what is learned is the task, not one string.
INSTRUCTIONS: dict[Kind, tuple[str, ...]] = {
    "autoencoding": (
        "Repeat the background word for word.",
        "What does the background say? Write it out in full.",
        "Reproduce the passage exactly.",
        "Copy the text of the background.",
    ),
    "continuation": (
        "Continue the text of the background.",
        "How does the passage go on?",
        "Write what comes after the background.",
        "What follows this text?",
    ),
}

EXAMPLES = """\
examples:
  # a few steps, to see that texts and machine are fit; a line of the file is {"text": "...", "title": "..."}
  python -m training pretrain training/configs/tiny-test.yaml --out runs/tiny-texts \\
      data.train=data/texts.jsonl data.dev=data/texts.jsonl
  # texts first, then questions
  python -m training pretrain training/configs/paper-mistral-7b-modernbert.yaml --out runs/texts \\
      data.train=data/texts.jsonl.gz data.dev=data/texts-dev.jsonl.gz
  python -m training train training/configs/paper-mistral-7b-modernbert.yaml --out runs/questions \\
      start=runs/texts/best data.train=data/train.jsonl.gz data.dev=data/dev.jsonl.gz
"""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a corpus; `id` is the number of its line."""

    id: str
    passage: Passage


def text_task(config: TrainConfig) -> Task:
    """Repeating and continuing texts. Raises DataError and ConfigError where the data cannot be used."""
    texts = load_texts(config, "data.train", config.data.train)
    dev_texts = load_texts(config, "data.dev", config.data.dev)[: config.data.dev_questions or None]

    def evaluate(objective: Objective, show: bool) -> dict[str, float]:
        return evaluate_texts(objective, dev_texts, config, show)

    def example(model: Model, index: int, key: str) -> TrainExample | None:
        rng = random.Random(f"{key}/{texts[index].id}")
        kind: Kind = "autoencoding" if rng.random() < config.data.autoencoding else "continuation"
        made = make_text_example(model, texts[index].passage, kind, config.data.answer_tokens, rng)
        return None if over_prompt_limit(model, made, config.data.prompt_tokens) else made

    return Task([len(text.passage.content) for text in texts], example, evaluate)


def evaluate_texts(
    objective: Objective, texts: Sequence[Text], config: TrainConfig, show: bool = False
) -> dict[str, float]:
    """Loss per token of each kind on the same examples every time; `show`: how far it is, on the terminal."""
    objective.eval()
    model, most = objective.model, config.data.answer_tokens
    shares: dict[Kind, float] = {
        "autoencoding": config.data.autoencoding,
        "continuation": 1 - config.data.autoencoding,
    }
    scores = {}
    for kind in (kind for kind, share in shares.items() if share > 0):
        examples = [
            make_text_example(model, text.passage, kind, most, random.Random(f"dev/{text.id}")) for text in texts
        ]
        scores[f"loss_{kind}"] = dev_losses(objective, examples, config, show)["loss_answer"]
    objective.train()
    return scores


def make_text_example(model: Model, passage: Passage, kind: Kind, most: int, rng: random.Random) -> TrainExample:
    """One chunk of the text compressed, and itself or what follows it as the target, cut to `most` tokens.

    A text of one chunk has nothing that follows: it is repeated. Raises InputError for a text without tokens.
    """
    tokenizer, size, content = model.generator.tokenizer, model.config.compressor.chunk_tokens, passage.content
    chunks = chunk_passage(passage, 0, tokenizer, model.compressor.tokenizer, size)
    chunks = [chunk for chunk in chunks if content[chunk.start : chunk.end].strip()]  # one may be all line breaks
    followed = [chunk for chunk in chunks if chunk.end < len(content)]
    if not followed:
        kind = "autoencoding"
    chunk = rng.choice(chunks if kind == "autoencoding" else followed)
    compressed = content[chunk.start : chunk.end]
    request = prepare(model, rng.choice(INSTRUCTIONS[kind]), [Passage(compressed)])
    rate = rng.choice(model.config.compressor.rates)
    if kind == "autoencoding":
        answer_ids = model.template.answer_ids(compressed)[:most]
    else:
        # What follows does not end here, so no end of turn is learned.
        answer_ids = encode(tokenizer, content[chunk.end :]).ids[:most]
    questions = [Question(request.query, answer_ids)]
    return TrainExample(request, rows_of(model, request, rate), "compressed", questions, None, [])


def load_texts(config: TrainConfig, key: str, name: str) -> list[Text]:
    """Texts of the JSONL file that `key` names, one object `{"text", "title"?}` a line.

    What was wrong with others is printed. Raises ConfigError and DataError.
    """
    path = Path(name)
    check_file(path, key)
    report = ReadReport(path.name)
    policy = ReadPolicy(on_problem=config.data.on_bad_row)
    lines = ((number, (number, line)) for number, line in number_lines(path))
    texts = list(parse_records(lines, parse_text, policy, report))
    tqdm.write(str(report))
    if not texts:
        raise ConfigError(f'{key} {name}: has no usable text; a line is {{"text": ...}}')
    return texts


def parse_text(numbered: tuple[int, bytes]) -> Text:
    """A text from one numbered line. Raises RowError."""
    number, line = numbered
    values = parse_json_line(line)
    title = check_string(values["title"], "title") if values.get("title") else ""
    return Text(str(number), Passage(parse_string(values, "text"), title))


def pretrain_config(config: TrainConfig) -> TrainConfig:
    """`config` with only the loss that texts have. Raises ConfigError where its weight is 0."""
    if not config.loss.answer:
        raise ConfigError("loss.answer: pretraining has no other loss")
    return replace(config, loss=replace(config.loss, kl=0.0, relevance=0.0, alignment=0.0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m training pretrain`."""
    parser.description = (
        "Auto-encoding and continuation on texts (JSONL with `text` and `title`, .gz or not) before `train`, which\n"
        "goes on from it with start=RUN/best. Takes the same settings; data.train and data.dev are the texts."
    )
    add_run_arguments(parser, EXAMPLES)


def run(args: argparse.Namespace) -> None:
    """Entry point of `python -m training pretrain`."""
    run_task(args, text_task, pretrain_config)
