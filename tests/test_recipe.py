"""Recipes: what is read is what was written, and every mistake is one line that names the key."""

import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgrpo import recipe as sections
from mmgrpo.facts import facts
from mmgrpo.ratios import sample_mean
from mmgrpo.recipe import Recipe, RecipeError, build, load, resolved
from mmgrpo.toml import write
from mmgrpo.weighting import narrowest

PARTS = """
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

class Plan(Protocol):
    def __call__(self, iteration: int) -> list[int]: ...

class Policy(NamedTuple):
    model: str
    dtype: str
    train: tuple[str, ...] | None
    lora: Mapping[str, object] | None
    sampler: object
    plan: object
    call: Mapping[str, object]
    cache: Path

def load(*, model: str, dtype: Literal["float32", "bfloat16"] = "bfloat16", train: tuple[str, ...] | None = None,
         lora: Mapping[str, object] | None = None, sampler: Callable[[float], float], plan: Plan | None = None,
         call: Mapping[str, object] = {}, cache: Path = Path("cache")) -> Policy:
    return Policy(model, dtype, train, lora, sampler, plan, call, cache)

def step(x: float, *, noise: float = 0.7) -> float:
    return x * noise

def window(*, size: int, stride: int = 1) -> Plan:
    return lambda iteration: list(range(iteration * stride, iteration * stride + size))

def count(samples: object, *, of: str = "blue") -> str:
    return of

def scorers(*, models: list[Callable[[object], str]]) -> Callable[[object], list[str]]:
    return lambda samples: [model(samples) for model in models]

def advantage(feedback: object, *, eps: float = 1e-4) -> object:
    return feedback

def objective(evaluation: object, *, low: float = 0.2, high: float = 0.2) -> object:
    return evaluation

wide = partial(objective, high=0.28)
"""

TEXT = """
[policy]
build = "{parts}:load"
model = "tiny"
lora = {{ rank = 8, targets = ["to_q", "to_k"] }}
train = ["transformer"]

[policy.sampler]
build = "{parts}:step"
noise = 0.5

[policy.plan]
build = "{parts}:window"
size = 4

[policy.call]
height = 16
negative_prompt = "C:\\\\ \\u007f é \\"x\\""

[prompts]
source = "train.jsonl"

[[rewards]]
name = "blue"
build = "{parts}:count"

[[rewards]]
name = "red"
build = "{parts}:count"
weight = 0.5
of = "red"

[advantage]
build = "{parts}:advantage"

[objective]
build = "{parts}:wide"
low = 0.1

[optimizer]
learning_rate = 3e-4

[train]
iterations = 10
prompts = 4
group_size = 8
"""


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A recipe whose components are in the user's own file."""
    (tmp_path / "parts.py").write_text(PARTS)
    path = tmp_path / "demo.toml"
    path.write_text(TEXT.format(parts=(tmp_path / "parts.py").as_posix()), encoding="utf-8")
    return path


def test_a_recipe_holds_what_the_file_says_and_defaults_for_the_rest(demo: Path) -> None:
    recipe = load(demo)
    assert (recipe.seed, recipe.train.prompts, recipe.train.updates, recipe.loss.aggregation) == (0, 4, 1, "seq_mean")
    assert [(reward.name, reward.weight) for reward in recipe.rewards] == [("blue", 1.0), ("red", 0.5)]
    assert recipe.prompts.source == "train.jsonl"
    assert recipe.policy["dtype"] == "bfloat16"


def test_components_are_built_inside_out_with_their_types(demo: Path) -> None:
    policy = build(load(demo).policy, "policy")
    assert policy.sampler(3.0) == 1.5
    assert policy.plan(2) == [2, 3, 4, 5]
    assert policy.train == ("transformer",)
    assert policy.lora == {"rank": 8, "targets": ["to_q", "to_k"]}
    assert policy.call == {"height": 16, "negative_prompt": 'C:\\ \x7f é "x"'}
    assert policy.cache == Path("cache")


