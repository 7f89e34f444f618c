"""`calibrate`: a copy of a checkpoint whose relevance is a probability and whose threshold says "not answerable".

Fitted on the ranking records of an evaluation, which hold raw scores: nothing is compressed again.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core.checkpoint import load_checkpoint, read_adapter, save_checkpoint
from core.config import RelevanceConfig
from core.errors import ConfigError
from core.manifest import DTYPES, read_manifest
from training.arguments import MAX_SEED, check_checkpoint, check_file, check_out_folder, whole
from training.calibration import Calibration, measure_no_answer
from training.intervals import Bootstrap
from training.results import RankingRecord, Record, read_results

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # scale, bias and threshold from the scores that an evaluation of this checkpoint recorded
  python -m training calibrate --checkpoint checkpoints/demo --results evaluations/demo/results.jsonl \\
      --out checkpoints/demo-calibrated
"""


def fit_relevance(records: Sequence[Record], rate: int, passages: int, seed: int = 0) -> Calibration:
    """Scale, bias and threshold from half of the questions, and how they do on the other half.

    Raises ConfigError where fewer than two questions have both gold and other passages.
    """
    chosen = [
        record
        for record in records
        if isinstance(record, RankingRecord)
        and (record.ranker, record.passages) == (f"compressor x{rate}", passages)
        and any(record.gold)
        and not all(record.gold)
    ]
    scored = [(record.scores, record.gold) for record in chosen]
    fitted = measure_no_answer(scored, Bootstrap(seed=seed)).calibration if scored else None
    if fitted is None:
        raise ConfigError(
            f"results: {len(chosen)} questions are ranked at rate {rate} with {passages} passages, gold and others "
            "among them; calibration needs at least 2"
        )
    return fitted


def calibrate_checkpoint(source: Path, target: Path, relevance: RelevanceConfig) -> None:
    """Write the checkpoint `source` with other calibration to the new folder `target`. Raises CheckpointError."""
    model = load_checkpoint(source)
    manifest, _ = read_manifest(source)
    dtype = DTYPES[manifest.dtype]
    adapter = read_adapter(source, model.generator, model.config, dtype)
    calibrated = replace(model, config=replace(model.config, relevance=relevance))
    save_checkpoint(calibrated, target, adapter=adapter, training=manifest.training, dtype=dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint that was evaluated")
    parser.add_argument("--results", type=Path, required=True, help="results.jsonl of its evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibrated copy; must not exist")
    parser.add_argument(
        "--rate", type=whole(1), help="compression rate to calibrate at (default: the checkpoint's first)"
    )
    parser.add_argument("--passages", type=whole(1), default=5, help="number of passages to calibrate at (default 5)")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the split into two halves")


def run(args: argparse.Namespace) -> None:
    """Calibrate. Raises ScaledownError for what the user can mend."""
    check_checkpoint(args.checkpoint, "--checkpoint")
    check_file(args.results, "--results")
    check_out_folder(args.out, "--out", new=True)
    results = read_results(args.results)
    model = load_checkpoint(args.checkpoint, verify=False)
    if results.run.get("checkpoint") != model.name:
        raise ConfigError(f"{args.results}: is of checkpoint {results.run.get('checkpoint')}, not of {model.name}")
    rate = args.rate or model.config.compressor.rates[0]
    fitted = fit_relevance(results.records, rate, args.passages, args.seed)
    relevance = RelevanceConfig(scale=fitted.scale, bias=fitted.bias, threshold=fitted.threshold)
    calibrate_checkpoint(args.checkpoint, args.out, relevance)
    log.info("%s: %s", args.out, fitted)
