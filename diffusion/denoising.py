"""What samplers are given: the guided denoiser, the noise of their steps, and who wants to see them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""x (N, C, H, W) float32 and the timestep of all -> epsilon and, where the network has them, the variance channels,
(N, C or 2C, H, W); under flow the velocity (N, C, H, W). The timestep is an int, the original one; under flow any number, 1000
times the flow time."""

StepNoise = Callable[[int], Tensor]
"""k -> the k-th standard normal noise that is added, (N, C, H, W), k = 0, 1, ..."""

Callback = Callable[[int, Tensor, Tensor], None]
"""After each step: its number 0, 1, ..., the latents, the predicted x0."""
