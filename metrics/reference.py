"""Reference batches: what their ready-made statistics are of, and how to write one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from metrics.evidence import evenly_spaced
from metrics.features import Features
from metrics.networks.adm import ADM_NAME
from metrics.pictures import PictureBatch
from runtime.config import InputError
from runtime.files import stream_npz


def usable_statistics(batch: PictureBatch, network: Mapping[str, str] | None, trusted: bool) -> tuple[PictureBatch, list[str]]:
    """`batch` without statistics that are of another network than `network` (a `networks.description`), and warnings.

    A file that does not say which network made its `mu` and `sigma` is taken to be one of ADM's, because ADM's own do not say
    so; `trusted` takes it to be of `network`, whichever that is. Raises InputError where statistics of another network are
    all there is.
    """
    if network is None or (batch.pool is None and batch.spatial is None):
        return batch, []
    made_by = batch.network
    if made_by is None:
        if trusted or network["name"] == ADM_NAME:
            # ADM's files hold both pairs; those of pytorch-fid and others hold one.
            doubtful = not trusted and (batch.pool is None or batch.spatial is None)
            return batch, [f"{batch.path.name} does not say which network made its statistics; they were taken to be of "
                           f"{ADM_NAME}."] * doubtful  # fmt: skip
        maker = "a network that the file does not name"
    else:
        maker = f"{made_by.get('name')} (SHA-256 {made_by.get('sha256')})"
        if _same(made_by, network):
            differ = made_by.get("backend") != network["backend"]
            return batch, [f"{batch.path.name}: its statistics were computed by {made_by.get('backend')}, the other side's by "
                           f"{network['backend']}."] * differ  # fmt: skip
    if batch.pictures is None:
        remedy = "evaluate with that network" if made_by else "add --trust-statistics if you know that it was this one"
        raise InputError(f"{batch.path} holds nothing but statistics of {maker}, which do not compare with {network['name']} "
                         f"(SHA-256 {network['sha256']}); give a batch with pictures, or {remedy}.")  # fmt: skip
    note = f"{batch.path.name}: its mu and sigma are of {maker}, so the statistics were computed anew from the pictures."
    return replace(batch, pool=None, spatial=None), [note]


def common_network(reference: PictureBatch, samples: PictureBatch) -> Mapping[str, str] | None:
    """The network that two batches of statistics alone are of; None where neither says so. InputError where they differ."""
    named = [batch.network for batch in (reference, samples) if batch.network is not None]
    unnamed_is_adms = len(named) < 2 and all(network.get("name") == ADM_NAME for network in named)
    if not unnamed_is_adms and not (len(named) == 2 and _same(*named)):
        names = [
            f"{batch.path}: {batch.network.get('name')}, SHA-256 {batch.network.get('sha256')}" if batch.network
            else f"{batch.path} does not say" for batch in (reference, samples)
        ]  # fmt: skip
        raise InputError(f"the two batches hold statistics of different networks ({'; '.join(names)}); compare batches of one.")
    return named[0] if named else None


def _same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether numbers of two networks (`networks.description`) compare."""
    return all(one.get(key) == other.get(key) for key in ("name", "protocol", "sha256"))


def write_reference(path: Path, batch: PictureBatch, features: Features, network: Mapping[str, str], keep: int) -> int:
    """Writes `mu, sigma` and, where the network has spatial features, `mu_s, sigma_s`, with `count` and `network` to say of
    what; and `keep` of the pictures, evenly spaced, with their classes. -> how many were kept

    Precision, recall and the other scores of single pictures need pictures in the reference: ADM's keep 10,000.
    """
    assert batch.pictures is not None
    assert features.pool_statistics is not None
    kept = evenly_spaced(batch.pictures.count, keep)
    small: dict[str, NDArray[Any]] = {"mu": features.pool_statistics.mean, "sigma": features.pool_statistics.covariance}
    if features.spatial_statistics is not None:
        small |= {"mu_s": features.spatial_statistics.mean, "sigma_s": features.spatial_statistics.covariance}
    small |= {"count": np.asarray(batch.pictures.count), "network": np.asarray(json.dumps(dict(network)))}
    if batch.labels is not None and len(kept):
        small["arr_1"] = batch.labels[kept]
    shape = (len(kept), batch.pictures.height, batch.pictures.width, 3)
    ranges = [(index, index + 1) for index in kept.tolist()]
    pictures = tqdm(batch.pictures.pieces(ranges), "pictures", len(kept), unit=" pictures", dynamic_ncols=True)
    stream_npz(path, shape, (picture.tobytes() for picture in pictures), small)
    return len(kept)
