"""Everything this repository can do, one command each.

A session in brackets belongs to one package: nox -s "unit(llama2)". Without brackets it runs for every package that
has it: nox -s unit. Packages are found by their folders, models/*/pyproject.toml. What follows "--" is handed on:
nox -s "unit(llama2)" -- -k rope -x. All sessions share one environment, .nox/dev, which is made on first use.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import nox

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".nox" / "dev"
CONSTRAINTS = ROOT / "constraints.txt"
F = TypeVar("F", bound=Callable[..., None])

PYTHONS = ((3, 10), (3, 13))  # from, below: requires-python of every package

MODELS = {p.parent.name: p.parent for p in sorted(ROOT.glob("models/[a-z]*/pyproject.toml"))}
TEMPLATE = {"template": ROOT / "models" / "_template"}  # tested like a model, never released
PACKAGES = {"core": ROOT / "core", **MODELS, **TEMPLATE}
RELEASED = {"core": ROOT / "core", **MODELS}

nox.needs_version = ">=2025.2.9"
nox.options.envdir = str(ROOT / ".nox")
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests"]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every forked test process would compile torch again
os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")

TWO = ("-n", "2", "--dist", "worksteal")
"""Options by which pytest uses two processes: most tests keep one core busy. --pdb wants -n 0 after it."""
# Small tensors on few cores: threads only get in each other's way, and tests of compilation ask for it themselves.
TEST_ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def per_package(packages: dict[str, Path], **options: Any) -> Callable[[F], F]:
    """Make a function a session per package, in the shared environment unless told otherwise; none for no package."""

    def register(function: F) -> F:
        if packages:
            params = [nox.param(name, id=name) for name in packages]
            nox.session(**{"venv_backend": "none", "requires": ["dev"], **options})(
                nox.parametrize("package", params)(function)
            )
        return function

    return register


def module(package: str) -> str:
    """Return the import name of a package: every package names it after its folder."""
    return f"mindspeed_model_{package}"


def having(tier: str) -> dict[str, Path]:
    """Return the packages with tests of a tier: in a folder of that name, by its mark, or inherited from ModelSuite."""
    suite = (PACKAGES["core"] / "src" / module("core") / "testing" / "suite.py").read_text(encoding="utf-8")
    out = {}
    for name, folder in PACKAGES.items():
        texts = [f.read_text(encoding="utf-8") for f in folder.glob("tests/**/*.py")]
        own = any(folder.glob(f"tests/{tier}/test_*.py")) or any(f"mark.{tier}" in t for t in texts)
        if own or (f"mark.{tier}" in suite and any("(ModelSuite)" in t for t in texts)):
            out[name] = folder
    return out


def run(session: nox.Session, program: str, *args: str, **env: str) -> None:
    """Run a program of the shared environment."""
    path = f"{DEV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    session.run(str(DEV / "bin" / program), *args, external=True, env={"PATH": path, **env})


def pytest(session: nox.Session, *args: str) -> None:
    """Run pytest in the shared environment; selecting no test fails, so that a typo in -k is not green."""
    run(session, "python", "-m", "pytest", *args, *session.posargs, **TEST_ENV)


# --- the environment -------------------------------------------------------------------------------------------------


def stamp() -> dict[str, object]:
    """Return what the shared environment is made from."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for file in [ROOT / "pyproject.toml", CONSTRAINTS, *(p / "pyproject.toml" for p in PACKAGES.values())]:
        digest.update(file.read_bytes())
    return {"sha256": digest.hexdigest(), "packages": sorted(PACKAGES)}


