"""Every test that asks for a family runs for each published shape."""

import pytest
from helpers.toys import SIZES


@pytest.fixture(params=SIZES)
def family(request) -> str:
    return request.param
