"""`python -m training`: what every command has in common."""

from pathlib import Path

import pytest

from tests.tiny_training import settings, write_run
from training.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    usage, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert f"python -m training {command}" in usage
    assert f"-m training {command} " in examples


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["init", "--unknown"]])
def test_wrong_usage_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m training" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_a_folder_that_cannot_be_made_is_named(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    assert main(["train", str(config), "--out", str(out)]) == 1
    assert f"error: {out}: Not a directory" in capsys.readouterr().err
