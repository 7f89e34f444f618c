"""/admin/checkpoints: which versions there are, and changing the one that serves. Off unless an admin key is set."""

import contextlib
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from core.errors import CheckpointError, InvalidInputError
from service.auth import ADMIN_KEY
from service.checkpoints import CheckpointControl, checkpoint_root
from service.errors import WITH_BODY, documented
from service.file_thread import LOOK_SECONDS, FileThread
from service.schemas import Strict
from service.versions import available_under

router = APIRouter(prefix="/admin", responses=documented(*WITH_BODY, 404, 409), dependencies=[ADMIN_KEY])


class CheckpointAction(Strict):
    """What to do: load a checkpoint beside the others, serve it, or go back to the one before."""

    action: Literal["load", "activate", "rollback"]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="folder under the checkpoint root, or for activate a version in memory"
    )


class CheckpointList(BaseModel):
    """`active` serves; `kept` served before and can be rolled back to, the next one last; `available` are on disk.

    `available` is null where the disk does not answer. `loaded` is in memory, to be activated; it has not served since
    it was loaded. One is held so. `changing` is what a change that is under way is about; no other can begin meanwhile.
    """

    active: str
    kept: list[str]
    available: list[str] | None
    loaded: str | None
    changing: str | None


class CheckpointChange(CheckpointList):
    """The list after the change, and the version it was about."""

    version: str


@router.get("/checkpoints")
async def list_checkpoints(request: Request) -> CheckpointList:
    """The versions there are."""
    return CheckpointList.model_validate(await _state(request))


@router.post("/checkpoints")
async def change_checkpoint(body: CheckpointAction, request: Request) -> CheckpointChange:
    """Load, activate or roll back. Requests in flight finish on the version they began with."""
    if (body.name is None) != (body.action == "rollback"):
        raise InvalidInputError("name", "rollback takes none" if body.name else f"is required to {body.action}")
    checkpoints = control_of(request)
    name = body.name or ""
    match body.action:
        case "load":
            version = await checkpoints.load(name)
        case "activate":
            version = await checkpoints.activate(name)
        case "rollback":
            version = await checkpoints.roll_back()
    return CheckpointChange.model_validate({**await _state(request), "version": version})


async def _state(request: Request) -> dict[str, object]:
    files: FileThread = request.app.state.files
    root = checkpoint_root(request.app.state.engine.settings)
    available: list[str] | None = None
    with contextlib.suppress(CheckpointError):
        available = await files.run("the checkpoint root", LOOK_SECONDS, available_under, root)
    return {**asdict(await control_of(request).state()), "available": available}


def control_of(request: Request) -> CheckpointControl:
    """What changes the checkpoint of the application."""
    control: CheckpointControl = request.app.state.checkpoints
    return control
