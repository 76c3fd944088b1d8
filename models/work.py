"""What passes of a network computed, where that depends on what they saw: counted while running."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from models.token_density import TIMESTEPS

DECISIONS = ("heads", "channels", "tokens")
"""What may be on or off in a block."""


class CountedWork:
    """Sums over the images that went through a network: multiply-accumulates, and which shares of each layer were on.

    Nothing here waits for the device: all counts are known to the host when a pass has been launched.
    """

    def __init__(self, depth: int) -> None:
        self.macs = 0
        """All multiply-accumulates."""
        self.block_macs = 0
        """Those of attention and MLP alone, the convention of DyDiT's FLOPs ratio."""
        self.images = np.zeros(TIMESTEPS, dtype=np.int64)
        self.kept = {name: np.zeros((depth, TIMESTEPS)) for name in DECISIONS}
        """Sums over images of the share that was on, (layer, timestep)."""

    @property
    def passes(self) -> int:
        """Images that went through."""
        return int(self.images.sum())

    def add_layer(self, layer: int, timestep: int, images: int, shares: Mapping[str, float], macs: int) -> None:
        """A block's pass over `images`: the shares of it that were on, and the MACs of its attention and MLP."""
        for name, share in shares.items():
            self.kept[name][layer, timestep] += images * share
        self.block_macs += macs
        self.macs += macs

    def add_pass(self, timestep: int, images: int, macs: int) -> None:
        """A pass over `images` is complete: `macs` are those of everything but attention and MLP."""
        self.images[timestep] += images
        self.macs += macs

    def add(self, other: CountedWork) -> None:
        """Counts what another process computed in."""
        self.macs += other.macs
        self.block_macs += other.block_macs
        self.images += other.images
        for name, values in other.kept.items():
            self.kept[name] += values

    def rates(self, name: str) -> np.ndarray:
        """The mean share of "heads", "channels" or "tokens" that was on, (layer, timestep); NaN at timesteps never met."""
        with np.errstate(invalid="ignore"):
            return self.kept[name] / self.images
