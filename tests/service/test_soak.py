"""The soak command, against a real server."""

import asyncio
import re

import httpx
import pytest

from service.soak import Sample, main, note_memory
from tests.service.conftest import Serve

SMALL = ["--requests", "6", "--clients", "3", "--passages", "2", "--sentences", "3", "--max-new-tokens", "4"]


def test_it_reports_what_the_clients_saw(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", str(client.base_url), *SMALL, "--seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("6 answers by 3 clients in ")
    assert "0 failed" in shown
    for line in ("throughput", "latency", "time to first token", "MiB before"):
        assert line in shown


@pytest.mark.parametrize("labels", [("",), ('{worker="0"}', '{worker="1"}')])
def test_the_memory_is_that_of_all_workers(labels: tuple[str, ...]) -> None:
    text = "".join(f"process_resident_memory_bytes{each} 1.5e+09\n" for each in labels)

    async def noted() -> list[Sample]:
        samples: list[Sample] = []
        answers = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
        async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=answers) as connection:
            await note_memory(connection, samples, 3.0)
        return samples

    assert asyncio.run(noted()) == [Sample(3.0, len(labels) * 1_500_000_000)]


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
