"""Representation alignment (REPA): what a block makes of the tokens is drawn towards a vision encoder's patch features.

Yu et al. 2024, "Representation Alignment for Generation", arXiv 2410.06940: loss - weight * cosine(projector(h), z), averaged
over tokens and samples, where h are the tokens behind a block, z the features of the clean picture's patches, and the
projector a multilayer perceptron that sampling does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from data.features import AlignmentTargets
from models import DiT
from runtime.config import InputError
from runtime.settings import TrainingSettings

HIDDEN = 2048
"""Channels of the projector's two hidden layers."""
PUBLISHED_BLOCK = 8
"""The block of XL and L behind which the paper aligns."""


class Alignment(nn.Module):
    """Projector and loss. Takes up, in every pass of the network, what the first run of its block puts out."""

    def __init__(self, network: DiT, block: int, weight: float, width: int) -> None:
        """`block` counts from 1; `width` is that of the targets."""
        super().__init__()
        self.block, self.weight = block, weight
        hidden = network.backbone.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(hidden, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width)
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self._taken: list[Tensor] = []

    def listen(self, network: DiT) -> None:
        """From now on takes up what the block of `network` puts out, however it is compiled or checkpointed."""
        network.blocks[self.block - 1].register_forward_hook(self._take)

    def _take(self, block: nn.Module, arguments: Any, output: Any) -> None:
        # A method may run a second pass in a step, of other decisions; blocks may put out these beside the tokens.
        if not self._taken:
            self._taken.append(output[0] if isinstance(output, tuple) else output)

    def forget(self) -> None:
        """Must be called before each pass of the network."""
        self._taken.clear()

    def forward(self, targets: Tensor, places: Tensor | None) -> Tensor:
        """The loss of the pass that has run, not yet weighted: minus the mean cosine. -> ()

        targets (N, T, width) of the full map; places (N, K) of the tokens behind the block in it, None: all, in order
        """
        tokens = self._taken.pop()  # (N, K, D)
        if places is not None:
            targets = targets.gather(1, places.unsqueeze(2).expand(-1, -1, targets.shape[2]))  # (N, K, width)
        return -F.cosine_similarity(self.projector(tokens).float(), targets.float(), dim=2).mean()


def with_alignment_block(settings: TrainingSettings, network: DiT, targets: AlignmentTargets) -> TrainingSettings:
    """The settings with the block behind which `network` is aligned. InputError where it, or the targets, do not fit."""
    backbone, spec = network.backbone, targets.spec
    if spec.grid != backbone.grid:
        raise InputError(
            f"{settings.feature_path} holds {spec.describe()}, and --model {settings.model} has {backbone.grid[0]} x "
            f"{backbone.grid[1]}; extract with --alignment-patch {backbone.patch_size}."
        )
    possible = network.alignable_blocks()
    if not possible:
        raise InputError(f"--method {settings.method} has no block whose tokens stand for places of the map; leave --alignment "
                         "out.")  # fmt: skip
    block = default_block(possible, backbone.depth) if settings.alignment_block is None else settings.alignment_block
    if block not in possible:
        raise InputError(
            f"--alignment-block is {block}, behind which --method {settings.method} has no tokens that stand for places of the "
            f"map; choose from {', '.join(map(str, possible))}."
        )
    return replace(settings, alignment_block=block)


def default_block(possible: Sequence[int], depth: int) -> int:
    """The last of `possible` up to the paper's block, or half of the depth where that is less; else the first."""
    most = min(PUBLISHED_BLOCK, depth // 2)
    return max((block for block in possible if block <= most), default=possible[0])


def make_alignment(settings: TrainingSettings, network: DiT, targets: AlignmentTargets) -> Alignment:
    """The alignment of settings that `with_alignment_block` completed. The projector is drawn from torch's generator."""
    assert settings.alignment_block is not None
    return Alignment(network, settings.alignment_block, settings.alignment, targets.spec.width)
