"""`python -m service.demo`: start the service, ask one question over five passages in every mode, stop it again.

Talks to the service over HTTP only, as any client would. Exits with 0 only if every step worked.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx

from service.cli.answer import READ_AS
from service.demo_question import PASSAGES, QUERY

START_SECONDS = 600  # the base model may have to be fetched first
ANSWER_SECONDS = 300
ASKED: tuple[dict[str, Any], ...] = (
    {"mode": "text"},
    {"mode": "hybrid"},
    {"mode": "compressed"},
    {"mode": "compressed", "rate": 8},
)


def main() -> int:
    """Run the demo; the exit status."""
    with tempfile.TemporaryFile() as log, running_service(log) as (process, url):
        with httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False) as client:
            try:
                state = wait_until_ready(process, client)
                show_answers(client, trained=state["trained"], checkpoint=state["checkpoint"])
            except (httpx.HTTPError, RuntimeError) as error:
                log.seek(0)
                tail = log.read().decode(errors="replace")[-4000:]
                print(f"The demo failed: {error}\nThe service's log ends with:\n{tail}", file=sys.stderr)
                return 1
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        print(f"The service has stopped with exit code {code}.")
        return code


@contextlib.contextmanager
def running_service(log: Any) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The service as a process on a free port of this machine; it does not outlive the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # The demo shows the defaults: keys or limits of the caller's own environment stay out, the checkpoint does not.
    keep = ("SCALEDOWN_CHECKPOINT", "SCALEDOWN_BASE_MODEL")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SCALEDOWN_") or k in keep}
    command = [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client) -> dict[str, Any]:
    """What `/readyz` says once it says yes. Raises RuntimeError where the service ends or takes too long."""
    print("Starting the service ...", flush=True)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with exit code {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            response = client.get("/readyz", timeout=5)
            if response.status_code == 200:
                state: dict[str, Any] = response.json()
                return state
        time.sleep(0.2)
    raise RuntimeError(f"the service was not ready after {START_SECONDS} seconds")


def show_answers(client: httpx.Client, *, trained: bool, checkpoint: str) -> None:
    """Ask in each mode and print what came back."""
    print(f"Checkpoint: {checkpoint}")
    if not trained:
        print("It is untrained: `text` answers like the base model, `hybrid` and `compressed` cannot make sense yet,")
        print("and relevance is arbitrary.")
    print(f"Question:   {QUERY}")
    print(f"Passages:   {', '.join(passage['title'] for passage in PASSAGES)}")
    for options in ASKED:
        response = client.post("/answer", json={"query": QUERY, "passages": PASSAGES, "max_new_tokens": 48, **options})
        if response.status_code == 422 and "rate" in options:  # a checkpoint of other rates
            continue
        if response.status_code != 200:
            raise RuntimeError(f"{options['mode']}: status {response.status_code}: {response.text}")
        show_answer(response.json())


def show_answer(answer: dict[str, Any]) -> None:
    """Print one answer with its relevance, tokens and timings."""
    usage, plan = answer["usage"], answer["plan"]
    share = usage["tokens_saved"] / usage["text_tokens"]
    shown = "text" if plan["mode"] == "text" else f"{plan['mode']}, rate {plan['rate']}"
    print(f"\n--- {shown} ---")
    print(f"Answer:     {answer['answer'].strip()!r}")
    for passage in answer["passages"]:
        title = PASSAGES[passage["index"]]["title"]
        print(f"            relevance {passage['relevance']:.3f}  as {READ_AS[passage['mode']]:<19}  {title}")
    print(
        f"Tokens:     {usage['prompt_tokens']} in the prompt instead of {usage['text_tokens']}: "
        f"{usage['tokens_saved']} saved ({share:.0%}); {usage['completion_tokens']} written"
    )
    print("Stages:     " + ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in answer["timings_ms"].items()))


if __name__ == "__main__":
    sys.exit(main())
