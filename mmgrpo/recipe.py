"""Recipes: strict TOML with one table per section; the fields of these records are all the options of the loop.

Components (policy, rewards, advantage, objective) stay tables here, checked and completed with their defaults, until
`build` makes them. Paths in a recipe are relative to the current folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, with_config

from mmgrpo.components import build, complete, locate, options_of, typed
from mmgrpo.contradictions import refuse_contradictions
from mmgrpo.methods import underlaid
from mmgrpo.toml import RecipeError, Table, join, read, refuse_unknown, write
from mmgrpo.types import Kind

__all__ = ["Recipe", "RecipeError", "build", "load", "resolved"]

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Distance = Literal["exact", "flow_grpo", "k2", "k3", "k3_unbiased"]
section = with_config(extra="forbid")


@section
@dataclass(frozen=True)
class Prompts:
    """[prompts] Where prompts come from; further keys are keyword options of mmgrpo.data:load_prompts."""

    source: str  # a JSONL, CSV or text file, or a `datasets` folder or name
    options: Mapping[str, Any] = field(default_factory=dict)


@section
@dataclass(frozen=True)
class Evaluation:
    """[evaluation] The held-out prompts; further keys are keyword options of mmgrpo.data:load_prompts."""

    source: str = ""  # as in [prompts]; empty: no evaluation
    samples: Count = 1  # per prompt
    options: Mapping[str, Any] = field(default_factory=dict)


@section
@dataclass(frozen=True)
class Reward:
    """[[rewards]] One component of the score; further keys are options of what `build` names."""

    name: str  # unique; metrics and overrides use it
    component: Mapping[str, object]  # the table with `build`
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0  # in the total; 0 is watched but not trained on
    held_out_only: bool = False  # asked about held-out samples alone, for what is too slow in training; needs weight 0


@section
@dataclass(frozen=True)
class Loss:
    """[loss]"""

    aggregation: Literal["seq_mean", "token_mean", "constant"] = "seq_mean"  # how (B, S) losses become one number
    length: Count | None = None  # decisions that a sequence is divided by, for "constant"
    kl_weight: NotNegative = 0.0  # of the KL to the reference, in the units of `kl`
    kl: Distance = "exact"  # mmgrpo/kl.py: closed forms, then estimates
    kl_kinds: Mapping[Kind, Distance] = field(default_factory=dict)  # where decisions of a kind have another
    kl_shares: Mapping[Kind, NotNegative] = field(
        default_factory=dict
    )  # what kl_weight is multiplied by; 1 if not named
    anchor_weight: NotNegative = (
        0.0  # of -log p, mean over the decisions of the samples that the advantage says to imitate
    )
    entropy_weight: NotNegative = 0.0  # of the mean entropy, which is raised; the start of an adaptive one
    kl_in_reward: NotNegative = 0.0  # of log pi_old / pi_ref of a sample, taken from its reward before the advantage


@section
@dataclass(frozen=True)
class Entropy:
    """[entropy] How the weight of the entropy's bonus follows it (Skywork-OR1), and the band that it is held in; nats."""

    target: NotNegative | None = None  # mean entropy up to which the bonus grows and counts; not set: its weight stays
    delta: Positive = 0.005  # change of the weight per optimizer update
    bounds: tuple[NotNegative, NotNegative] = (0.0, 1.0)  # least and most of the weight
    band: tuple[NotNegative, NotNegative] | None = None  # of the mean of -log p
    band_weight: NotNegative = 0.0  # of what lies outside of the band


@section
@dataclass(frozen=True)
class Reference:
    """[reference] The weights that the KL holds the policy to."""

    kind: Literal["none", "frozen", "adapters_off", "ema", "previous"] = "none"
    decay: Share | None = None  # of the average per optimizer update, for "ema"


@section
@dataclass(frozen=True)
class Ema:
    """[ema] Averaged weights, for evaluation."""

    decay: Share = 0.0  # per optimizer update; 0 is off