def test_a_function_with_positional_parameters_is_bound_and_not_called(demo: Path) -> None:
    recipe = load(demo)
    objective = build(recipe.objective, "objective")
    assert isinstance(objective, partial)
    assert objective.keywords == {"low": 0.1, "high": 0.28}
    assert build(recipe.rewards[1].component, "rewards.red")(None) == "red"


def test_components_inside_an_array_are_built(demo: Path) -> None:
    parts = demo.parent / "parts.py"
    models = [{"build": f"{parts}:count", "of": colour} for colour in ("red", "green")]
    scorer = build({"build": f"{parts}:scorers", "models": models}, "rewards.both")
    assert scorer(None) == ["red", "green"]


def test_the_resolved_recipe_reads_back_equal_and_names_the_defaults(demo: Path, tmp_path: Path) -> None:
    recipe = load(demo, ["seed=7", "prompts.text=caption", "policy.call.guidance_scale=4.5"])
    text = resolved(recipe)
    again = tmp_path / "resolved.toml"
    again.write_text(text, encoding="utf-8")
    assert load(again) == recipe
    assert resolved(load(again)) == text
    table = tomllib.loads(text)
    assert table["policy"]["plan"] == {"build": table["policy"]["plan"]["build"], "size": 4, "stride": 1}
    assert (table["advantage"]["eps"], table["objective"]["high"], table["policy"]["cache"]) == (1e-4, 0.28, "cache")
    assert (table["train"]["group_size"], table["optimizer"]["eps"]) == (8, 1e-8)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_written_toml_reads_back_equal(table: dict[str, object]) -> None:
    assert tomllib.loads(write(table)) == table


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.iterations=5", "train", "iterations", 5),
        ("train.drop_zero_advantage=false", "train", "drop_zero_advantage", False),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("prompts.source=my data/a.csv", "prompts", "source", "my data/a.csv"),
        ("prompts.source = '5'", "prompts", "source", "5"),
        ("loss.kl_weight=0", "loss", "kl_weight", 0.0),
    ],
)
def test_an_override_sets_a_key(demo: Path, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(demo, [override]), section), key) == value


def test_overrides_reach_into_components_and_named_rewards(demo: Path) -> None:
    recipe = load(demo, ["policy.plan.size=2", "rewards.red.weight=-1", "rewards.red.of=pink", "policy.lora.rank=4"])
    assert recipe.policy["plan"]["size"] == 2
    assert recipe.policy["lora"] == {"rank": 4, "targets": ["to_q", "to_k"]}
    assert (recipe.rewards[1].weight, recipe.rewards[1].component["of"]) == (-1.0, "pink")


