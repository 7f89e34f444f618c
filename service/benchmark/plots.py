"""Results as SVG plots. Needs matplotlib, which only the extra `training` brings: import this module late.

Drawn without pyplot, so nothing is global and no display is needed; equal results give equal bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Entry = Mapping[str, Any]
SIZE = (6.0, 3.8)  # inches, of one panel
COLOURS = {
    "transformers": "#999999",
    "text": "#444444",
    "hybrid": "#d17a00",
    "compressed": "#0063b1",
    "vllm text": "#88aa88",
    "vllm hybrid": "#99cc33",
    "vllm compressed": "#1b7837",
}
STAGE_COLOURS = {
    "prepare": "#bbbbbb",
    "compress": "#0063b1",
    "prompt": "#7fb2d8",
    "prefill": "#d17a00",
    "decode": "#eebb77",
}


def draw(command: str, result: Entry) -> dict[str, str]:
    """SVG texts by name; none for a command whose table says all."""
    figures: dict[str, Callable[[Entry], Figure]] = {"engine": _engine, "scaling": _scaling}
    drawn = {command: figures[command](result)} if command in figures else {}
    if command == "engine":
        drawn["engine-stages"] = _stages(result)
    return {name: _to_svg(figure) for name, figure in drawn.items()}


def _to_svg(figure: Figure) -> str:
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "scaledown", "svg.fonttype": "path"}):
        figure.savefig(target, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return target.getvalue()


def _engine(result: Entry) -> Figure:
    """Answers a second, first token and operations over text in the same engine, against the number of passages."""
    plain = [case for case in result["cases"] if case["query_tokens"] == result["cases"][0]["query_tokens"]]
    panels = (("answers_per_s", "answers/s"), ("first_token", "first token, times sooner"), ("flops", "FLOPs, fewer"))
    figure = Figure(figsize=(len(panels) * SIZE[0], SIZE[1]))
    drawn = figure.subplots(1, len(panels))
    for axes, (key, label) in zip(drawn, panels, strict=True):
        for batch, style in zip(sorted({case["batch"] for case in plain}), ("o-", "s--"), strict=False):
            cases = sorted((case for case in plain if case["batch"] == batch), key=lambda case: int(case["passages"]))
            for name, colour in COLOURS.items():
                _ratio_line(axes, cases, name, key, colour, style, f"{name}, batch {batch}")
        if key == "flops":
            _paper(axes, result["paper"])
        axes.axhline(1, color=COLOURS["text"], linewidth=1)
        _label(axes, "passages", f"{label}, over text", legend=False)
    # One legend for all, beside them: a dozen lines leave no room inside.
    named = {name: line for axes in drawn for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn[-1].legend(named.values(), named.keys(), fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _ratio_line(axes: Axes, cases: Sequence[Entry], name: str, key: str, colour: str, style: str, label: str) -> None:
    shown = [case for case in cases if case["ratios"].get(name, {}).get("over_text", {}).get(key) is not None]
    values = [case["ratios"][name]["over_text"][key] for case in shown]
    middles = [value["median"] if isinstance(value, Mapping) else value for value in values]
    if not shown:
        return
    counts = [case["passages"] for case in shown]
    axes.plot(counts, middles, style, color=colour, label=label, linewidth=1.2, markersize=4)
    for count, value in zip(counts, values, strict=True):
        if isinstance(value, Mapping):
            axes.vlines(count, value["low"], value["high"], color=colour, linewidth=1)


def _paper(axes: Axes, paper: Entry) -> None:
    low, high = paper["flops_ratio_at_10_passages"]
    axes.vlines(10, low, high, color="#b00020", linewidth=4, alpha=0.5, label=f"the paper, {paper['source']}")
    axes.plot([50], [paper["flops_ratio_at_50_passages"]], "D", color="#b00020", alpha=0.5)


def _stages(result: Entry) -> Figure:
    """Seconds of a batch by stage, a bar for each case and variant."""
    bars = [
        (f"{case['label']}: {name}", figures["stages_s"])
        for case in result["cases"]
        for name, figures in case["variants"].items()
    ]
    figure = Figure(figsize=(SIZE[0] + 2, 1.2 + 0.28 * len(bars)))
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for stage, colour in STAGE_COLOURS.items():
        widths = [stages[stage]["median"] if stage in stages else 0.0 for _, stages in bars]
        axes.barh(range(len(bars)), widths, left=left, label=stage, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="small")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    _label(axes, "seconds a batch", "")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _scaling(result: Entry) -> Figure:
    """Seconds by stage and memory against each size, on logarithmic axes, where linear growth has slope 1."""
    curves = result["curves"]
    figure = Figure(figsize=(len(curves) * SIZE[0], 2 * SIZE[1]))
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, curve in enumerate(curves):
        times, memory = panels[0][column], panels[1][column]
        sizes = curve["sizes"]
        for stage in curve["points"][0]["stages_s"]:
            seconds = [point["stages_s"][stage]["median"] for point in curve["points"]]
            _growth(times, curve, seconds, stage, STAGE_COLOURS.get(stage))
        _growth(times, curve, [point["seconds"]["median"] for point in curve["points"]], "all", "#000000")
        memory.plot(sizes, [point["peak_bytes"] / 2**20 for point in curve["points"]], "o-", color="#0063b1")
        memory.set_xscale("log")
        _label(times, curve["over"], "seconds")
        _label(memory, curve["over"], "peak memory, MiB")
    return figure


def _growth(axes: Axes, curve: Entry, seconds: Sequence[float], name: str, colour: str | None) -> None:
    slope = curve["slopes"].get(f"{name}, s", {}).get("exponent")
    label = name if slope is None else f"{name} ~ x^{slope:.2f}"
    if any(seconds):
        axes.loglog(curve["sizes"], seconds, "o-", color=colour, label=label, linewidth=1.2, markersize=4)


def _label(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
