"""The report's plots, as SVG text. Knows the summary's and the trainer's keys; knows no files.

Drawn without pyplot, so nothing is global and no display is needed; equal inputs give equal bytes.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.results import Setting

Entry = Mapping[str, Any]
SIZE = (7.0, 3.8)  # inches
COLOURS = {"text": "#444444", "hybrid": "#d17a00", "compressed": "#0063b1", "auto": "#2b8a3e"}
STAGE_COLOURS = {
    "prepare": "#bbbbbb",
    "compress": "#0063b1",
    "prompt": "#7fb2d8",
    "prefill": "#d17a00",
    "decode": "#eebb77",
}


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, without a time stamp."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "scaledown", "svg.fonttype": "path"}):
        figure.savefig(target, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return target.getvalue()


def plot_training(lines: Sequence[Entry]) -> Figure:
    """The trainer's losses over steps, train as lines and dev as dots; beside them F1, pointing and ranking on dev.

    Steps that were done again after a kill stand in the log twice: the later line counts.
    """
    latest = {(str(line["split"]), int(line["step"])): line for line in lines}
    ordered = [latest[key] for key in sorted(latest)]
    names = sorted({name for line in ordered for name in line})
    losses = [name for name in names if name == "loss" or name.startswith("loss_")]
    scores = [name for name in names if name.startswith("f1") or name in ("gold_first", "pointer")]
    figure = Figure(figsize=(2 * SIZE[0], SIZE[1]))
    left, right = figure.subplots(1, 2)
    _curves(left, ordered, losses, 1.0)
    _curves(right, ordered, scores, 100.0)
    _label(left, "optimiser step", "loss")
    _label(right, "optimiser step", "%")
    return figure


def _curves(axes: Axes, lines: Sequence[Entry], names: Sequence[str], scale: float) -> None:
    """Every named value of both splits, one colour a name."""
    for index, name in enumerate(names):
        for split, style in (("train", "-"), ("dev", "o--")):
            points = [(line["step"], scale * line[name]) for line in lines if line["split"] == split and name in line]
            if points:
                label = f"{name}, {split}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label, linewidth=1, markersize=3)


def plot_rates(settings: Sequence[Entry]) -> Figure:
    """Token F1 against the compression rate at the first number of passages; text as a level."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for mode in ("compressed", "hybrid"):
        chosen = sorted((entry for entry in settings if entry["mode"] == mode), key=lambda entry: int(entry["rate"]))
        _intervals(axes, [entry["rate"] for entry in chosen], chosen, mode, COLOURS[mode])
    for entry in settings:
        if entry["mode"] == "text":
            f1 = entry["f1"]
            axes.axhline(100 * f1["value"], color=COLOURS["text"], label="text")
            axes.axhspan(100 * f1["low"], 100 * f1["high"], color=COLOURS["text"], alpha=0.12)
    rates = sorted({entry["rate"] for entry in settings if entry["rate"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"x{rate}" for rate in rates], minor=False)
    _label(axes, "compression rate", "token F1, %")
    return figure


def plot_tokens(settings: Sequence[Entry]) -> Figure:
    """Token F1 against the prompt's mean tokens: fixed rates of each mode, and `auto` under each budget."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for mode, label in (
        ("text", "text"),
        ("hybrid", "hybrid"),
        ("compressed", "compressed"),
        ("auto", "auto, budgets"),
    ):
        chosen = sorted(
            (entry for entry in settings if entry["mode"] == mode), key=lambda entry: float(entry["prompt_tokens"])
        )
        _intervals(axes, [entry["prompt_tokens"] for entry in chosen], chosen, label, COLOURS[mode])
        for entry in chosen:
            mark = f"x{entry['rate']}" if entry["rate"] else entry.get("budget") and f"<={entry['budget']}"
            if mark:
                at = (entry["prompt_tokens"], 100 * entry["f1"]["value"])
                axes.annotate(mark, at, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    _label(axes, "prompt tokens (mean)", "token F1, %")
    return figure


def plot_passages(settings: Sequence[Entry]) -> Figure:
    """Token F1 against the number of passages, a line for each mode and rate."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    styles = ["-", "--", ":", "-."]
    rates = sorted({entry["rate"] or 0 for entry in settings})
    for label in dict.fromkeys(setting_label(entry) for entry in settings):
        chosen = sorted(
            (entry for entry in settings if setting_label(entry) == label), key=lambda entry: int(entry["passages"])
        )
        style = styles[rates.index(chosen[0]["rate"] or 0) % len(styles)]
        counts = [entry["passages"] for entry in chosen]
        _intervals(axes, counts, chosen, label, COLOURS[chosen[0]["mode"]], style)
    axes.set_xticks(sorted({entry["passages"] for entry in settings}))
    _label(axes, "passages", "token F1, %")
    return figure


def plot_stages(settings: Sequence[Entry], key: str, unit: str, scale: float) -> Figure:
    """Stacked bars of `settings[...][key]` ("seconds" or "flops" by stage), each value divided by `scale`."""
    shown = [entry for entry in settings if entry[key]]
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.4 * len(shown)))
    axes = figure.subplots()
    left = [0.0] * len(shown)
    for stage in dict.fromkeys(stage for entry in shown for stage in entry[key]):
        widths = [entry[key].get(stage, 0.0) / scale for entry in shown]
        axes.barh(range(len(shown)), widths, left=left, label=stage, color=STAGE_COLOURS.get(stage))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shown)), [entry["name"] for entry in shown])
    axes.invert_yaxis()
    _label(axes, unit, "")
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars, not on them
    return figure


def setting_label(entry: Entry) -> str:
    """Mode, rate or budget, and hops of a summary's setting."""
    given = {key: entry[key] for key in ("mode", "rate", "passages", "budget", "hops") if key in entry}
    return Setting(**given).label


def _intervals(
    axes: Axes, positions: Sequence[float], entries: Sequence[Entry], label: str, colour: str, style: str = "-"
) -> None:
    """A line through token F1 with its confidence intervals."""
    if not entries:
        return
    values = [100 * entry["f1"]["value"] for entry in entries]
    below = [value - 100 * entry["f1"]["low"] for value, entry in zip(values, entries, strict=True)]
    above = [100 * entry["f1"]["high"] - value for value, entry in zip(values, entries, strict=True)]
    axes.errorbar(
        positions,
        values,
        [below, above],
        label=label,
        color=colour,
        linestyle=style,
        marker="o",
        capsize=3,
        markersize=4,
    )


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
