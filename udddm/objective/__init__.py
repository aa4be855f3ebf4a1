"""What a visit of a sample trains: Eq. 3 and 4 (`loss`), the chain objective, and Algorithm 1 as printed."""

import math

from udddm.backends.deepspeed_config import zero_stage
from udddm.config import RunConfig
from udddm.objective.algorithm1 import AlgorithmOne
from udddm.objective.chain import Chain
from udddm.objective.loss import Objective, Visits, adaptive_loss, denoise, pseudo_huber
from udddm.process import Process

__all__ = ["AlgorithmOne", "Chain", "Objective", "Visits", "adaptive_loss", "build", "denoise", "pseudo_huber"]


CHAIN_HUBER_C = 0.19
"""c of Eq. 4 over sqrt(C H W) for chains: what served best on the digits (docs/method.md, "c")."""


def build(config: RunConfig, process: Process, epochs: float, shape: tuple[int, int, int]) -> Objective:
    """The configured objective for a run of `epochs` epochs on images [C, H, W]."""
    chosen = config.objective
    if chosen.name == "algorithm-1":
        paper = 0.00014 if config.process.kind == "vp" else 0.00015
        return AlgorithmOne(process, chosen.huber_c or paper, config.seed)
    conditioned = config.network.condition != "none"
    c = chosen.huber_c or CHAIN_HUBER_C * math.sqrt(math.prod(shape))
    lockstep = config.engine.name == "deepspeed" and zero_stage(config) == 3
    return Chain(process, chosen.chain, c, config.seed, epochs, conditioned, lockstep)
