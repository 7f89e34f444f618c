"""What becomes of an error in the worker's thread: what its caller is told, and memory given back. Knows no HTTP."""

import logging

import torch

from core.errors import EngineError, OverloadedError, ScaledownError
from service.jobs import Job

log = logging.getLogger(__name__)


def shown(error: Exception, job: Job) -> ScaledownError:
    """What the caller is told about a failure; anything that is not ours goes to the log only."""
    if isinstance(error, ScaledownError):
        return error
    if out_of_memory(error):
        return OverloadedError("there is not enough memory for this request: send fewer or shorter passages", 30)
    log.error("the engine failed", exc_info=error, extra={"request_id": job.request_id})
    return EngineError("the engine failed")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    # torch has a class for CUDA only; its CPU allocator raises RuntimeError with this text.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give the device's memory that nothing uses back to all."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
