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
from metrics.pictures import PictureBatch
from runtime.config import InputError
from runtime.files import stream_npz


def usable_statistics(batch: PictureBatch, network: Mapping[str, str] | None) -> tuple[PictureBatch, list[str]]:
    """`batch` without statistics that are of another network than `network` (a `networks.description`), and notes about that.

    A file that does not say which network made its `mu` and `sigma` is taken to be one of ADM's, as all published ones are.
    Raises InputError where statistics of another network are all there is.
    """
    if network is None or (batch.pool is None and batch.spatial is None):
        return batch, []
    if batch.network is None:
        made_by, same = "ADM's Inception (the file does not say so, but published ones are)", network["name"].startswith("ADM ")
    else:
        made_by = f"{batch.network.get('name')} (SHA-256 {batch.network.get('sha256')})"
        same = all(batch.network.get(key) == network[key] for key in ("name", "protocol", "sha256"))
    if same:
        return batch, []
    if batch.pictures is None:
        raise InputError(f"{batch.path} holds statistics of {made_by} alone, which do not compare with {network['name']} "
                         f"(SHA-256 {network['sha256']}); give a reference with pictures, or the same network.")  # fmt: skip
    note = f"{batch.path.name}: mu and sigma are of {made_by}, so the statistics were computed anew from the pictures."
    return replace(batch, pool=None, spatial=None), [note]


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
