"""Everything a training run holds between two iterations, and how it is built, saved and restored."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgrpo import aggregations, checkpoint, kl, packing, seeds
from mmgrpo.behaviour import Behaviour
from mmgrpo.comparing import Remembering
from mmgrpo.data import load_prompts
from mmgrpo.entropy import Adaptation, Band, Bonus
from mmgrpo.improve import Loss
from mmgrpo.optimizers import optimizer
from mmgrpo.previewing import expect
from mmgrpo.recall import Kept, packed, unpacked
from mmgrpo.recipe import Loss as LossOptions
from mmgrpo.recipe import Recipe, build
from mmgrpo.shadow import Reference, Shadow
from mmgrpo.signs import SLOWER, History
from mmgrpo.types import KINDS, AdvantageFunction, Policy, Prompt, Reward

COUNTERS = ("iteration", "rollouts", "updates", "samples")
AGGREGATIONS = {"seq_mean": aggregations.seq_mean, "token_mean": aggregations.token_mean}


@dataclass
class Run:
    """The state of a run; what a checkpoint holds is `state()`."""

    recipe: Recipe
    policy: Policy
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: dict[str, Reward]
    compare: AdvantageFunction
    loss: Loss
    aggregate: Callable[..., Tensor]  # (B, S) mask, keep=(B,) -> (B, S) weights
    optimizer: torch.optim.Optimizer
    reference: Reference
    average: Shadow | None
    behaviour: Behaviour = field(default_factory=lambda: Behaviour({}))  # samples: today's weights, or such as lag
    bonus: Bonus = Bonus(0.0)  # of the entropy
    watched: dict[str, Reward] = field(default_factory=dict)  # of the held-out samples alone
    kept: list[Kept] = field(default_factory=list)  # groups that may stand in for others
    stored: Path = Path()  # the folder of samples that were made once, in the stage "offline"
    history: History = History()  # of what the watch reads
    norms: list[float] = field(default_factory=list)  # of the gradient before it is clipped, since the watch read them
    iteration: int = 0  # the next one
    rollouts: int = 0  # so far: the position in the prompts
    updates: int = 0  # optimizer updates so far
    samples: int = 0  # samples generated so far

    @property
    def weights(self) -> dict[str, float]:
        return {reward.name: reward.weight for reward in self.recipe.rewards}

    @property
    def device(self) -> torch.device:
        """Where the trained weights are."""
        return next(iter(self.policy.trainable().values())).device

    def averaged(self) -> AbstractContextManager[None]:
        """The weights that are evaluated and exported: the averages if the run keeps any, else today's."""
        return nullcontext() if self.average is None else self.average.applied()

    def learning_rate(self) -> float:
        """Warm-up, then constant or falling to a tenth over the run; less after each alarm of a watch that slows."""
        options, total = self.recipe.optimizer, self.recipe.train.iterations
        warm = min(1.0, (self.iteration + 1) / options.warmup) if options.warmup else 1.0
        fall = 1 - 0.9 * self.iteration / total if options.decay == "linear" else 1.0
        return options.learning_rate * warm * fall * SLOWER**self.history.slowed


def start(recipe: Recipe) -> Run:
    """Build every component of a recipe, in its first state; seeds the process."""
    seeds.seed_process(seeds.derive(recipe.seed, "process"))
    policy: Policy = build(recipe.policy, "policy")
    compare: AdvantageFunction = build(recipe.advantage, "advantage")
    expect(compare, policy)
    prompts = load_prompts(recipe.prompts.source, **recipe.prompts.options)
    evaluation = recipe.evaluation
    held_out = load_prompts(evaluation.source, **evaluation.options) if evaluation.source else []
    policy.prepare([*prompts, *held_out])  # whose flaws are told now, not at the first evaluation
    trainable = policy.trainable()
    reference = recipe.reference
    decay = {} if reference.decay is None else {"decay": reference.decay}
    off = policy.adapters_off if reference.kind == "adapters_off" else None
    return Run(
        recipe=recipe,
        policy=policy,
        prompts=prompts,
        held_out=held_out,
        rewards=built_rewards(recipe, held_out=False),
        watched=built_rewards(recipe, held_out=True),
        compare=compare,
        loss=built_loss(recipe),
        bonus=Bonus(recipe.loss.entropy_weight),
        aggregate=aggregation(recipe),
        optimizer=optimizer(trainable, recipe.optimizer),
        reference=Reference(reference.kind, trainable, adapters_off=off, **decay),
        average=Shadow(trainable, torch.float32) if recipe.ema.decay else None,
        behaviour=Behaviour(trainable, recipe.behaviour.lag, recipe.behaviour.ramp, recipe.behaviour.flat),
    )


def built_rewards(recipe: Recipe, held_out: bool) -> dict[str, Reward]:
    """The rewards by name: those of every sample, or those of the held-out ones alone."""
    chosen = [reward for reward in recipe.rewards if reward.held_out_only == held_out]
    return {reward.name: build(reward.component, f"rewards.{reward.name}") for reward in chosen}


