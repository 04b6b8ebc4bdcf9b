"""A recipe: what to train and how, as values. YAML files become frozen pydantic models."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import UserError, nearest

# Those of PyYAML without their alternatives in base 60.
_NO_SIXTY = {
    "tag:yaml.org,2002:int": re.compile(
        r"^(?:[-+]?0b[01_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$"
    ),
    "tag:yaml.org,2002:float": re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}

NOTHING_TO_KEEP = (
    "recompute_keep=attention: plain formulas (optimization_level=0, or MINDSPEED_MODEL_OPS=reference) have no result "
    "of attention to keep; nearest: recompute_keep=nothing"
)
Compile = bool | Literal["whole"]
Precision = Literal["bf16", "bf16-pure", "fp32", "fp64"]


class Section(BaseModel):
    """A frozen group of recipe fields; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, values: Any) -> Any:
        """Take a lone value for a list of it."""
        if not isinstance(values, dict):
            return values
        lone = {name for name, value in values.items() if isinstance(value, str | int | float) and _is_list(cls, name)}
        return {name: (value,) if name in lone else value for name, value in values.items()}


def _is_list(kind: type[BaseModel], name: str) -> bool:
    field = kind.model_fields.get(name)
    choices = () if field is None else (field.annotation, *get_args(field.annotation))
    return any(get_origin(choice) is tuple and get_args(choice)[-1] is Ellipsis for choice in choices)


class _Yaml(yaml.SafeLoader):
    """YAML as its version 1.2 reads it in that 16:9 is a string: version 1.1 counts it to the base of 60."""

    yaml_implicit_resolvers = {
        first: [(tag, _NO_SIXTY.get(tag, pattern)) for tag, pattern in pairs]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def local(default: Any, **kwargs: Any) -> Any:
    """Declare a field that belongs to one run or machine and does not enter the recipe's digest."""
    return Field(default, json_schema_extra={"digest": False}, **kwargs)


def optional(default: Any = None, **kwargs: Any) -> Any:
    """Declare a field that enters the digest only when it is not its default: recipes from before it keep theirs."""
    return Field(default, json_schema_extra={"digest": "set"}, **kwargs)


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # Python takes true for 1
    return value


_NUMBER = BeforeValidator(_no_flag)


class HcclBuffers(Section):
    """Sizes in MB of HCCL's buffers, by the group that they belong to; null: HCCL_BUFFSIZE, 200 where it is not set."""

    auto: bool = Field(False, description="tp, cp and pp, where not named, as large as a micro-batch's messages")
    tp: PositiveInt | None = Field(None, description="MB of the tensor-parallel groups")
    cp: PositiveInt | None = Field(None, description="MB of the context-parallel groups")
    pp: PositiveInt | None = Field(None, description="MB of the pipeline groups")
    dp: PositiveInt | None = Field(None, description="MB of the data-parallel groups")
    replicas: PositiveInt | None = Field(None, description="MB of the groups that shard and reduce weights (dp x cp)")

    @classmethod
    def groups(cls) -> tuple[str, ...]:
        """Return the names of the groups."""
        return tuple(name for name in cls.model_fields if name != "auto")


class ParallelConfig(Section):
    """How the work is spread; the data-parallel size is what is left of the world size."""

    tp: PositiveInt = Field(1, description="tensor-parallel size")
    sequence: bool = Field(False, description="split activations between TP regions along the sequence")
    cp: PositiveInt = Field(1, description="context-parallel size (Ulysses): ranks that share the tokens of a sample")
    pp: PositiveInt = Field(1, description="pipeline stages (1F1B)")
    shard: Literal["none", "zero1", "zero2", "zero3"] = Field(
        "none", description="what data parallelism shards: optimizer states, gradients too, weights too"
    )
    overlap_chunks: Annotated[Literal[1, 2, 4, 8], _NUMBER] = optional(
        1, description="parts of a tensor-parallel product, so that one's communication overlaps another; 1: off"
    )
    hccl_buffers: HcclBuffers | None = optional(description="communication buffers, on Ascend alone; null: HCCL's own")

    @property
    def model(self) -> int:
        """Return how many processes work on one sample: tp x cp x pp."""
        return self.tp * self.cp * self.pp

    @property
    def product(self) -> str:
        """Return ``model`` as it is made up, for messages."""
        sizes = [(name, getattr(self, name)) for name in ("tp", "cp", "pp")]
        shown = [f"parallel.{name}={size}" for name, size in sizes if size > 1 or name != "cp"]
        return f"{' x '.join(shown)} = {self.model}"

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tp == 1:
            raise ValueError("sequence=true needs tp of 2 or more; set parallel.sequence=false or raise parallel.tp")
        if self.overlap_chunks > 1 and self.tp == 1:
            raise ValueError(
                f"overlap_chunks={self.overlap_chunks} needs tp of 2 or more; set parallel.overlap_chunks=1 or raise "
                "parallel.tp"
            )
        return self


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(3e-4, gt=0, description="learning rate")
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.95), description="decay of both moments")
    eps: float = Field(1e-8, gt=0, description="what is added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; vectors do not decay")
    clip: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate as a share of lr")
    ema: float | None = optional(
        gt=0, lt=1, description="decay of a moving average of the weights, kept in fp32; null: none"
    )


