"""Run a module with emulated NPUs: ``python -m mindspeed_model_core.testing.npu_emulator SITE DEVICES [MODULE ...]``.

``SITE`` is a folder with torch_npu, see ``install``. The processes that a module starts with ``--nproc`` are started
the same way, and so have the NPUs too. Without a module, say what there is.
"""

from __future__ import annotations

import runpy
import sys

import torch

from ... import device, launch
from ...errors import UserError
from . import install

if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[2].isdigit():
        sys.exit("usage: python -m mindspeed_model_core.testing.npu_emulator SITE DEVICES [MODULE [ARGUMENT ...]]")
    site, devices, *command = sys.argv[1:]
    try:
        install(site, int(devices))
    except UserError as error:
        launch.report(str(error))
        sys.exit(2)
    if not command:
        print(f"{devices} emulated NPUs, each an {device.name(torch.device('npu', 0))}")
        sys.exit()
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