@nox.session(reuse_venv=True)
def dev(session: nox.Session) -> None:
    """Make or refresh .nox/dev: every package editable, and the tools; at once when nothing changed."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        session.error(
            f"this is Python {sys.version_info.major}.{sys.version_info.minor}; the packages need 3.10, 3.11 or 3.12: "
            "install nox with one of these, for example python3.12 -m pip install nox"
        )
    seal, want = DEV / "packages.json", stamp()
    have = json.loads(seal.read_text()) if seal.is_file() else {}
    if have == want:
        return
    seal.unlink(missing_ok=True)
    gone = sorted(set(have.get("packages", [])) - set(PACKAGES))
    if gone:
        session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", *(f"mindspeed-model-{n}" for n in gone))
    project = nox.project.load_toml(ROOT / "pyproject.toml")
    tools = nox.project.dependency_groups(project, *project["dependency-groups"])
    options = ["--no-compile", "--quiet", "--constraint", str(CONSTRAINTS)]
    # The backend first and once, instead of one isolated build environment for each package.
    session.install(*options, *(t for t in tools if t.startswith("poetry-core")))
    editables = [a for folder in PACKAGES.values() for a in ("--editable", str(folder))]
    session.install(*options, "--no-build-isolation", *editables, *tools)
    seal.write_text(json.dumps(want))


# --- run it ----------------------------------------------------------------------------------------------------------


DEMOS = {name: file for name, folder in MODELS.items() for file in folder.glob("src/*/demo.py")}


@nox.session(venv_backend="none", requires=["dev"])
def demo(session: nox.Session) -> None:
    """Train a tiny model on real text, resume it, export, compare, generate: on CPU, in about three minutes."""
    # A newcomer waits for one, that of the package whose pyproject.toml offers it; others are run by name.
    offers = [
        n for n in DEMOS if nox.project.load_toml(MODELS[n] / "pyproject.toml")["tool"].get("demo", {}).get("first")
    ]
    demonstrate(session, offers[0])


def demonstrate(session: nox.Session, package: str) -> None:
    """Run a model's demonstration."""
    run(session, "python", "-m", f"{module(package)}.demo", *session.posargs)


