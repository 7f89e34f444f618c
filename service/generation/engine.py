"""The protocol of what writes answers, all that a lane knows of it. Knows neither models nor HTTP."""

from typing import Protocol

from core.prompts import Prompt
from service.jobs import AnswerPlan, Job


class GeneratorEngine(Protocol):
    """Writes the answers of one checkpoint version. Only the worker's thread calls it, but for `trouble` and `verify`.

    A job that was added is told every piece of its answer, if its plan asks for them, and ends with `Finished` or
    `Failed`; one that was cancelled is told nothing more.
    """

    @property
    def trouble(self) -> str | None:
        """Why no answer can be written now."""

    @property
    def jobs(self) -> int:
        """Jobs that need `advance` to be called."""

    def add(self, job: Job, plan: AnswerPlan, prompt: Prompt) -> None:
        """Take a job whose prompt is ready."""

    def cancel(self, job: Job) -> None:
        """Stop work on a job, wherever it stands; nothing happens where it is not here."""

    def advance(self) -> None:
        """Let prompts join, and write a token of every answer here."""

    async def verify(self) -> None:
        """Find out whether answers can be written, with the checkpoint's own weights; called on the event loop.

        Raises GeneratorUnavailableError where nothing can be written now, CheckpointError for other weights.
        """
