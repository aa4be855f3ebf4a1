"""Keys that had other names in earlier versions.

Old names in YAML files, overrides, run.json and checkpoints are still accepted. One warning per source names the old
and the new keys.
"""

from __future__ import annotations

from typing import Any

RENAMED = {
    "process": "schedule",
    "objective.warmup": "objective.pretrain",
    "objective.consistency": "objective.ict",
    "objective.tuning": "objective.ect",
    "objective.denoiser": "objective.edm",
    "objective.chain.mean": "objective.chain.p_mean",
    "objective.chain.deviation": "objective.chain.p_std",
    "objective.chain.guiding": "objective.chain.x0_weight",
    "objective.ict.mean": "objective.ict.p_mean",
    "objective.ict.deviation": "objective.ict.p_std",
    "objective.ict.first": "objective.ict.s0",
    "objective.ict.last": "objective.ict.s1",
    "objective.ect.mean": "objective.ect.p_mean",
    "objective.ect.deviation": "objective.ect.p_std",
    "objective.edm.mean": "objective.edm.p_mean",
    "objective.edm.deviation": "objective.edm.p_std",
    "network.width": "network.base_channels",
    "network.multipliers": "network.channel_mult",
    "network.blocks": "network.blocks_per_level",
    "network.attention": "network.attention_resolutions",
    "network.head_width": "network.head_dim",
    "store.on_damage": "store.on_corruption",
    "train.accumulation": "train.grad_accumulation",
    "train.clip": "train.grad_clip",
    "train.decay": "train.lr_schedule",
    "train.initial": "train.init_from",
    "train.threads": "train.torch_threads",
}
"""New dotted key by old dotted key. Sections are renamed first; the keys in them are listed under the new section."""


def current_key(key: str) -> str:
    """The current name of a dotted key."""
    done = ""
    for part in key.split("."):
        done = f"{done}.{part}" if done else part
        done = RENAMED.get(done, done)
    return done


def modernize(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Returns a copy of a tree of plain values with current names, and a phrase for each name that was replaced.

    If both an old and its new name are present, both are kept, and validation reports the old one.
    """
    found: dict[str, Any] = {}
    replaced: list[str] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        new = RENAMED.get(key, key)
        leaf = new.rpartition(".")[2]
        if new != key and leaf in tree:
            new, leaf = key, name
        if new != key:
            replaced.append(f"{key} is now {new}")
        if isinstance(value, dict):
            value, more = modernize(value, f"{new}.")
            replaced += more
        found[leaf] = value
    return found, replaced
