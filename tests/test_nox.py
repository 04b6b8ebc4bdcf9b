"""What the sessions refuse."""

from __future__ import annotations

import pytest

from .repository import NOXFILE, PACKAGES

HEAD = "hardware,devices,recipe,digest,note\n"


def recorded(monkeypatch, tmp_path, *rows: str):
    (tmp_path / "perf_baselines").mkdir(exist_ok=True)
    (tmp_path / "perf_baselines" / "some.csv").write_text(HEAD + "".join(f"{row}\n" for row in rows))
    monkeypatch.setattr(NOXFILE, "ROOT", tmp_path)
    return NOXFILE.recorded("some", "H200", lambda package: {"small": "aaa", "large": "bbb"})


def test_what_was_recorded_here_is_measured_again(monkeypatch, tmp_path) -> None:
    rows = ("H200,8,small,aaa", "H200,1,small,aaa", "H200,1,small,000", "A3,2,large,ccc")
    jobs = [("small", "--nproc", "1"), ("small", "--nproc", "8")]
    assert recorded(monkeypatch, tmp_path, *rows) == jobs
    # One of a changed recipe is for what made it, whatever its digest.
    assert recorded(monkeypatch, tmp_path, *rows, "H200,1,large,eee,with recompute=none") == jobs


def test_perf_measures_alone_and_beside_others() -> None:
    def jobs(*words: str, has_peers: bool = True):
        return NOXFILE.perf_jobs(list(words), has_peers, lambda: [("small", "--nproc", "1")])

    assert jobs() == ([("small", "--nproc", "1")], ())
    assert jobs(has_peers=False) == ([("small", "--nproc", "1")], None)
    assert jobs("small", "seed=1") == ([("small", "seed=1")], None)
    assert jobs("--work", "tiny", "--record") == ([], ("--work", "tiny", "--record"))
    with pytest.raises(ValueError, match="--record: this model has no benchmarks/peers.py"):
        jobs("--record", has_peers=False)


@pytest.mark.parametrize(("row", "said"), [("large,ccc", "digest ccc, its digest now is bbb"), ("gone,aaa", "no such")])
def test_a_recipe_that_changed_since_it_was_recorded_fails(monkeypatch, tmp_path, row, said) -> None:
    with pytest.raises(ValueError, match=f"some.csv: .*{said}.*record it again: mindspeed-some measure"):
        recorded(monkeypatch, tmp_path, "H200,8,small,aaa", f"H200,1,{row}")


def test_the_digests_are_those_of_the_recipes(monkeypatch, tmp_path) -> None:
    import sys
    from pathlib import Path

    from mindspeed_model_template import MODEL

    monkeypatch.setattr(NOXFILE, "DEV", Path(sys.executable).parents[1])
    found = NOXFILE.digests("template")
    assert found and all(MODEL.load_recipe(name).digest() == digest for name, digest in found.items())
    assert set(PACKAGES) >= {"template"}


def test_selecting_no_test_fails(monkeypatch) -> None:
    """pytest's status 5 is not among those that a session takes for success."""
    asked = {}

    class Session:
        posargs = ("-k", "tyop")

        def run(self, *args, **options):
            asked.update(options, args=args)

    NOXFILE.pytest(Session(), "tests", "-m", "unit")
    assert asked["args"][-2:] == ("-k", "tyop") and 5 not in asked.get("success_codes", (0,))


def test_why_torch_npu_cannot_be_fetched_is_said() -> None:
    listed = (
        "ERROR: Could not find a version that satisfies the requirement torch_npu==9 (from versions: 2.7.1, 2.13.0)"
    )
    said = NOXFILE.unfetched("9", f"{listed}\nERROR: No matching distribution found for torch_npu==9\n")
    assert said.startswith("there is no torch_npu 9 for this Python") and said.endswith("there is 2.7.1, 2.13.0")
    none = (
        "ERROR: Could not find a version (from versions: none)\nERROR: No matching distribution found for torch_npu==9"
    )
    assert NOXFILE.unfetched("9", none).endswith("found for torch_npu==9 (can pip reach an index?)")
    assert "pip said nothing" in NOXFILE.unfetched("9", "")


def test_a_device_that_is_not_here_ends_a_session_in_one_line(monkeypatch) -> None:
    class Session:
        def error(self, said):
            raise SystemExit(said)

    monkeypatch.setenv("MINDSPEED_MODEL_DEVICE", "abacus")
    with pytest.raises(SystemExit, match="^MINDSPEED_MODEL_DEVICE='abacus': not present on this machine.*$"):
        NOXFILE.hardware(Session())
    monkeypatch.setenv("MINDSPEED_MODEL_DEVICE", "cpu")
    assert NOXFILE.hardware(Session())[0] == "cpu"


def test_torch_npu_is_pinned_with_torch_and_goes_beside_the_environment() -> None:
    import re

    version, site = NOXFILE.npu_site()
    torch = re.search(r"(?m)^torch==(\S+)", NOXFILE.CONSTRAINTS.read_text(encoding="utf-8"))
    assert torch and version.partition(".post")[0] == torch[1]
    assert not site.is_relative_to(NOXFILE.DEV)


def test_every_model_has_the_npu_tier() -> None:
    assert set(NOXFILE.having("npu")) == set(PACKAGES)