MISTAKES = [
    ("train.group_sice=4", "demo.toml: train.group_sice: unknown key; did you mean 'group_size'?"),
    ("trian.iterations=4", "demo.toml: trian: unknown key; did you mean 'train'?"),
    ("train.iterations=five", "demo.toml: train.iterations: 'five' arrived; expected a whole number"),
    ("train.iterations=5.0", "demo.toml: train.iterations: 5.0 arrived; expected a whole number"),
    ("train.iterations=true", "demo.toml: train.iterations: True arrived; expected a whole number"),
    ("train.iterations=0", "demo.toml: train.iterations: 0 arrived; expected a value greater than or equal to 1"),
    ("train.keep_share=1.5", "demo.toml: train.keep_share: 1.5 arrived; expected a value less than or equal to 1"),
    ("train.keep_share=0", "demo.toml: train.keep_share: 0 arrived; expected a value greater than 0"),
    ("train=3", "demo.toml: train: 3 arrived; expected a table"),
    ("seed=-1", "demo.toml: seed: -1 arrived; expected a value greater than or equal to 0"),
    ("optimizer.learning_rate='3e-4'", "demo.toml: optimizer.learning_rate: '3e-4' arrived; expected a number"),
    ("optimizer.learning_rate=nan", "demo.toml: optimizer.learning_rate: nan arrived; expected a finite number"),
    ("optimizer.betas=[0.9, 1.0]", "demo.toml: optimizer.betas.1: 1.0 arrived; expected a value less than 1"),
    ("loss.aggregation=mean", "demo.toml: loss.aggregation: 'mean' arrived; expected 'seq_mean', 'token_mean' or"),
    ("policy.dtypo=float32", "demo.toml: policy.dtypo: unknown key of "),
    ("policy.dtypo=float32", "did you mean 'dtype'?"),
    ("policy.dtype=float16", "demo.toml: policy.dtype: 'float16' arrived; expected 'float32' or 'bfloat16'"),
    ("policy.train=transformer", "demo.toml: policy.train: 'transformer' arrived; expected an array"),
    ("policy.lora=8", "demo.toml: policy.lora: 8 arrived; expected a table"),
    ("policy.sampler.noise=loud", "demo.toml: policy.sampler.noise: 'loud' arrived; expected a number"),
    ("policy.sampler.noize=1.0", "demo.toml: policy.sampler.noize: unknown key of "),
    ("policy.sampler=flow_sde", "demo.toml: policy.sampler: 'flow_sde' arrived; expected a table with 'build'"),
    ("policy.plan=3", "demo.toml: policy.plan: 3 arrived; expected a table with 'build'"),
    (
        "policy.plan={build='mmgrpo.sedes:derive'}",
        "no module 'mmgrpo.sedes'; did you mean 'mmgrpo.seeds'?",
    ),
    ("policy.plan={build='mmgrp.seeds:derive'}", "policy.plan.build: no module 'mmgrp'; did you mean 'mmgrpo'?"),
    ("policy.plan={build='mmgrpo.seeds:deriv'}", "no function 'deriv' in mmgrpo.seeds; did you mean 'derive'?"),
    ("policy.plan={build='window'}", "policy.plan.build: 'window' arrived; expected 'module:function'"),
    ("policy.plan={build='absent.py:window'}", "policy.plan.build: no file 'absent.py'"),
    ("policy.plan={size=3}", "demo.toml: policy.plan: {'size': 3} arrived; expected a table with 'build'"),
    ("policy={model='tiny'}", "demo.toml: policy.build: missing; expected 'module:function'"),
    ("policy.sampler.noise.x=1", "override 'policy.sampler.noise.x=1': policy.sampler.noise is 0.5; expected a table"),
    ("rewards=[]", "demo.toml: rewards: missing, and it has no default"),
    ("rewards={name='red'}", "arrived; expected [[rewards]] tables"),
    ("train.stage=teach", "demo.toml: train.stage: 'teach' arrived"),
    (
        "rewards.bleu.weight=1",
        "rewards.bleu: no entry of that name; did you mean 'blue'?",
    ),
    ("rewards.blue.off=red", "demo.toml: rewards.blue.off: unknown key of "),
    ("rewards.blue.weight=heavy", "demo.toml: rewards.blue.weight: 'heavy' arrived; expected a number"),
    ("rewards.blue.name=red", "demo.toml: rewards: two rewards are named 'red'"),
    ("prompts.txt=caption", "demo.toml: prompts.txt: unknown key; did you mean 'text'?"),
    ("prompts={text='a'}", "demo.toml: prompts.source: missing"),
    ("evaluation.sample=2", "demo.toml: evaluation.sample: unknown key; did you mean 'samples'?"),
    ("watch.action=halt", "demo.toml: watch.action: 'halt' arrived; expected 'stop', 'slow', 'tell' or 'off'"),
    ("watch.norm_factor=1.0", "demo.toml: watch.norm_factor: 1.0 arrived; expected a value greater than 1"),
    ("watch.fall=0", "demo.toml: watch.fall: 0 arrived; expected a value greater than 0"),
    ("watch.guard={blue='more'}", "demo.toml: watch.guard: 'more' arrived; expected 'higher' or 'lower'"),
    ("watch.guarded={}", "demo.toml: watch.guarded: unknown key; did you mean 'guard'?"),
    ("watch.guard={bleu='higher'}", "demo.toml: watch.guard: 'bleu' arrived; did you mean 'blue'?"),
    ("train.iterations", "override 'train.iterations': expected key=value"),
    ("=5", "override '=5': expected key=value"),
    ("a b=5", "override 'a b=5': expected key=value"),
    ("train.iterations=", "override 'train.iterations=': '' is not a TOML value"),
    ("train.iterations=[1", "override 'train.iterations=[1': '[1' is not a TOML value"),
    ("train.iterations=1\nseed=2", "expected one value on one line"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(demo: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(demo, [override])
    assert message in str(caught.value)
    assert len(str(caught.value).replace("1\\nseed", "").splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.group_size=1"], "train.group_size"),
        (["train.updates=3"], "train.updates"),
        (["train.keep_share=0.1"], "train.keep_share"),
        (["train.keep_among='batch'", "train.keep_share=1.0"], "train.keep_among"),
        (["train.evaluate_every=5"], "train.evaluate_every"),
        (["loss.kl_weight=0.1"], "loss.kl_weight"),
        (['loss.kl_kinds={token="k3"}'], "loss.kl_kinds"),
        (["loss.aggregation=constant"], "loss.length"),
        (["loss.length=7"], "loss.length"),
        (["reference.kind=frozen"], "reference.kind"),
        (["reference.kind=ema", "loss.kl_weight=0.1"], "reference.decay"),
        (["reference.decay=0.9"], "reference.decay"),
        (["rewards.blue.weight=0", "rewards.red.weight=0"], "rewards"),
        (["rewards.blue.held_out_only=true"], "rewards.held_out_only"),
        (["train.stage=pretrain", "train.rounds=2"], "train.stage"),
        (["objective={build='mmgrpo.contrasts:regressed'}"], "objective"),
        (["loss.kl_in_reward=0.1"], "loss.kl_in_reward"),
        (["loss.kl_in_reward=0.1", "reference.kind=frozen", "recall.groups=4"], "recall.groups"),
        (["recall.age=3"], "recall.age"),
        (["entropy.bounds=[0.3, 0.2]"], "entropy.bounds"),
        (["entropy.band=[1.0, 2.0]"], "entropy.band"),
        (["entropy.band=[2.0, 1.0]", "entropy.band_weight=0.1"], "entropy.band"),
        (["watch.guard={blue='higher'}"], "watch.guard"),
        (["watch.guard={bleu='higher'}", "evaluation.source=a.jsonl", "train.evaluate_every=5"], "watch.guard"),
    ],
)
def test_a_combination_that_would_train_wrongly_is_refused(demo: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"^demo\.toml: {key}: .* expected"):
        load(demo, overrides)


NAMED = {
    "objectives": (
        "clipped", "dapo", "ngrpo", "two_sided", "gspo", "gspo_token", "luspo", "rloo", "reinforce", "guarded", "cispo",
        "sapo", "gmpo", "vespo", "dhpo", "dhpo_guided", "elastic",
    ),
    "off_policy": (
        "rec_one_side", "rec_one_side_is", "rec_two_side", "rec_two_side_is", "rec_ring", "rec_sample", "opmd", "opmd_kimi",
        "asymre", "red_weight",
    ),
    "contrasts": ("disco", "disco_ratio", "disco_b", "dno", "dno_hard"),
    "weighting": ("sampler_corrected", "top_entropy", "without_stale", "by_kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", [f"mmgrpo.{module}:{name}" for module, names in NAMED.items() for name in names])
def test_every_named_objective_can_be_asked_for_and_reads_back_equal(demo: Path, name: str) -> None:
    recipe = load(demo, [f"objective={{build='{name}'}}"])
    demo.with_name("again.toml").write_text(resolved(recipe), encoding="utf-8")
    again = load(demo.with_name("again.toml"))
    assert again == recipe
    one, other = (facts(build(found.objective, "objective")) for found in (recipe, again))
    assert one == other


def test_a_named_objective_keeps_its_factor_and_takes_further_options(demo: Path) -> None:
    objective = build(load(demo, ["objective={build='mmgrpo.objectives:gspo', low=0.1}"]).objective, "objective")
    assert facts(objective).couples == "sample" and narrowest(objective) == (4e-4, sample_mean)
    mixed = "{build='mmgrpo.objectives:by_entropy', invert=true}"
    objective = build(
        load(demo, [f"objective={{build='mmgrpo.objectives:dhpo', mixing={mixed}}}"]).objective, "objective"
    )
    assert facts(objective).needs == ("entropy",)
    ring = "{build='mmgrpo.off_policy:ring', outer_low=0.5}"
    objective = build(load(demo, [f"objective={{build='mmgrpo.off_policy:rec_one_side', keep={ring}}}"]).objective, "")
    assert objective.keywords["keep"].keywords["outer_low"] == 0.5
    with pytest.raises(RecipeError, match=r"objective\.lo: unknown key of mmgrpo\.objectives:gspo; did you mean 'low'"):
        load(demo, ["objective={build='mmgrpo.objectives:gspo', lo=0.1}"])


OWN = """
from mmgrpo.facts import Facts

def paired(evaluation, advantages, *, low: float = 0.1):
    return -advantages * evaluation.log_ratio

FACTS = {paired: Facts(("entropy",), "batch", every=True)}
"""


def test_an_own_file_says_what_its_objective_needs(demo: Path) -> None:
    own = demo.with_name("own.py")
    own.write_text(OWN, encoding="utf-8")
    recipe = load(demo, [f"objective={{build='{own.as_posix()}:paired', low=0.2}}"])
    assert facts(build(recipe.objective, "objective")) == (("entropy",), "batch", True)
    needy = {"build": "mmgrpo.weighting:without_stale", "objective": dict(recipe.objective)}
    assert facts(build(needy, "objective")) == (("entropy",), "batch", True)


def test_a_missing_option_is_named(demo: Path) -> None:
    for line, key in (("learning_rate = 3e-4", "optimizer.learning_rate"), ('model = "tiny"', "policy.model")):
        demo.with_name("short.toml").write_text(demo.read_text(encoding="utf-8").replace(line, ""), encoding="utf-8")
        with pytest.raises(RecipeError, match=rf"^short\.toml: {key}: missing"):
            load(demo.with_name("short.toml"))


def test_invalid_toml_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("seed = 1\n[policy\n")
    with pytest.raises(RecipeError, match=r"^broken\.toml: not valid TOML: .*line 2"):
        load(path)


def test_a_missing_package_of_a_component_is_named(demo: Path) -> None:
    (demo.parent / "needy.py").write_text("import a_package_nobody_has\n")
    with pytest.raises(RecipeError, match=r"policy\.plan\.build: .*needy\.py needs the package 'a_package_nobody_has'"):
        load(demo, [f"policy.plan={{build='{(demo.parent / 'needy.py').as_posix()}:plan'}}"])


def test_there_are_fewer_than_sixty_options() -> None:
    kinds = (
        "Prompts",
        "Evaluation",
        "Reward",
        "Loss",
        "Entropy",
        "Reference",
        "Ema",
        "Optimizer",
        "Train",
        "Offline",
        "Recall",
        "Watch",
        "Behaviour",
    )
    names = [item.name for kind in kinds for item in fields(vars(sections)[kind])]
    assert len([name for name in names if name not in ("options", "component")]) < 60  # those two hold keys of others


SHIPPED = sorted((Path(__file__).parent.parent / "pipelines" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_short_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    assert isinstance(recipe, Recipe)
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    (tmp_path / path.name).write_text(resolved(recipe), encoding="utf-8")
    assert load(tmp_path / path.name) == recipe
