"""The facade that megatron-core sees: in a process of its own, for it changes ``torch.cuda``."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import types
import torch
import torch.distributed as dist
from mindspeed_model_core.parallel import facade

def written(name, text):
    module = types.ModuleType(name)
    exec(text, module.__dict__)
    return module

TEXT = '''
import torch
import torch.distributed as dist
def device(): return torch.cuda.current_device()
def made(): return torch.empty(2, device="cuda").device
def moved(): return torch.ones(2).cuda().device
def grouped(name): return dist.new_group([0], group_desc=name)
'''
theirs, ours = written("megatron.some", TEXT), written("other.some", TEXT)
facade.install(torch.device("cpu"))
assert theirs.device() == torch.device("cpu")

def fails(function):
    try:
        function()
    except (AssertionError, RuntimeError):
        return True
    return False

assert fails(ours.device) and fails(theirs.made)
with facade.active():
    assert theirs.made() == theirs.moved() == torch.device("cpu")
    assert fails(ours.made) and fails(ours.moved)

# It can point elsewhere later: what it serves is looked up at each call.
facade.install(torch.device("meta"))
with facade.active():
    assert theirs.made() == torch.device("meta")
assert fails(lambda: facade.install(torch.device("cuda")))

given = []
original = dist.new_group = lambda *args, **kwargs: given.append(kwargs.get("pg_options"))
with facade.group_options({"A": "options of A", "B": None}):
    theirs.grouped("A"), theirs.grouped("B"), ours.grouped("A")
assert dist.new_group is original
with facade.group_options({"A": None}):
    assert dist.new_group is original
theirs.grouped("A")
assert given == ["options of A", None, None, None], given
"""


def test_it_answers_for_megatron_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
