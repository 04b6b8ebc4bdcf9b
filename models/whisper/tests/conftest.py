from mindspeed_model_core.testing.suite import pytest_generate_tests  # noqa: F401
