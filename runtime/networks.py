"""Networks to and from the JSON of checkpoints, weights into networks, and what is printed about them.

A blueprint is a network on the meta device: shapes without storage, enough to check options and checkpoints before
anything large is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models import METHODS, Backbone, DiT, create_model
from models.backbone import SIT, ObjectiveName, default_objective, default_time_scale
from models.token_density import TIMESTEPS
from models.weights import (
    LABEL_TABLE,
    LoadingPlan,
    from_diffusers,
    from_sit,
    has_variance,
    identify,
    is_whole_sit,
    load,
    plan_loading,
    strip_prefixes,
    without_variance,
)
from runtime.checkpoint import Weights
from runtime.config import InputError, to_mapping


def blueprint(method: str, backbone: Backbone, options: Mapping[str, Any]) -> DiT:
    """The network without storage. InputError where the options do not fit the backbone."""
    with torch.device("meta"):
        return create_model(method, backbone, options)


def build(plan: DiT) -> DiT:
    """The network of a blueprint, initialised from torch's global seed."""
    return type(plan)(plan.backbone, plan.options)


def describe(network: DiT, model: str) -> dict[str, Any]:
    """Everything needed to build the network again: fit for JSON, taken back by `described`."""
    backbone, options = to_mapping(network.backbone), to_mapping(network.options)
    return {"model": model, "method": method_name(network), "backbone": backbone, "options": options}


def described(description: Mapping[str, Any]) -> DiT:
    """The blueprint of what `describe` described."""
    backbone = {**description["backbone"], "latent_size": tuple(description["backbone"]["latent_size"])}
    return blueprint(description["method"], Backbone(**backbone), description["options"])


def with_density(plan: DiT, density: str) -> DiT:
    """The blueprint with another token density: weights do not depend on it. InputError where the method has none."""
    if not hasattr(plan.options, "density"):
        raise InputError(f"--density {density}: a network of --method {method_name(plan)} has no token density to choose; "
                         "leave the flag out, or give a checkpoint of another method.")  # fmt: skip
    with torch.device("meta"):
        return type(plan)(plan.backbone, replace(plan.options, density=density))


def method_name(network: DiT) -> str:
    """The name of a network's method in the registry."""
    return next(name for name, kind in METHODS.items() if type(network) is kind)


def fit_weights(weights: Weights, plan: DiT) -> tuple[dict[str, Tensor], LoadingPlan]:
    """A checkpoint's tensors under canonical names, and how they go into the network of a blueprint.

    Raises InputError, naming the checkpoint, when they do not fit.
    """
    try:
        state, notes = canonical(weights), list[str]()
        _check_heads(weights, plan)
        _check_variance(_shapes(state), plan)
        if not plan.backbone.learn_sigma and has_variance(_shapes(state)):
            state, notes = without_variance(state), ["the variance outputs are left out"]
        loading = plan_loading(plan, _shapes(state), METHODS)
        return state, replace(loading, notes=(*loading.notes, *notes))
    except InputError as error:
        raise InputError(f"{weights.origin}: {error}") from None


def _check_heads(weights: Weights, plan: DiT) -> None:
    """Heads leave no trace in the shapes; our header knows them."""
    network = (weights.header or {}).get("network", {})
    heads = network.get("backbone", {}).get("num_heads", plan.backbone.num_heads)
    if heads != plan.backbone.num_heads:
        raise InputError(f"the checkpoint's attention has {heads} heads and --model asks for {plan.backbone.num_heads}; give "
                         f"the checkpoint's --model {network.get('model', '')}.")  # fmt: skip


def _check_variance(shapes: Mapping[str, tuple[int, ...]], plan: DiT) -> None:
    """A network that learns the variance cannot start without: zeros would be a variance too, and a wrong one."""
    patches, outputs = shapes.get("x_embedder.proj.weight", (0,)), shapes.get("final_layer.linear.weight", (0,))[0]
    if plan.backbone.learn_sigma and outputs and outputs == math.prod(patches[1:]):
        raise InputError("the weights predict no variance, as those trained under --objective flow; give that objective (for a "
                         "SiT its --model SiT-...), or for ddpm --no-learn-sigma.")  # fmt: skip


def as_ours(weights: Weights, model: str, time_scale: float | None = None) -> Weights:
    """Released weights in our conventions: a SiT, as which `model` names them, with time and velocity reversed.

    Files of ours, and what has other methods' keys or lacks some, come back unchanged. InputError for a `time_scale` that SiT
    has not.
    """
    if weights.header is not None or not model.startswith(SIT):
        return weights
    state = canonical(weights)
    shapes = _shapes(state)
    if identify(shapes, METHODS)[0] != next(iter(METHODS)) or not is_whole_sit(shapes):
        return weights
    if time_scale not in (None, 1.0):
        raise InputError(f"{weights.origin}: SiT embeds the flow time itself; leave out --time-scale {time_scale:g}.")
    converted = "SiT: time and velocity reversed, variance outputs left out"
    return replace(weights, state=from_sit(state), origin=f"{weights.origin} ({converted})")


