"""The two commands: `plan` for a traffic, `check` of the simulation against real runs. Returns text, prints nothing."""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ConfigError
from service.settings import Settings
from service.sizing.calculator import PRICES, Plan, Price, plan
from service.sizing.costs import Costs, Sizes
from service.sizing.fitting import BUILT_IN, fit, measurements, read_result
from service.sizing.simulation import Limits, Simulated, Traffic, simulate_closed, simulate_open

ARRIVALS = 10_000  # that percentiles rest on: a 99th on a hundred of them
WARM_UP = 500  # arrivals at each replica before those: at 90 % busy a queue forgets that it began empty within these
MEETS_NOBODY = 0.01  # requests at a replica, on average: more replicas make none faster
MOST_REPLICAS = 4  # few that run long, as each has its warm-up


@dataclass(frozen=True, slots=True)
class Comparison:
    """One real run beside its simulation; `error` is relative to the real one."""

    label: str
    quantity: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """More than 0: the simulation says more."""
        return self.simulated / self.measured - 1


def read_costs(options: argparse.Namespace) -> Costs:
    """Costs from the JSON the user names, or the built-in one."""
    path = options.measured or BUILT_IN
    return fit(read_result(path), "built-in table" if path == BUILT_IN else path.name)


def plan_command(options: argparse.Namespace) -> str:
    """Replicas, memory and money for the traffic, in its mode and in text, and what a simulation says of latency."""
    costs, limits = read_costs(options), Limits.of(Settings())
    sizes = Sizes(options.passages, options.passage_tokens, options.query_tokens, options.new_tokens)
    price = _price(options, costs)
    traffics = [Traffic(sizes, options.mode), Traffic(sizes, "text", ranked=False)]
    lines = [*_header(costs, sizes, options, price), ""]
    plans: list[Plan] = []
    for traffic in traffics[: 1 if options.mode == "text" else 2]:
        try:
            found, simulated = sized(costs, traffic, limits, options.rate, options.busy, options.latency, price)
        except ConfigError as error:
            if not plans:
                raise
            lines.append(f"text is no way to do it: {error.message}")
            break
        plans.append(found)
        lines += [*_show_plan(found, options.rate, price), *_show_simulated(simulated), ""]
    if len(plans) == 2:
        saved = plans[1].prompt_tokens - plans[0].prompt_tokens
        lines += [
            f"{options.mode} over text: {saved} prompt tokens saved an answer, "
            f"{saved * options.rate:,.0f} a second; {plans[1].replicas / plans[0].replicas:.1f} times fewer replicas, "
            f"{plans[1].cost_per_million / plans[0].cost_per_million:.1f} times cheaper."
        ]
    return "\n".join(lines)


def sized(
    costs: Costs, traffic: Traffic, limits: Limits, rate: float, busy: float, latency: float | None, price: Price
) -> tuple[Plan, Simulated]:
    """The plan, with as many more replicas, to a tenth, as the 95th percentile of latency needs to meet a goal.

    Raises ConfigError where no number of replicas meets it, and where the generator cannot read such a prompt.
    """
    needed = costs.prompt_tokens(traffic.sizes, traffic.mode) + traffic.sizes.new_tokens
    if needed > costs.max_tokens:
        raise ConfigError(
            f"passages: prompt and answer in {traffic.mode} mode have {needed:,} tokens, and the generator reads "
            f"{costs.max_tokens:,}"
        )
    found = plan(costs, traffic, limits, rate, busy, price)
    simulated = _simulate(costs, traffic, limits, rate, found.replicas)
    if latency is None or percentile(simulated.latencies, 0.95) <= latency:
        return found, simulated
    if found.alone_s > latency:
        raise ConfigError(f"latency: {traffic.mode} takes {found.alone_s:.2f} s for a request that meets nobody")
    few = enough = found.replicas
    while percentile(simulated.latencies, 0.95) > latency:
        if rate / enough * found.alone_s < MEETS_NOBODY:
            raise ConfigError(f"latency: no number of replicas has its 95th percentile at {latency:g} s")
        few, enough = enough, 2 * enough
        simulated = _simulate(costs, traffic, limits, rate, enough)
    while enough > max(few + 1, 1.1 * few):
        middle = round(math.sqrt(few * enough))
        tried = _simulate(costs, traffic, limits, rate, middle)
        if percentile(tried.latencies, 0.95) > latency:
            few = middle
        else:
            enough, simulated = middle, tried
    return at_replicas(found, enough), simulated


def at_replicas(found: Plan, replicas: int) -> Plan:
    """The same plan on another number of replicas."""
    factor = replicas / found.replicas
    return replace(
        found,
        replicas=replicas,
        utilisation=found.utilisation / factor,
        cost_per_million=found.cost_per_million * factor,
    )


def _simulate(costs: Costs, traffic: Traffic, limits: Limits, rate: float, replicas: int) -> Simulated:
    counted = ARRIVALS / min(replicas, MOST_REPLICAS)
    gap = replicas / rate  # seconds between two arrivals at one replica
    return simulate_open(
        costs,
        traffic,
        limits,
        rate,
        replicas,
        (WARM_UP + counted) * gap,
        most=MOST_REPLICAS,
        warm_up_s=WARM_UP * gap,
    )


