"""What a visit of a sample trains: Eq. 3 and 4 (`loss`), the chain objective, and Algorithm 1 as printed."""

import math

from udddm.backends.engines.deepspeed_config import zero_stage
from udddm.config import RunConfig
from udddm.diffusion.denoise import denoise
from udddm.diffusion.schedule import NoiseSchedule
from udddm.objectives.base import Objective, Visits
from udddm.objectives.chain import Chain
from udddm.objectives.ect import ECT
from udddm.objectives.edm import EDM
from udddm.objectives.ict import ICT
from udddm.objectives.labels import LabelDropout
from udddm.objectives.loss import adaptive_loss, pseudo_huber
from udddm.objectives.pretrain import Pretrained
from udddm.objectives.target import Teacher
from udddm.objectives.uddm import UDDM

__all__ = [
    "ECT",
    "EDM",
    "ICT",
    "UDDM",
    "Chain",
    "LabelDropout",
    "Objective",
    "Pretrained",
    "Teacher",
    "Visits",
    "adaptive_loss",
    "build",
    "denoise",
    "pseudo_huber",
]


CHAIN_HUBER_C = 0.19
"""c of Eq. 4 over sqrt(C H W) for chains: what served best on the digits (docs/method.md, "c")."""
ICT_HUBER_C = 0.00054
"""Likewise for consistency training (Song & Dhariwal 2023, section 3.3)."""


def build(config: RunConfig, process: NoiseSchedule, epochs: float, shape: tuple[int, int, int]) -> Objective:
    """The configured objective for a run of `epochs` epochs on images [C, H, W]."""
    chosen, seed, pixels = config.objective, config.seed, math.prod(shape)
    conditioned = config.network.condition != "none"
    teacher = Teacher(
        every_row=config.network.dropout > 0 or config.train.compile,
        lockstep=config.engine.name == "deepspeed" and zero_stage(config) == 3,
    )
    denoiser = EDM(process, chosen.edm, seed, pixels, conditioned, teacher)
    if chosen.name == "denoiser":
        return denoiser
    warm = math.ceil(config.pretrain_share * epochs)
    left = max(epochs - warm, 1e-9)
    then: Objective
    if chosen.name == "algorithm-1":
        paper = 0.00014 if config.schedule.kind == "vp" else 0.00015
        then = UDDM(process, chosen.huber_c or paper, seed)
    elif chosen.name == "chain":
        c = chosen.huber_c or CHAIN_HUBER_C * math.sqrt(pixels)
        then = Chain(process, chosen.chain, c, seed, left, conditioned, teacher)
    else:
        c = chosen.huber_c or ICT_HUBER_C * math.sqrt(pixels)
        if chosen.name == "consistency":
            then = ICT(process, chosen.ict, c, seed, left, conditioned, teacher)
        else:
            then = ECT(process, chosen.ect, c, seed, left, conditioned, teacher)
    return Pretrained(denoiser, then, warm) if warm else then
