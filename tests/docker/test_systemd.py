"""The systemd unit: what it promises about settings, exit statuses and shutdown. No systemd runs here."""

from pathlib import Path

from service.exit_status import SETTINGS
from service.settings import Settings
from service.supervisor import GRACE_S

UNIT = Path(__file__).parent.parent.parent / "docker" / "scaledown.service"
# Lines of a unit may repeat a name; of these none does.
VALUES = dict(line.split("=", 1) for line in UNIT.read_text(encoding="utf-8").splitlines() if "=" in line)


def test_it_is_started_again_unless_a_setting_is_wrong() -> None:
    assert VALUES["Restart"] == "on-failure"
    assert VALUES["RestartPreventExitStatus"] == str(SETTINGS)


def test_it_is_given_the_time_that_several_workers_take_to_drain() -> None:
    assert int(VALUES["TimeoutStopSec"]) > Settings().drain_seconds + GRACE_S


def test_its_paths_are_those_of_a_clone() -> None:
    clone = VALUES["WorkingDirectory"]
    assert VALUES["ExecStart"] == f"{clone}/.venv/bin/python -m service"
    assert VALUES["EnvironmentFile"] == "/etc/scaledown.env"
