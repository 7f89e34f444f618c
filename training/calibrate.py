"""`calibrate`: a copy of a checkpoint whose relevance is a probability and whose threshold says "not answerable".

Fitted on the ranking records of an evaluation, which hold raw scores: nothing is compressed again.
"""

import argparse
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from core.accelerators.record import FOLDER as GRAPHS
from core.checkpoint import load_checkpoint, read_adapter, save_checkpoint
from core.config import RelevanceConfig
from core.errors import ConfigError
from core.manifest import DTYPES, read_manifest
from core.model import Model
from training.arguments import MAX_SEED, check_checkpoint, check_file, check_out_folder, whole
from training.calibration import Calibration, Scored, measure_no_answer
from training.intervals import Bootstrap
from training.results import RankingRecord, Record, read_results

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # scale, bias and threshold from the scores that an evaluation of this checkpoint recorded
  python -m training calibrate --checkpoint checkpoints/demo --results evaluations/demo/results.jsonl \\
      --out checkpoints/demo-calibrated
"""


Pair = tuple[int, int]  # a compression rate, and the number of passages that were ranked


def ranked_pairs(records: Sequence[Record]) -> dict[Pair, list[Scored]]:
    """The compressor's scores and the gold labels of the questions that have gold and other passages."""
    pairs: dict[Pair, list[Scored]] = defaultdict(list)
    for record in records:
        if not isinstance(record, RankingRecord) or not any(record.gold) or all(record.gold):
            continue
        if rate := re.fullmatch(r"compressor x(\d+)", record.ranker):
            pairs[int(rate[1]), record.passages].append((record.scores, record.gold))
    return dict(pairs)


def choose_pair(known: Collection[Pair], rate: int | None, passages: int | None, default_rate: int) -> Pair:
    """The pair asked for; without a rate the default one, if it is there, and without a number the only one.

    Raises ConfigError, which lists what is there, where that is none or several.
    """
    if rate is None and any(pair[0] == default_rate for pair in known):
        rate = default_rate
    fitting = [pair for pair in sorted(known) if rate in (None, pair[0]) and passages in (None, pair[1])]
    if len(fitting) != 1:
        listed = "; ".join(f"--rate {pair[0]} --passages {pair[1]}" for pair in sorted(known))
        raise ConfigError(
            f"--rate, --passages: questions with gold and other passages are ranked at {listed or 'none'}"
        )
    return fitting[0]


def fit_relevance(scored: Sequence[Scored], seed: int = 0) -> Calibration:
    """Scale, bias and threshold from half of the questions, and how they do on the other half.

    Raises ConfigError for fewer than two questions, and where what is relevant does not score higher.
    """
    fitted = measure_no_answer(scored, Bootstrap(seed=seed)).calibration if scored else None
    if fitted is None:
        raise ConfigError(
            f"results: {len(scored)} questions have gold and other passages; calibration needs at least 2"
        )
    if fitted.scale <= 0:
        raise ConfigError(
            f"results: gold passages score no higher than others (scale {fitted.scale:.3g}), so a probability would "
            "put passages in reverse; train relevance first (loss.relevance)"
        )
    return fitted


def calibrate_checkpoint(source: Path, target: Path, relevance: RelevanceConfig) -> None:
    """Write the checkpoint `source` with other calibration to the new folder `target`. Raises CheckpointError.

    Graphs for an accelerator come along as they are: no weight differs.
    """
    model = load_checkpoint(source)
    manifest, _ = read_manifest(source)
    dtype = DTYPES[manifest.dtype]
    adapter = read_adapter(source, model.generator, model.config, dtype)
    calibrated = replace(model, config=replace(model.config, relevance=relevance))

    def copy_graphs(_: Model, folder: Path) -> None:
        if (source / GRAPHS).is_dir():
            shutil.copytree(source / GRAPHS, folder / GRAPHS)

    save_checkpoint(calibrated, target, adapter=adapter, training=manifest.training, dtype=dtype, add=copy_graphs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint that was evaluated")
    parser.add_argument("--results", type=Path, required=True, help="results.jsonl of its evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibrated copy; must not exist")
    parser.add_argument(
        "--rate",
        type=whole(1),
        help="compression rate to calibrate at (default: the checkpoint's first, or the only one that was ranked)",
    )
    parser.add_argument(
        "--passages", type=whole(1), help="number of passages to calibrate at (default: the only one that was ranked)"
    )
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
    pairs = ranked_pairs(results.records)
    pair = choose_pair(pairs, args.rate, args.passages, model.config.compressor.rates[0])
    fitted = fit_relevance(pairs[pair], args.seed)
    relevance = RelevanceConfig(scale=fitted.scale, bias=fitted.bias, threshold=fitted.threshold)
    calibrate_checkpoint(args.checkpoint, args.out, relevance)
    log.info("%s: at rate %d with %d passages %s", args.out, *pair, fitted)
