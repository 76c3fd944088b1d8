"""DyDiT (arXiv 2410.03456): width by timestep, tokens by content.

In every block two routers read the timestep: which attention heads and which channel groups of the MLP are on. A third reads
each token: whether it takes the MLP or passes it by. Training multiplies by masks, one decision for each sample. Sampling runs
only what is on: all samples of a step share the timestep, so weights are sliced, and tokens of the whole batch gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.dit import DiT, Draws
from models.dynamic_block import DynamicBlock, Masks, decide
from models.layers import Condition, ModulatedBlock, Plan
from models.slices import Snapshot
from models.token_density import TIMESTEPS
from models.weights import DenseRules, Rows
from models.work import DECISIONS, CountedWork
from runtime.config import InputError, option
from runtime.seeding import Keys, uniform

WIDTH_BIAS, TOKEN_BIAS = 15.0, 35.0
"""Of the routers at the start: everything is on."""
HELD_STEPS = 100
"""First steps of a training, in which the target is exactly 1."""

MASKED, COMPLETE = Plan(("masked",)), Plan(("complete",))
WITH_COMPLETE = Plan(("masked", "complete"))
"""Every sample decides for itself; everything is on; both, one after the other."""

NEW = (".attn_rate.", ".mlp_rate.", ".token_selection.")
"""What a block has beside DiT's parameters."""


@dataclass(frozen=True)
class DyDiTOptions:
    flops_target: float = option(0.5, "share of the attention's and MLP's operations that training leaves on, in the mean")
    target_warmup: int = option(1000, "steps in which the target falls from 1")
    complete_steps: int | None = option(
        30_000, "steps in which the network with everything on is trained too, in a second pass; none: all"
    )


