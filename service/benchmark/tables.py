"""Results as plain text tables. Knows the JSON's keys; measures nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.benchmark.variants import STAGES

Entry = Mapping[str, Any]
CACHES_OFF = "start it with SCALEDOWN_EMBEDDING_CACHE_BYTES=0 and SCALEDOWN_DOCUMENT_CACHE_BYTES=0"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def show(command: str, result: Entry) -> str:
    """All that a command has to say: what was measured on, and its tables."""
    tables: Mapping[str, Sequence[Callable[[Entry], str]]] = {
        "engine": (show_engine, show_stages),
        "load": (show_load,),
        "scaling": (show_scaling,),
        "cache": (show_cache,),
    }
    return "\n\n".join(part(result) for part in (show_setting, *tables[command]))


def show_setting(result: Entry) -> str:
    """Machine, versions, model and sizes: what a figure means nothing without."""
    lines = []
    for part in ("machine", "versions", "model", "settings"):
        values = ", ".join(f"{name} {value}" for name, value in result[part].items() if value != "")
        lines.append(f"{part + ':':<10}{values}")
    return "\n".join(lines)


def show_engine(result: Entry) -> str:
    """Ratios over text in the same engine, and over transformers' generate, one row a case and variant."""
    headings = (
        *("passages, batch", "variant", "prompt", "answers/s", "(spread)", "first token", "FLOPs", "by shapes"),
        *("peak memory", "answers/s"),
    )
    above = "over text in this engine: answers/s to peak memory; over transformers' generate: the second answers/s"
    rows = [_engine_row(case, name, figures) for case in result["cases"] for name, figures in case["variants"].items()]
    paper = result["paper"]
    low, high = paper["flops_ratio_at_10_passages"]
    return "\n".join(
        (
            f"Ratios {above}. More than 1 is better.",
            table(headings, rows),
            f"The paper ({paper['source']}; its models, its hardware): FLOPs {low} to {high} times fewer at 10 "
            f"passages, {paper['flops_ratio_at_50_passages']} times at 50.",
        )
    )


def _engine_row(case: Entry, name: str, figures: Entry) -> tuple[str, ...]:
    over_text = case["ratios"][name].get("over_text")
    over_transformers = case["ratios"][name].get("over_transformers")
    ratios: tuple[str, ...] = ("1", "", "1", "1", "1", "1") if name == "text" else ("-", "", "-", "-", "-", "-")
    if over_text:
        speed = over_text["answers_per_s"]
        ratios = (
            f"{speed['median']:.2f}",
            f"{speed['low']:.2f}-{speed['high']:.2f}",
            f"{over_text['first_token']['median']:.2f}",
            *(
                "-" if over_text[key] is None else f"{over_text[key]:.2f}"
                for key in ("flops", "flops_by_shapes", "peak_bytes")
            ),
        )
    last = "1" if name == "transformers" else "-"
    if over_transformers:
        last = f"{over_transformers['answers_per_s']['median']:.2f}"
    return (case["label"], name, str(figures["prompt_tokens"]), *ratios, last)


def show_stages(result: Entry) -> str:
    """Seconds of a batch by stage, and memory, one row a case and variant."""
    rows = [_stages_row(case, name, figures) for case in result["cases"] for name, figures in case["variants"].items()]
    headings = ("passages, batch", "variant", *STAGES, "all", "peak MiB", "of it working")
    above = "Seconds of a batch by stage; memory of one batch at its most, and how much of that came with it."
    return f"{above}\n{table(headings, rows)}"


def _stages_row(case: Entry, name: str, figures: Entry) -> tuple[str, ...]:
    stages = figures["stages_s"]
    seconds = [f"{stages[stage]['median']:.3f}" if stage in stages else "-" for stage in STAGES]
    memory = ["-" if figures[key] is None else f"{figures[key] / 2**20:.0f}" for key in ("peak_bytes", "working_bytes")]
    return (case["label"], name, *seconds, f"{figures['seconds']['median']:.3f}", *memory)


def show_load(result: Entry) -> str:
    """One row a load: what clients saw, and the ratio to the same requests given to the engine directly."""
    headings = (
        *("load", "answers/s", "tokens/s", "p50 ms", "p95 ms", "p99 ms", "first p50 ms", "first p99 ms"),
        *("refused", "failed", "over direct"),
    )
    rows = []
    for load in result["loads"]:
        waits = [load["latency_s"], load["first_token_s"]]
        shown = [f"{1000 * waits[0][p]:.0f}" if waits[0] else "-" for p in ("p50", "p95", "p99")]
        shown += [f"{1000 * waits[1][p]:.0f}" if waits[1] else "-" for p in ("p50", "p99")]
        ratio = load["throughput_over_direct"]
        rows.append(
            (
                load["label"],
                f"{load['answers_per_s']:.2f}",
                f"{load['tokens_per_s']:.1f}",
                *shown,
                str(load["refused"]),
                str(load["failed"]),
                f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio else "-",
            )
        )
    errors = {code: count for load in result["loads"] for code, count in load["errors"].items()}
    cached = sum(load["cached_chunks"] for load in result["loads"])
    return (
        table(headings, rows)
        + (f"\nerrors: {errors}" if errors else "")
        + (f"\n{cached} chunks came from the service's caches, and cost it nothing: {CACHES_OFF}" if cached else "")
    )


def show_cache(result: Entry) -> str:
    """Times to compress one question's passages, and how many times faster."""
    names = ("uncached", "cold", "warm")
    shown = ("warm_over_cold", "warm_over_uncached", "cold_over_uncached", "query_once_over_each")
    rows = []
    for case in result["cases"]:
        seconds = [f"{1000 * case['seconds'][name]['median']:.1f}" for name in names]
        ratios = [case["ratios"][name] for name in shown]
        spreads = [f"{each['median']:.2f} ({each['low']:.2f}-{each['high']:.2f})" for each in ratios]
        rows.append((str(case["passages"]), *seconds, *spreads, f"{case['cache_bytes'] / 2**20:.1f}"))
    headings = ("passages", *(f"{name} ms" for name in names), "cold/warm", "uncached/warm", "uncached/cold")
    above = "Times to compress for one question; ratios over 1 are times faster. Query once: read once for all chunks."
    return above + "\n" + table((*headings, "query each/once", "cache MiB"), rows)


def show_scaling(result: Entry) -> str:
    """One row a curve and stage: the fitted slope and the exponent at its larger sizes."""
    rows = []
    for curve in result["curves"]:
        for name, slope in curve["slopes"].items():
            exponent = slope["exponent"]
            rows.append(
                (
                    f"{curve['over']} {curve['sizes'][0]}-{curve['sizes'][-1]}",
                    name,
                    f"{slope['per_unit']:.3g}",
                    f"{slope['fixed']:.3g}",
                    "-" if exponent is None else f"{exponent:.2f}",
                )
            )
    return table(("growing", "cost", "per unit", "fixed", "exponent"), rows)
