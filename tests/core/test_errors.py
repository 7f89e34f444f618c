"""An error that crosses to another process arrives as it was."""

import copy

import pytest

from core.errors import EngineError, InvalidInputError, OverloadedError, ScaledownError, TooLargeError


@pytest.mark.parametrize(
    "error",
    [
        EngineError("the engine failed"),
        InvalidInputError("passages.3.text", "is empty"),
        TooLargeError("query", "9 is over the limit of 8 characters", 8),
        OverloadedError("there is no room", 2.5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_attributes_on_its_way(error: ScaledownError) -> None:
    arrived = copy.copy(error)  # by what pickle asks too
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.args, vars(arrived)) == (str(error), error.args, vars(error))
