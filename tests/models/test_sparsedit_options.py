"""What may be chosen of a SparseDiT, and what of older files is still understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import Backbone, SparseDiT, create_model
from models.sparsedit import DEFAULT_SPLITS, SparseDiTOptions
from models.token_density import TokenDensity
from runtime.config import ArgumentParser, InputError, checked_values, from_mapping, to_mapping
from tests.models.random_networks import tiny


@pytest.mark.parametrize("depth", DEFAULT_SPLITS)
def test_default_splits_fill_the_depth(depth: int) -> None:
    backbone = Backbone.named(f"DiT-32x{depth}x2/2", (32, 32))
    with torch.device("meta"):
        model = SparseDiT(backbone)
    assert len(model.blocks) == depth
    assert model.density == TokenDensity.fixed((8, 8))
    assert model.options == SparseDiTOptions(*DEFAULT_SPLITS[depth], "8", False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_blocks": 2}, ["1 + 1 x (1+3+1+1) + 2 = 9", "the backbone has 8", "top_blocks"]),
        ({"modules": 2}, ["1 + 2 x (1+3+1+1) + 1 = 14", "modules"]),
        ({"density": "9"}, ["sparse grid 9x9", "8x8"]),
        ({"density": "4x9"}, ["sparse grid 4x9", "8x8"]),
        ({"density": "8,9,4@0,10,20"}, ["sparse grid 9x9", "8x8"]),
        ({"density": "0x4"}, ["token density 0x4", "at least 1 row"]),
        ({"density": "4x4x4"}, ["token density '4x4x4' is not understood"]),
        ({"density": ""}, ["token density '' is not understood"]),
        ({"density": True}, ["density must be text, not True"]),
        ({"sparse_grid": (9,)}, ["sparse grid 9x9", "8x8"]),
        ({"sparse_grid": (4, 4, 4)}, ["token density '4x4x4' is not understood"]),
        ({"sparse_grid": "a"}, ["token density 'a' is not understood"]),
        ({"sparse_grid": 8, "density": "8"}, ["sparse_grid is the older name of density", "keep one"]),
        ({"sparse_grid": 8, "sparse-grid": 4}, ["sparse_grid is the older name of density", "keep one"]),
        ({"module_blocks": (1, 3, 1)}, ["module_blocks is 1,3,1", "four counts"]),
        ({"module_blocks": (1, 3, 1, 1, 0)}, ["module_blocks is 1,3,1,1,0", "four counts"]),
        ({"module_blocks": (0, 4, 1, 1)}, ["module_blocks is 0,4,1,1", "one merge"]),
        ({"module_blocks": (1, 4, 0, 1)}, ["module_blocks is 1,4,0,1", "one recover"]),
        ({"module_blocks": (1, -1, 1, 1)}, ["module_blocks is 1,-1,1,1", "negative"]),
        ({"poolingformer_blocks": -1}, ["poolingformer_blocks is -1"]),
        ({"modules": -1}, ["modules is -1"]),
        ({"top_blocks": -1}, ["top_blocks is -1"]),
    ],
    ids=str,
)
def test_impossible_splits_are_refused_in_one_sentence(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        create_model("sparsedit", tiny(), options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_a_depth_without_default_split_asks_for_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"depth 7 has no default split \(8, 12, 24, 28 have\); give modules, top_blocks"):
        create_model("sparsedit", tiny("DiT-48x7x4/2"), {"poolingformer_blocks": 1, "module_blocks": (1, 3, 1, 1)})


# Token density -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "density"),
    [
        ({"sparse_grid": (3, 5)}, "3x5"),
        ({"sparse_grid": [4, 4]}, "4"),
        ({"sparse_grid": [4]}, "4"),
        ({"sparse-grid": "8x4"}, "8x4"),
        ({"sparse_grid": "8,4"}, "8x4"),
        ({"sparse_grid": 8}, "8"),
        ({"sparse_grid": "4"}, "4"),
        ({"sparse_grid": None}, "4"),
        ({"sparse_grid": "none"}, "4"),
        ({"sparse_grid": "8,4@0,500"}, "8,4@0,500"),
        ({"density": 8}, "8"),
        ({"density": "08 , 6x6 @ 0 , 500"}, "8,6@0,500"),
        ({"density": "0.61:0.86/4"}, "5,4,4,3@0,250,500,750"),
        ({}, "4"),
    ],
    ids=str,
)
def test_a_density_is_kept_as_written_out_grids_and_older_files_are_read(given: dict[str, Any], density: str) -> None:
    """The map is 8 x 8, half of which is the default."""
    model = create_model("sparsedit", tiny(), given)
    assert model.options.density == density
    assert model.density == TokenDensity.parse(density, (8, 8))
    again = create_model("sparsedit", tiny(), to_mapping(model.options))
    assert (again.options, again.density) == (model.options, model.density)


def test_older_options_are_only_translated() -> None:
    """Nothing else of the mapping changes, and the one that is given stays as it is."""
    given = {"sparse-grid": [8, 8], "top-blocks": "3"}
    assert checked_values(SparseDiTOptions, given, "here") == {"density": "8x8", "top_blocks": 3}
    assert given == {"sparse-grid": [8, 8], "top-blocks": "3"}


@pytest.mark.parametrize("flag", ["--density", "--sparse-grid", "--sparse_grid"])
@pytest.mark.parametrize("value", ["8", "8x6", "0.61:0.86/4", "10,9,8,6@0,250,500,750"])
def test_both_flags_take_every_form(flag: str, value: str) -> None:
    parser = ArgumentParser("", "train.py")
    parser.add_config(SparseDiTOptions)
    for words in ([flag, value], [f"{flag}={value}"]):
        options = from_mapping(SparseDiTOptions, vars(parser.parse_args(words)), "command line")
        assert options == SparseDiTOptions(density=value)


def test_rates_follow_the_map_and_grids_do_not() -> None:
    """The same rates are other grids on another map."""
    for side, density in ((16, "10,9,8,6@0,250,500,750"), (32, "20,18,15,12@0,250,500,750")):
        backbone = tiny(latent_size=(2 * side, 2 * side))
        assert create_model("sparsedit", backbone, {"density": "0.61:0.86/4"}).options.density == density
        assert create_model("sparsedit", backbone, {"density": "6"}).options.density == "6"
