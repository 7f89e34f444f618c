"""`python -m training`: what every command has in common."""

from pathlib import Path

import pytest

from tests.tiny_training import settings, write_run
from training.__main__ import COMMANDS, choose_parser, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    usage, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert f"python -m training {command}" in usage
    assert f"-m training {command} " in examples


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_are_arguments_that_it_takes(command: str) -> None:
    text = (choose_parser([command])[0].epilog or "").replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.startswith("  python -m training ")]
    assert lines
    for line in lines:
        parser, rest = choose_parser(line[3:])
        parsed = parser.parse_intermixed_args(rest)
        config = getattr(parsed, "config", None)
        assert config is None or config.name == "prepare.yaml" or (ROOT / config).is_file()


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["init", "--unknown"]])
def test_wrong_usage_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m training")
    assert said.count("\n") == 1
    assert "--help" in said


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
    assert capsys.readouterr().err == f"error: --out {out}: {tmp_path / 'file'} is a file, not a folder\n"
