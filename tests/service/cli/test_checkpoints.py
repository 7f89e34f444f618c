"""`scaledown checkpoints`, and a checkpoint that a command loads itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.cli.__main__ import main
from service.versions import version_of
from tests.service.calls import PASSAGES, QUERY, answer
from tests.service.conftest import Serve

ADMIN = "admin-0123456789abcdef"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["checkpoints", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_those_of_a_service(
    serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALEDOWN_ADMIN_KEY", ADMIN)
    first, second = version_of(root / "first"), version_of(root / "second")
    with serve(admin_key=ADMIN, checkpoint_root=root) as client:
        monkeypatch.setenv("SCALEDOWN_URL", str(client.base_url))
        assert run(capsys, "list")["available"] == ["first", "second"]
        assert run(capsys, "activate", "first")["active"] == first
        before = run(capsys, "list")["kept"]
        loaded = run(capsys, "load", "second")
        assert (loaded["loaded"], loaded["kept"]) == (second, before)
        assert client.get("/readyz").json()["checkpoint"] == first
        assert main(["checkpoints", "list"]) == 0
        shown = capsys.readouterr().out.splitlines()[1:]
        assert [line.rstrip().split(maxsplit=1) for line in shown] == [
            [first, "serves"],
            [before[0], "in memory, to roll back to"],
            [second, "in memory, to activate"],
        ]
        assert run(capsys, "rollback")["active"] == before[0]
        assert main(["checkpoints", "activate", "nowhere"]) == 2
        assert "nowhere" in capsys.readouterr().err
        monkeypatch.setenv("SCALEDOWN_ADMIN_KEY", "sha256:" + "0" * 64)
        assert main(["checkpoints", "list"]) == 1
        assert "holds the key's hash" in capsys.readouterr().err


def test_folders(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = version_of(root / "first")
    listed = run(capsys, "list", "--root", str(root))
    assert [each["version"] for each in listed] == [version, version_of(root / "second")]
    assert listed[0]["trained"] is False
    assert main(["checkpoints", "list", "--root", str(root)]) == 0
    assert "first@" in capsys.readouterr().out
    inspected = run(capsys, "inspect", str(root / "first"))
    assert inspected["version"] == version
    assert inspected["config"]["compressor"]["chunk_tokens"] == 64
    assert "compressor.safetensors" in inspected["manifest"]["files"]
    verified = run(capsys, "verify", str(root / "first"))
    assert (verified["version"], verified["checked"]) == (version, ["sha256", "golden example"])

    broken = tmp_path / "broken"
    shutil.copytree(root / "first", broken)
    (broken / "golden.json").write_text((broken / "golden.json").read_text().replace("2", "3", 1))
    for more in ([], ["--files-only"]):
        assert main(["checkpoints", "verify", str(broken), *more]) == 1
        assert "golden.json: its sha256 is not the one in manifest.json" in capsys.readouterr().err
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for command in ("inspect", "verify"):
        assert main(["checkpoints", command, str(circle)]) == 1
        assert "error: " in capsys.readouterr().err


def test_a_checkpoint_that_the_command_loads_answers_as_a_service_does(
    serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not for the command's own model: keys, and costs that take a while to measure.
    for name, value in {"API_KEYS": ADMIN, "COMPRESSOR_TOKEN_US": "10", "PREFILL_TOKEN_US": "100"}.items():
        monkeypatch.setenv(f"SCALEDOWN_{name}", value)
    (tmp_path / "passages.json").write_text(json.dumps(PASSAGES))
    given = [QUERY, "--input", str(tmp_path / "passages.json"), "--checkpoint", str(root / "second")]
    assert main(["answer", *given, "--max-new-tokens", "8", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    with serve(checkpoint_root=root, admin_key=ADMIN, api_keys="") as client:
        client.post(
            "/admin/checkpoints",
            json={"action": "activate", "name": "second"},
            headers={"Authorization": f"Bearer {ADMIN}"},
        )
        expected = answer(client)
    assert (got["answer"], got["checkpoint"]) == (expected["answer"], expected["checkpoint"])
    assert main(["answer", *given, "--max-new-tokens", "8", "--quiet"]) == 0
    assert capsys.readouterr().out == got["answer"] + "\n"


def test_a_setting_that_is_wrong_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["rerank", QUERY, "a", "--checkpoint", str(root / "first")]
    monkeypatch.setenv("SCALEDOWN_BATCH_TOKENS", "none")
    assert main(given) == 1
    assert "batch_tokens" in capsys.readouterr().err
    monkeypatch.delenv("SCALEDOWN_BATCH_TOKENS")
    monkeypatch.setenv("SCALEDOWN_BACH_TOKENS", "1")
    assert main(given) == 1
    assert "SCALEDOWN_BACH_TOKENS" in capsys.readouterr().err