def published_time_scale(model: str, method: str) -> float:
    """What networks of a backbone and a method embed at full noise, where nothing else is said."""
    scale = METHODS[method].released_time_scale
    return default_time_scale(model) if scale is None else scale


def published_objective(model: str, method: str) -> ObjectiveName:
    """What networks of a backbone and a method are trained under, where nothing else is said."""
    return METHODS[method].released_objective or default_objective(model)


def build_with(plan: DiT, weights: Weights) -> tuple[DiT, LoadingPlan]:
    """The network of a blueprint with a checkpoint's weights."""
    state, loading = fit_weights(weights, plan)
    network = build(plan)
    load(network, state, loading)
    return network, loading


def canonical(weights: Weights) -> dict[str, Tensor]:
    """The weights under DiT's or the method's names, without the prefixes of wrappers."""
    return from_diffusers(strip_prefixes(weights.state))


def recognized(
    weights: Weights,
    model: str,
    latent_size: tuple[int, int],
    objective: ObjectiveName | None = None,
    time_scale: float | None = None,
) -> DiT:
    """The blueprint of a checkpoint without our header: the backbone is `model`, the rest is told by keys and shapes.

    Neither tells `objective` and `time_scale`; None: those of published networks.
    """
    shapes = _shapes(canonical(weights))
    try:
        method, _, options = identify(shapes, METHODS)
        inputs = math.prod(shapes["x_embedder.proj.weight"][1:])  # of a patch
        objective = objective or published_objective(model, method)
        places = patch_size(shapes, model, latent_size) ** 2
        if inputs % places:
            raise InputError(f"its patches of {inputs} numbers are none of --model {model}, which have {places} places; give "
                             "the backbone it was trained with.")  # fmt: skip
        backbone = Backbone.named(
            model,
            latent_size,
            in_channels=inputs // places,
            num_classes=shapes[LABEL_TABLE][0] - 1,
            learn_sigma=objective == "ddpm" and shapes["final_layer.linear.weight"][0] == 2 * inputs,
            objective=objective,
            time_scale=published_time_scale(model, method) if time_scale is None else time_scale,
        )
    except InputError as error:
        raise InputError(f"{weights.origin}: {error}") from None
    except KeyError as error:
        raise InputError(f"{weights.origin}: {error} is missing, so this is no whole DiT; copy the checkpoint again.") from None
    try:
        return blueprint(method, backbone, options)
    except InputError as error:
        hint = f"does not fit --model {model}, give the backbone it was trained with"
        raise InputError(f"{weights.origin} {hint}: {error}") from None


def patch_size(shapes: Mapping[str, tuple[int, ...]], model: str, latent_size: tuple[int, int]) -> int:
    """The side of the patches that a checkpoint embeds; where its weights are of flattened ones, that of `model`."""
    patches = shapes["x_embedder.proj.weight"]
    return patches[2] if len(patches) == 4 else Backbone.named(model, latent_size).patch_size


def dense_blueprint(network: DiT) -> DiT:
    """The dense network on the same backbone, which costs are compared with."""
    return blueprint(next(iter(METHODS)), network.backbone, {})


def mean_gmacs(network: DiT, timesteps: Sequence[int] = range(TIMESTEPS)) -> float:
    """Billions of multiply-accumulates of one image and pass, the mean over the steps at the original `timesteps`."""
    return network.mean_macs(timesteps) / 1e9


def summary(network: DiT, model: str) -> str:
    """One line: method, backbone, parameters, and multiply-accumulates against the dense backbone."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    gmacs, dense = mean_gmacs(network), mean_gmacs(dense_blueprint(network))
    mean = ", the mean over timesteps" if network.plan_varies else ""
    most = "" if network.work is None else "at most "
    options = ", ".join(f"{name} {_short(value)}" for name, value in to_mapping(network.options).items() if value is not False)
    named = model if network.backbone.objective == "ddpm" else f"{model} under {network.backbone.objective}"
    return (
        f"{method_name(network)} {named}, {parameters:,} parameters, {most}{gmacs:.4g} GMACs per image and pass{mean} "
        f"({gmacs / dense:.1%} of the dense backbone's {dense:.4g})" + (f"; {options}" if options else "")
    )


def guidance_line(network: DiT) -> list[str]:
    """What path-drop guidance saves; nothing where there is no cheap path."""
    plan, cheap = network.plan(0), network.cheap_plan(0)
    if cheap is None:
        return []
    whole, part = network.macs(plan), network.macs(cheap)
    return [
        f"path-drop guidance: {part / 1e9:.4g} GMACs for the unconditional half, a guided step "
        f"{(whole + part) / (2 * whole):.1%} of one with classifier-free guidance"
    ]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
