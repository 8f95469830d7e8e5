"""What a recipe must not say: options that are each valid but that together would train wrongly, or not as the reader believes."""

from typing import TYPE_CHECKING

from mmgrpo.components import build
from mmgrpo.facts import facts
from mmgrpo.toml import RecipeError, nearest

if TYPE_CHECKING:
    from mmgrpo.recipe import Recipe


Problems = dict[str, str | bool]  # key -> what is wrong with it, or nothing


def refuse_contradictions(recipe: "Recipe", where: str) -> None:
    """Raise RecipeError naming the first key that contradicts another."""
    found = in_training(recipe) | in_offline(recipe) | in_recall(recipe) | in_loss(recipe, where)
    found |= in_entropy(recipe) | in_watch(recipe)
    for key, problem in found.items():
        if problem:
            raise RecipeError(f"{where}{key}: {problem}")


def in_training(recipe: "Recipe") -> Problems:
    """What is wrong with rewards and the loop."""
    train, loss = recipe.train, recipe.loss
    among = train.group_size * (1 if train.keep_among == "group" else train.prompts)
    kept = round(train.keep_share * among)
    aligned = train.stage != "pretrain"
    return {
        "rewards": aligned
        and all(reward.weight == 0 for reward in recipe.rewards)
        and ("every weight is 0; expected one to train on" if recipe.rewards else "missing, and it has no default"),
        "rewards.held_out_only": any(reward.held_out_only and reward.weight for reward in recipe.rewards)
        and "true arrived with a weight; expected weight 0, training does not ask such a reward",
        "train.stage": not aligned
        and (train.rounds, train.passes, train.keep_share, loss.kl_weight, loss.kl_in_reward) != (1, 1, 1.0, 0.0, 0.0)
        and f"{train.stage!r} arrived with train.rounds, train.passes, train.keep_share, loss.kl_weight or loss.kl_in_reward; expected "
        "none of these, they concern the stage 'align'",
        "train.group_size": aligned
        and train.group_size < 2
        and f"{train.group_size} arrived; expected at least 2, a sample is compared with others of its prompt",
        "train.updates": train.prompts % train.updates != 0
        and f"{train.updates} updates cannot share {train.prompts} prompts evenly; expected a divisor",
        "train.keep_share": aligned
        and kept < 2
        and f"keeps {kept} of {among} samples; expected at least a top and a bottom one",
        "train.keep_among": train.keep_among != "group"
        and train.keep_share == 1
        and f"{train.keep_among!r} arrived with train.keep_share 1; expected a share, all samples are kept",
        "train.evaluate_every": train.evaluate_every > 0
        and not recipe.evaluation.source
        and f"{train.evaluate_every} arrived; expected evaluation.source to name the held-out prompts",
    }


def in_offline(recipe: "Recipe") -> Problems:
    """What is wrong with samples that are made once."""
    offline, train = recipe.offline, recipe.train
    once = train.stage == "offline"
    rolling = {
        "train.rounds": train.rounds > 1,
        "behaviour.lag": recipe.behaviour.lag > 0,
        "loss.kl_in_reward": recipe.loss.kl_in_reward > 0,
    }
    asked = [name for name, there in rolling.items() if there]
    return {
        "policy.draws": once
        and recipe.policy.get("draws") is None
        and "missing, with train.stage 'offline'; expected draws, as recorded steps belong to the weights that took them",
        "offline.samples": once
        and offline.samples < train.group_size
        and f"{offline.samples} arrived with train.group_size {train.group_size}; expected at least as many samples of a prompt",
        "offline": once
        and bool(asked)
        and f"train.stage 'offline' arrived with {', '.join(asked)}; expected none of it: the weights of the start sample, once",
        "offline.samples or folder": not once
        and offline != type(offline)()
        and f"{offline.samples} and {offline.folder!r} arrived with train.stage {train.stage!r}; expected 'offline'",
    }


