"""What a training step computes, the same for every method and objective."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from diffusion.schedule import Timesteps
from models import DiT, Plan
from runtime.alignment import Alignment
from runtime.objectives import Objective
from runtime.seeding import Keys


class Batch(NamedTuple):
    """What one process computes at once. All its timesteps lie in one interval of the method's, whose plan this is."""

    latents: Tensor  # (n, C, H, W)
    labels: Tensor  # (n,)
    positions: Tensor  # (n,) int64, in the global batch
    timesteps: Timesteps
    plan: Plan
    targets: Tensor | None = None  # (n, T, width), where the training aligns


class TrainingStep(nn.Module):
    """Draw, noise, predict, score. This is what accelerate wraps; nothing but its `forward` is called on the wrapped module.

    Compiled, it makes one graph for each signature of a plan: what else changes from step to step comes in tensors.
    """

    def __init__(self, network: DiT, objective: Objective, seed: int, alignment: Alignment | None = None) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.seed = seed
        self.alignment = alignment
        if alignment:
            alignment.listen(network)

    def forward(self, batch: Batch, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """step () int64 -> scalar loss; its parts and what else was measured by name, scalars or (layers,)"""
        keys = Keys(self.seed, step, batch.positions)
        noised = self.objective.noised(batch.latents, keys, batch.timesteps)
        draws = self.network.draw(keys)
        if self.alignment:
            self.alignment.forget()
        outputs, features = self.network.training_forward(noised.x_t, noised.t, batch.labels, batch.plan, draws)
        total = batch.latents.new_zeros(())
        parts: dict[str, Tensor] = {}
        for name, (output, weight) in outputs.items():
            losses = {part: values.mean() for part, values in self.objective.losses(output, noised).items()}
            total = total + weight * losses["loss"]
            parts |= {part if name == "denoising" else f"{name}/{part}": value for part, value in losses.items()}
        extra = self.network.extra_losses(features, step)
        if len(outputs) + len(extra) > 1 or self.alignment:
            parts["denoising/loss"] = parts["loss"]
        total = total + sum(extra.values())
        if self.alignment:
            assert batch.targets is not None
            aligned = self.alignment(batch.targets, self.network.places_behind(self.alignment.block, draws))
            total = total + self.alignment.weight * aligned
            parts["alignment"] = aligned
        parts |= {**extra, **self.network.measurements(features, step), "loss": total}
        return total, {name: value.detach() for name, value in parts.items()}
