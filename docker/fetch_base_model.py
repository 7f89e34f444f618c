"""Fetch the base model that the service's settings need into the cache, and end.

Runs before the service, with the only mount of the cache that can be written: the service itself reads it only, and
needs no way to a package index or a model hub.
"""

import logging
import sys

from core.base_models import resolve_base_model
from core.config import Config
from core.errors import ConfigError, ScaledownError
from core.manifest import parse_json, read_bounded
from service.settings import SHIPPED, Settings

log = logging.getLogger("fetch_base_model")


def needed_base_model(settings: Settings) -> str | None:
    """The name of the generator's base model, or None for a checkpoint that holds a whole generator.

    Raises ConfigError where the checkpoint is missing, CheckpointError where it cannot be read.
    """
    folder = settings.checkpoint or (SHIPPED if SHIPPED.is_dir() else None)
    if folder is None:
        return settings.base_model
    if not folder.is_dir():
        raise ConfigError(f"checkpoint: there is no {folder}; put it there, or name another by SCALEDOWN_CHECKPOINT")
    generator = parse_json(Config, read_bounded(folder / "config.json"), "config.json").generator
    return None if generator.merged else generator.base_model


def main() -> int:
    """The exit status: 0 if the base model is there now, else 1 and the reason in the log."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        name = needed_base_model(Settings())
        if name is None:
            log.info("the checkpoint holds its whole generator: no base model is needed")
        else:
            log.info("base model %s: %s", name, resolve_base_model(name).path)
    except ScaledownError as error:
        log.error(error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
