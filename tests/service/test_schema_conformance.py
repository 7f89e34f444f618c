"""schemathesis: whatever the OpenAPI document allows or forbids, every response is one that it describes.

Each operation gets requests that fit its schema and requests that do not. No response may be a 500, have a status or
a media type that the document does not name, or a body that its schema does not allow.
"""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.schemas import APIOperation

from service.app import create_app
from tests.service.conftest import Serve, make_settings

ADMIN_KEY = "admin-0123456789abcdef"
LIMITS = {"max_new_tokens": 4, "max_timeout_seconds": 10, "admin_key": ADMIN_KEY}
EXAMPLES = 10  # of each kind and operation
SCHEMA = schemathesis.openapi.from_dict(create_app(make_settings(**LIMITS)).openapi())
Operation = APIOperation[Any, Any, Any, Any]
OPERATIONS: list[Any] = [operation.ok() for operation in SCHEMA.get_all_operations()]  # type: ignore[union-attr]  # all are ok
CHECKED: list[Any] = CHECKS.get_by_names(
    ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[httpx.Client]:
    with serve(**LIMITS) as client:
        yield client


def kinds(operation: Operation) -> list[GenerationMode]:
    """An operation without a body takes nothing that could be wrong."""
    return list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        pytest.param(operation, kind, id=f"{operation.label} {kind.value}")
        for operation in OPERATIONS
        for kind in kinds(operation)
    ],
)
def test_every_response_is_one_the_document_describes(
    served: httpx.Client, operation: Operation, kind: GenerationMode
) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=kind))
    def check(case: Case[Any]) -> None:
        response = case.call(base_url=str(served.base_url), headers={"Authorization": f"Bearer {ADMIN_KEY}"})
        assert response.status_code != 500  # 504 may be: a deadline can be as short as a float
        case.validate_response(response, checks=CHECKED)

    check()