@section
@dataclass(frozen=True)
class Behaviour:
    """[behaviour] The policy that samples, old <- q old + (1 - q) today's after each iteration (DiffusionNFT)."""

    lag: Share = 0.0  # the largest q; 0: today's weights sample
    ramp: Positive | None = None  # by which q rises in each iteration, from 0; not set: q is the lag from the start
    flat: Natural = 0  # iterations before q rises


@section
@dataclass(frozen=True)
class Optimizer:
    """[optimizer] AdamW, and Muon on chosen matrices."""

    learning_rate: Positive
    betas: tuple[Share, Share] = (0.9, 0.999)  # decay of the first and second moment per update
    weight_decay: NotNegative = 1e-4  # decoupled, times the learning rate
    eps: Positive = 1e-8  # added to the root of the second moment
    max_grad_norm: Positive = 1.0  # L2 norm over all trained parameters
    warmup: Natural = 0  # iterations of a linear rise from 0 to the learning rate
    decay: Literal["constant", "linear"] = "constant"  # of the learning rate, "linear" to a tenth at the end
    muon: tuple[str, ...] = ()  # patterns of names such as "*blocks*": the trained 2-D weights that take Muon


@section
@dataclass(frozen=True)
class Train:
    """[train] The loop."""

    iterations: Count  # rollouts in the run
    prompts: Count  # per iteration, over all ranks
    group_size: Count  # samples per prompt, at least 2
    stage: Literal["align", "pretrain", "offline"] = "align"  # "pretrain": supervised; "offline": on samples made once
    rounds: Count = (
        1  # rollouts at most, until `prompts` groups have differences to learn from (DAPO's dynamic sampling)
    )
    updates: Count = 1  # optimizer updates per pass over a rollout; divides `prompts`
    passes: Count = 1  # times a rollout is used
    drop_zero_advantage: bool = True  # samples with advantage 0 are not replayed
    keep_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of each group, half from its top and half from its bottom
    keep_among: Literal["group", "batch"] = (
        "group"  # whose top and bottom; "batch": all of a rollout, as DanceGRPO's code
    )
    save_every: Count = 50  # iterations
    evaluate_every: Natural = 0  # iterations; 0 is never
    keep: Count = 3  # newest checkpoints that stay on disk
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)  # beside metrics.jsonl


@section
@dataclass(frozen=True)
class Offline:
    """[offline] Samples that are made once, of which each iteration's groups are taken; of the stage "offline"."""

    samples: Count = 16  # of each prompt, at least train.group_size
    folder: str = ""  # of samples that several runs share, filled by the first; empty: RUN/offline


@section
@dataclass(frozen=True)
class Recall:
    """[recall] Groups that are kept and trained on again in the place of groups without signal."""

    groups: Natural = 0  # kept at most, in main memory and in every checkpoint; 0 is off
    age: Count = 10  # iterations after which a group is forgotten


@section
@dataclass(frozen=True)
class Watch:
    """[watch] What is done when training goes wrong: mmgrpo/signs.py says how that looks."""

    action: Literal["stop", "slow", "tell", "off"] = "stop"  # "slow": the learning rate is lowered, three times at most
    after: Count = 10  # iterations before the first judgement, and after each lowering before the next
    norm_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4.0  # gradient norm over its running median
    norm_updates: Count = 3  # updates that are over it, none of their iterations without one
    fall: Positive = 0.15  # of the rollouts' reward from its best, in standard deviations of the first samples' rewards
    saturated: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of groups without spread that is acted on; 1 is never
    guard: Mapping[str, Literal["higher", "lower"]] = field(default_factory=dict)  # held-out scores: which way is good


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; what the file left out has its default."""

    seed: int  # of everything random in the run
    policy: Mapping[str, object]  # component
    prompts: Prompts
    rewards: tuple[Reward, ...]
    advantage: Mapping[str, object]  # component
    objective: Mapping[str, object]  # component
    loss: Loss
    reference: Reference
    ema: Ema
    optimizer: Optimizer
    train: Train
    evaluation: Evaluation
    method: str | None = None  # a name of mmgrpo/methods.toml, whose part lies under the sections above
    entropy: Entropy = Entropy()
    offline: Offline = Offline()
    recall: Recall = Recall()
    behaviour: Behaviour = Behaviour()
    watch: Watch = Watch()


OWN = ("name", "weight", "held_out_only")  # keys of a reward's table that are not options of its component
LOADER = "mmgrpo.data:load_prompts"
DEFAULTS: dict[str, Table] = {
    "advantage": {"build": "mmgrpo.advantages:standardized"},
    "objective": {"build": "mmgrpo.objectives:clipped"},
}


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, overrides (`"train.iterations=5"`, `"rewards.ocr.weight=0.5"`) applied.

    Raises RecipeError, one line with the file and the dotted key, and FileNotFoundError for the file itself.
    """
    table = read(path, overrides)
    where = f"{path.name}: "
    sections = [item.name for item in fields(Recipe)]
    refuse_unknown(table, sections, where)
    table = underlaid(table, where)
    for key in ("policy", "prompts", "optimizer", "train"):
        if key not in table:
            raise RecipeError(f"{where}{key}: missing, and it has no default")
    recipe = _recipe(table, where)
    refuse_contradictions(recipe, where)
    return recipe


