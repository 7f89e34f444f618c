"""The command as a process: completion in a shell, output nobody reads, no torch where none is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli.__main__ import main

SCALEDOWN = [sys.executable, "-m", "service.cli"]


def completions(line: str, folder: Path) -> set[str]:
    """What argcomplete's shell function would be given for a line with the cursor at its end."""
    output = folder / "completions"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run(SCALEDOWN, env=environment, check=True, capture_output=True)
    return {word.strip() for word in output.read_text().split("\n")}


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("scaledown ", {"serve", "answer", "train", "checkpoints"}),
        ("scaledown re", {"rerank"}),
        ("scaledown answer --max-n", {"--max-new-tokens"}),
        ("scaledown answer --mode ", {"compressed", "hybrid", "text"}),
        ("scaledown checkpoints ", {"list", "activate", "verify"}),
        ("scaledown train rep", {"report"}),
    ],
)
def test_completion(line: str, some: set[str], tmp_path: Path) -> None:
    assert some <= completions(line, tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_part_of_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "scaledown" in capsys.readouterr().out


def test_a_reader_that_has_had_enough_is_no_trace() -> None:
    process = subprocess.Popen(
        [*SCALEDOWN, "completion", "bash"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_asking_a_service_needs_no_torch() -> None:
    code = (
        "import sys; from service.cli.__main__ import main; status = main(['answer', 'q', 'p', '--url', "
        "'http://127.0.0.1:9']); found = {'torch', 'transformers', 'fastapi', 'pydantic_settings'} & set(sys.modules); "
        "sys.exit(', '.join(found) or status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
