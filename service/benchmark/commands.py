"""The four commands: settings in; the result for the JSON out, each time a part of it is done. Writes no files."""

import argparse
import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import httpx

from core.model import Model
from service.benchmark import engine as variants
from service.benchmark.cache import cache_models, run_cache_case
from service.benchmark.cache_size import run_cache_curve
from service.benchmark.direct import answer_directly
from service.benchmark.engine import Case, plan_cases, run_case
from service.benchmark.load import Body, Outcome, closed_loop, connect, open_loop, require_loopback, summarise
from service.benchmark.machine import describe_machine, describe_model, describe_versions, short_collections
from service.benchmark.questions import make_questions
from service.benchmark.scaling import run_curve
from service.benchmark.server import running_service
from service.benchmark.statistics import paired_ratios
from service.benchmark.variants import VARIANTS
from service.benchmark.vllm_variant import vllm_variants
from service.loading import load_model
from service.settings import Settings

Notify = Callable[[str], None]
Result = dict[str, Any]
QUERY_TOKENS = 16


def engine(options: argparse.Namespace, settings: Settings, notify: Notify) -> Iterator[Result]:
    """`engine`: every variant in every case."""
    if options.vllm_url:
        require_loopback(options.vllm_url)
    model = load_model(settings)
    own = {name: run for name, run in VARIANTS.items() if name in options.variants}
    compared = {**own, **(vllm_variants(model, options.vllm_url) if options.vllm_url else {})}
    if options.quick:
        options.passages, options.batch, options.new_tokens, options.repeats = options.passages[:1], 2, 4, 1
    sizes = Case(1, 1, options.passage_tokens, QUERY_TOKENS, options.new_tokens, options.vary)
    cases = plan_cases(options.passages, options.batch, sizes, paper=not options.quick)
    result = _frame("engine", model, settings, options)
    result["paper"] = variants.PAPER
    result["cases"] = []
    with short_collections():
        for case in cases:
            result["cases"].append(run_case(model, case, options.repeats, notify, compared))
            yield result


def scaling(options: argparse.Namespace, settings: Settings, notify: Notify) -> Iterator[Result]:
    """`scaling`: three curves, each with the other two sizes held, and one over what a cache holds."""
    model = load_model(settings)
    sizes = {"passages": options.passages, "passage tokens": options.lengths, "concurrency": options.concurrency}
    if options.quick:
        sizes = {name: sorted(values)[:2] for name, values in sizes.items()}
        options.new_tokens, options.repeats, options.cached = 4, 1, sorted(options.cached)[:2]
    base = Case(5, 1, options.passage_tokens, QUERY_TOKENS, options.new_tokens)
    result = _frame("scaling", model, settings, options)
    result["curves"] = []
    with short_collections():
        for name, values in sizes.items():
            result["curves"].append(run_curve(model, name, values, base, options.variant, options.repeats, notify))
            yield result
        result["curves"].append(run_cache_curve(sorted(set(options.cached)), options.repeats, notify))
        yield result


def load(options: argparse.Namespace, settings: Settings, notify: Notify) -> Iterator[Result]:
    """`load`: closed loops beside the same requests given to the engine directly, then open loops."""
    if options.url:
        require_loopback(options.url)
    if options.quick:
        options.clients, options.rates, options.requests = options.clients[:1], options.rates[:1], 4
        options.new_tokens, options.repeats, options.passages = 4, 1, options.passages[:2]
    model = load_model(settings)
    bodies = _bodies(model, options)
    result = _frame("load", model, settings, options)
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(running_service(settings))
        stack.enter_context(short_collections())
        result["loads"] = asyncio.run(_loads(url, options, settings, model, bodies, notify))
    yield result


def cache(options: argparse.Namespace, settings: Settings, notify: Notify) -> Iterator[Result]:
    """`cache`: chunks unknown, known, and without a cache."""
    if options.quick:
        options.passages, options.repeats = options.passages[:1], 1
    models = cache_models(settings)
    result = _frame("cache", models[0], settings, options)
    result["cases"] = []
    with short_collections():
        for count in options.passages:
            sizes = (options.passage_tokens, QUERY_TOKENS, options.repeats)
            result["cases"].append(run_cache_case(models, count, *sizes, notify))
            yield result


def _frame(command: str, model: Model, settings: Settings, options: argparse.Namespace) -> Result:
    """The part of the JSON that every command has."""
    # Secret, or told elsewhere.
    hidden = ("key", "command", "checkpoint", "output", "base_model", "dtype", "quantize", "device")
    return {
        "command": command,
        "machine": describe_machine(model.device),
        "versions": describe_versions(),
        "model": describe_model(model),
        "settings": {name: value for name, value in vars(options).items() if name not in hidden},
    }


def _bodies(model: Model, options: argparse.Namespace) -> list[Body]:
    """Requests of mixed sizes in a random, fixed order."""
    source = random.Random(0)
    bodies = []
    for seed in range(options.requests):
        question = make_questions(
            model.generator.tokenizer,
            1,
            passages=source.choice(options.passages),
            passage_tokens=options.passage_tokens,
            query_tokens=QUERY_TOKENS,
            seed=seed,
        )[0]
        texts = [passage.text for passage in question.passages]
        values = {"mode": options.mode, "max_new_tokens": options.new_tokens}
        bodies.append({"query": question.query, "passages": texts, **values})
    return bodies


async def _loads(
    url: str, options: argparse.Namespace, settings: Settings, model: Model, bodies: Sequence[Body], notify: Notify
) -> list[dict[str, Any]]:
    loads = []
    async with connect(url, options.key) as connection:
        await closed_loop(connection, bodies[: max(options.clients)], max(options.clients))  # warms up
        for clients in options.clients:
            notify(f"{clients} clients, and the engine directly")
            loads.append(await _closed(connection, options.repeats, settings, model, bodies, clients))
        saturated = max(entry["answers_per_s"] for entry in loads)
        for share in options.rates if saturated else ():
            notify(f"arrivals at {share:g} of the throughput")
            outcome = await open_loop(connection, bodies, share * saturated)
            loads.append(summarise(f"open, {share:g} of {saturated:.3g}/s", [outcome]))
    return loads


async def _closed(
    connection: httpx.AsyncClient,
    repeats: int,
    settings: Settings,
    model: Model,
    bodies: Sequence[Body],
    clients: int,
) -> dict[str, Any]:
    """One closed loop, and as often the same without a service; the two take turns, and never run together."""
    outcomes: list[Outcome] = []
    direct: list[float] = []
    for repeat in range(-1, repeats):
        seconds, _ = answer_directly(model, bodies, clients, settings.max_sequences, settings.batch_tokens)
        if repeat < 0:
            continue  # warms up
        direct.append(seconds)
        outcomes.append(await closed_loop(connection, bodies, clients))
    entry = summarise(f"closed, {clients} clients", outcomes)
    if not entry["failed"]:
        ratio = paired_ratios(direct, [outcome.seconds for outcome in outcomes])
        entry["throughput_over_direct"] = asdict(ratio)
    return entry