def _recipe(table: Table, where: str) -> Recipe:
    def part(name: str, kind: Any) -> Any:
        return typed(table.get(name, {}), kind, where + name)

    def component(name: str) -> dict[str, object]:
        given = table.get(name, {})
        return complete({**DEFAULTS.get(name, {}), **given} if isinstance(given, Mapping) else given, where + name)

    return Recipe(
        seed=part("seed", Natural) if "seed" in table else 0,
        policy=component("policy"),
        prompts=_with_options(table["prompts"], Prompts, where + "prompts"),
        rewards=_rewards(table.get("rewards", []), where + "rewards"),
        advantage=component("advantage"),
        objective=component("objective"),
        loss=part("loss", Loss),
        reference=part("reference", Reference),
        ema=part("ema", Ema),
        optimizer=part("optimizer", Optimizer),
        train=part("train", Train),
        evaluation=_with_options(table.get("evaluation", {}), Evaluation, where + "evaluation"),
        method=part("method", str) if "method" in table else None,
        entropy=part("entropy", Entropy),
        offline=part("offline", Offline),
        recall=part("recall", Recall),
        behaviour=part("behaviour", Behaviour),
        watch=part("watch", Watch),
    )


def _with_options(table: object, kind: Any, where: str) -> Any:
    """A section that has fields of its own and options of `load_prompts` in one table."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}: {table!r} arrived; expected a table")
    own = [item.name for item in fields(kind) if item.name != "options"]
    refuse_unknown(table, [*own, *options_of(locate(LOADER, where))], where)
    ours = {key: value for key, value in table.items() if key in own}
    further = complete({"build": LOADER} | {key: value for key, value in table.items() if key not in own}, where)
    return typed(ours | {"options": {key: value for key, value in further.items() if key != "build"}}, kind, where)


def _rewards(tables: object, where: str) -> tuple[Reward, ...]:
    if not isinstance(tables, list):
        raise RecipeError(f"{where}: {tables!r} arrived; expected [[rewards]] tables")
    rewards = tuple(_reward(table, join(where, str(index))) for index, table in enumerate(tables))
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{where}: two rewards are named {name!r}; expected a name for each")
    return rewards


def _reward(table: object, where: str) -> Reward:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}: {table!r} arrived; expected a table")
    named = join(where.rpartition(".")[0], table["name"]) if isinstance(table.get("name"), str) else where
    component = complete({key: value for key, value in table.items() if key not in OWN}, named)
    own = {key: table[key] for key in OWN if key in table}
    reward: Reward = typed(own | {"component": component}, Reward, named)
    return reward


def resolved(recipe: Recipe) -> str:
    """TOML text of the recipe with every default filled in; `load` reads it back equal."""
    plain: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe)
    for name in ("prompts", "evaluation"):
        plain[name] |= plain[name].pop("options")
    plain["rewards"] = [table | table.pop("component") for table in plain["rewards"]]
    return write(plain)