def in_recall(recipe: "Recipe") -> Problems:
    """What is wrong with groups that are kept."""
    recall, train, loss = recipe.recall, recipe.train, recipe.loss
    return {
        "recall.groups": recall.groups > 0
        and (train.stage != "align" or loss.kl_in_reward > 0)
        and f"{recall.groups} arrived with train.stage {train.stage!r} and loss.kl_in_reward {loss.kl_in_reward}; expected the stage "
        "'align' and 0: the KL of a group of an earlier iteration would be today's",
        "recall.age": recall.groups == 0
        and recall.age != type(recall)().age
        and f"{recall.age} arrived with recall.groups 0; expected groups that are kept",
    }


def in_loss(recipe: "Recipe", where: str) -> Problems:
    """What is wrong with the terms of the loss and the reference."""
    loss, reference = recipe.loss, recipe.reference
    asks = recipe.train.stage != "pretrain" and facts(build(recipe.objective, where + "objective")).refers
    refers = asks or loss.kl_weight > 0 or loss.kl_in_reward > 0
    return {
        "loss.length": (loss.aggregation == "constant") != (loss.length is not None)
        and f"{loss.length} arrived with aggregation {loss.aggregation!r}; expected one with 'constant' alone",
        "loss.kl_weight": loss.kl_weight > 0
        and reference.kind == "none"
        and f"{loss.kl_weight} arrived; expected reference.kind to say what the KL is measured to",
        "loss.kl_kinds": loss.kl_weight == 0
        and bool(loss.kl_kinds or loss.kl_shares)
        and f"{dict(loss.kl_kinds)} and loss.kl_shares {dict(loss.kl_shares)} arrived with loss.kl_weight 0; expected a weight",
        "loss.kl_in_reward": loss.kl_in_reward > 0
        and reference.kind == "none"
        and f"{loss.kl_in_reward} arrived; expected reference.kind to say what the KL is measured to",
        "objective": asks
        and reference.kind == "none"
        and f"{recipe.objective['build']} compares with a reference; expected reference.kind to say which",
        "reference.kind": not refers
        and reference.kind != "none"
        and f"{reference.kind!r} arrived with loss.kl_weight 0; expected 'none', nothing would use it",
        "reference.decay": (reference.kind == "ema") != (reference.decay is not None)
        and f"{reference.decay} arrived with kind {reference.kind!r}; expected a decay with 'ema' and only there",
    }


def in_entropy(recipe: "Recipe") -> Problems:
    """What is wrong with the bounds of the entropy."""
    entropy = recipe.entropy
    return {
        "entropy.bounds": entropy.bounds[1] < entropy.bounds[0]
        and f"{entropy.bounds} arrived; expected the least weight, then the most",
        "entropy.band": (
            (entropy.band is None) != (entropy.band_weight == 0)
            or (entropy.band is not None and entropy.band[0] > entropy.band[1])
        )
        and f"{entropy.band} arrived with entropy.band_weight {entropy.band_weight}; expected [low, high] and a weight, or neither",
    }


def in_watch(recipe: "Recipe") -> Problems:
    """What is wrong with the scores that are guarded."""
    watch, train, known = recipe.watch, recipe.train, [reward.name for reward in recipe.rewards]
    strange = [name for name in watch.guard if name.partition(".")[0] not in known]
    unseen = watch.action == "off" or train.evaluate_every == 0 or train.stage == "pretrain"
    problem: str | bool = False
    if strange:
        problem = f"{strange[0]!r} arrived{nearest(strange[0], known)}; expected names of [[rewards]]"
    elif watch.guard and unseen:
        problem = (
            f"{dict(watch.guard)} arrived with watch.action {watch.action!r}, train.evaluate_every {train.evaluate_every} "
            f"and train.stage {train.stage!r}; expected held-out scores to look at, and not the stage 'pretrain'"
        )
    return {"watch.guard": problem}
