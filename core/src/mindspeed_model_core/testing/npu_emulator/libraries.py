"""Builds the libraries that torch_npu links against, once for each wheel, and loads them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError

HERE = Path(__file__).parent
SOURCES = ("emulator.h", "runtime.c", "opapi.c", "hccl.c", "profiling.c")
EMPTY = ("libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel", "libmsprofiler", "libascend_hal")
"""Libraries that need only exist: the wheel names them, and what it wants of them is in libascendcl."""
LIBRARIES = ("libascendcl", "libhccl", *EMPTY, "libopapi")
SILENT = frozenset(
    "aclrtResetDevice aclrtSynchronizeDevice aclrtSynchronizeDeviceWithTimeout aclrtDeviceEnablePeerAccess "
    "aclrtSetDeviceSatMode aclrtSetStreamOverflowSwitch aclrtSetOpWaitTimeout aclrtSetOpExecuteTimeOut "
    "aclrtSetSysParamOpt aclrtCtxSetSysParamOpt aclrtPeekAtLastError aclrtGetLastError aclrtSetDeviceResLimit "
    "aclrtSynchronizeStream aclrtSynchronizeStreamWithTimeout aclrtSetStreamFailureMode aclrtSetStreamAttribute "
    "aclrtStreamWaitEvent aclrtResetEvent aclrtSynchronizeEvent aclSetCompileopt aclopSetCompileFlag "
    "aclGenGraphAndDumpForOp aclopStartDumpArgs aclopStopDumpArgs aclmdlRICaptureThreadExchangeMode "
    "aclrtSubscribeReport aclrtUnSubscribeReport aclrtHostRegisterV2 aclrtHostUnregister HcclSetConfig".split()
)
"""Functions that torch_npu looks up by name and that have nothing to do here: like all it links against, but for those
in runtime.c and hccl.c, they return 0."""
_FLAGS = ["-w", "-shared", "-fPIC", "-O1"]
_UNDEFINED, _DYNAMIC_SYMBOLS = 0, 11


def load(package: Path) -> dict[str, ctypes.CDLL]:
    """Load the libraries for the ``torch_npu`` in this folder by their sonames; build them if this wheel is new."""
    folder = build(package)
    return {name: ctypes.CDLL(str(folder / f"{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES}


def build(package: Path) -> Path:
    """Return the folder with the libraries for the ``torch_npu`` in this folder, compiled on first use.

    UserError where there is no C compiler, or where it fails.
    """
    final = _cache() / _digest(package)
    if final.is_dir():
        return final
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UserError("the NPU emulator needs a C compiler: neither cc nor gcc is found; install one, or set CC")
    # Processes may come here at once: each builds its own and the first to finish gives the folder its name.
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".build-") as work:
        out = Path(work) / "out"
        out.mkdir()
        _compile(compiler, package, Path(work), out)
        try:
            out.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    return final


def _cache() -> Path:
    """Return a folder of this user's own to keep what was built in: the user's cache, else below TMPDIR."""
    named = os.environ.get("XDG_CACHE_HOME")
    choices = [Path(named)] if named else [Path.home() / ".cache", Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"]
    for choice in choices:
        folder = choice / "mindspeed-npu-emulator"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Libraries from here are loaded: nobody else may have made the folder.
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    raise UserError(
        f"{choices[-1]}: cannot be written; set XDG_CACHE_HOME to a folder for the NPU emulator's libraries"
    )


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for file in [*(HERE / name for name in SOURCES), HERE / "libraries.py", package / "version.py"]:
        digest.update(file.read_bytes())
    # A version has a binary for each Python.
    digest.update(",".join(f"{p.name} {p.stat().st_size}" for p in _binaries(package)).encode())
    return digest.hexdigest()[:16]


def _binaries(package: Path) -> list[Path]:
    return sorted((package / "lib").glob("*.so")) + sorted(package.glob("_C.*.so"))


def _compile(compiler: str, package: Path, work: Path, out: Path) -> None:
    wanted = {s for binary in _binaries(package) for s in undefined_symbols(binary)}
    wanted = {s for s in wanted if re.match(r"(acl|Msprof|rt[A-Z]|[Hh]ccl)", s)}
    defined = {
        n: set(re.findall(r"(?m)^\w[\w \*]*?\b(\w+)\(", (HERE / f"{n}.c").read_text()))
        for n in ("runtime", "profiling", "hccl")
    }
    missing = sorted((wanted | SILENT) - set().union(*defined.values()))
    (work / "rest.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
    kernels = sorted(kernel_names(package / "lib" / "libtorch_npu.so"))
    own = (HERE / "opapi.c").read_text()
    with (work / "kernels.c").open("w") as file:
        file.write("int emulator_kernel(const char *);\n")
        for name in kernels:
            if f"RUNS({name.removeprefix('aclnn')})" not in own:
                file.write(f'int {name}(void) {{ return emulator_kernel("{name}"); }}\n')
                file.write(f"int {name}GetWorkspaceSize(void) {{ return 0; }}\n")

    def link(name: str, *parts: str) -> None:
        command = [*compiler.split(), *_FLAGS, f"-Wl,-soname,{name}.so", "-o", str(out / f"{name}.so"), *parts]
        done = subprocess.run([*command, "-lpthread", "-lrt"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the NPU emulator could not be built: {' '.join(command)}: {done.stderr.strip()[-500:]}")

    runtime = ["-Wl,--no-as-needed", str(out / "libascendcl.so"), "-Wl,-rpath,$ORIGIN"]
    link("libascendcl", str(HERE / "runtime.c"), str(HERE / "profiling.c"), str(work / "rest.c"))
    link("libhccl", str(HERE / "hccl.c"), *runtime)
    link("libopapi", str(HERE / "opapi.c"), "-I", str(HERE), str(work / "kernels.c"), *runtime)
    (work / "empty.c").write_text("")
    for name in EMPTY:
        link(name, str(work / "empty.c"), *runtime)


def undefined_symbols(binary: Path) -> Iterator[str]:
    """Yield the names of a 64-bit little-endian ELF file's undefined dynamic symbols."""
    data = binary.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    # Of a section: its kind, where it is and how long, and which other it refers to.
    sections = [struct.unpack_from("<4xI16xQQI", data, start + i * size) for i in range(count)]
    for kind, offset, length, strings in sections:
        if kind != _DYNAMIC_SYMBOLS:
            continue
        names = sections[strings][1]
        for at in range(offset, offset + length, 24):
            name, section = struct.unpack_from("<I2xH", data, at)
            if name and section == _UNDEFINED:
                end = data.index(b"\0", names + name)
                yield data[names + name : end].decode()


def kernel_names(library: Path) -> set[str]:
    """Return the names of CANN's kernels that a library mentions: it looks them up by name when it needs one."""
    found = {m.decode() for m in re.findall(rb"aclnn[A-Z]\w+", library.read_bytes())}
    return {name for name in found if not name.endswith("GetWorkspaceSize")}
