"""The schemas on file are those of torch_npu as it is loaded here."""

from __future__ import annotations

import pytest
from mindspeed_model_core.testing import npu_schemas
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.suite import needs_emulator

pytestmark = [pytest.mark.npu, needs_emulator]


def test_the_file_is_torch_npus_own() -> None:
    operators = npu_schemas.read()
    assert run_on("npu", npu_schemas.text, 1, operators)[0] == npu_schemas.FILE.read_text()