for _name, _file in DEMOS.items():
    _run = functools.partial(demonstrate, package=_name)
    _run.__doc__ = (ast.get_docstring(ast.parse(_file.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    nox.session(_run, name=f"demo({_name})", venv_backend="none", requires=["dev"])


# --- test it ---------------------------------------------------------------------------------------------------------


@per_package({"repository": ROOT, **PACKAGES})
def tests(session: nox.Session, package: str) -> None:
    """Run every test that needs no accelerator; with a package's name, that package's whole CI."""
    folder = ROOT if package == "repository" else PACKAGES[package]
    pytest(session, str(folder / "tests"), "-m", "not device and not npu and not docs", "--durations=5", *TWO)


@per_package(PACKAGES)
def unit(session: nox.Session, package: str) -> None:
    """Run the tests of one process, in seconds."""
    pytest(session, str(PACKAGES[package] / "tests"), "-m", "unit")


@per_package(having("dist"))
def dist(session: nox.Session, package: str) -> None:
    """Run the tests of 2 to 8 processes on this machine's CPU: equal to the single process."""
    pytest(session, str(PACKAGES[package] / "tests"), "-m", "dist")


@per_package(having("parity"))
def parity(session: nox.Session, package: str) -> None:
    """Compare outputs and gradients with the reference implementation, through saved files."""
    pytest(session, str(PACKAGES[package] / "tests"), "-m", "parity")


def npu_site() -> tuple[str, Path]:
    """Return the version of torch_npu that constraints.txt pins, and the folder it is in: beside the environment.

    In it, torch_npu would make every import of torch fail where there is no CANN.
    """
    pinned = re.search(r"(?m)^torch_npu==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"))
    assert pinned, "constraints.txt pins no torch_npu"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return pinned[1], ROOT / ".nox" / "npu" / f"torch_npu-{pinned[1]}-{python}"


@nox.session(venv_backend="none", requires=["dev"], default=False)
def emulator(session: nox.Session) -> None:
    """Fetch torch_npu (44 MB, once) and build what stands in for CANN, for the npu tier; says so where it cannot."""
    version, site = npu_site()
    python = str(DEV / "bin" / "python")
    code = "import torch; print(torch.__version__.partition('+')[0], torch.backends.cuda.is_built())"
    torch, cuda = str(session.run(python, "-c", code, external=True, silent=True)).split()[-2:]
    if version.partition(".post")[0] != torch:
        session.error(f"constraints.txt pins torch_npu {version}, which needs that torch; .nox/dev has torch {torch}")
    if cuda == "True":
        session.error(
            "the npu tier needs the CPU build of torch, .nox/dev has one for CUDA: remove .nox/dev, and run again with "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu in the environment"
        )
    if not site.is_dir():
        fetch(session, f"torch_npu=={version}", site, functools.partial(unfetched, version))
    run(session, "python", "-m", f"{module('core')}.testing.npu_emulator", str(site), "2")


def fetch(session: nox.Session, requirement: str, site: Path, why: Callable[[str], str]) -> None:
    """Put one distribution, without what it needs, into a folder of its own; or end the session, saying ``why`` not."""
    session.log(f"{requirement} goes to {site.relative_to(ROOT)}")
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        pip = [
            str(DEV / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--target",
            f"{folder}/site",
            requirement,
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            session.error(why(done.stderr))
        os.replace(f"{folder}/site", site)


def unfetched(version: str, said: str) -> str:
    """Return why pip could not install torch_npu, from what it said."""
    listed = re.search(r"from versions: (.*?)\)", said)
    if listed and listed[1] != "none":
        return (
            f"there is no torch_npu {version} for this Python and machine, which torch in constraints.txt needs; "
            f"there is {listed[1]}"
        )
    lines = [line for line in said.splitlines() if line.strip()] or ["pip said nothing"]
    last = f"{lines[-1].removeprefix('ERROR: ')} (can pip reach an index?)"
    return f"torch_npu {version} cannot be fetched, so the npu tier cannot run: {last}"


@per_package(having("npu"), requires=["dev", "emulator"], default=False)
def npu(session: nox.Session, package: str) -> None:
    """Run the Ascend path on emulated NPUs: torch_npu's own code without the hardware; fails where it cannot."""
    plugin, tests = f"{module('core')}.testing.npu_emulator.plugin", PACKAGES[package] / "tests"
    os.environ["MINDSPEED_EMULATOR_SITE"] = str(npu_site()[1])
    pytest(session, str(tests), "-p", plugin, "-m", "npu", "--durations=5", *TWO)
    if (tests / "device").is_dir() and not session.posargs:
        # What a real device must pass in one process, in a process of its own: after it none could be forked.
        pytest(session, str(tests / "device"), "-p", plugin, "-m", "device")


TRITON = "triton==3.6.0"


@nox.session(venv_backend="none", requires=["dev"], default=False)
def kernels(session: nox.Session) -> None:
    """Hold Triton's kernels for CUDA to their formulas by its interpreter, on a CPU; fetches Triton (190 MB, once)."""
    code = "import importlib.util as u; print(u.find_spec('triton') is not None)"
    there = session.run(str(DEV / "bin" / "python"), "-c", code, external=True, silent=True)
    if str(there).split()[-1] == "False":
        # Beside the environment: PyTorch for CUDA brings a version of its own.
        site = ROOT / ".nox" / "triton" / TRITON.replace("==", "-")
        if not site.is_dir():
            fetch(session, TRITON, site, lambda said: f"{TRITON} cannot be fetched, which is held here: {said[-300:]}")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    pytest(session, str(PACKAGES["core"] / "tests" / "unit" / "test_kernels.py"))


def hardware(session: nox.Session) -> tuple[str, str]:
    """Return the kind of device that runs would use here, and its name."""
    code = "from mindspeed_model_core import device as d; here = d.pick(); print(here.type, d.name(here))"
    done = subprocess.run([str(DEV / "bin" / "python"), "-c", code], capture_output=True, text=True)
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
    if done.returncode:
        session.error(said.partition("UserError: ")[2] or said)
    kind, _, name = said.partition(" ")
    return kind, name


@per_package(having("device"))
def device(session: nox.Session, package: str) -> None:
    """Run a model's and core's tests of a real accelerator and report; skipped, saying so, where there is none."""
    kind, name = hardware(session)
    if kind == "cpu":
        session.skip("no accelerator here (neither an Ascend NPU with torch_npu nor CUDA): nothing was tested")
    session.log(f"accelerator: {name}")
    ops = PACKAGES["core"] / "tests" / "device"
    pytest(session, *dict.fromkeys((str(ops), str(PACKAGES[package] / "tests"))), "-m", "device")


@per_package(MODELS)
def perf(session: nox.Session, package: str) -> None:
    """Measure again what was recorded on this hardware, and beside other libraries; or -- RECIPE [key=value ...] alone.

    What begins with a dash goes to the second part alone: -- --work NAME --record. -- --help lists the options.
    """
    kind, name = hardware(session)
    session.log(f"hardware: {name}" + (" (no accelerator: the CPU is measured)" if kind == "cpu" else ""))
    peers = PACKAGES[package] / "benchmarks" / "peers.py"
    try:
        measured, beside = perf_jobs(session.posargs, peers.is_file(), lambda: recorded(package, name, digests))
    except ValueError as error:
        session.error(str(error))
    if not measured and beside is None:
        session.skip(f"nothing is recorded on {name}; mindspeed-{package} measure RECIPE --record does it")
    for job in measured:
        run(session, f"mindspeed-{package}", "measure", *job, "--compare")
    if beside is not None:
        run(session, "python", str(peers), *beside)


def perf_jobs(
    words: list[str], has_peers: bool, recorded: Callable[[], list[tuple[str, ...]]]
) -> tuple[list[tuple[str, ...]], tuple[str, ...] | None]:
    """Return what ``measure`` and what the comparison with peers (None: not at all) are called with.

    ValueError for the comparison's options where the model has none.
    """
    if not words:
        return recorded(), () if has_peers else None
    if not words[0].startswith("-"):
        return [tuple(words)], None
    if not has_peers:
        raise ValueError(f"{words[0]}: this model has no benchmarks/peers.py; without it: -- RECIPE [key=value ...]")
    return [], tuple(words)


def digests(package: str) -> dict[str, str]:
    """Return the digest that each recipe of a model has now."""
    code = f"from {module(package)} import MODEL as m; import json; from mindspeed_model_core import recipe as r\n"
    code += "print(json.dumps({n: m.load_recipe(n).digest() for n in r.names(m.package)}))"
    printed = subprocess.run([str(DEV / "bin" / "python"), "-c", code], check=True, capture_output=True, text=True)
    return dict(json.loads(printed.stdout.splitlines()[-1]))


def recorded(package: str, hardware: str, digests: Callable[[str], dict[str, str]]) -> list[tuple[str, ...]]:
    """Return the recipes and device counts that a model's baselines have on this hardware.

    What was recorded of a changed recipe, which its note tells, is left to what made it. ValueError when one was only
    recorded as other work than the recipe, by its digest, is now: that cannot be repeated.
    """
    file = ROOT / "perf_baselines" / f"{package}.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [
            row
            for row in csv.DictReader(lines)
            if row["hardware"] == hardware and not (row.get("note") or "").startswith("with ")
        ]
    now = digests(package) if rows else {}
    held: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        held.setdefault((row["recipe"], row["devices"]), []).append(row["digest"])
    for (recipe, devices), known in held.items():
        if now.get(recipe) not in known:
            raise ValueError(
                f"{file}: {recipe} on {devices} x {hardware} was recorded with digest {known[-1]}, its digest now is "
                f"{now.get(recipe, 'none: there is no such recipe')}; record it again: "
                f"mindspeed-{package} measure {recipe} --nproc {devices} --record"
            )
    return [(recipe, "--nproc", devices) for recipe, devices in sorted(held)]


IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    # Kernels need Triton, which PyTorch brings where it is built for CUDA.
    if not found.name.endswith(("__main__", ".demo", ".kernels")) and ".testing" not in found.name:
        importlib.import_module(found.name)
"""


# --- check it --------------------------------------------------------------------------------------------------------


def contracts() -> str:
    """Return import-linter's configuration: the rules of imports over the packages that are here."""
    core, packages = module("core"), [module(n) for n in PACKAGES]
    models = [p for p in packages if p != core]

    def section(name: str, title: str, kind: str, **fields: list[str] | str) -> Iterator[str]:
        yield from (f"[importlinter:contract:{name}]", f"name = {title}", f"type = {kind}")
        for key, value in fields.items():
            yield f"{key} = {value}" if isinstance(value, str) else f"{key} =" + "".join(f"\n    {v}" for v in value)

    def door(library: str, only: str) -> Iterator[str]:
        return section(
            library,
            f"{library} is imported by {only} alone",
            "forbidden",
            source_modules=packages,
            forbidden_modules=[library],
            ignore_imports=[f"{only} -> {library}"],
            allow_indirect_imports="True",
            unmatched_ignore_imports_alerting="none",
        )

    lines = ["[importlinter]", "include_external_packages = True", "root_packages ="]
    lines += [f"    {p}" for p in packages]
    lines += section("core", "core imports no model", "forbidden", source_modules=core, forbidden_modules=models)
    if len(models) > 1:
        lines += section("models", "models do not import each other", "independence", modules=models)
    lines += door("megatron", f"{core}.parallel.engine")
    lines += door("torch_npu", f"{core}.device.npu")
    return "\n".join(lines) + "\n"


@nox.session(venv_backend="none", requires=["dev"])
def lint(session: nox.Session) -> None:
    """Check style, format, and who may import whom; "-- --fix" repairs the first two."""
    fix = "--fix" in session.posargs
    run(session, "ruff", "check", *(["--fix"] if fix else []), ".")
    run(session, "ruff", "format", *([] if fix else ["--check"]), ".")
    config = ROOT / ".nox" / "importlinter.ini"
    config.write_text(contracts())
    run(session, "lint-imports", "--config", str(config), "--no-cache")


@nox.session(venv_backend="none", requires=["dev"])
def types(session: nox.Session) -> None:
    """Check the types of every package with mypy."""
    sources = [str(p / "src") for p in PACKAGES.values()]
    run(session, "mypy", *sources, *session.posargs, MYPYPATH=os.pathsep.join(sources))


@nox.session(venv_backend="none", requires=["dev"])
def docs(session: nox.Session) -> None:
    """Run the commands of the documentation and follow its links."""
    pytest(session, str(ROOT / "tests"), "-m", "docs")


@per_package(RELEASED, venv_backend="virtualenv", reuse_venv=False)
def wheel(session: nox.Session, package: str) -> None:
    """Build a package's wheel, install it with core's in an empty environment, and use it from there."""
    built = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(built, ignore_errors=True)
    sources = {"core": RELEASED["core"], package: RELEASED[package]}
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built)]
    run(session, "python", *build, *(str(p) for p in sources.values()))
    session.install("--no-compile", "--quiet", "--constraint", str(CONSTRAINTS), *map(str, sorted(built.glob("*.whl"))))
    session.run("python", "-m", "pip", "check")
    # Away from the checkout, so that nothing can come from its folders.
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        session.run("python", "-c", IMPORT_ALL, module(package))
        session.run("mindspeed", "--version")
        if package == "core":
            return
        session.run("mindspeed", "list")
        listed = str(session.run(f"mindspeed-{package}", "recipes", silent=True))
        shipped = [f.stem for f in sorted(RELEASED[package].glob("src/*/recipes/*.yaml"))]
        missing = [r for r in shipped if r not in listed]
        if missing or not shipped:
            session.error(f"recipes that the wheel does not hold: {', '.join(missing) or 'all of them'}")
        session.run(f"mindspeed-{package}", "show", shipped[0], silent=True)
        session.log(f"{', '.join(w.name for w in sorted(built.iterdir()))}: {len(shipped)} recipes")


# --- make it ---------------------------------------------------------------------------------------------------------


def copy_template(name: str, destination: Path) -> None:
    """Copy models/_template to a folder, with the model's name in place of the template's.

    ValueError when the name cannot be a package's or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", name) or name in PACKAGES:
        raise ValueError(f"NAME={name!r}: needs small letters and digits, a letter first, not {', '.join(PACKAGES)}")
    if destination.exists():
        raise ValueError(f"{destination}: exists")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "dist", "runs")
    shutil.copytree(TEMPLATE["template"], destination, ignore=ignore)

    def renamed(text: str) -> str:
        text = text.replace("models/_template", f"models/{name}")
        return text.replace("template", name).replace("Template", name.capitalize())

    for path in sorted(destination.rglob("*"), reverse=True):
        if path.is_file():
            path.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
        if "template" in path.name:
            path.rename(path.with_name(path.name.replace("template", name)))


@nox.session(venv_backend="none", requires=["dev"], default=False)
def new(session: nox.Session) -> None:
    """Start a model package from the template: nox -s new -- NAME."""
    if len(session.posargs) != 1:
        session.error("nox -s new -- NAME")
    name = session.posargs[0]
    try:
        copy_template(name, ROOT / "models" / name)
    except ValueError as error:
        session.error(str(error))
    # The new name sorts elsewhere among the imports.
    run(session, "ruff", "check", "--quiet", "--fix", str(ROOT / "models" / name))
    run(session, "ruff", "format", "--quiet", str(ROOT / "models" / name))
    session.log(f'models/{name} is a working package; nox -s "tests({name})" shows it. docs/adding-a-model.md goes on.')


@nox.session(venv_backend="none", requires=["dev"], default=False)
def release(session: nox.Session) -> None:
    """Set a package's version and write its changelog from its newsfragments: nox -s release -- llama2 0.2.0."""
    if len(session.posargs) != 2 or session.posargs[0] not in RELEASED:
        session.error(f"nox -s release -- PACKAGE VERSION; packages: {', '.join(RELEASED)}")
    package, version = session.posargs
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        session.error(f"VERSION={version!r}: expected MAJOR.MINOR.PATCH, such as 0.2.0 or 0.2.0rc1")
    folder = RELEASED[package]
    fragments = [f for f in folder.glob("newsfragments/*.md")]
    if not fragments:
        session.error(f"{folder.name}/newsfragments: empty, so there is nothing to release")
    project = folder / "pyproject.toml"
    text, count = re.subn(r'(?m)^version = ".*"$', f'version = "{version}"', project.read_text(encoding="utf-8"))
    if count != 1:
        session.error(f"{project}: expected one line version = ..., found {count}")
    config = ["--config", str(ROOT / "pyproject.toml"), "--dir", str(folder)]
    run(session, "towncrier", "build", *config, "--version", version, "--yes")
    project.write_text(text, encoding="utf-8")
    tag = f"mindspeed-model-{package}-v{version}"
    session.log(f"next: review, then git commit -am 'Release {tag}' && git tag {tag} && git push --follow-tags")
    session.log(f"then: python -m pip wheel --no-deps --wheel-dir dist ./{folder.relative_to(ROOT)}")