def check_command(options: argparse.Namespace) -> tuple[str, bool]:
    """Every real run beside its simulation, and whether all are within the error that is allowed."""
    result = read_result(options.measured or BUILT_IN)
    costs, limits = fit(result, "measured"), Limits.of(Settings())
    compared = compare_engine(result, costs, limits)
    if options.load is not None:
        compared += compare_load(read_result(options.load), costs, limits)
    lines = [f"{'run':44} {'':10} {'measured':>9} {'simulated':>9}  error"]
    lines += [
        f"{each.label:44} {each.quantity:10} {each.measured:9.3f} {each.simulated:9.3f}  {each.error:+.1%}"
        for each in compared
    ]
    worst = max(abs(each.error) for each in compared)
    lines.append(f"worst error {worst:.1%}; allowed {options.within:.0%}")
    return "\n".join(lines), worst <= options.within


def compare_engine(result: Mapping[str, Any], costs: Costs, limits: Limits) -> list[Comparison]:
    """Each case of `service.benchmark engine`: a batch of questions that come together, until the last is answered."""
    # The benchmark reads all of a batch's prompts together, whatever the service's budgets are.
    at_once = replace(limits, wait_s=0.0, prefill_tokens=2**31, batch_tokens=2**31)
    compared = []
    for run in measurements(result):
        traffic = Traffic(run.sizes, run.mode, ranked=run.mode != "text")
        simulated = simulate_closed(costs, traffic, at_once, run.batch, run.batch)
        label = f"engine: {run.mode}, {run.sizes.passages} passages, batch {run.batch}"
        compared.append(Comparison(label, "seconds", run.seconds, simulated.seconds))
    return compared


def compare_load(result: Mapping[str, Any], costs: Costs, limits: Limits) -> list[Comparison]:
    """Each load of `service.benchmark load`: closed loops by throughput and latency, open ones by latency."""
    if result.get("command") != "load":
        raise ConfigError("load: must be the JSON of `python -m service.benchmark load`")
    settings, compared = result["settings"], []
    passages = round(sum(settings["passages"]) / len(settings["passages"]))
    for entry in result["loads"]:
        if entry["failed"] or entry["refused"] or not entry["answers"]:
            continue
        length = max(1, round(entry["tokens_per_s"] / entry["answers_per_s"]))
        traffic = Traffic(Sizes(passages, settings["passage_tokens"], 16, length), settings["mode"])
        clients = re.fullmatch(r"closed, (\d+) clients", entry["label"])
        rate = re.fullmatch(r"open, ([\d.]+) of ([\d.e+-]+)/s", entry["label"])
        if clients:
            simulated = simulate_closed(costs, traffic, limits, int(clients[1]), settings["requests"])
            compared.append(Comparison(entry["label"], "answers/s", entry["answers_per_s"], simulated.answers_per_s))
        elif rate:
            per_s = float(rate[1]) * float(rate[2])
            simulated = simulate_open(costs, traffic, limits, per_s, 1, settings["requests"] / per_s)
        else:
            continue
        median = percentile(simulated.latencies, 0.5)
        compared.append(Comparison(entry["label"], "median s", entry["latency_s"]["p50"], median))
    return compared


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _price(options: argparse.Namespace, costs: Costs) -> Price:
    """Of a replica's machine. Raises ConfigError for one whose device nothing was measured on."""
    if options.price:
        return Price("as given", options.price, "--price", costs.device)
    price = PRICES[options.instance]
    if price.device != costs.device:
        raise ConfigError(
            f"instance: {options.instance} computes on {price.device}, of which costs measured on {costs.device} say "
            "nothing: give --measured of a run on it, or the measured machine's --instance or --price"
        )
    return price


def _header(costs: Costs, sizes: Sizes, options: argparse.Namespace, price: Price) -> list[str]:
    return [
        f"measured: {costs.source}: {costs.machine}; {costs.model}",
        f"traffic:  {options.rate:g} requests/s of {sizes.passages} x {sizes.passage_tokens} tokens, "
        f"query {sizes.query_tokens}, answer {sizes.new_tokens}; replicas at most {options.busy:.0%} busy",
        f"price:    {price.name}, {price.per_hour:g} USD/hour ({price.source})",
    ]


def _show_plan(found: Plan, rate: float, price: Price) -> list[str]:
    stages = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in found.stages_s.items())
    hourly, memory = found.replicas * price.per_hour, found.memory_bytes / 2**30
    return [
        f"{found.mode}: {found.replicas:,} replicas, {found.utilisation:.0%} busy at {rate:g} requests/s",
        f"  prompt {found.prompt_tokens} tokens; {found.capacity:.3g} answers/s a replica, {found.sequences} at a time",
        f"  ms an answer: {stages}; alone {found.alone_s:.2f} s",
        f"  memory {memory:.1f} GiB a replica, {found.replicas * memory:,.0f} in all",
        f"  {hourly:,.2f} USD/hour, {found.cost_per_million:,.0f} USD for a million answers",
    ]


def _show_simulated(simulated: Simulated) -> list[str]:
    latency = ", ".join(f"p{round(100 * p)} {percentile(simulated.latencies, p):.2f}" for p in (0.5, 0.95, 0.99))
    first = ", ".join(f"p{round(100 * p)} {percentile(simulated.first_tokens, p):.2f}" for p in (0.5, 0.95))
    counted = f"{len(simulated.latencies):,} requests after {simulated.warm_up:,} to warm up"
    return [f"  simulated, {counted}: latency {latency} s; first token {first} s"]
