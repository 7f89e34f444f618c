"""`label`: teacher's answers, logits and relevance scores for prepared rows.

Goes on where it was when killed: finished blocks are in a journal beside the output, which itself appears only when
all of it is done.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from core.base_models import resolve_base_model
from core.config import PromptConfig
from core.errors import ConfigError
from core.generator import load_generator
from core.manifest import sha256_of
from training.arguments import amount, check_file, check_out_file, check_out_folder, device, whole
from training.chat_endpoint import ChatEndpoint
from training.data_format import Row, read_rows, write_rows
from training.data_quality import DataError, ReadPolicy
from training.journal import Journal
from training.labelling import LabelConfig, label_rows, lacks_gold
from training.relevance_teachers import (
    Combination,
    Ensemble,
    RelevanceTeacher,
    fit_combination,
    make_relevance_teacher,
)
from training.teacher_logits import SHARD_PATTERN, tokenizer_fingerprint
from training.teachers import EndpointTeacher, LocalTeacher, Teacher

log = logging.getLogger(__name__)

COMBINATION = "combination"  # the journal's note of how several rerankers were combined

EXAMPLES = """\
examples:
  # answers of a demo model, a folder or a hub id, 32 rows at a time; run the same line again after a kill
  python -m training label --data data/train.jsonl --teacher smollm2-135m --max-new-tokens 32 --block 32 \\
      --out data/labelled.jsonl
  # the same with the 32 likeliest tokens at each position, for loss.kl
  python -m training label --data train.jsonl.gz --teacher smollm2-135m --logits labels/logits --top-k 32 \\
      --out train.labelled.jsonl.gz
  # answers from a server, relevance from a cross-encoder
  python -m training label --data train.jsonl.gz --endpoint http://localhost:9000/v1 --teacher my-model \\
      --reranker cross-encoder/ms-marco-MiniLM-L6-v2 --out train.labelled.jsonl.gz
  # no teacher: gold answers are the targets, only relevance is scored
  python -m training label --data train.jsonl.gz --reranker BAAI/bge-reranker-base --out train.labelled.jsonl.gz
  # relevance from what a checkpoint knows and an embedding model beside it, combined by gold passages of other rows
  python -m training label --data train.jsonl.gz --reranker checkpoint:checkpoints/demo dense:minilm-l6 \\
      --fit-data dev.jsonl --out train.ranked.jsonl.gz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    defaults = {field.name: field.default for field in fields(LabelConfig)}
    parser.add_argument("--data", type=Path, required=True, help="rows that `prepare` wrote (.jsonl or .jsonl.gz)")
    parser.add_argument("--out", type=Path, required=True, help="the same rows with their labels")
    parser.add_argument("--teacher", default="", help="a base model's name; with --endpoint the model's name there")
    parser.add_argument("--endpoint", default="", help="an OpenAI-compatible server: http://host:port/v1")
    parser.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", help="variable with the endpoint's key, if it needs one"
    )
    parser.add_argument(
        "--concurrency", type=whole(1), default=8, help="requests in flight at the endpoint (default 8)"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=128, help="of an answer (default 128, as the paper)")
    parser.add_argument("--system", default=defaults["system"], help="system prompt (default: the generator's)")
    parser.add_argument("--logits", type=Path, help="folder for top-k log-probabilities; a local teacher only")
    parser.add_argument("--top-k", type=whole(1), default=32, help="how many with --logits (default 32)")
    parser.add_argument(
        "--reranker",
        nargs="+",
        default=[],
        help="whose scores become the passages' relevance: a cross-encoder, dense:<embedding model> or "
        "checkpoint:<folder>; several are combined into the sum that best tells gold passages from others",
    )
    parser.add_argument(
        "--fit-data",
        type=Path,
        help="rows to combine several rerankers by, which none of them was trained on (default: --data)",
    )
    parser.add_argument(
        "--score", choices=("logit", "probability"), default="logit", help="form of them (default logit)"
    )
    parser.add_argument(
        "--gold-bonus",
        type=amount,
        default=defaults["gold_bonus"],
        help="added to the logit of a passage that --data says is gold (default 0, as the paper)",
    )
    parser.add_argument("--relabel", action="store_true", help="also answer rows that have a teacher's answer")
    parser.add_argument(
        "--must-contain-gold",
        action="store_true",
        help="keep the gold answer where the teacher's contains none (default: the teacher's, as the paper)",
    )
    parser.add_argument(
        "--block", type=whole(1), default=16, help="rows answered together and saved together (default 16)"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cpu, cuda, cuda:1; default: cuda if any")
    parser.add_argument("--refuse", action="store_true", help="stop at the first bad row instead of skipping it")


def config_from(args: argparse.Namespace) -> LabelConfig:
    """What the command line asks for. Raises ConfigError."""
    return LabelConfig(
        teacher=args.teacher,
        endpoint=args.endpoint,
        max_new_tokens=args.max_new_tokens,
        top_k=args.top_k if args.logits else 0,
        system=args.system,
        reranker=args.reranker,
        score=args.score,
        gold_bonus=args.gold_bonus,
        relabel=args.relabel,
        must_contain_gold=args.must_contain_gold,
    )


def run(args: argparse.Namespace) -> None:
    """Label and write. Raises ScaledownError for what the user can mend."""
    config = config_from(args)
    check_file(args.data, "--data")
    if args.fit_data is not None:
        check_file(args.fit_data, "--fit-data")
        if len(config.reranker) < 2:
            raise ConfigError("--fit-data: is for several rerankers; give --reranker two or more")
    check_out_file(args.out, "--out")
    if args.logits is not None:
        check_out_folder(args.logits, "--logits")
    journal_path = args.out.with_name(f"{args.out.name}.journal")
    if args.out.exists() and not journal_path.exists():
        raise ConfigError(f"{args.out} already exists and is complete; delete it or give another --out")
    rows = _read(args.data, args)
    if not rows:
        raise DataError(f"--data {args.data}: no rows to label; `prepare` writes such files")
    _require_no_strangers(args.logits, journal_path)
    settings = {
        **asdict(config),
        "logits": str(args.logits or ""),
        "data_sha256": sha256_of(args.data),
        "fit_sha256": sha256_of(args.fit_data) if args.fit_data else "",
    }
    with Journal(journal_path, settings) as journal:
        if journal.rows:
            log.info("%d of %d rows are already labelled", len(journal.rows), len(rows))
        teacher, tokenizer = _make_teacher(config, args, proven=bool(journal.rows))
        reranker = _make_reranker(config, args, rows, journal) if config.reranker else None
        labelled = label_rows(
            rows, config, teacher, reranker, journal, block=args.block, logits=args.logits, tokenizer=tokenizer
        )
        _write(args.out, labelled)
        journal.delete()


def _read(path: Path, args: argparse.Namespace) -> list[Row]:
    """The good rows of a file, with answers or without; what was wrong with the others is logged."""
    rows, report = read_rows(path, ReadPolicy("refuse" if args.refuse else "skip", need_answer=False))
    log.info("%s", report)
    return rows


def _write(path: Path, labelled: Sequence[Row]) -> None:
    """Write the rows that have something to learn from."""
    targets = [row for row in labelled if row.answers or row.teacher_answer]
    if len(targets) < len(labelled):
        log.warning("%d rows have neither a gold nor a teacher's answer: left out", len(labelled) - len(targets))
    write_rows(path, targets)
    answered = sum(row.teacher_answer is not None for row in targets)
    without = sum(lacks_gold(row, row.teacher_answer or "") for row in targets)
    said = "%s: %d rows, %d with a teacher's answer, of which %d contain no gold answer"
    log.info(said, path, len(targets), answered, without)


def _make_teacher(config: LabelConfig, args: argparse.Namespace, *, proven: bool) -> tuple[Teacher | None, str]:
    """The teacher and its tokenizer's fingerprint; none where gold answers are to stay. `proven`: it has answered."""
    prompt = PromptConfig(system=config.system)
    if config.endpoint:
        key = os.environ.get(args.api_key_env, "")
        endpoint = ChatEndpoint(config.endpoint, config.teacher, key, concurrency=args.concurrency)
        return EndpointTeacher(endpoint, prompt, config.max_new_tokens, proven=proven), ""
    if not config.teacher:
        return None, ""
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    generator = load_generator(resolve_base_model(config.teacher), device=args.device, dtype=dtype)
    fingerprint = tokenizer_fingerprint(generator.tokenizer.get_vocab())
    return LocalTeacher(generator, prompt, config.max_new_tokens, config.top_k), fingerprint


def _make_reranker(
    config: LabelConfig, args: argparse.Namespace, rows: Sequence[Row], journal: Journal
) -> RelevanceTeacher:
    """The reranker, or several in one: fitted once, for all rows of a journal must have scores of one kind."""
    teachers = [make_relevance_teacher(name, args.device) for name in config.reranker]
    if len(teachers) == 1:
        return teachers[0]
    if COMBINATION not in journal.notes:
        fit_rows = _read(args.fit_data, args) if args.fit_data else rows
        journal.note(COMBINATION, asdict(fit_combination(teachers, fit_rows)))
    return Ensemble(teachers, Combination(**journal.notes[COMBINATION]))


def _require_no_strangers(logits: Path | None, journal: Path) -> None:
    """Raises ConfigError where the folder has shards of another run: rows would be found twice."""
    if logits is not None and not journal.exists() and any(logits.glob(SHARD_PATTERN)):
        raise ConfigError(f"--logits {logits}: already holds logits of another run; empty it or give another folder")
