"""`scaledown checkpoints`: those of a running service, and folders on this machine."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.errors import ConfigError
from service.cli.flags import add_json, add_url
from service.client import Checkpoints, Connection, InvalidRequestError
from service.client.calls import CheckpointAction
from service.client.connection import ADMIN_KEY

REMOTE: dict[str, tuple[CheckpointAction, str]] = {
    "load": ("load", "load and verify a checkpoint beside the one that serves"),
    "activate": ("activate", "serve a checkpoint, without losing a request"),
    "rollback": ("rollback", "serve the checkpoint before"),
}


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What a running service serves (its admin key comes from "
        f"{ADMIN_KEY}), and checkpoint folders on this machine.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="the versions of a running service, or the checkpoints in a folder")
    where = listing.add_mutually_exclusive_group()
    add_url(where)
    where.add_argument("--root", type=Path, metavar="FOLDER", help="list the checkpoints in here, and ask no service")
    for name, (_, summary) in REMOTE.items():
        remote = commands.add_parser(name, help=summary)
        if name != "rollback":
            remote.add_argument("name", help="a folder under the service's checkpoint root")
        add_url(remote)
    inspect = commands.add_parser("inspect", help="what a checkpoint is and how it was made")
    verify = commands.add_parser("verify", help="check every file, load the model, and repeat its golden example")
    verify.add_argument("--files-only", action="store_true", help="check the files' sha256 only; needs no base model")
    for local in (inspect, verify):
        local.add_argument("folder", type=Path, help="the checkpoint's folder")
    for each in commands.choices.values():
        add_json(each)
    return parser, arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Run one; the exit status. Raises ServiceError and ScaledownError."""
    options = choose_parser(arguments, prog)[0].parse_args(arguments)
    if options.command in REMOTE or (options.command == "list" and options.root is None):
        return _ask_service(options)
    # Late: this imports torch, which takes seconds.
    from service.cli import folders

    run = {"list": folders.list_folders, "inspect": folders.inspect, "verify": folders.verify}[options.command]
    result, shown = run(options)
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(shown)
    return 0


def _ask_service(options: argparse.Namespace) -> int:
    if os.environ.get(ADMIN_KEY, "").startswith("sha256:"):
        raise ConfigError(f"{ADMIN_KEY}: holds the key's hash, which the service knows it by; here the key is needed")
    try:
        with Connection(options.url).client() as client:
            if options.command == "list":
                found = client.checkpoints()
            else:
                found = client.change_checkpoint(REMOTE[options.command][0], getattr(options, "name", None))
    except InvalidRequestError as error:
        if error.status == 404:
            raise ConfigError(f"the service has no /admin: it was started without {ADMIN_KEY}") from None
        raise
    if options.json:
        json.dump(dataclasses.asdict(found), sys.stdout)
        print()
    else:
        Console().print(table_of(found))
    return 0


def table_of(found: Checkpoints) -> Table:
    """A service's versions, for a person."""
    table = Table("checkpoint", "state", box=None, header_style="dim", pad_edge=False)
    rows: list[tuple[Any, Any]] = [(found.active, "serves")]
    rows += [(version, "in memory, to roll back to") for version in reversed(found.kept)]
    if found.loaded:
        rows.append((found.loaded, "in memory, to activate"))
    in_memory = {version.split("@")[0] for version, _ in rows}
    rows += [(name, "on disk") for name in found.available or () if name not in in_memory]
    if found.changing:
        rows.append((found.changing, "being loaded"))
    for row in rows:
        table.add_row(*row)
    return table
