"""Recipes: extends, typed overrides, one-line errors and the digest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mindspeed_model_core import recipe as recipes
from mindspeed_model_core.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from toy_zoo import MODEL, ToyRecipe


def load(name: str, *overrides: str) -> ToyRecipe:
    return MODEL.load_recipe(name, overrides)


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(name, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_are_the_shipped_files() -> None:
    assert recipes.names("toy_zoo") == ["base", "longer"]


def test_extends_merges_sections_key_by_key() -> None:
    longer = load("longer")
    assert (longer.name, longer.steps, longer.reproduces) == ("longer", 50, "some-row")
    assert (longer.optim.lr, longer.optim.warmup, longer.precision) == (2e-3, 1, "fp32")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("parallel.tp=2", lambda r: r.parallel.tp, 2),
        ("optim.lr=1e-4", lambda r: r.optim.lr, 1e-4),
        ("optim.clip=null", lambda r: r.optim.clip, None),
        ("optim.betas=[0.8,0.9]", lambda r: r.optim.betas, (0.8, 0.9)),
        ("recompute=all", lambda r: r.recompute, "all"),
        ("recompute=3", lambda r: r.recompute, 3),
        ("deterministic=true", lambda r: r.deterministic, True),
        ("data.path=a=b.txt", lambda r: r.data.path, "a=b.txt"),
        ("parallel.shard=none", lambda r: r.parallel.shard, "none"),
        ("init_from=models/x", lambda r: r.init_from, "models/x"),
        ("init_from=16:9", lambda r: r.init_from, "16:9"),
        ("profile.ranks=2", lambda r: r.profile.ranks, (2,)),
        ("metrics.trackers=tensorboard", lambda r: r.metrics.trackers, ("tensorboard",)),
        ("lora.targets=[up,16:9]", lambda r: r.lora.targets, ("up", "16:9")),
        ("optim.lr=2.5e-4", lambda r: r.optim.lr, 2.5e-4),
        ("seed=0x10", lambda r: r.seed, 16),
    ],
)
def test_overrides_are_typed(override, read, value) -> None:
    got = read(load("base", override))
    assert got == value and type(got) is type(value)


def test_config_overrides_reach_the_preset() -> None:
    assert MODEL.config(load("base", "config.layers=2")).layers == 2
    assert "did you mean 'layers'" in refused("base", "config.layer=2")


def test_what_is_compiled_is_whole_and_keeps_nothing() -> None:
    assert "parallel.tp=2: what ranks exchange within a block" in refused("base", "compile=true", "parallel.tp=2")
    assert "lora.dropout=0.5: what is drawn" in refused("base", "compile=true", "lora.rank=2", "lora.dropout=0.5")
    kept = ("compile=true", "recompute=all", "recompute_keep=attention")
    assert "recompute_keep=attention: a compiled block" in refused("base", *kept)


@pytest.mark.parametrize("cut", ["recompute=1", "parallel.pp=2", "parallel.cp=2", "parallel.shard=zero1"])
def test_one_graph_is_of_a_network_that_is_not_cut(cut: str) -> None:
    assert f"{cut}: blocks of a network that is one graph" in refused("base", "compile=whole", cut)
    assert load("base", "compile=whole", "recompute=0").compile == "whole"


def test_unknown_recipe_names_the_nearest() -> None:
    assert "did you mean 'base'" in refused("bass")
    assert "no such file" in refused("missing.yaml")


def test_unknown_key_names_path_and_nearest() -> None:
    text = refused("base", "parallel.tensor=2")
    assert "parallel.tensor" in text and "tp" in text
    text = refused("base", "optim.lrr=1")
    assert "optim.lrr" in text and "did you mean 'lr'" in text
    assert "did you mean 'steps'" in refused("base", "step=3")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("steps=many", ("steps", "'many'")),
        ("steps=0", ("steps", "0", "greater than 0")),
        ("parallel.shard=zero4", ("parallel.shard", "'zero4'", "zero3")),
        ("precision=fp8", ("precision", "'fp8'", "bf16")),
        ("parallel.sequence=true", ("sequence=true needs tp of 2 or more",)),
        ("parallel.overlap_chunks=2", ("overlap_chunks=2 needs tp of 2 or more", "parallel.overlap_chunks=1")),
        ("parallel.overlap_chunks=3", ("parallel.overlap_chunks=3", "1, 2, 4 or 8")),
        ("compile=1.5", ("compile=1.5", "must be true, false or whole")),
        ("cuda_graph=maybe", ("cuda_graph='maybe'", "must be true or false")),
        ("deterministic=[1]", ("deterministic=[1]", "must be true or false")),
        ("optimization_level=true", ("optimization_level=True", "must be a number")),
        ("parallel.overlap_chunks=16", ("parallel.overlap_chunks=16", "did you mean '8'")),
        ("optim=3", ("optim", "3")),
        ("optim.lr.x=3", ("optim.lr.x",)),
        ("preset=huge", ("huge", "tiny", "wide")),
        ("steps", ("'steps'", "key=value")),
        ("optim.betas=[0.9,1.0]", ("optim.betas.1=1.0", "less than 1")),
        ("optim.betas=[-0.1,0.9]", ("optim.betas.0=-0.1", "greater than or equal to 0")),
        ("optim.lr=.inf", ("optim.lr=inf", "finite number")),
        ("optim.weight_decay=.nan", ("optim.weight_decay=nan", "finite number")),
        ("optim.warmup=9999", ("optim.warmup=9999", "longer than the run", "nearest: ")),
        ("seed=-1", ("seed=-1", "greater than or equal to 0")),
        ("seed=9223372036854775808", ("seed=9223372036854775808", "less than")),
        ("recompute=true", ("recompute=True", "must be none, all, auto, or a number")),
        ("recompute=false", ("recompute=False", "must be none, all, auto, or a number")),
        ("recompute=-1", ("recompute=-1", "a number of blocks from 0")),
        ("recompute=some", ("recompute='some'", "must be none, all")),
        ("lora={rank:4}", ("lora: 'rank:4' is one word; write a space after the colon: {rank: 4}",)),
        ("lora={'rnk:4':2}", ("lora.rnk:4=2: unknown key; did you mean 'rank'",)),
        ("lora=true", ("lora=True: is a section; set its fields, as lora.rank=16",)),
        ("steps=1e3", ("steps='1e3'", "; nearest: 1000")),
        ("optim.betas=0.9", ("optim.betas=0.9: must be a list, such as [0.9, 0.95]",)),
        ("recompute_keep=attention", ("recompute_keep=attention: ", "recompute=none; set recompute=all")),
        ("parallel.sequence=true", ("recipe base: parallel.sequence=true needs",)),
        ("data.kind=zzz", ("data.kind='zzz'", "(known: csv, null, text)")),
        ("profile.stop=3", ("stop=3 needs a start", "profile.start=3")),
        ("profile.ranks=[-1]", ("profile.ranks.0=-1", "greater than or equal to 0")),
        ("=3", ("key=value",)),
    ],
)
def test_bad_values_are_one_line_that_names_them(override: str, parts: tuple[str, ...]) -> None:
    text = refused("base", override)
    assert all(part in text for part in parts), text


def test_chunks_need_the_level_that_overlaps() -> None:
    wanted = ("parallel.tp=2", "parallel.overlap_chunks=4")
    said = refused("base", *wanted, "optimization_level=1")
    assert all(part in said for part in ("overlap_chunks=4", "needs optimization_level=2, this is 1"))
    assert load("base", *wanted).parallel.overlap_chunks == 4
    assert load("base", "parallel.tp=2").digest() == load("base", *wanted[:1], "parallel.overlap_chunks=1").digest()
    assert load("base", *wanted).digest() != load("base", wanted[0]).digest()


def test_files_extend_shipped_recipes_and_each_other(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: base\nsteps: 7\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nseed: 3\n")
    two = load(str(tmp_path / "two.yaml"))
    assert (two.name, two.steps, two.seed, two.optim.warmup) == ("two", 7, 3, 1)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("steps: [", "not valid YAML"),
        ("- 1\n", "expected a mapping of fields"),
        ("steps: 3\n", "preset"),
        ("extends: bass\n", "did you mean 'base'"),
        ("extends: self.yaml\n", "circle"),
        ("preset: tiny\nparallel: {tq: 2}\n", "parallel.tq"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "self.yaml").write_text(text)
    assert part in refused(str(tmp_path / "self.yaml"))


def test_yaml_round_trips(tmp_path: Path) -> None:
    first = load("longer", "parallel.tp=2", "parallel.sequence=true", "optim.betas=[0.5,0.6]")
    (tmp_path / "longer.yaml").write_text(first.to_yaml())
    assert load(str(tmp_path / "longer.yaml")) == first


def test_digest_follows_the_work_only() -> None:
    base = load("base").digest()
    assert len(base) == 12 and int(base, 16) >= 0
    for same in ("data.path=elsewhere", "checkpoint.every=5", "init_from=x", "profile.start=3", "description=other"):
        assert load("base", same).digest() == base, same
    changed = [load("base", o).digest() for o in ("steps=7", "optim.lr=1", "data.length=32", "parallel.shard=zero1")]
    assert len({base, *changed}) == 5


def test_changed_work_reproduces_nothing() -> None:
    assert load("longer", "checkpoint.keep=7").reproduces == "some-row"
    assert load("longer", "optim.lr=1.0").reproduces is None
