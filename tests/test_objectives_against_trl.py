"""Losses and their gradients against those of TRL's trainer on random log-probs, for every loss that both have.

TRL's own code computes its loss; only what its model would have said of the tokens is given. Axes: B samples, S tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmgrpo.aggregations import Aggregation, constant, seq_mean, token_mean
from mmgrpo.entropy import Adaptation, Bonus, adapted, applied
from mmgrpo.improve import Given, Loss, slopes
from mmgrpo.kl import estimated_k3, unbiased_k3
from mmgrpo.objectives import cispo, clipped, dapo, gmpo, gspo, luspo, sapo, two_sided, vespo
from mmgrpo.ratios import sample_mean, sample_sum_from_sampler
from mmgrpo.types import Evaluation
from mmgrpo.weighting import in_top_share, sampler_corrected, top_entropy, without_stale

pytest.importorskip("trl", reason="compares with TRL, which is not installed")

from benchmarks import random_vlms, two_trainers  # noqa: E402 - they import TRL
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402

F64, B, S, LONGEST = torch.float64, 6, 5, 7


@pytest.fixture(scope="module")
def opponent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer of TRL's, whose settings each test changes."""
    folder = tmp_path_factory.mktemp("trl")
    built = random_vlms.reading(random_vlms.SMALLEST)
    prompts = random_vlms.prompts(built, random_vlms.SMALLEST, 60, 2, folder)
    made = two_trainers.trainer_of(built, prompts, two_trainers.Asked(LONGEST, 4), 1, folder)
    made.model.eval()  # in training its loss is divided by what the loop accumulates
    return made


class Drawn(NamedTuple):
    """What is known of the tokens, (B, S) each but the advantages, (B,)."""

    new: Tensor
    old: Tensor
    reference: Tensor
    gap: Tensor  # log-prob of the replay - of the sampler
    entropy: Tensor
    advantages: Tensor
    mask: Tensor


def drawn(seed: int) -> Drawn:
    generator = torch.Generator().manual_seed(seed)

    def normal(spread: float, *shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=F64)

    old = -normal(1.0, B, S).abs() - 0.1
    lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
    mask = torch.arange(S) < lengths
    return Drawn(
        new=(old + normal(0.5, B, S)).requires_grad_(),
        old=old,
        reference=old + normal(0.3, B, S),
        gap=torch.where(mask, normal(0.4, B, S), 0),
        entropy=normal(1.0, B, S).abs().requires_grad_(),
        advantages=normal(1.0, B),
        mask=mask,
    )


def sequence(values: Tensor) -> Tensor:
    return values.sum(1, keepdim=True)


class Row(NamedTuple):
    """A loss of both sides."""

    ours: Loss
    aggregation: Aggregation
    theirs: Mapping[str, Any]  # attributes of the trainer, "args." for those of its settings
    weight: Callable[[Tensor], Tensor] | None = None  # of the gap: TRL's importance_sampling_ratio


