"""What a visit of a sample trains: Eq. 3 and 4 (`loss`), the chain objective, and Algorithm 1 as printed."""

from udddm.config import RunConfig
from udddm.objective.algorithm1 import AlgorithmOne
from udddm.objective.chain import Chain
from udddm.objective.loss import Objective, Visits, adaptive_loss, denoise, pseudo_huber
from udddm.process import Process

__all__ = ["AlgorithmOne", "Chain", "Objective", "Visits", "adaptive_loss", "build", "denoise", "pseudo_huber"]


def build(config: RunConfig, process: Process, epochs: float) -> Objective:
    """The configured objective for a run of `epochs` epochs."""
    chosen = config.objective
    if chosen.name == "algorithm-1":
        return AlgorithmOne(process, chosen.huber_c, config.seed)
    conditioned = config.network.condition != "none"
    return Chain(process, chosen.chain, chosen.huber_c, config.seed, epochs, conditioned)
