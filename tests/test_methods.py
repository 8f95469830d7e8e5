"""The catalogue of methods: every entry is a part of a recipe that loads, says what it needs, and yields to the user."""

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmgrpo.behaviour import share_kept
from mmgrpo.cli import app
from mmgrpo.components import build, typed
from mmgrpo.draws import Draws
from mmgrpo.facts import facts
from mmgrpo.methods import catalogue, definition, find, needs
from mmgrpo.recipe import Recipe, RecipeError, load, resolved
from mmgrpo.toml import write

every = pytest.mark.parametrize("name", catalogue())
BASE = """
[policy]
build = "pipelines.vlm:load"
model = "model"
max_new_tokens = 8
[prompts]
source = "prompts.jsonl"
[[rewards]]
name = "length"
build = "rewards.length:overlong"
[optimizer]
learning_rate = 1e-4
[train]
iterations = 1
prompts = 4
group_size = 4
"""
FLOW = BASE.replace("pipelines.vlm:load", "pipelines.diffusion:load").replace(
    "max_new_tokens = 8", "call = { num_inference_steps = 10 }"
)
PUBLISHED = """
mc_grpo risk_mvar gdpo gaussian_rank ngrpo dist_centric token_hidden_reward unlikeliness gigpo salt_graph edge_grpo dr_irl_scaling
elastic_clip hybrid_ratio disco asymre opmd red_drop red_weight dno entropy_clip_batch entropy_clip_vocabulary grpo two_grpo dr_grpo
dapo lite_ppo rloo reinforce_pp reinforce_pp_baseline gspo gspo_token gmpo cispo sapo luspo vespo two_sided tis mis off_policy_mask
top_entropy entropy_bonus a_star_po group_replay nft nft_plain awm awm_tuned dgpo gdro
top_entropy entropy_bonus a_star_po group_replay flow_grpo flow_grpo_fast flow_grpo_trunk dance_grpo mix_grpo guard flow_dppo
vgpo euphonium mix_grpo_flash tempflow e_grpo
""".split()


def loaded(folder: Path, *lines: str, base: str = BASE) -> Recipe:
    path = folder / "mine.toml"
    path.write_text("\n".join(lines) + "\n" + base, encoding="utf-8")
    return load(path)


def base_of(name: str) -> str:
    """A recipe without a method, of a policy that has what the method says of it."""
    return FLOW if "policy" in find(name, "").recipe else BASE


def test_the_published_methods_are_there():
    assert set(PUBLISHED) <= set(catalogue())


@every
def test_a_method_is_one_line_of_a_recipe_and_equals_its_part_written_out(tmp_path, name):
    short = loaded(tmp_path, f'method = "{name}"', base=base_of(name))
    assert short.method == name
    parts = find(name, "").recipe
    merged = {**tomllib.loads(base_of(name))}
    for section, options in parts.items():
        merged[section] = {**options, **merged.get(section, {})}
    (tmp_path / "long.toml").write_text(write(merged), encoding="utf-8")
    long = load(tmp_path / "long.toml")
    assert (short.advantage, short.objective, short.loss) == (long.advantage, long.objective, long.loss)
    assert (short.train, short.entropy, short.policy) == (long.train, long.entropy, long.policy)
    assert (short.behaviour, short.ema, short.reference) == (long.behaviour, long.ema, long.reference)
    (tmp_path / "again.toml").write_text(resolved(short), encoding="utf-8")
    assert load(tmp_path / "again.toml") == short


@every
def test_its_parts_are_built_and_its_definition_can_be_read(name):
    method = find(name, "")
    for section in ("advantage", "objective"):
        if section in method.recipe:
            assert callable(build(method.recipe[section], section))
    for option, value in method.recipe.get("policy", {}).items():
        assert option in ("same_noise", "draws") or callable(build(value, f"policy.{option}"))
    text = definition(name)
    assert method.paper in text and f'method = "{name}"' in text and all(need in text for need in needs(method))
    if method.status != "exact":
        parts = [
            str(method.recipe[section]["build"]) for section in ("advantage", "objective") if section in method.recipe
        ]
        assert any(
            word in text for word in ("PARTIAL", "RECONSTRUCTED", "RECALLED", "not published", "not confirmed")
        ), parts


