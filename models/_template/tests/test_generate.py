"""Generation."""

from __future__ import annotations

from mindspeed_model_core.testing.suite import open_net
from mindspeed_model_template import MODEL, Template
from mindspeed_model_template.generate import generate


def test_a_seed_decides_the_text() -> None:
    net = open_net(MODEL, MODEL.presets["tiny"])
    assert isinstance(net, Template)
    first, again, other = ("".join(generate(net, "a", length=40, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_temperature_zero_takes_the_likeliest_byte() -> None:
    net = open_net(MODEL, MODEL.presets["tiny"])
    assert isinstance(net, Template)
    texts = {"".join(generate(net, "a", length=20, temperature=0, seed=seed)) for seed in range(3)}
    assert len(texts) == 1
