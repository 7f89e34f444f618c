"""What a service container runs: secrets come from files, then the process becomes `python -m service`.

A secret file is named after its setting in lower case, such as /run/secrets/scaledown_api_keys. What is in files shows
up neither in the container's description nor in the compose file. An empty file stands for none.
"""

import os
import sys
from pathlib import Path

SECRETS = (
    "SCALEDOWN_API_KEYS",
    "SCALEDOWN_ADMIN_KEY",
    "SCALEDOWN_GENERATOR_KEY",
    "SCALEDOWN_DOCUMENT_CACHE_REDIS",
)


def main() -> None:
    """Read the secrets and become the service. A variable that is set already wins over its file."""
    folder = Path(os.environ.get("SECRETS_DIR", "/run/secrets"))
    for name in SECRETS:
        file = folder / name.lower()
        # API keys may stand one on a line.
        value = ",".join(file.read_text(encoding="utf-8").split()) if file.is_file() else ""
        if value:
            os.environ.setdefault(name, value)
    os.execv(sys.executable, [sys.executable, "-m", "service", *sys.argv[1:]])


if __name__ == "__main__":
    main()
