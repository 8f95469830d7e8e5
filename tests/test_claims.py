"""The bench of claims: runs do not meet, what is exact agrees with what is drawn, and every claim names components that exist."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from benchmarks.claims import __main__, texts, worlds
from benchmarks.claims.claims import Claim, Estimate, verdict
from benchmarks.claims.tables import Tables, roll
from benchmarks.claims.training import GRPO, Effort, train

from mmgrpo.advantages import gdpo
from mmgrpo.comparing import Comparison, Remembering
from mmgrpo.contrasts import disco
from mmgrpo.facts import facts, unbound
from mmgrpo.improve import evaluate
from mmgrpo.objectives import elastic
from mmgrpo.weighting import Weighted

SEEDS = (3, 4)
ADDED_UP = [worlds.coins, worlds.hard, worlds.many, worlds.uneven, worlds.rare, texts.words, texts.chains]
SIDES = {
    "together": (GRPO, worlds.coins),
    "late, twice": (GRPO, texts.words),
    "advantages apart": (replace(GRPO, compare=lambda: gdpo, compare_apart=True), texts.two_rewards),
    "losses apart": (replace(GRPO, objective=disco, lose_apart=True), worlds.uneven),
}


@pytest.mark.parametrize("name", SIDES)
def test_a_run_does_not_depend_on_the_runs_beside_it(name):
    side, world = SIDES[name]
    effort = Effort(samples=4, updates=3, stale=2, passes=2)
    rates = torch.tensor([20.0, 6.0])
    both = train(world(SEEDS), side, effort, SEEDS, rates).policy.weight
    alone = train(world(SEEDS[1:]), side, effort, SEEDS[1:], rates[1:]).policy.weight
    assert (both[1] - world(SEEDS).start[1]).abs().max() > 1e-3
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [*ADDED_UP, texts.graph, texts.walk, texts.long, texts.forks])
def test_what_is_expected_is_what_rewards_say_on_average(world):
    drawn = world(SEEDS)
    streams = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        expected = drawn.chance(Tables(drawn)).mean(1)
    found = drawn.reward(roll(Tables(drawn), drawn, 400, streams)[1])["reward"]  # (R, P, G)
    error = found.std(2).square().mean(1).sqrt() / found[0].numel() ** 0.5
    assert ((found.mean((1, 2)) - expected).abs() <= 5 * error).all()


def test_the_length_of_wrong_answers_is_that_of_drawn_ones():
    world = texts.lengths(SEEDS)
    policy, streams = Tables(world), [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = roll(policy, world, 2000, streams)[1]
    wrong = world.reward(drawn)["reward"] == 0
    tokens = drawn.taken.sum(-1)[wrong] - 1.0
    with torch.no_grad():
        expected = texts.length_of_wrong(policy)
    assert abs(float(tokens.mean() - expected[0])) < 5 * float(tokens.std()) / len(tokens) ** 0.5


def test_same_weights_give_zero_log_ratio_and_the_samplers_gap_is_its_noise():
    world = texts.mismatched(SEEDS)
    policy, streams = Tables(world), [torch.Generator().manual_seed(seed) for seed in SEEDS]
    found = evaluate(policy, roll(policy, world, 4, streams)[0])
    assert found.log_ratio.abs().max() == 0
    assert found.sampler_gap is not None and found.sampler_gap.std() > 0.1


@pytest.mark.parametrize(
    ("difference", "against", "tolerance", "said"),
    [
        (Estimate(0.4, 0.1), 1.0, None, "shows"),
        (Estimate(0.2, 0.1), 1.0, None, "does not show"),
        (Estimate(-0.4, 0.1), 1.0, None, "opposite"),
        (Estimate(0.004, 0.001), 1.0, None, "does not show"),  # clear, and less than a hundredth
        (Estimate(-0.01, 0.003), 1.0, 0.02, "shows"),
        (Estimate(-0.01, 0.01), 1.0, 0.02, "does not show"),
        (Estimate(-0.1, 0.01), 1.0, 0.02, "opposite"),
    ],
)
def test_a_verdict_needs_three_standard_errors_and_a_hundredth(difference, against, tolerance, said):
    assert verdict(difference, against, tolerance) == said


@pytest.mark.parametrize("claim", __main__.CLAIMS.values(), ids=lambda claim: claim.name)
def test_every_claim_is_about_components_of_the_project(claim: Claim):
    for side in (claim.method, claim.against):
        compare = side.compare()
        function = compare.function if isinstance(compare, Comparison | Remembering) else compare
        objective = side.objective.objective if isinstance(side.objective, Weighted) else side.objective
        for component in (function, objective, side.aggregate):
            assert unbound(component).__module__.startswith("mmgrpo.")
        batched = (
            facts(side.objective).couples == "batch" and unbound(side.objective) is not elastic
        )  # joins groups alone
        assert side.lose_apart or not batched
        assert side.compare_apart or not isinstance(compare, Remembering)
    world = claim.world.func if isinstance(claim.world, partial) else claim.world
    assert (world.__doc__ or "").strip()


def test_a_claim_is_a_line_a_row_and_a_dot(capsys: pytest.CaptureFixture[str], tmp_path):
    arguments = ("--only", "gdpo_scales", "top_entropy", "--seeds", "2", "--tuning", "1", "--output", str(tmp_path))
    __main__.main(arguments)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["claim"] for line in lines] == ["gdpo_scales", "top_entropy"]
    for line in lines:
        assert line["benchmark"] == "claims" and line["seeds"] == 2
        assert line["verdict"] in ("shows", "does not show", "opposite")
        assert line["difference"]["mean"] == pytest.approx(line["method"]["mean"] - line["against"]["mean"], abs=1e-6)
    rows = [row for row in (tmp_path / "claims.md").read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    assert len(rows) == 2 + len(lines)
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")
