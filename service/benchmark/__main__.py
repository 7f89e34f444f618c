"""`python -m service.benchmark`: measure the engine, the service under load, and how costs grow.

Figures are of the machine they are printed with; compare ratios. Nothing else should run beside a measurement.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.errors import ScaledownError
from service.settings import Settings, explain

PROG = "python -m service.benchmark"
ENGINE_VARIANTS = ("transformers", "text", "compressed", "hybrid")  # not read from `variants`, which imports torch
EPILOG = """
  python -m service.benchmark engine                          the shipped checkpoint, else an untrained model
  python -m service.benchmark engine --checkpoint checkpoints/mine --dtype bfloat16 --threads 2
  python -m service.benchmark engine --vllm-url http://127.0.0.1:8001/v1   beside vLLM, see serve_vllm.sh in its folder
  python -m service.benchmark engine --vary 0.8 --variants text compressed   passages of 26 to 230 tokens
  python -m service.benchmark load --clients 1 8 32           starts a service, loads it, stops it
  python -m service.benchmark load --url http://127.0.0.1:8000 --checkpoint checkpoints/mine
  python -m service.benchmark scaling --quick                 a smoke run of a few sizes
  python -m service.benchmark cache                           an untrained compressor that reads the chunk first
"""


URL_HELP = (
    "a running service on this machine that serves --checkpoint, with its caches of 0 bytes, as the same requests come "
    "again (default: starts one)"
)


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line: options of all commands, then their own."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="engine | load | scaling | cache")
    shared = _shared_options()
    _add_engine(commands.add_parser("engine", parents=[shared], help="text, compressed and hybrid side by side"))
    _add_load(commands.add_parser("load", parents=[shared], help="a service under closed and open load"))
    _add_scaling(commands.add_parser("scaling", parents=[shared], help="how costs grow, with what"))
    _add_cache(commands.add_parser("cache", parents=[shared], help="passages that were compressed before, and not"))
    return parser


def _shared_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--checkpoint", type=Path, help="checkpoint folder (default: the shipped one, else an untrained model)")
    add("--base-model", help="generator of the untrained model (default: smollm2-135m)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: %(default)s")
    add("--quantize", choices=("int8",), help="linear layers in int8, by torchao")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--threads", type=int, default=0, help="threads of one operation on the CPU; 0: torch decides")
    add("--passage-tokens", type=_count, default=128, help="generator tokens of a passage (default: %(default)s)")
    add("--new-tokens", type=_count, default=32, help="tokens of every answer (default: %(default)s)")
    add("--repeats", type=_count, default=5, help="timed repeats, without the warm-up (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs/benchmark"),
        help="folder of the JSON and the plots (default: %(default)s)",
    )
    add("--quick", action="store_true", help="the smallest sizes, once: does it work? Its figures mean nothing")
    add("--json", action="store_true", help="print the JSON that is written, and no tables")
    return shared


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--passages", type=_count, nargs="+", default=[5, 10, 20, 50], help="default: %(default)s")
    add("--batch", type=_count, default=8, help="questions at a time, saturated (default: %(default)s)")
    add("--vary", type=_share, default=0.0, help="share by which single passages are longer or shorter, such as 0.8")
    add("--variants", nargs="+", choices=ENGINE_VARIANTS, default=ENGINE_VARIANTS, help="fewer than all take less time")
    add("--vllm-url", default="", help="a vLLM server on this machine that serves the merged generator")


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="", help=URL_HELP)
    add("--key", default="", help="API key, if the service asks for one")
    add("--clients", type=_count, nargs="+", default=[1, 8, 32], help="closed loop: clients that wait for their answer")
    add("--rates", type=float, nargs="*", default=[0.5, 0.9], help="open loop: arrivals, by the saturated throughput")
    add("--requests", type=_count, default=64, help="requests of one load (default: %(default)s)")
    add("--passages", type=_count, nargs="+", default=[1, 5, 5, 10, 20], help="sizes that are mixed")
    add("--mode", choices=("compressed", "hybrid", "text"), default="compressed")


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--passages", type=_count, nargs="+", default=[1, 2, 5, 10, 20, 50, 100, 200], help="default: %(default)s")
    add("--lengths", type=_count, nargs="+", default=[32, 64, 128, 256, 512, 1024], help="tokens of a passage")
    add("--variant", choices=ENGINE_VARIANTS, default="compressed")
    add("--concurrency", type=_count, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="questions at a time")
    add("--cached", type=_count, nargs="+", default=[100, 1000, 10_000], help="chunks that a cache holds")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passages", type=_count, nargs="+", default=[5, 10, 20, 50], help="default: %(default)s")


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run one command; the exit status."""
    options = build_parser(prog).parse_args(arguments)
    try:
        result = _run(options)
    except (ValidationError, ScaledownError) as error:
        print(explain(error), file=sys.stderr)
        return 2
    from service.benchmark.tables import show

    print(json.dumps(result) if options.json else show(options.command, result))
    _plot(options.output, options.command, result)
    return 1 if any(load["failed"] for load in result.get("loads", ())) else 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result. Its JSON is written each time a part is done, so that an hour's work outlives what stops it."""
    # Late: these import torch, and --help should not take seconds.
    from service.benchmark import commands

    given = {
        name: getattr(options, name) for name in ("checkpoint", "base_model", "dtype", "quantize", "device", "threads")
    }
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    run = {
        "engine": commands.engine,
        "load": commands.load,
        "scaling": commands.scaling,
        "cache": commands.cache,
    }[options.command]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.command}.json"
    result: dict[str, Any] = {}
    for result in run(options, settings, _notify):
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _notify(f"written: {path}")
    return result


def _notify(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _plot(folder: Path, command: str, result: dict[str, Any]) -> None:
    try:
        from service.benchmark.plots import draw
    except ImportError:
        print("no plots: they need matplotlib, which the extra `training` brings", file=sys.stderr)
        return
    for name, svg in draw(command, result).items():
        path = folder / f"{name}.svg"
        path.write_text(svg, encoding="utf-8")
        _notify(f"written: {path}")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise ValueError
    return share


if __name__ == "__main__":
    sys.exit(main())