class LoraConfig(Section):
    """Low-rank adapters on frozen weights: rank, scale, where."""

    rank: PositiveInt = Field(16, description="width between the two factors")
    alpha: float | None = Field(None, gt=0, description="the update counts alpha / rank; null: rank, so 1")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs dropped in training")
    targets: tuple[str, ...] = Field(
        (),
        description="globs of linear layers, by whole name or what follows a dot (mlp.*, qkv, or qkv.0 of what it "
        "stacks); empty: all in blocks",
    )
    init_from: str | None = Field(None, description="an adapter folder or a run of adapters; null: random")

    @property
    def scale(self) -> float:
        """Return what the update is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


class CheckpointConfig(Section):
    """When a run saves itself."""

    every: PositiveInt | None = local(None, description="steps between saves; null: only at the end and on SIGTERM")
    keep: PositiveInt = local(2, description="how many of the newest checkpoints stay on disk")
    background: bool = local(True, description="write while training goes on")


class ProfileConfig(Section):
    """A window of steps recorded with the device's profiler, readable by TensorBoard."""

    start: int | None = local(None, ge=1, description="first profiled step; null: off")
    stop: int | None = local(None, ge=1, description="last profiled step")
    ranks: tuple[NonNegativeInt, ...] = local((0,), description="processes that record")
    memory: bool = local(False, description="also write a memory snapshot")
    stacks: bool = local(False, description="record Python stacks")
    shapes: bool = local(False, description="record input shapes")

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.start is None and self.stop is not None:
            raise ValueError(f"stop={self.stop} needs a start; set profile.start={self.stop} or earlier")
        if self.start and (self.stop or self.start) < self.start:
            raise ValueError(f"stop={self.stop} is before start={self.start}; nearest: stop={self.start}")
        return self


class MetricsConfig(Section):
    """What is written while training."""

    every: PositiveInt = local(1, description="steps between records")
    trackers: tuple[str, ...] | None = local(
        None, description="accelerate's trackers: tensorboard, wandb, ...; null: tensorboard when it is installed"
    )