def test_what_the_user_writes_wins(tmp_path):
    named = loaded(tmp_path, 'method = "dapo"', "[objective]", "high = 0.4")
    assert named.objective["high"] == 0.4 and named.objective["build"] == "mmgrpo.objectives:dapo"
    other = loaded(tmp_path, 'method = "dapo"', "[objective]", 'build = "mmgrpo.objectives:cispo"')
    assert (
        other.objective == {"build": "mmgrpo.objectives:cispo", "cap": 5.0} and other.loss.aggregation == "token_mean"
    )
    assert loaded(tmp_path, 'method = "two_grpo"').train.group_size == 4  # the recipe's own


def test_a_part_of_the_policy_lies_under_any_that_has_its_options(tmp_path):
    found = loaded(
        tmp_path, 'method = "mix_grpo"', base=FLOW.replace("[prompts]", "same_noise = true\n[prompts]")
    ).policy
    assert found["build"] == "pipelines.diffusion:load" and found["same_noise"] is True
    assert found["plan"]["size"] == 4 and found["plan"]["order"] == "progressive"
    mine = 'sampler = { build = "mmgrpo.transitions:cps", eta = 0.5 }\n[prompts]'
    found = loaded(tmp_path, 'method = "mix_grpo"', base=FLOW.replace("[prompts]", mine)).policy
    assert found["sampler"] == {"build": "mmgrpo.transitions:cps", "eta": 0.5} and found["plan"]["size"] == 4


@pytest.mark.parametrize("name", ["nft", "nft_plain", "awm", "awm_tuned", "dgpo", "gdro"])
def test_a_method_of_the_forward_process_brings_its_draws_and_nothing_of_a_sampler(tmp_path, name):
    found = loaded(tmp_path, f'method = "{name}"', base=FLOW)
    assert {"sampler", "plan", "routes"}.isdisjoint(found.policy)
    draws = typed(found.policy["draws"], Draws, "policy.draws")
    compares = facts(build(found.objective, "objective")).couples == "batch"
    assert draws.share == ("group" if compares else "sample")


def test_the_weights_that_sample_lag_as_published(tmp_path):
    nft = loaded(tmp_path, 'method = "nft"', base=FLOW).behaviour
    kept = [share_kept(step, nft.lag, nft.ramp, nft.flat) for step in (0, 99, 499, 5000)]
    assert kept == pytest.approx([0.001, 0.1, 0.5, 0.5])  # q = min(0.001 step, 0.5)
    dgpo = loaded(tmp_path, 'method = "dgpo"', base=FLOW)
    kept = [share_kept(step, dgpo.behaviour.lag, dgpo.behaviour.ramp, dgpo.behaviour.flat) for step in (0, 299, 5000)]
    assert kept == pytest.approx([0.001, 0.3, 0.3])
    assert dgpo.policy["draws"]["low"] == pytest.approx(3 * 0.3 / (1 + 2 * 0.3))  # a share of 0.3 under a shift of 3


def test_a_policy_without_the_options_of_a_method_is_refused(tmp_path):
    with pytest.raises(
        RecipeError,
        match=r"^mine\.toml: method: 'mix_grpo' needs a policy with the option 'sampler', which pipelines\.vlm",
    ):
        loaded(tmp_path, 'method = "mix_grpo"')
    with pytest.raises(RecipeError, match=r"policy\.build: missing"):
        loaded(tmp_path, 'method = "mix_grpo"', base=FLOW.replace('build = "pipelines.diffusion:load"', ""))


def test_an_unknown_method_is_told_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match=r"mine\.toml: method: no method 'dappo'; did you mean 'dapo'\?"):
        loaded(tmp_path, 'method = "dappo"')


def test_the_command_lists_all_and_prints_one():
    runner = CliRunner(env={"COLUMNS": "400"})
    table = runner.invoke(app, ["methods"])
    assert table.exit_code == 0 and all(name in table.output for name in catalogue())
    one = runner.invoke(app, ["methods", "mc_grpo"])
    assert one.exit_code == 0 and "least_scale = 0.1" in one.output and "arXiv 2601.22582" in one.output
    assert isinstance(runner.invoke(app, ["methods", "mcgrpo"]).exception, RecipeError)
