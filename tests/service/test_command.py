"""`python -m service`: help that teaches, and errors that name the flag or the variable."""

import pytest

from service.__main__ import main


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--checkpoint", "--max-passages", "SCALEDOWN_API_KEYS", "SIGTERM", "curl"):
        assert text in shown
    for secret in ("api-keys", "admin-key", "generator-key", "document-cache-redis"):
        assert f"--{secret}" not in shown.split()  # a flag would show it to every user of the machine
        assert f"SCALEDOWN_{secret.replace('-', '_').upper()}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "x"], "port:"),
        (["--max-passages", "0"], "max_passages:"),
        (["--device", "tpu"], "device:"),
        (["--checkpoint-root", "/nowhere"], "checkpoint_root:"),
    ],
)
def test_a_wrong_value_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--max-pasages", "3"])
    assert caught.value.code == 2
    assert "--max-pasages" in capsys.readouterr().err


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SCALEDOWN_MAX_PASAGES", "3")
    assert main([]) == 2
    assert "SCALEDOWN_MAX_PASAGES" in capsys.readouterr().err