class Recipe(Section):
    """Everything that decides a training run. Models subclass it to type ``data`` and their own sections."""

    name: str = local("unnamed", description="the recipe's file name")
    description: str = local("", description="what it trains, in a line")
    reproduces: str | None = local(None, description="id of the row of published.csv this recipe repeats")
    preset: str = Field(description="a published size of the model")
    config: dict[str, Any] = Field(default_factory=dict, description="changes to the preset's fields")
    init_from: str | None = local(None, description="a hub folder or an original release; null: random weights")
    steps: PositiveInt = Field(1000, description="optimizer steps of the whole run")
    seed: int = Field(0, ge=0, lt=2**63, description="of random weights, the order of the data and noise")
    global_batch: PositiveInt = Field(8, description="samples per optimizer step, over all devices")
    micro_batch: PositiveInt = Field(1, description="samples per forward pass on one device")
    precision: Precision = Field(
        "bf16", description="bf16: fp32 master weights, fp32 gradient reduction; bf16-pure: bf16 throughout"
    )
    recompute: Literal["none", "all", "auto"] | NonNegativeInt = Field(
        "none",
        description="blocks recomputed in backward: none, all, the first N of each pipeline stage, or auto: as few as "
        "the memory that is free lets",
    )
    recompute_keep: Literal["nothing", "attention", "products"] = Field(
        "nothing",
        description="what recomputed blocks keep: fused attention's results, which are small and dear, or with "
        "products also those of matrix products, so that only cheap steps run again",
    )
    deterministic: bool = Field(False, description="the same bits from the same run, where that costs speed too")
    optimization_level: Annotated[Literal[0, 1, 2], _NUMBER] = optional(
        2, description="0: plain formulas; 1: fused ops; 2: also communication that overlaps computation"
    )
    compile: Compile = optional(
        False,
        description="compile each block with torch.compile: fewer passes over memory, a slow first step; whole: the "
        "network as one graph, for small ones",
    )
    cuda_graph: bool = optional(
        False,
        description="on CUDA, record forward and backward of each kind of batch and replay them: the device then does "
        "not wait for the host; for one device or replicas: no tp, cp, pp, shard or lora.dropout",
    )
    lora: LoraConfig | None = optional(description="train adapters instead of the weights, which init_from names")
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    metrics: MetricsConfig = MetricsConfig()

    @field_validator("recompute", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not count and value not in ("none", "all", "auto"):
            raise ValueError("must be none, all, auto, or a number of blocks from 0")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _graphs(cls, value: Any) -> Any:
        if value != "whole" and value not in (True, False):
            raise ValueError("must be true, false or whole")
        return value if value == "whole" else bool(value)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.recompute_keep != "nothing" and self.recompute in ("none", 0):
            raise ValueError(
                f"recompute_keep={self.recompute_keep}: is what recomputed blocks keep, and recompute="
                f"{self.recompute}; set recompute=all, or recompute_keep=nothing"
            )
        if self.optim.warmup > self.steps:
            raise ValueError(
                f"optim.warmup={self.optim.warmup}: is longer than the run, steps={self.steps}; nearest: {self.steps}"
            )
        if self.parallel.overlap_chunks > 1 and self.optimization_level < 2:
            raise ValueError(
                f"parallel.overlap_chunks={self.parallel.overlap_chunks}: needs optimization_level=2, this is "
                f"{self.optimization_level}; set optimization_level=2 or parallel.overlap_chunks=1"
            )
        if self.compile and self.parallel.tp > 1:
            raise ValueError(
                f"parallel.tp={self.parallel.tp}: what ranks exchange within a block is not compiled; set "
                "parallel.tp=1, or compile=false"
            )
        if self.compile == "whole":
            cut = self.parallel
            whole = {"recompute": (self.recompute or "none", "none"), "parallel.pp": (cut.pp, 1),
                     "parallel.cp": (cut.cp, 1), "parallel.shard": (cut.shard, "none")}  # fmt: skip
            for name, (value, needed) in whole.items():
                if value != needed:
                    raise ValueError(
                        f"{name}={value}: blocks of a network that is one graph are not told apart; set "
                        f"{name}={needed}, or compile=true"
                    )
        if self.compile and self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout={self.lora.dropout}: what is drawn at random is not compiled; set lora.dropout=0, or "
                "compile=false"
            )
        if self.cuda_graph:
            for name, alone in {"tp": 1, "cp": 1, "pp": 1, "shard": "none"}.items():
                if (value := getattr(self.parallel, name)) != alone:
                    raise ValueError(
                        f"parallel.{name}={value}: what ranks exchange within a micro-batch is not recorded; set "
                        f"parallel.{name}={alone}, or cuda_graph=false"
                    )
            if self.lora is not None and self.lora.dropout > 0:
                raise ValueError(
                    f"lora.dropout={self.lora.dropout}: what is drawn at random is not recorded; set lora.dropout=0, "
                    "or cuda_graph=false"
                )
        if self.compile and self.recompute_keep != "nothing":
            raise ValueError(
                f"recompute_keep={self.recompute_keep}: a compiled block cannot keep a part of its results; set "
                "recompute_keep=nothing, or compile=false"
            )
        if self.optimization_level == 0 and self.recompute_keep == "attention":
            raise ValueError(NOTHING_TO_KEEP)
        return self

    def micro_batches(self, ranks: int) -> int:
        """Return how many micro-batches each of ``ranks`` data ranks has in a step; UserError if they do not divide."""
        share = self.micro_batch * ranks
        if self.global_batch % share:
            raise UserError(
                f"global_batch={self.global_batch}: not a multiple of micro_batch={self.micro_batch} x {ranks} data "
                f"ranks = {share}; nearest: {max(share, round(self.global_batch / share) * share)}"
            )
        return self.global_batch // share

    @property
    def passes(self) -> int:
        """Return what a training step costs in forward passes: 3, or 2 where frozen weights need no gradient."""
        return 3 if self.lora is None else 2

    def digest(self) -> str:
        """Return 12 hex digits that change exactly when a field that changes the work does."""
        text = json.dumps(_work(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that loads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _work(section: BaseModel) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("digest") is False:
            continue
        value = getattr(section, name)
        if value == field.default and isinstance(extra, dict) and extra.get("digest") == "set":
            continue
        out[name] = _work(value) if isinstance(value, BaseModel) else section.model_dump(mode="json")[name]
    return out


R = TypeVar("R", bound=Recipe)
S = TypeVar("S", bound=Section)


def names(package: str) -> list[str]:
    """Return the names of the recipes shipped with a model package."""
    folder = resources.files(package) / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(kind: type[R], package: str, name: str, overrides: tuple[str, ...] | list[str] = ()) -> R:
    """Read a shipped recipe by name, or a YAML file by path, apply ``key=value`` overrides and validate.

    Raises UserError naming the key, the value and the nearest valid choice.
    """
    values = _read(package, name, ())
    # Not Path.stem: the name of a shipped recipe may have a dot in it, as t2v-1.3b.
    values["name"] = re.sub(r"\.ya?ml$", "", Path(name).name)
    shipped = copy.deepcopy(values)
    for text in overrides:
        key, eq, raw = text.partition("=")
        if not eq or not key:
            raise UserError(f"override {text!r}: write key=value, for example parallel.tp=2")
        try:
            value = yaml.load(raw, _Yaml) if raw else None
        except yaml.YAMLError:
            value = raw
        _assign(kind, values, key, value)
    recipe = validate(kind, values, f"recipe {name}")
    if recipe.reproduces is None or not overrides:
        return recipe
    # Other work than the recipe's does not repeat the row that the recipe names.
    same = validate(kind, shipped, f"recipe {name}").digest() == recipe.digest()
    return recipe if same else recipe.model_copy(update={"reproduces": None})


def validate(kind: type[S], values: dict[str, Any], where: str) -> S:
    """Build a section from plain values; the first mistake becomes a one-line UserError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(kind, error)}") from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    value, reason = first["input"], first["type"]
    # A union names the branch that failed after the field; only names of fields are the user's, and what is none.
    *loc, last = first["loc"] or ("",)
    path = [str(p) for p in loc if isinstance(p, int) or str(p).isidentifier()]
    if reason == "extra_forbidden" or isinstance(last, int) or str(last).isidentifier():
        path.append(str(last))
    key = ".".join(path)
    if reason == "extra_forbidden":
        name, colon, rest = path[-1].partition(":")
        if colon and value is None:
            return f"{'.'.join(path[:-1])}: {path[-1]!r} is one word; write a space after the colon: {{{name}: {rest}}}"
        return f"{key}={value!r}: unknown key{nearest(path[-1], _section(kind, path[:-1]).model_fields)}"
    if reason == "missing":
        return f"{key}: this field is required"
    message = first["msg"].removeprefix("Value error, ")
    field = _section(kind, path[:-1]).model_fields.get(path[-1]) if path else None
    if reason == "literal_error" and field is not None:
        message += nearest(value, _choices(field.annotation))
    elif reason == "model_type" and (inner := _section(kind, path)) is not kind:
        name, inner_field = next(iter(inner.model_fields.items()))
        message = f"is a section; set its fields, as {key}.{name}={inner_field.default}"
    elif reason == "tuple_type" and field is not None:
        shown = field.default if isinstance(field.default, tuple) else (value,)
        message = f"must be a list, such as {list(shown)}"
    elif reason in ("bool_parsing", "bool_type"):
        message = "must be true or false"
    elif reason == "int_parsing" and (number := _number(value)) is not None:
        message += f"; nearest: {number}"
    if isinstance(value, dict | BaseModel):
        # A rule of several fields, whose message begins with one of them.
        begins = re.match(r"\w+", message)
        inside = begins and begins[0] in _section(kind, path).model_fields
        return f"{key}{'.' if inside else ': '}{message}" if key else message
    return f"{key}={value!r}: {message}" if key else message


def _choices(annotation: Any) -> list[Any]:
    """Return the values a field of literals takes; null is one where it may be left out."""
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _number(text: Any) -> int | None:
    try:
        return round(float(text))
    except (ValueError, OverflowError):
        return None


def _section(kind: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        field = kind.model_fields.get(part)
        inner = _inner(field.annotation) if field else None
        if inner is None:
            break
        kind = inner
    return kind


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the section a field holds, also where it may be null."""
    choices = (annotation, *get_args(annotation))
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _assign(kind: type[BaseModel], values: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    here: type[BaseModel] | None = kind
    for part in [*path, leaf]:
        if here is None:
            break
        if part not in here.model_fields:
            raise UserError(f"{key}={value!r}: unknown key {part!r}{nearest(part, here.model_fields)}")
        here = _inner(here.model_fields[part].annotation)
    for part in path:
        child = values.setdefault(part, {})
        if child is None:
            child = values[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}={value!r}: {part!r} is a value, not a section")
        values = child
    values[leaf] = value


def _read(package: str, name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"recipe {name}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"recipe {name}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    else:
        shipped = names(package)
        if name not in shipped:
            raise UserError(f"recipe {name!r}: not found{nearest(name, shipped)}; a path must end in .yaml")
        text = (resources.files(package) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        values = yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {name}: expected a mapping of fields, got {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if path.parent != Path(".") and str(parent).endswith(".yaml"):
        parent = str(path.parent / parent)
    if parent in seen or parent == name:
        raise UserError(f"recipe {name}: extends {parent!r} in a circle: {' -> '.join([*seen, name, parent])}")
    return _merge(_read(package, parent, (*seen, name)), values)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        out[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out
