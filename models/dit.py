"""Dense DiT: the backbone, the method `dense`, and the base class of every other method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.backbone import Backbone, ObjectiveName
from models.layers import (
    Block,
    Condition,
    FinalLayer,
    FlatPatchEmbedder,
    LabelEmbedder,
    ModulatedBlock,
    PatchEmbedder,
    Plan,
    TimestepEmbedder,
    position_embedding,
)
from models.token_density import TIMESTEPS, TokenDensity
from models.weights import DenseRules, Rows
from models.work import CountedWork
from runtime.seeding import Keys, uniform

Draws = Mapping[str, Tensor]
"""Random tensors of one training step, by name, each with the batch as its first dimension."""


@dataclass(frozen=True)
class DenseOptions:
    """The dense DiT has nothing to choose."""


class DiT(nn.Module):
    """Dense DiT. Subclasses replace the blocks and how tokens run through them; embedding, output and interface stay."""

    options_type: ClassVar[type] = DenseOptions
    released_layout: ClassVar[str] = "DiT"
    """The layout in which the authors publish weights (see `layout_names`)."""
    released_objective: ClassVar[ObjectiveName | None] = None
    """What these were trained under, which their files do not say; None: as networks of the backbone's name."""
    released_time_scale: ClassVar[float | None] = None
    """Their `Backbone.time_scale`; None: as networks of the backbone's name."""
    x_embedder: PatchEmbedder | FlatPatchEmbedder
    blocks: Sequence[ModulatedBlock]
    work: CountedWork | None = None
    """Counts what passes computed where that depends on what they saw; None: a plan says it all."""
    training_options: ClassVar[frozenset[str]] = frozenset()
    """Options that training alone reads."""
    recipe: ClassVar[Mapping[str, Any]] = {}
    """Training settings the method's paper changes; below a YAML file and flags in precedence."""

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = self.resolve(options or self.options_type(), backbone)
        width = backbone.hidden_size
        self.build_outside_blocks()
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(backbone.num_classes, width)
        self.blocks = nn.ModuleList(self.build_blocks())  # type: ignore[assignment]
        self.final_layer = FinalLayer(width, backbone.patch_size, backbone.out_channels)
        self.initialize_weights()

    # What a method replaces ------------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, options: Any, backbone: Backbone) -> Any:
        """`options` with every default filled in for `backbone`; InputError where they do not fit it."""
        return options

    def build_outside_blocks(self) -> None:
        """What stands before and between the blocks, the embedders of time and label apart."""
        backbone = self.backbone
        self.x_embedder = PatchEmbedder(backbone.patch_size, backbone.in_channels, backbone.hidden_size)
        # A parameter without gradient, as in DiT: it stands in checkpoints and in the published parameter counts.
        self.pos_embed = nn.Parameter(torch.empty(1, backbone.tokens, backbone.hidden_size), requires_grad=False)

    def embed_patches(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> the full token map (N, T, D)"""
        return self.x_embedder(x) + self.pos_embed

    def build_blocks(self) -> Iterator[ModulatedBlock]:
        """The blocks in the order in which they run, one per layer of the backbone."""
        backbone = self.backbone
        for _ in range(backbone.depth):
            yield Block(backbone.hidden_size, backbone.num_heads, backbone.mlp_ratio)

    def run_blocks(
        self, tokens: Tensor, condition: Condition, plan: Plan, draws: Draws | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens (N, T, D), condition of N samples -> (N, T, D), features for `extra_losses` and `measurements`"""
        for block in self.blocks:
            tokens = block(tokens, None, block.modulation(condition))  # (N, T, D)
        return tokens, {}

    def block_macs(self, plan: Plan) -> int:
        """Multiply-accumulates of all blocks for one image."""
        return sum(block.macs(self.backbone.tokens, self.backbone.tokens) for block in self.blocks)

    @property
    def flops_target(self) -> float | None:
        """The share of the dense backbone's attention and MLP that training leaves on; None where plans decide it."""
        return None

    @property
    def density(self) -> TokenDensity | None:
        """The sparse grid of every timestep; None where the method has none."""
        return None

    @property
    def plan_varies(self) -> bool:
        """Whether `plan` depends on the timestep."""
        return any(self.plan(t) != self.plan(0) for t in range(TIMESTEPS))

    def plan(self, t: int) -> Plan:
        """What the step at the original timestep t (0 .. 999) computes."""
        return Plan()

    def guidance_plans(self, t: int) -> tuple[Plan, Plan]:
        """Plans of the conditional and the unconditional half of classifier-free guidance; equal plans let both halves run as
        one batch.
        """
        plan = self.plan(t)
        return plan, plan

    def cheap_plan(self, t: int) -> Plan | None:
        """A pass at timestep t that leaves out most of the network, which path-drop guidance takes for the unconditional half;
        None where the method has none.
        """
        return None

    def training_plans(self, step: int = 0) -> Sequence[tuple[range, Plan]]:
        """Intervals of timesteps, together 0 .. 999 in order, and the plan of a training pass within each.

        A training batch holds timesteps of one interval alone. Intervals are the same at every training step, plans those of
        the step's stage.
        """
        return [(range(TIMESTEPS), self.plan(0))]

    def training_stages(self) -> Sequence[int]:
        """The training steps from which on `training_plans` has other plans, ascending, the first 0."""
        return [0]

    def training_lines(self, steps: int | None = None) -> list[str]:
        """What is said before a training of `steps` steps (None: nobody knows) of its own terms, beside the cost of a pass."""
        return []

    def draw(self, keys: Keys) -> dict[str, Tensor]:
        """Everything random in one training pass: here, which labels become the null class. label_drop: (N,) bool"""
        return {"label_drop": uniform(keys, "label drop") < self.backbone.label_drop}

    def training_forward(
        self, x: Tensor, t: Tensor, y: Tensor, plan: Plan, draws: Draws
    ) -> tuple[dict[str, tuple[Tensor, float]], dict[str, Tensor]]:
        """Outputs to which the objective applies, each with its weight, "denoising" first; and features for `extra_losses`."""
        output, features = self.predict(x, t, y, plan, draws)
        return {"denoising": (output, 1.0)}, features

    def alignable_blocks(self) -> Sequence[int]:
        """The blocks, counted from 1, behind which each token of a training pass stands for one place of the full map."""
        return range(1, self.backbone.depth + 1)

    def places_behind(self, block: int, draws: Draws) -> Tensor | None:
        """The places of the tokens behind one of `alignable_blocks` in the full map, (N, K) int64; None: all, in order."""
        return None

    def extra_losses(self, features: Mapping[str, Tensor], step: int | Tensor) -> dict[str, Tensor]:
        """Scalar losses of the method itself, already weighted, by name."""
        return {}

    def measurements(self, features: Mapping[str, Tensor], step: int | Tensor) -> dict[str, Tensor]:
        """What else of a training pass is logged, by name: scalars, or one number for each layer."""
        return {}

    def imitate_training(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """For measurements of drawn weights: decisions that come out of weights fall as often as training would make them.

        x (N, C, H, W), t (N,), y (N,) are what the network will see.
        """

    def forget(self) -> None:
        """Frees what passes have left to be used again by others: here nothing."""

    @classmethod
    def recognize(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Mapping[str, Any]] | None:
        """(layout name, options) when a checkpoint with these keys was made by this method, else None."""
        return ("DiT", {}) if "blocks.0.attn.qkv.weight" in shapes else None

    def layout_names(self, layout: str) -> dict[str, str]:
        """Our key -> the key in `layout`, for every key of the network."""
        return {key: key for key in self.state_dict()}

    def dense_rules(self) -> DenseRules:
        """Where each key comes from when a dense DiT is converted."""
        return DenseRules(sources={key: Rows(key) for key in self.state_dict()})

    # What all methods share ------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        plan: Plan | None = None,
        draws: Draws | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Latents, timesteps, labels -> noise prediction, then variance channels when sigma is learned.

        x (N, C, H, W); t (N,), 0 .. 999, flow times times 1000; y (N,) int64, `num_classes` is the null class
        -> (N, out_channels, H, W)
        Where many samples share a timestep and a label: t (1,) is everyone's, and y (R,) holds the different labels, of which
        sample i has y[index[i]], index (N,) int64.
        Without a plan each sample gets that of its own timestep, the slow and general way: where plans differ the timesteps are
        read back from the device and the samples of one plan run together.
        """
        if plan is None and len(self.training_plans()) > 1:
            return self._forward_by_plan(x, t.expand(len(x)), y if index is None else y[index], draws)
        return self.predict(x, t, y, plan, draws, index)[0]

    def predict(
        self, x: Tensor, t: Tensor, y: Tensor, plan: Plan | None, draws: Draws | None, index: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward` under one plan (None: that of training), and the features of the pass."""
        plan = self.training_plans()[0][1] if plan is None else plan
        tokens, condition = self.embed(x, t, y, draws, index)  # (N, T, D)
        tokens, features = self.run_blocks(tokens, condition, plan, draws)  # (N, T, D)
        return self.unpatchify(self.final_layer(tokens, condition)), features  # (N, out_channels, H, W)

    def embed(
        self, x: Tensor, t: Tensor, y: Tensor, draws: Draws | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Condition]:
        """The full token map (N, T, D) and what conditions its pass."""
        labels = self.y_embedder(y, None if draws is None else draws["label_drop"])  # (R, D), without an index R = N
        timestep = self.t_embedder(self.embedded_time(t))  # (N, D) or (1, D)
        return self.embed_patches(x), Condition(timestep + labels, index, timestep)

    def embedded_time(self, t: Tensor) -> Tensor:
        """What the timestep embedder is given for the timesteps t (N,), 0 .. 999 or flow times times 1000. -> (N,)"""
        scale = self.backbone.time_scale
        return t if scale == TIMESTEPS else t * (scale / TIMESTEPS)

    def _forward_by_plan(self, x: Tensor, t: Tensor, y: Tensor, draws: Draws | None) -> Tensor:
        """x (N, C, H, W), t (N,), y (N,) -> (N, out_channels, H, W), every sample under the plan of its timestep."""
        # A flow's time 1, pure noise, is timestep 1000, and has the plan of the last one.
        plans = [self.plan(int(step) - (step == TIMESTEPS)) for step in t.tolist()]
        parts, order = [], []
        for plan in dict.fromkeys(plans):
            chosen = torch.tensor([place for place, other in enumerate(plans) if other == plan], device=x.device)
            drawn = None if draws is None else {name: values[chosen] for name, values in draws.items()}
            parts.append(self(x[chosen], t[chosen], y[chosen], plan, drawn))
            order.append(chosen)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, T, p p C), channels last inside a patch -> (N, C, H, W)"""
        (rows, columns), patch = self.backbone.grid, self.backbone.patch_size
        patches = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # (N, rows, columns, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (N, C, H, W)

    def macs(self, plan: Plan | None = None) -> int:
        """Multiply-accumulates of one forward pass for one image: everything, softmax attention included, guidance not.

        Without a plan: the network's only one; ValueError where plans differ, for which there is `mean_macs`.
        """
        if plan is None:
            if self.plan_varies:
                raise ValueError("plans differ with the timestep; give a plan, or ask mean_macs over timesteps")
            plan = self.plan(0)
        tokens = self.backbone.tokens
        embedding = self.x_embedder.macs(tokens) + self.t_embedder.macs()
        return embedding + self.block_macs(plan) + self.final_layer.macs(tokens)

    def mean_macs(self, timesteps: Sequence[int] = range(TIMESTEPS)) -> float:
        """The mean of `macs` over the steps at the original `timesteps`: of a sampler's, or of training's uniform draw."""
        counts = Counter(self.plan(t) for t in timesteps)
        return sum(count * self.macs(plan) for plan, count in counts.items()) / counts.total()

    def initialize_weights(self, linear_gain: float = 1.0) -> None:
        """DiT's initialisation: the network starts as the zero function, each block as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=linear_gain)
                nn.init.zeros_(module.bias)
        self.initialize_outside_blocks()
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            assert isinstance(embedding, nn.Embedding | nn.Linear)
            nn.init.normal_(embedding.weight, std=0.02)
        zero(*self.final_layer.adaLN_modulation.parameters(), *self.final_layer.linear.parameters())
        for block in self.blocks:
            zero(*block.adaLN_modulation.parameters())

    def initialize_outside_blocks(self) -> None:
        self.pos_embed.data.copy_(position_embedding(self.backbone.hidden_size, self.backbone.grid))
        # The patch embedding is a Linear on flattened patches in all but name.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.backbone.hidden_size, -1))
        zero(self.x_embedder.proj.bias)


def zero(*parameters: Tensor | None) -> None:
    """Sets parameters to zero."""
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)
