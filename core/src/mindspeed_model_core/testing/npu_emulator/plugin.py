"""A pytest plugin that installs the emulator before anything is collected; ``nox -s npu`` loads it."""

from __future__ import annotations

import os

import pytest

from ...errors import UserError
from . import SITE, install


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Install the emulator with the torch_npu in the folder that the environment names."""
    try:
        install(os.environ[SITE])
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