class DyDiT(DiT):
    """DyDiT on any DiT backbone. A plan names what is on in each layer at its timestep; tokens choose while it runs."""

    options_type: ClassVar[type] = DyDiTOptions
    released_layout: ClassVar[str] = "released DyDiT"
    training_options: ClassVar[frozenset[str]] = frozenset(field.name for field in fields(DyDiTOptions))
    recipe: ClassVar[Mapping[str, Any]] = {"max_steps": 200_000, "timestep_strata": 4, "skip_gradient_norm": 200.0}
    blocks: Sequence[DynamicBlock]
    work: CountedWork

    def __init__(self, backbone: Backbone, options: DyDiTOptions | None = None) -> None:
        super().__init__(backbone, options)
        everything = tuple(range(backbone.num_heads))
        self.everything = Plan(("sliced",), selection=((everything, everything),) * backbone.depth)
        self._planned = Snapshot(()), list[Plan]()
        self.work = CountedWork(backbone.depth)

    @classmethod
    def resolve(cls, options: DyDiTOptions, backbone: Backbone) -> DyDiTOptions:
        if backbone.num_heads < 2:
            raise InputError("a network of one head has none to switch off; --method dydit needs a --model of two or more.")
        if int(backbone.hidden_size * backbone.mlp_ratio) % backbone.num_heads:
            raise InputError(f"the MLP's channels do not fall into {backbone.num_heads} equal groups; choose another --model.")
        if not 0 < options.flops_target <= 1:
            raise InputError(f"--flops-target is {options.flops_target}; it must be above 0 and at most 1.")
        least = least_ratio(backbone)
        if options.flops_target < least:
            raise InputError(
                f"--flops-target is {options.flops_target}; one of {backbone.num_heads} heads in every layer is always on, "
                f"which is {least:.3f} already: give more than that, or a --model of more heads."
            )
        for name in ("target_warmup", "complete_steps"):
            value = getattr(options, name)
            if value is not None and value < 0:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 0.")
        return options

    def build_blocks(self) -> Iterator[ModulatedBlock]:
        for _ in range(self.backbone.depth):
            yield DynamicBlock(self.backbone.hidden_size, self.backbone.num_heads, self.backbone.mlp_ratio)

    def initialize_weights(self, linear_gain: float = 1.0) -> None:
        """Routers say "on" whatever they see: a bias alone, so that the network equals the DiT whose weights it is given."""
        super().initialize_weights(linear_gain)
        for block in self.blocks:
            routers = (block.attn_rate.router, WIDTH_BIAS), (block.mlp_rate.router, WIDTH_BIAS)
            for router, bias in (*routers, (block.token_selection.mlp_head[2], TOKEN_BIAS)):
                assert isinstance(router, nn.Linear)
                nn.init.zeros_(router.weight)
                nn.init.constant_(router.bias, bias)

    @property
    def flops_target(self) -> float:
        return self.options.flops_target

    # Plans -----------------------------------------------------------------------------------------------------------

    def plan(self, t: int) -> Plan:
        """What is on at timestep t by the routers' weights of this moment; on the meta device, without weights, everything."""
        if self.final_layer.linear.weight.is_meta:
            return replace(self.everything, timestep=t)
        first, _, second = self.t_embedder.mlp
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        routers = [router for block in self.blocks for router in (block.attn_rate.router, block.mlp_rate.router)]
        weights = [weight for layer in (first, second, *routers) for weight in (layer.weight, layer.bias)]
        snapshot, plans = self._planned
        if not snapshot.holds(weights):
            self._planned = Snapshot(weights), (plans := self._plans(first, second, routers))
        return plans[t]

    def _plans(self, first: nn.Linear, second: nn.Linear, routers: Sequence[nn.Linear]) -> list[Plan]:
        """The plans of all timesteps, in float64 on the CPU: the same wherever and in whatever precision the network runs."""
        times = self.embedded_time(torch.arange(TIMESTEPS))
        embedded = F.silu(exact(first, self.t_embedder.sinusoids(times).double()))  # (1000, D)
        embedded = exact(second, embedded)  # (1000, D)
        always = torch.ones(TIMESTEPS, 1, dtype=torch.bool)
        logits = [exact(router, embedded) for router in routers]  # each (1000, groups - 1)
        self._check_routers(logits)
        on = [torch.cat((always, one > 0), dim=1).tolist() for one in logits]  # each (1000, groups)
        plans, known = [], dict[Any, Any]()
        for t in range(TIMESTEPS):
            sets = [tuple(group for group, there in enumerate(layer[t]) if there) for layer in on]
            selection = tuple(zip(sets[::2], sets[1::2], strict=True))
            plans.append(Plan(("sliced",), selection=known.setdefault(selection, selection), timestep=t))
        return plans

    def _check_routers(self, logits: Sequence[Tensor]) -> None:
        """InputError where a router's weights are not finite: it would say "off" and leave no trace in the pictures."""
        heads = [layer for block in self.blocks for layer in block.token_selection.mlp_head if isinstance(layer, nn.Linear)]
        tokens = [weight.detach() for layer in heads for weight in (plain_weight(layer), layer.bias)]
        if not all(bool(values.isfinite().all()) for values in (*logits, *tokens)):
            raise InputError("the routers' weights hold numbers that are not finite; give another checkpoint.")

    def training_plans(self, step: int = 0) -> Sequence[tuple[range, Plan]]:
        complete = self.options.complete_steps
        return [(range(TIMESTEPS), WITH_COMPLETE if complete is None or step < complete else MASKED)]

    def training_stages(self) -> Sequence[int]:
        return [0] if self.options.complete_steps in (0, None) else [0, self.options.complete_steps]

    def training_lines(self, steps: int | None = None) -> list[str]:
        target, warmup, complete = astuple(self.options)
        whole = self._width_macs(self.everything) / 1e9
        when = f"reached at step {warmup:,}" if warmup else "from the first step"
        lines = [
            f"target {target:g} of attention and MLP, {when}: {target * whole:.4g} of {whole:.4g} GMACs per image and pass"
        ]
        if steps is not None and warmup >= steps:
            lines.append(f"WARNING: this training ends at step {steps:,}, before it reaches its target; lower --target-warmup.")
        if complete != 0:
            until = "throughout" if complete is None else f"until step {complete:,}"
            lines.append(f"two passes a training step {until}: the second one has everything on")
        return lines

    # Passes ----------------------------------------------------------------------------------------------------------

    def run_blocks(
        self, tokens: Tensor, condition: Condition, plan: Plan, draws: Draws | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if plan.signature == ("sliced",):
            return self._run_sliced(tokens, condition, plan), {}
        if plan == COMPLETE:
            for block in self.blocks:
                tokens = block(tokens, None, block.modulation(condition))  # (N, T, D)
            return tokens, {}
        return self._run_masked(tokens, condition, draws)

    def _run_masked(self, tokens: Tensor, condition: Condition, draws: Draws | None) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (N, T, D), decisions (N, layers, heads | groups | T), and the probability of each to be on under noise"""
        found: dict[str, list[Tensor]] = {name: [] for name in (*DECISIONS, *(f"{name} probability" for name in DECISIONS))}
        for layer, block in enumerate(self.blocks):
            noise = {} if draws is None else {name: draws[f"{name} noise"][:, layer] for name in DECISIONS}
            head_logits, channel_logits = block.attn_rate(condition.timestep), block.mlp_rate(condition.timestep)
            heads = always_first(decide(head_logits, noise.get("heads")))  # (N, heads)
            channels = always_first(decide(channel_logits, noise.get("channels")))  # (N, groups)
            masks = Masks(heads, channels, noise.get("tokens"))
            tokens, mask, token_logits = block(tokens, masks, block.modulation(condition))  # (N, T, D)
            likely = always_first(head_logits.sigmoid()), always_first(channel_logits.sigmoid()), token_logits.sigmoid()
            for name, decision, probability in zip(DECISIONS, (heads, channels, mask), likely, strict=True):
                found[name].append(decision.expand(len(tokens), -1))
                found[f"{name} probability"].append(probability.expand(len(tokens), -1))
        return tokens, {name: torch.stack(values, dim=1) for name, values in found.items()}

    def _run_sliced(self, tokens: Tensor, condition: Condition, plan: Plan) -> Tensor:
        images, full, heads_there = *tokens.shape[:2], self.backbone.num_heads
        for layer, (block, (heads, channels)) in enumerate(zip(self.blocks, plan.selection, strict=True)):
            tokens, on = block.gathered(tokens, block.slices(heads, channels), block.modulation(condition))  # (N, T, D)
            macs = images * block.attn.sliced_macs(len(heads), full) + block.mlp.sliced_macs(len(channels), on)
            shares = len(heads) / heads_there, len(channels) / heads_there, on / (images * full)
            self.work.add_layer(layer, plan.timestep, images, dict(zip(DECISIONS, shares, strict=True)), macs)
        self.work.add_pass(plan.timestep, images, images * self._fixed_macs)
        return tokens

    def draw(self, keys: Keys) -> dict[str, Tensor]:
        """Label drop of both passes, and logistic noise, the difference of two Gumbels, for each decision of each layer."""
        depth, free = self.backbone.depth, self.backbone.num_heads - 1
        drawn = super().draw(keys)
        drawn["complete label_drop"] = uniform(keys, "complete label drop") < self.backbone.label_drop
        for name, count in (("heads", free), ("channels", free), ("tokens", self.backbone.tokens)):
            number = uniform(keys, f"{name} noise", (depth, count))  # (N, layers, count)
            drawn[f"{name} noise"] = torch.log(number) - torch.log1p(-number)
        return drawn

    def training_forward(
        self, x: Tensor, t: Tensor, y: Tensor, plan: Plan, draws: Draws
    ) -> tuple[dict[str, tuple[Tensor, float]], dict[str, Tensor]]:
        """The dynamic pass, and where the plan says so the complete one, of the same noised latents with its own label drop."""
        outputs, features = super().training_forward(x, t, y, plan, draws)
        if plan == WITH_COMPLETE:
            complete = self(x, t, y, COMPLETE, {"label_drop": draws["complete label_drop"]})
            outputs["complete"] = (complete, 1.0)
        return outputs, features

    def forget(self) -> None:
        for block in self.blocks:
            for layer in block.sliceable:
                layer.forget()

    # Costs -----------------------------------------------------------------------------------------------------------

    def extra_losses(self, features: Mapping[str, Tensor], step: int | Tensor) -> dict[str, Tensor]:
        """2 (mean ratio - target)^2 of the samples that one process computes at once (section 3.4)."""
        ratio = self.flops_ratio(features).mean()
        return {"flops": 2 * (ratio - self.target_at(step)).square()}

    def measurements(self, features: Mapping[str, Tensor], step: int | Tensor) -> dict[str, Tensor]:
        """FLOPs ratios: the target, what the routers' probabilities let expect, and what the decisions came to; and the share
        of each layer's heads, channels and tokens that was on, (layers,).
        """
        expected = {name: features[f"{name} probability"] for name in DECISIONS}
        return {
            "flops_ratio/target": torch.as_tensor(self.target_at(step)),
            "flops_ratio/expected": self.flops_ratio(expected).mean(),
            "flops_ratio/measured": self.flops_ratio(features).mean(),
            **{f"layers/{name}_kept": features[name].mean(dim=(0, 2)) for name in DECISIONS},
        }

    def flops_ratio(self, decisions: Mapping[str, Tensor]) -> Tensor:
        """The share of attention's and MLP's operations that is on, by the decisions (N, layers, ...). -> (N,)"""
        block, tokens = self.blocks[0], self.backbone.tokens
        heads, channels, kept = (decisions[name] for name in DECISIONS)
        return flops_ratio(heads, channels, kept, block.attn.macs(tokens), block.mlp.macs(tokens))

    def target_at(self, step: int | Tensor) -> float | Tensor:
        """The target ratio of a training step, counted from 0: linear from 1 over the warm-up, and 1 itself at first."""
        warmup, number = self.options.target_warmup, torch.as_tensor(step)
        ramp = 1 - (1 - self.options.flops_target) * ((number + (not warmup)) / max(1, warmup)).clamp(max=1)
        return torch.where(number < min(HELD_STEPS, warmup), torch.ones_like(ramp), ramp)

    def block_macs(self, plan: Plan) -> int:
        tokens = self.backbone.tokens
        if plan.signature != ("sliced",):
            routers = 0 if plan == COMPLETE else sum(block.router_macs(tokens) for block in self.blocks)
            return super().block_macs(plan) + routers
        choosing = sum(block.modulation_macs() + block.token_selection.macs(tokens) for block in self.blocks)
        return choosing + self._width_macs(plan)

    @cached_property
    def _fixed_macs(self) -> int:
        """Of what every sliced pass computes, whatever is on."""
        return self.macs(self.everything) - self._width_macs(self.everything)

    def _width_macs(self, plan: Plan) -> int:
        """Of attention and MLP at the plan's widths, with all tokens on."""
        tokens = self.backbone.tokens
        widths = zip(self.blocks, plan.selection, strict=True)
        return sum(
            block.attn.sliced_macs(len(heads), tokens) + block.mlp.sliced_macs(len(channels), tokens)
            for block, (heads, channels) in widths
        )

    @torch.no_grad()
    def imitate_training(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Heads, channels and tokens are all on at the share at which they come to the target together."""
        attention, mlp = (part.macs(self.backbone.tokens) for part in (self.blocks[0].attn, self.blocks[0].mlp))
        # attention * share + mlp * share^2 = target * (attention + mlp)
        root = math.sqrt(attention**2 + 4 * mlp * self.options.flops_target * (attention + mlp))
        share, groups = (root - attention) / (2 * mlp), self.backbone.num_heads
        timestep = self.t_embedder(self.embedded_time(torch.arange(TIMESTEPS, device=x.device)))  # (1000, D)
        for block in self.blocks:
            for router in (block.attn_rate.router, block.mlp_rate.router):
                assert isinstance(router, nn.Linear)
                nn.init.normal_(router.weight)
                nn.init.zeros_(router.bias)
                off = 1 - max(0.0, (share * groups - 1) / (groups - 1))  # the first is always on
                router.bias.copy_(-router(timestep).quantile(off, dim=0))
        tokens, condition = self.embed(x, t, y)
        for block in self.blocks:
            heads, channels = (
                always_first(decide(rate(condition.timestep), None)) for rate in (block.attn_rate, block.mlp_rate)
            )
            modulation, last = block.modulation(condition), block.token_selection.mlp_head[2]
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight)
            nn.init.zeros_(last.bias)
            logits = block(tokens, Masks(heads, channels, None), modulation)[2]  # (N, T)
            last.bias.copy_(-logits.flatten().quantile(1 - share))
            tokens = block(tokens, Masks(heads, channels, None), modulation)[0]  # (N, T, D)

    # Weights ---------------------------------------------------------------------------------------------------------

    @classmethod
    def recognize(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Mapping[str, Any]] | None:
        return (cls.released_layout, {}) if "blocks.0.attn_rate.router.weight" in shapes else None

    def dense_rules(self) -> DenseRules:
        """DiT's own parameters from DiT; the routers have no source."""
        new = frozenset(key for key in self.state_dict() if any(part in key for part in NEW))
        return DenseRules({key: Rows(key) for key in self.state_dict() if key not in new}, new)


def always_first(rest: Tensor) -> Tensor:
    """(N, groups - 1) -> (N, groups), the first 1"""
    return F.pad(rest, (1, 0), value=1.0)


def flops_ratio(heads: Tensor, channels: Tensor, tokens: Tensor, attention: float, mlp: float) -> Tensor:
    """The share of operations that is on (section 3.4), where a layer's attention and MLP cost `attention` and `mlp` whole.

    heads (N, layers, heads), channels (N, layers, groups), tokens (N, layers, T), each 0 to 1 -> (N,)
    """
    on = attention * heads.mean(2) + mlp * channels.mean(2) * tokens.mean(2)  # (N, layers)
    return on.mean(1) / (attention + mlp)


def least_ratio(backbone: Backbone) -> float:
    """The FLOPs ratio with one head on, and no token."""
    with torch.device("meta"):
        block = DynamicBlock(backbone.hidden_size, backbone.num_heads, backbone.mlp_ratio)
    attention, mlp = block.attn.macs(backbone.tokens), block.mlp.macs(backbone.tokens)
    return attention / backbone.num_heads / (attention + mlp)


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    """A Linear in float64 on the CPU, whatever its weights are laid out for. x (..., inputs) -> (..., outputs)"""
    return F.linear(x, plain_weight(layer).detach().cpu().double(), layer.bias.detach().cpu().double())


def plain_weight(layer: nn.Linear) -> Tensor:
    """The weight (outputs, inputs) of a Linear, packed or not."""
    return layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight
