"""Training metrics to `metrics.jsonl`, TensorBoard and the terminal. Knows nothing about what is measured."""

import json
import math
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class MetricsLog:
    """Metrics to `metrics.jsonl` and TensorBoard; silent on all processes but the first."""

    def __init__(self, folder: Path, enabled: bool, step: int = 0) -> None:
        """`step`: where the run goes on from; what a killed run logged after it is taken back, for it comes again."""
        path = folder / "metrics.jsonl"
        if enabled:
            drop_later_lines(path, step)
        self._file = path.open("a", encoding="utf-8") if enabled else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1) if enabled else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line: `step`, `split` (train or dev) and the values, to six digits; JSON has none that are not finite."""
        if self._file is None or self._board is None:
            return
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        finite = {key: value for key, value in rounded.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        self._file.flush()
        for key, value in finite.items():
            self._board.add_scalar(f"{split}/{key}", value, step)
        line = "  ".join(f"{key} {value:.4g}" for key, value in rounded.items())
        tqdm.write(f"{time.strftime('%H:%M:%S')} step {step} {split}: {line}")


def drop_later_lines(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`; a line torn by a kill goes too. The file is replaced as a whole."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.replace(path)
