"""From the name of a base model to a local folder with its weights. Knows nothing about what the model is for.

A folder counts only if its weights are safetensors: pickled weights can run code and are refused.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from huggingface_hub import snapshot_download
from tqdm import tqdm

from core.demo_models import DEMO_MODELS, install_demo_model
from core.errors import BaseModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Only what transformers reads without running code. Some repositories hold the weights twice (consolidated.*).
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
HUB_SKIPPED = ["*/*", "consolidated*"]
READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this machine: the name asked for, its folder, and the sha256 that identifies its weights."""

    name: str
    path: Path
    sha256: str


def resolve_base_model(name: str) -> BaseModel:
    """Find the folder of base model `name`, fetching it where needed.

    Tried in this order: a local folder; a demo model (`DEMO_MODELS`); the Hugging Face cache; the Hugging Face hub.
    The sha256 is the pinned one of its source file for a demo model, else `weights_sha256` of the folder.
    Raises BaseModelError, which says what was tried, when there is none, or its weights are pickled or incomplete.
    """
    if name and Path(name).is_dir():
        return BaseModel(name, Path(name).resolve(), weights_sha256(Path(name)))
    if name in DEMO_MODELS:
        return _resolve_demo(name)
    if HUB_ID.fullmatch(name):
        path = _resolve_hub(name)
        return BaseModel(name, path, weights_sha256(path))
    raise BaseModelError(
        f"base model {name!r} was not found: there is no such folder, it is no demo model ({_demo_names()}), "
        "and it does not have the form of a Hugging Face id (organisation/model)"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder` that transformers would load, sorted by name.

    Raises BaseModelError if `config.json` or a shard is missing, or the only weights are pickled.
    """
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder}: no config.json, so this is not a model folder")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise BaseModelError(
                f"{folder}: the weights are pickled (*.bin, *.pt), which can run code when they are read; "
                "convert them to safetensors"
            )
        raise BaseModelError(
            f"{folder}: no model.safetensors or index of its shards (pickled weights are never fetched)"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseModelError(f"{index}: not an index of safetensors files") from error
    for shard in names:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BaseModelError(f"{index}: {shard!r} is not a safetensors file beside it")
        if not (folder / shard).is_file():
            raise BaseModelError(f"{folder}: {shard} is missing")
    return [folder / shard for shard in names]


def weights_sha256(folder: Path) -> str:
    """One sha256 for all weights of `folder`: over its sorted weight files' names and own hashes.

    File hashes are remembered by path, size and modification time, so that 14 GB are not read at every start.
    """
    lines = [f"{_file_sha256(file.resolve())}  {file.name}\n" for file in weight_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def first_line(error: BaseException, folder: Path | None = None) -> str:
    """What a library's error says first: transformers and the hub's client go on for pages; `folder` by its name."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if folder is None else line.replace(str(folder), folder.name)


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("scaledown")) / "base_models"


def _demo_names() -> str:
    return ", ".join(sorted(DEMO_MODELS))


def _resolve_demo(name: str) -> BaseModel:
    demo = DEMO_MODELS[name]
    # The source's hash is in the folder's name: a new pin is a new folder, and an old one is never changed.
    folder = _cache_folder() / f"{name}-{demo.sha256[:12]}"
    if not folder.is_dir():  # it appears whole or not at all, so that reading needs no lock
        try:
            with _locked(folder):
                if not folder.is_dir():
                    install_demo_model(name, demo, folder, weights_sha256)
        except OSError as error:
            raise BaseModelError(f"{folder}: cannot be written ({error.strerror}); see XDG_CACHE_HOME") from error
    recorded = (folder / "weights.sha256").read_text().strip() if (folder / "weights.sha256").is_file() else ""
    if weights_sha256(folder) != recorded:
        raise BaseModelError(f"{folder}: the weights are not those that were installed; delete this folder")
    return BaseModel(name, folder, demo.sha256)


def _resolve_hub(name: str) -> Path:
    with contextlib.suppress(OSError, BaseModelError):  # not in the cache, or only in part
        path = Path(snapshot_download(name, local_files_only=True))
        weight_files(path)
        return path
    try:
        path = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED))
    # The hub's client raises OSError, ValueError and its HTTP library's errors; all of them mean the same here.
    except Exception as error:
        raise BaseModelError(
            f"base model {name!r} was not found. Tried: a local folder of that name; the demo models "
            f"({_demo_names()}); the Hugging Face cache; the Hugging Face hub ({first_line(error)})"
        ) from error
    weight_files(path)
    return path


def _file_sha256(file: Path) -> str:
    """sha256 of `file`'s bytes, from the memory of earlier runs where size and modification time still fit."""
    memory = _cache_folder() / "file_hashes.json"
    stat = file.stat()
    seen = [stat.st_size, stat.st_mtime_ns]
    known = _read_hashes(memory).get(str(file))
    if isinstance(known, list) and len(known) == 3 and known[:2] == seen:
        return str(known[2])
    digest = hashlib.sha256()
    for block in _blocks(file, stat.st_size):
        digest.update(block)
    with contextlib.suppress(OSError), _locked(memory):  # a cache that cannot be written costs time, nothing else
        hashes = {path: known for path, known in _read_hashes(memory).items() if Path(path).exists()}
        hashes[str(file)] = [*seen, digest.hexdigest()]
        part = memory.with_suffix(".part")
        part.write_text(json.dumps(hashes, indent=1, sort_keys=True))
        part.replace(memory)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        yield


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    with (
        file.open("rb") as source,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {file.name}", delay=2, leave=False) as bar,
    ):
        while block := source.read(READ_BYTES):
            bar.update(len(block))
            yield block


def _read_hashes(memory: Path) -> dict[str, object]:
    try:
        values = json.loads(memory.read_text())
    except (OSError, ValueError):  # none yet, or damaged: hash again
        return {}
    return values if isinstance(values, dict) else {}
