"""A container's health: exits with 0 if /livez answers 200. Asks this machine directly, whatever proxy is set."""

import http.client
import os
import sys

SECONDS = 4


def main() -> int:
    """The exit status Docker expects: 0 healthy, 1 not."""
    port = int(os.environ.get("SCALEDOWN_PORT") or "8000")  # set to nothing counts as unset, as in the service
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/livez")
        return int(connection.getresponse().status != 200)
    except (OSError, http.client.HTTPException):
        return 1


if __name__ == "__main__":
    sys.exit(main())