SEQUENCE = {"importance_sampling_level": "sequence"}
ROWS: dict[str, Row] = {
    "grpo": Row(Loss(clipped), seq_mean, {}),
    "bnpo": Row(Loss(clipped), token_mean, {"loss_type": "bnpo"}),
    "dr_grpo": Row(Loss(clipped), partial(constant, length=LONGEST), {"loss_type": "dr_grpo"}),
    "dapo": Row(Loss(dapo), token_mean, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "cispo": Row(Loss(partial(cispo, cap=1.3)), token_mean, {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": Row(Loss(sapo), seq_mean, {"loss_type": "sapo"}),
    "sapo of sequences": Row(
        Loss(partial(sapo, level=sample_mean)), seq_mean, {"loss_type": "sapo", **SEQUENCE}
    ),
    "gspo": Row(
        Loss(gspo), seq_mean, {"epsilon_low": 3e-4, "epsilon_high": 4e-4, **SEQUENCE}
    ),
    "gspo, wide": Row(Loss(partial(gspo, low=0.2, high=0.2)), seq_mean, SEQUENCE),
    "luspo": Row(
        Loss(partial(luspo, low=0.2, high=0.25)), partial(constant, length=1),
        {"loss_type": "luspo", "epsilon_high": 0.25, **SEQUENCE},
    ),
    "vespo": Row(Loss(vespo), token_mean, {"loss_type": "vespo"}),
    "vespo, other powers": Row(
        Loss(partial(vespo, powers=(1.5, 2.5), rates=(1.0, 3.0))), token_mean,
        {"loss_type": "vespo", "args.vespo_k_pos": 1.5, "args.vespo_k_neg": 2.5, "args.vespo_lambda_pos": 1.0,
         "args.vespo_lambda_neg": 3.0},
    ),
    "vespo, of the sampler": Row(
        Loss(partial(vespo, level=sample_sum_from_sampler)), token_mean,
        {"loss_type": "vespo", "use_vllm": True}, torch.exp,
    ),
    "delta": Row(Loss(partial(two_sided, ceiling=1.4)), seq_mean, {"args.delta": 1.4}),
    "k3": Row(Loss(clipped, estimated_k3, 0.3), seq_mean, {"beta": 0.3}),
    "unbiased k3": Row(
        Loss(clipped, unbiased_k3, 0.3), token_mean,
        {"beta": 0.3, "loss_type": "bnpo", "args.use_bias_correction_kl": True},
    ),
    "token_truncate": Row(
        Loss(sampler_corrected(cap=1.3, floor=0.8)), seq_mean, {"use_vllm": True}, lambda gap: gap.exp().clamp(0.8, 1.3)
    ),
    "token_mask": Row(
        Loss(sampler_corrected(cap=1.3, mode="mask"), estimated_k3, 0.3), seq_mean, {"use_vllm": True, "beta": 0.3},
        lambda gap: gap.exp().where(gap.exp() <= 1.3, 0),
    ),
    "sequence_truncate": Row(
        Loss(sampler_corrected(cap=1.3, level="sample")), token_mean, {"use_vllm": True, "loss_type": "bnpo"},
        lambda gap: sequence(gap).exp().clamp(max=1.3),
    ),
    "sequence_mask": Row(
        Loss(sampler_corrected(cap=1.3, level="sample", mode="mask")), seq_mean, {"use_vllm": True},
        lambda gap: sequence(gap).exp().where(sequence(gap).exp() <= 1.3, 0),
    ),
    "off-policy mask": Row(
        Loss(without_stale(limit=0.05), estimated_k3, 0.3), seq_mean, {"off_policy_mask_threshold": 0.05, "beta": 0.3}
    ),
    "entropy mask": Row(
        Loss(top_entropy(share=0.4), estimated_k3, 0.3), token_mean,
        {"top_entropy_quantile": 0.4, "loss_type": "bnpo", "beta": 0.3},
    ),
    "entropy bonus": Row(
        Loss(clipped, entropy_weight=0.1), seq_mean, {"entropy_coef": 0.1, "_entropy_bonus_enabled": True}
    ),
    "bonus of the chosen": Row(
        Loss(top_entropy(share=0.4), entropy_weight=0.1), seq_mean,
        {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "_entropy_bonus_enabled": True},
    ),
    "several": Row(
        Loss(top_entropy(objective=without_stale(objective=sampler_corrected(cap=1.3)), share=0.6), estimated_k3, 0.3),
        partial(constant, length=LONGEST),
        {"top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.5, "use_vllm": True, "loss_type": "dr_grpo", "beta": 0.3},
        lambda gap: gap.exp().clamp(max=1.3),
    ),
}  # fmt: skip


def trl_loss(opponent: Any, row: Row, known: Drawn, loss: Callable[..., Tensor], monkeypatch: Any) -> Tensor:
    """Its loss under a row's settings."""
    plain = {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "args.use_bias_correction_kl": False}
    for name, value in {**plain, **row.theirs}.items():
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(opponent.args if owner else opponent, attribute, value)
    monkeypatch.setattr(opponent, "vllm_importance_sampling_correction", True)
    said = (known.new, known.entropy, None)
    monkeypatch.setattr(opponent, "_get_per_token_logps_and_entropies", lambda *args, **further: said)
    mask, nothing = known.mask.long(), torch.zeros(B, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros_like(mask), "completion_mask": mask,
        "advantages": known.advantages, "old_per_token_logps": known.old, "ref_per_token_logps": known.reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if row.weight is not None:
        inputs["importance_sampling_ratio"] = row.weight(known.gap)
    return loss(opponent, opponent.model, inputs)


def our_slopes(row: Row, known: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Our loss, and its slopes by the log-probs and by the entropies, as the trainer takes them."""
    new, entropy = known.new.detach(), known.entropy.detach()
    evaluation = Evaluation(new - known.old, to_reference=new - known.reference, sampler_gap=known.gap, entropy=entropy)
    advantages = known.advantages.unsqueeze(1).expand(B, S)
    given = Given(advantages, row.aggregation(known.mask).double(), evenly=token_mean(known.mask).double())
    total, found = slopes(evaluation, given, row.ours)
    nothing = torch.zeros_like(new)
    by_new = found["log_ratio"] + found.get("to_reference", nothing)
    return total, by_new, found.get("entropy", nothing)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradient_are_those_of_trl(opponent: Any, name: str, seed: int, monkeypatch: Any) -> None:
    known = drawn(seed)
    theirs = trl_loss(opponent, ROWS[name], known, type(opponent)._compute_loss, monkeypatch)
    theirs.backward()
    total, by_new, by_entropy = our_slopes(ROWS[name], known)
    assert known.new.grad is not None and known.new.grad.abs().max() > 1e-4
    torch.testing.assert_close(by_new, known.new.grad, rtol=1e-6, atol=1e-7)
    if known.entropy.grad is not None:
        torch.testing.assert_close(by_entropy, known.entropy.grad, rtol=1e-6, atol=1e-7)
    if name.startswith(("cispo", "vespo")):  # TRL's value has log pi where ours has log pi - log pi_old
        total = total + (by_new * known.old).sum()
    torch.testing.assert_close(total, theirs.detach(), rtol=1e-6, atol=1e-7)


CHOSEN = partial(gmpo, choose=partial(in_top_share, share=0.6))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("objective", "quantile"), [(gmpo, 1.0), (CHOSEN, 0.6)], ids=["all", "chosen"])
def test_the_geometric_mean_is_that_of_trl(opponent: Any, objective, quantile, seed: int, monkeypatch: Any) -> None:
    theirs = {"epsilon_low": 0.4, "epsilon_high": 0.4, "beta": 0.3, "top_entropy_quantile": quantile}
    known, row = drawn(seed), Row(Loss(objective, estimated_k3, 0.3), seq_mean, theirs)
    loss = trl_loss(opponent, row, known, GMPOTrainer._compute_loss, monkeypatch)
    loss.backward()
    total, by_new, _ = our_slopes(row, known)
    torch.testing.assert_close(by_new, known.new.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-7)


def test_the_weight_of_the_entropy_follows_it_as_in_trl(opponent: Any, monkeypatch: Any) -> None:
    how = {
        "use_adaptive_entropy": True,
        "_entropy_bonus_enabled": True,
        "entropy_coef": 0.1,
        "_last_world_entropy": 9.0,
    }
    options = {"entropy_target": 0.8, "entropy_coef_delta": 0.03, "entropy_coef_min": 0.08, "entropy_coef_max": 0.14}
    for name, value in (how | {"current_gradient_accumulation_steps": 1}).items():
        monkeypatch.setattr(opponent, name, value, raising=False)
    for name, value in options.items():
        monkeypatch.setattr(opponent.args, name, value)
    monkeypatch.setattr(opponent.model, "training", True)
    bonus, seen = Bonus(0.1), set()
    ours = Adaptation(0.8, delta=0.03, least=0.08, most=0.14)
    for seed in range(8):
        known = drawn(seed)
        row = Row(Loss(clipped, entropy_weight=applied(bonus, ours)), seq_mean, {})
        theirs = trl_loss(opponent, row, known, type(opponent)._compute_loss, monkeypatch)
        torch.testing.assert_close(our_slopes(row, known)[0], theirs.detach(), rtol=1e-6, atol=1e-7)
        bonus = adapted(bonus, float(known.entropy.detach()[known.mask].mean()), ours)
        assert opponent.entropy_coef == pytest.approx(bonus.weight)
        seen.add(round(bonus.weight, 3))
    assert len(seen) > 2