def built_loss(recipe: Recipe) -> Loss:
    """The terms of the recipe's loss; the weight of an entropy term is that of its start."""
    options, entropy = recipe.loss, recipe.entropy
    bonus = options.entropy_weight if options.entropy_weight or entropy.target is not None else None
    band = None if entropy.band is None else Band(*entropy.band, entropy.band_weight)
    objective = build(recipe.objective, "objective")
    return Loss(objective, distance(options), options.kl_weight, options.anchor_weight, bonus, band)


def adaptation(recipe: Recipe) -> Adaptation | None:
    """How the entropy's bonus follows the entropy; None if it does not."""
    options = recipe.entropy
    return None if options.target is None else Adaptation(options.target, options.delta, *options.bounds)


def distance(options: LossOptions) -> kl.KL:
    """The KL of the recipe's loss, per kind of decision if it tells them apart."""
    if not options.kl_kinds and not options.kl_shares:
        return kl.DISTANCES[options.kl]
    return kl.ByKind(
        {
            number: (kl.DISTANCES[options.kl_kinds.get(kind, options.kl)], options.kl_shares.get(kind, 1.0))
            for kind, number in KINDS.items()
        }
    )


def aggregation(recipe: Recipe) -> Callable[..., Tensor]:
    """(B, S) mask, keep=(B,) -> (B, S) weights of the loss."""
    if recipe.loss.aggregation == "constant":
        assert recipe.loss.length is not None  # the recipe was checked
        return partial(aggregations.constant, length=recipe.loss.length)
    return AGGREGATIONS[recipe.loss.aggregation]


def save(run: Run, folder: Path) -> Path:
    """Write a checkpoint of everything that the next iteration depends on, and the policy in its library's format."""
    moments, random = packing.optimizer_state(run.optimizer), packing.random_states()
    tensors = {
        "policy": {name: parameter.detach() for name, parameter in run.policy.trainable().items()},
        "optimizer": moments.tensors,
        "reference": run.reference.tensors(),
        "behaviour": run.behaviour.tensors(),
        "random": random.tensors,
    }
    if isinstance(run.compare, Remembering):
        tensors["advantage"] = dict(run.compare.memory)
    if run.average is not None:
        tensors["average"] = run.average.tensors()
    if adaptation(run.recipe) is not None:
        tensors["entropy"] = {"bonus": torch.tensor(run.bonus, dtype=torch.float64)}  # weight, last
    counters = {name: getattr(run, name) for name in COUNTERS}
    watch = packing.pack(asdict(run.history)).facts
    facts = {"counters": counters, "optimizer": moments.facts, "random": random.facts, "watch": watch}
    if run.recipe.recall.groups:
        tensors["recall"], facts["recall"] = packed(run.kept)

    def export(path: Path) -> None:
        with run.averaged():
            run.policy.save(path / "model")

    keep = run.recipe.train.keep + bool(run.history.stopped)  # the one of a run that failed costs no earlier one
    return checkpoint.write(folder, run.iteration, tensors, facts, keep=keep, extra=export)


def restore(run: Run, path: Path) -> Run:
    """The run as it was when the checkpoint was written, weights loaded in place."""
    tensors, facts = checkpoint.read(path)
    load_weights(run.policy, tensors["policy"])
    packing.restore_optimizer(run.optimizer, packing.Packed(tensors["optimizer"], facts["optimizer"]))
    run.reference.load(tensors["reference"])
    run.behaviour.load(tensors.get("behaviour", {}))
    if run.average is not None:
        run.average.load(tensors["average"])
    packing.restore_random_states(packing.Packed(tensors["random"], facts["random"]))
    if isinstance(run.compare, Remembering):
        run.compare.memory = tensors.get("advantage", {})
    if adaptation(run.recipe) is not None:
        run.bonus = Bonus(*tensors["entropy"]["bonus"].tolist())
    if run.recipe.recall.groups:
        run.kept = unpacked(packing.Packed(tensors["recall"], facts["recall"]), run.prompts)
    run.history = remembered(facts)
    counters = facts["counters"]
    assert isinstance(counters, dict) and counters.keys() == set(COUNTERS)
    return replace(run, **counters)


def remembered(facts: Mapping[str, object]) -> History:
    """What the watch had read when a checkpoint with these facts was written."""
    history: Any = packing.unpack(packing.Packed({}, facts["watch"]))
    return History(**history)


@torch.no_grad()
def load_weights(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the policy's trained parameters; raises ValueError if names or shapes differ."""
    parameters = policy.trainable()
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(
            f"the checkpoint has {len(tensors)} trained tensors, the recipe's policy {len(parameters)}; "
            f"the first that differs is {odd[0]!r}: was it trained with other policy.lora or policy.train?"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; the checkpoint's is {tuple(tensors[name].shape)}"
            )
        parameter.copy_(tensors[name])
