"""`evaluate`: text, hybrid and compressed side by side on the same questions, with the ranking that comes with them.

Reads a checkpoint and rows, writes `results.jsonl` (resumable), `result.json` and the report. Measures nothing itself.
"""

import argparse
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import load_checkpoint
from core.config import Config
from core.errors import ConfigError
from core.manifest import sha256_of
from core.model import Model
from core.packed_linear import pack_model
from core.sampling import GenerationOptions
from training.arguments import MAX_SEED, check_checkpoint, check_file, check_out_folder, device, whole
from training.chat_endpoint import ChatEndpoint, check_url
from training.data_format import read_rows
from training.data_quality import DataError
from training.evaluation import MODES, Plan, evaluate, judge_answers, too_long
from training.intervals import Bootstrap
from training.questions import Question, to_questions
from training.report import settings_table, write_report
from training.results import Record, ResultsFile, read_results
from training.summary import summarise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # every mode at every rate of the checkpoint, from 5 passages; run it again to go on after a kill
  python -m training evaluate --checkpoint checkpoints/demo --data data/dev.jsonl --out evaluations/demo
  # accuracy against prompt tokens: fixed rates, and relevance deciding under a budget
  python -m training evaluate --checkpoint checkpoints/best --data dev.jsonl.gz --out evaluations/best \\
      --budgets 128 192 256 384 512
  # accuracy against the number of passages; 20 passages ranked, beside BM25 and an embedding model
  python -m training evaluate --checkpoint checkpoints/best --data nq.jsonl.gz --out evaluations/nq \\
      --passages 1 5 10 --ranking-passages 20 --embedding-model minilm-l6
  # what is kept of another checkpoint's text mode, measured before on the same questions
  python -m training evaluate --checkpoint checkpoints/best --data dev.jsonl.gz --out evaluations/kept \\
      --modes hybrid compressed --text-baseline evaluations/text/results.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="rows in the data format (.jsonl or .jsonl.gz)")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and report; resumes what it holds")
    parser.add_argument("--limit", type=whole(1), help="the first questions only")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--rates", nargs="+", type=whole(1), help="compression rates (default: all of the checkpoint)")
    parser.add_argument(
        "--budgets", nargs="+", type=whole(1), help="bounds on the prompt, in tokens, to run auto mode under"
    )
    parser.add_argument(
        "--passages", nargs="+", type=whole(1), default=[5], help="numbers of passages to answer from (default 5)"
    )
    parser.add_argument(
        "--hops", type=int, choices=(1, 2), default=1, help="2: all but the best are read again for it too (default 1)"
    )
    parser.add_argument("--ranking-passages", type=whole(0), default=0, help="rank more than are answered from")
    parser.add_argument("--embedding-model", help="rank with this model too, as it comes (a name, folder or hub id)")
    parser.add_argument("--batch-size", type=whole(1), default=16, help="questions answered side by side (default 16)")
    parser.add_argument("--max-new-tokens", type=whole(1, 4096), default=64, help="of an answer (default 64)")
    parser.add_argument(
        "--cost-questions", type=whole(0), default=4, help="questions to count operations and memory of (default 4)"
    )
    parser.add_argument("--text-baseline", type=Path, help="results.jsonl whose text mode is what retention is against")
    parser.add_argument("--judge-url", help="OpenAI-compatible endpoint of a judge, up to /v1")
    parser.add_argument("--judge-model", help="the judge's name there")
    parser.add_argument("--judge-key-env", default="OPENAI_API_KEY", help="environment variable of its key")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cpu, cuda, cuda:1 (default: cuda if any)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what is computed in (default float32)")
    parser.add_argument("--resamples", type=whole(1), default=1000, help="of the bootstrap (default 1000)")
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED), default=0, help="of the bootstrap and the calibration's split"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, summarise and report. Raises ScaledownError for what the user can mend."""
    if (args.judge_url is None) != (args.judge_model is None):
        raise ConfigError("--judge-url and --judge-model go together")
    if args.judge_url is not None:
        check_url(args.judge_url, "--judge-url")
    check_checkpoint(args.checkpoint, "--checkpoint")
    check_file(args.data, "--data")
    check_out_folder(args.out, "--out")
    questions = _read_questions(args.data, args.limit)
    model = load_checkpoint(args.checkpoint, device=args.device, dtype=DTYPES[args.dtype])
    pack_model(model)  # as it is served
    check_rates(args.rates or (), model.config)
    plan = Plan(
        modes=tuple(args.modes),
        rates=tuple(args.rates or model.config.compressor.rates),
        budgets=tuple(args.budgets or ()),
        passages=tuple(args.passages),
        ranking_passages=args.ranking_passages,
        batch_size=args.batch_size,
        embedding_model=args.embedding_model,
        cost_questions=args.cost_questions,
        hops=args.hops,
        options=GenerationOptions(max_new_tokens=args.max_new_tokens),
    )
    described = _describe_run(args, model, len(questions))
    baseline = _read_baseline(args.text_baseline, described)
    results = ResultsFile.open(args.out / "results.jsonl", described)
    left_out = too_long(model, questions, plan)
    questions = _without(questions, left_out)
    evaluate(model, questions, results, plan)
    if args.judge_url is not None:
        key = os.environ.get(args.judge_key_env, "")
        judge_answers(ChatEndpoint(args.judge_url, args.judge_model, key), questions, results)
    kept = {question.id for question in questions}
    summary = summarise(
        described | {"left_out": left_out, "environment": _environment(args)},
        [record for record in results.records if record.question in kept],
        Bootstrap(args.resamples, seed=args.seed),
        baseline,
    )
    for path in write_report(summary, args.out):
        log.info("wrote %s", path)
    log.info("%s", settings_table(summary))


def _read_questions(data: Path, limit: int | None) -> list[Question]:
    """The questions of a file. Raises DataError."""
    rows, report = read_rows(data)
    log.info("%s", report)
    if not rows:
        raise DataError(f"--data {data}: no usable rows; `prepare` writes such files")
    return to_questions(rows[:limit])


def _without(questions: Sequence[Question], left_out: Sequence[str]) -> list[Question]:
    """The questions that every mode can answer; says which are not. Raises DataError where none is left."""
    dropped = set(left_out)
    kept = [question for question in questions if question.id not in dropped]
    if not kept:
        raise DataError(
            "no question is within the compressor's query_tokens and its prompt fits the generator with its answer; "
            "give fewer --passages"
        )
    if dropped:
        log.warning(
            "%d of %d questions are left out in every mode, as they are over the compressor's query_tokens, or prompt "
            "and answer may not fit the generator; the first: %s; all stand in result.json",
            *(len(dropped), len(questions), ", ".join(left_out[:10])),
        )
    return kept


def check_rates(rates: Sequence[int], config: Config) -> None:
    """Raises ConfigError for a rate that the checkpoint is not trained for."""
    trained = config.compressor.rates
    if unknown := sorted(set(rates) - set(trained)):
        raise ConfigError(f"--rates {unknown[0]}: must be one of {', '.join(map(str, trained))}, as the checkpoint has")


def _describe_run(args: argparse.Namespace, model: Model, questions: int) -> dict[str, Any]:
    """What all records of a results file have in common; another value of any of it is another run."""
    return {
        "checkpoint": model.name,
        "generator": model.base.name,
        "compressor": model.config.compressor.kind,
        "data": args.data.name,
        "data_sha256": sha256_of(args.data),
        "questions": questions,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
    }


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    """What times depend on."""
    return {
        "device": args.device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": args.batch_size,
    }


def _read_baseline(path: Path | None, described: dict[str, Any]) -> list[Record]:
    """Another run's records on the same questions. Raises ConfigError where it answered them otherwise."""
    if path is None:
        return []
    check_file(path, "--text-baseline")
    baseline = read_results(path)
    alike = ("data_sha256", "max_new_tokens", "dtype")
    if differing := [key for key in alike if baseline.run.get(key) != described[key]]:
        raise ConfigError(f"--text-baseline {path}: {', '.join(differing)} differ; evaluate both alike")
    return baseline.records
