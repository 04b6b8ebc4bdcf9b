"""The NPU emulator's parts that need no torch_npu; the rest is in the npu tier."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import npu_emulator
from mindspeed_model_core.testing.npu_emulator import libraries

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler; neither cc nor gcc is here")


def compiled(text: str, file: Path, *flags: str) -> Path:
    source = file.with_suffix(".c")
    source.write_text(text)
    subprocess.run([str(COMPILER), "-shared", "-fPIC", *flags, "-o", str(file), str(source)], check=True)
    return file


def wheel(folder: Path) -> Path:
    """Return a folder like torch_npu's: libraries that want functions of CANN and name a kernel."""
    (folder / "lib").mkdir(parents=True)
    wants = 'extern int aclrtFree(void *), HcclSomething(void), other(void); const char *k = "aclnnTwist";'
    wants += "int use(void) { aclrtFree(0); HcclSomething(); return other(); }"
    compiled(wants, folder / "lib" / "libtorch_npu.so")
    compiled("int nothing;", folder / "_C.some.so")
    (folder / "version.py").write_text("__version__ = '0'")
    return folder


@needs_compiler
@pytest.mark.parametrize("name", [n for n in libraries.SOURCES if n.endswith(".c")])
def test_sources_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    flags = ["-Wall", "-Werror", "-fsyntax-only", "-O1"]
    subprocess.run([str(COMPILER), *flags, str(libraries.HERE / name)], check=True)


@needs_compiler
def test_libraries_hold_all_that_a_wheel_wants_and_are_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = wheel(tmp_path / "torch_npu")
    assert {"aclrtFree", "HcclSomething", "other"} <= set(
        libraries.undefined_symbols(package / "lib" / "libtorch_npu.so")
    )
    built = libraries.build(package)
    assert built.is_relative_to(tmp_path / "cache")
    assert {p.name for p in built.iterdir()} == {f"{name}.so" for name in libraries.LIBRARIES}
    assert [p.name for p in built.parent.iterdir()] == [built.name]
    runtime = ctypes.CDLL(str(built / "libascendcl.so"))
    assert runtime.HcclSomething() == 0 and not hasattr(runtime, "other")
    kernels = ctypes.CDLL(str(built / "libopapi.so"))
    assert kernels.aclnnTwistGetWorkspaceSize() == 0 and kernels.aclnnTwist() != 0
    runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert runtime.aclGetRecentErrMsg() == b"kernel aclnnTwist was launched and has no CPU implementation"
    monkeypatch.setenv("CC", "false")
    assert libraries.build(package) == built
    (package / "version.py").write_text("__version__ = '1'")
    with pytest.raises(UserError, match="could not be built"):
        libraries.build(package)
    assert [p.name for p in built.parent.iterdir()] == [built.name]


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "version.py").touch()
    with pytest.raises(UserError, match="needs a C compiler: neither cc nor gcc is found"):
        libraries.build(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "version.py").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file: cannot be written; set XDG_CACHE_HOME"):
        libraries.build(tmp_path)


def test_what_it_cannot_work_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no torch_npu in it"):
        npu_emulator.install(tmp_path)
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "version.py").touch()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(UserError, match="torch built for CUDA"):
        npu_emulator.install(tmp_path)
    assert not npu_emulator.installed()
