from typing import NamedTuple
import torch
from torch import Tensor
from mmgrpo.transitions import Level, from_velocity, from_noise
class Levels(NamedTuple):
    now: Level
    next: Level
    second: Level
    kind: str
def read(scheduler, arguments):
    if hasattr(scheduler, "sigmas"):
        if scheduler.step_index is None:
            scheduler._init_step_index(arguments["timestep"])
        i = scheduler.step_index
        s = scheduler.sigmas
        L = lambda x: Level(1 - x, x)
        return Levels(L(s[i]), L(s[i+1]), L(s[1]), "flow")
    t = int(arguments["timestep"])
    p = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    a = scheduler.alphas_cumprod[t]; b = scheduler.alphas_cumprod[p] if p >= 0 else scheduler.final_alpha_cumprod
    L = lambda a: Level(a.sqrt(), (1-a).sqrt())
    return Levels(L(a), L(b), L(b), "eps")
def clean_and_noise(scheduler, levels, output, sample):
    return (from_velocity if levels.kind == "flow" else from_noise)(sample, output, levels.now)
def advance(scheduler, timestep):
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index += 1
def quiet(pipeline): return []
