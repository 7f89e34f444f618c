"""The one place that knows every runtime: which of them a run gets."""

import importlib
import os

from training.runtime import AccelerateRuntime, Runtime
from training.sharding import ShardedRuntime

DEVICES = ("auto", "trainium")


def choose_runtime(device: str) -> Runtime:
    """The runtime of one of DEVICES. Raises ConfigError where this machine cannot run it."""
    if device == "trainium":
        # Imported here: where torch_xla is installed, importing it takes the machine's devices.
        runtime: Runtime = importlib.import_module("training.trainium").XlaRuntime()
        return runtime
    return ShardedRuntime() if os.environ.get("ACCELERATE_USE_FSDP") == "true" else AccelerateRuntime()
