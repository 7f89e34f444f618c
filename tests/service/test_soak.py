"""The soak command, against a real server."""

import re

import httpx
import pytest

from service.soak import main
from tests.service.conftest import Serve

SMALL = ["--requests", "6", "--clients", "3", "--passages", "2", "--sentences", "3", "--max-new-tokens", "4"]


def test_it_reports_what_the_clients_saw(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", str(client.base_url), *SMALL, "--seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("6 answers by 3 clients in ")
    assert "0 failed" in shown
    for line in ("throughput", "latency", "time to first token", "MiB before"):
        assert line in shown


def test_refusals_are_counted_and_tried_again(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(max_requests=1) as client:
        assert main(["--url", str(client.base_url), *SMALL, "--seconds", "0"]) == 0
    assert re.match(
        r"6 answers by 3 clients in [\d.]+ s; [1-9]\d* refused for a while, 0 failed", capsys.readouterr().out
    )


def test_a_soak_goes_on_until_its_time_is_over(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", str(client.base_url), *SMALL, "--seconds", "1.5"]) == 0
    shown = capsys.readouterr().out
    assert int(shown.split()[0]) > 6
    assert "MiB before" in shown
