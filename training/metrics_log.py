"""Training metrics to `metrics.jsonl`, TensorBoard and the terminal. Knows nothing about what is measured."""

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class MetricsLog:
    """Metrics to `metrics.jsonl` and TensorBoard; silent on all processes but the first."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if enabled else None
        self._board = SummaryWriter(str(folder / "tensorboard")) if enabled else None

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **rounded}) + "\n")
        self._file.flush()
        for key, value in rounded.items():
            self._board.add_scalar(f"{split}/{key}", value, step)
        line = "  ".join(f"{key} {value:.4g}" for key, value in rounded.items())
        tqdm.write(f"{time.strftime('%H:%M:%S')} step {step} {split}: {line}")
