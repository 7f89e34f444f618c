"""Which key a path needs and whether a request has it. Keys are kept as SHA-256 and compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable

from fastapi import Security
from fastapi.security import HTTPBearer
from pydantic import SecretStr
from starlette.datastructures import Headers

from service.errors import NOTHING_HERE, JSONError, plain_response

OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/metrics", "/openapi.json"})
OPEN_FOLDER = "/page/"  # the web page's own files: it has to be there before it can ask for a key
HASHED = "sha256:"
# Dependencies of routes, for the OpenAPI document only: it is the middleware that refuses, before any body is read.
API_KEY = Security(
    HTTPBearer(
        scheme_name="api_key",
        description="asked for where the operator has set any; `X-API-Key: <key>` does as well",
        auto_error=False,
    )
)
ADMIN_KEY = Security(
    HTTPBearer(scheme_name="admin_key", description="where none is set there is no /admin", auto_error=False)
)


class KeyRing:
    """The API keys and the admin key. A path that is not known to be open needs an API key, if there are any."""

    def __init__(self, api_keys: Iterable[SecretStr], admin_key: SecretStr | None) -> None:
        self._api = [_digest(key) for key in api_keys]
        self._admin = [_digest(admin_key)] if admin_key is not None else []

    def refuse(self, path: str, headers: Headers) -> JSONError | None:
        """The refusal of a request, or None where it may pass. `path` is what routes see: without any `root_path`."""
        if path == "/admin" or path.startswith("/admin/"):
            if not self._admin:
                return plain_response(404, NOTHING_HERE)
            return self._check(headers, self._admin)
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or not self._api:
            return None
        return self._check(headers, self._api)

    def _check(self, headers: Headers, digests: list[bytes]) -> JSONError | None:
        offered = _offered_key(headers)
        if offered is None:
            challenge = {"WWW-Authenticate": "Bearer"}
            return plain_response(401, "a key is needed: Authorization: Bearer <key>, or X-API-Key", challenge)
        digest = hashlib.sha256(offered.encode("latin-1")).digest()  # the bytes that were sent
        # Every key is compared, whichever fits: the time says nothing about them.
        fits = [hmac.compare_digest(digest, known) for known in digests]
        return None if any(fits) else plain_response(403, "this key is not valid here")


def _digest(key: SecretStr) -> bytes:
    text = key.get_secret_value()
    if text.startswith(HASHED):
        return bytes.fromhex(text.removeprefix(HASHED))
    return hashlib.sha256(text.encode()).digest()


def _offered_key(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")
