"""Configuration: what a YAML file and flags may say, and the one sentence for what they may not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.config import (
    ArgumentParser,
    InputError,
    checked_values,
    from_mapping,
    load_yaml,
    nearest,
    option,
    to_mapping,
)


@dataclass(frozen=True)
class Inner:
    depth: int = 3


@dataclass(frozen=True)
class Example:
    """A field of every kind that the codebase uses."""

    learning_rate: float = option(1e-4, "a rate, 10% of it", flags=("--lr",))
    max_steps: int | None = option(None, "a count")
    name: str = option("run", "a text")
    folder: str | None = option(None, "a text or none")
    use_ema: bool = option(True, "a switch")
    schedule: Literal["constant", "cosine"] = option("constant", "a choice")
    blocks: tuple[int, ...] = option((1, 3, 1, 1), "a list")
    grid: tuple[int, ...] | None = option(None, "a list or none")
    bounds: tuple[float, float] | None = option(None, "two numbers or none", words=("LOW", "HIGH"))
    extra: dict = field(default_factory=dict)


def sentence(call: Callable[[], Any]) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?)"
    assert not re.search(r"[?.]\.|\s\.", message), f"stray punctuation: {message}"
    return message


# Values --------------------------------------------------------------------------------------------------------------

ACCEPTED: list[tuple[str, Any, Any]] = [
    ("learning_rate", "2e-4", 2e-4),
    ("learning_rate", 1, 1.0),
    ("learning_rate", "-.5", -0.5),
    ("max_steps", "100", 100),
    ("max_steps", None, None),
    ("max_steps", "none", None),
    ("max_steps", "None", None),
    ("name", "none", "none"),
    ("name", 123, "123"),
    ("name", 1e-3, "0.001"),
    ("folder", "none", None),
    ("folder", "a-b_c", "a-b_c"),
    ("use_ema", False, False),
    ("use_ema", "false", False),
    ("use_ema", "True", True),
    ("schedule", "cosine", "cosine"),
    ("blocks", "1,3,1,1", (1, 3, 1, 1)),
    ("blocks", "16x8", (16, 8)),
    ("blocks", "7", (7,)),
    ("blocks", 7, (7,)),
    ("blocks", [1, "2"], (1, 2)),
    ("blocks", (1, 2), (1, 2)),
    ("grid", "none", None),
    ("grid", "8x8", (8, 8)),
    ("bounds", ["0.2", 0.8], (0.2, 0.8)),
    ("bounds", (0, 1), (0.0, 1.0)),
    ("bounds", "0.2,0.8", (0.2, 0.8)),
    ("bounds", "none", None),
    ("extra", {"a": [1]}, {"a": [1]}),
]

REFUSED: list[tuple[str, Any, str]] = [
    ("learning_rate", "fast", "a number, not 'fast'"),
    ("learning_rate", True, "a number, not True"),
    ("learning_rate", None, "a number, not None"),
    ("learning_rate", [1], "a number, not [1]"),
    ("learning_rate", 10**400, "a number"),
    ("max_steps", 1.5, "a whole number, not 1.5"),
    ("max_steps", "1.5", "a whole number, not '1.5'"),
    ("max_steps", 1.0, "a whole number, not 1.0"),
    ("max_steps", True, "a whole number, not True"),
    ("max_steps", "", "a whole number, not ''"),
    ("name", ["a"], "text, not ['a']"),
    ("name", {"a": 1}, "text, not {'a': 1}"),
    ("name", True, "text, not True"),
    ("name", None, "text, not None"),
    ("use_ema", 1, "true or false, not 1"),
    ("use_ema", "maybe", "true or false, not 'maybe'"),
    ("use_ema", None, "true or false, not None"),
    ("schedule", "cosinus", "choose from constant, cosine; did you mean 'cosine'?"),
    ("schedule", 7, "choose from constant, cosine"),
    ("schedule", None, "choose from constant, cosine"),
    ("schedule", ["cosine"], "choose from constant, cosine"),
    ("blocks", "a,b", "a whole number, not 'a'"),
    ("blocks", "1,,2", "a whole number, not ''"),
    ("blocks", 1.5, "a list such as 1,3,1,1, not 1.5"),
    ("blocks", None, "a list"),
    ("blocks", {"a": 1}, "a list"),
    ("blocks", [1.5], "a whole number, not 1.5"),
    ("blocks", [[1]], "a whole number, not [1]"),
    ("grid", True, "not True"),
    ("bounds", [0.5], "takes 2 values, not 1"),
    ("bounds", [0, 0.5, 1], "takes 2 values, not 3"),
    ("bounds", ["low", "high"], "a number, not 'low'"),
    ("bounds", 0.5, "a list such as"),
    ("extra", [1], "a group of `key: value` lines, not [1]"),
]


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED, ids=[f"{name} {value!r}" for name, value, _ in ACCEPTED])
def test_accepted_values(name: str, value: Any, expected: Any) -> None:
    result = getattr(from_mapping(Example, {name: value}, "here"), name)
    assert (result, type(result)) == (expected, type(expected))


@pytest.mark.parametrize(("name", "value", "words"), REFUSED, ids=[f"{name} {value!s:.20}" for name, value, _ in REFUSED])
def test_refused_values(name: str, value: Any, words: str) -> None:
    message = sentence(lambda: from_mapping(Example, {name: value}, "here"))
    assert message.startswith(f"here: {name} ")
    assert words in message


@pytest.mark.parametrize("key", ["learning_rat", "learning-rat", "Learning_Rate", "learningrate"])
def test_an_unknown_key_names_the_nearest(key: str) -> None:
    message = sentence(lambda: from_mapping(Example, {key: 1}, "file.yaml"))
    assert message == f"file.yaml: unknown key {key!r}; did you mean 'learning_rate'?"


def test_an_unknown_key_like_none_lists_all() -> None:
    message = sentence(lambda: from_mapping(Example, {"qqq": 1}, "file.yaml"))
    assert message == f"file.yaml: unknown key 'qqq'; choose from {', '.join(f.name for f in fields(Example))}."
    assert "12" in sentence(lambda: from_mapping(Example, yaml.safe_load("12: 1"), "file.yaml"))


def test_an_unknown_key_where_none_is_known() -> None:
    @dataclass(frozen=True)
    class Empty:
        pass

    assert "choose from" not in sentence(lambda: from_mapping(Empty, {"density": 8}, "method dense"))


def test_dashes_are_underscores() -> None:
    assert from_mapping(Example, {"learning-rate": 1, "max-steps": 2}, "") == Example(learning_rate=1.0, max_steps=2)


def test_checked_values_holds_what_was_given_and_no_default() -> None:
    assert checked_values(Example, {"use-ema": "false"}, "") == {"use_ema": False}


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Example().name = "other"  # type: ignore[misc]


def test_nearest_prefers_the_close_word() -> None:
    assert nearest("sparsdit", ["dense", "sparsedit"]) == "; did you mean 'sparsedit'?"
    assert nearest("zzz", ["dense", "sparsedit"]) == "; choose from dense, sparsedit."


# Round trips ---------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-(2**53), 2**53)
# argparse up to Python 3.12 drops a value that is "--" alone, even behind an equals sign.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda word: word != "--")
lists = st.lists(whole, max_size=4).map(tuple)
examples = st.builds(
    Example,
    learning_rate=finite,
    max_steps=st.none() | whole,
    name=text,
    folder=st.none() | text.filter(lambda value: value.lower() != "none"),
    use_ema=st.booleans(),
    schedule=st.sampled_from(["constant", "cosine"]),
    blocks=lists,
    grid=st.none() | lists,
    bounds=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
    extra=st.dictionaries(text, whole | text, max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(example=examples)
def test_mappings_json_and_yaml_are_read_back(example: Example) -> None:
    mapping = to_mapping(example)
    assert from_mapping(Example, mapping, "") == example
    assert from_mapping(Example, json.loads(json.dumps(mapping)), "") == example
    assert from_mapping(Example, yaml.safe_load(yaml.safe_dump(mapping)), "") == example


@settings(max_examples=100, deadline=None)
@given(
    example=examples.filter(lambda example: "" not in (example.name, example.folder) and example.blocks and example.grid != ())
)
def test_flags_are_read_back(example: Example) -> None:
    given_flags = []
    for name, value in to_mapping(example).items():
        flag = "--" + name.replace("_", "-")
        if name == "use_ema":
            given_flags.append(flag if value else f"--no-{name}")
        elif name == "bounds" and value is not None:
            given_flags += [flag, *map(str, value)]
        elif name not in ("extra", "bounds"):
            given_flags.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    parsed = checked_values(Example, vars(parser().parse_args(given_flags)), "command line")
    assert {**to_mapping(example), "extra": {}} == to_mapping(Example(**parsed))


def test_nested_configs_become_plain() -> None:
    @dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        pair: tuple[int, int] = (1, 2)

    assert to_mapping(Outer()) == {"inner": {"depth": 3}, "pair": [1, 2]}


# YAML files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "must hold `key: value` lines, not NoneType"),
        ("- a\n- b", "must hold `key: value` lines, not list"),
        ("hello", "must hold `key: value` lines, not str"),
        ("a: [1", "cannot be read as YAML"),
        ("a: b: c", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_configuration(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        load_yaml(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "no such configuration file" in sentence(lambda: load_yaml(tmp_path / "no.yaml"))
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_yaml(tmp_path)


def test_yaml_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning-rate: 2e-4\nblocks: 1,3,1,1\ngrid: [8, 8]\n")
    assert from_mapping(Example, load_yaml(path), str(path)) == Example(learning_rate=2e-4, grid=(8, 8))


def test_yaml_numbers_are_decimal(tmp_path: Path) -> None:
    """PyYAML alone reads 0:0.75 as 0.75 seconds, 1:30 as 90, 0x8 and 010 as 8 and 4_3 as 43."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "density: 0:0.75\ntimes: [1:30, 61:01.5, 0x8, 010, 4_3, 1_0.5]\nnumber: 8\nrate: [1.5, -0.5, 0, -3, .inf]\n"
    )
    read = {"density": "0:0.75", "times": ["1:30", "61:01.5", "0x8", "010", "4_3", "1_0.5"], "number": 8}
    read |= {"rate": [1.5, -0.5, 0, -3, float("inf")]}
    assert load_yaml(path) == read != yaml.safe_load(path.read_text())


# Older files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed:
    """What was `width` is `size` now, in another unit."""

    size: int = 10
    other: int = 0

    @staticmethod
    def upgraded(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"size" if key == "width" else key: 10 * value if key == "width" else value for key, value in mapping.items()}


def test_older_keys_are_translated_before_they_are_checked() -> None:
    assert from_mapping(Renamed, {"width": 3, "other": 2}, "here") == Renamed(30, 2)
    assert from_mapping(Renamed, {"size": 3}, "here") == Renamed(3)
    assert from_mapping(Renamed, to_mapping(Renamed(7, 1)), "here") == Renamed(7, 1)
    assert checked_values(Renamed, {"width": 3}, "here") == {"size": 30}
    message = sentence(lambda: from_mapping(Renamed, {"widht": 3}, "here"))
    assert message == "here: unknown key 'widht'; choose from size, other."
    assert "unknown key 'width'" in sentence(lambda: from_mapping(Example, {"width": 3}, "here"))


# Flags ---------------------------------------------------------------------------------------------------------------


def parser() -> ArgumentParser:
    made = ArgumentParser("An example.", "example.py")
    made.add_config(Example)
    return made


def flags(*words: str) -> Mapping[str, Any]:
    return vars(parser().parse_args(words))


@pytest.mark.parametrize(
    "words",
    [
        ["--learning-rate", "2e-4"],
        ["--learning_rate", "2e-4"],
        ["--learning_rate=2e-4"],
        ["--lr", "2e-4"],
        ["--lr=2e-4"],
    ],
)
def test_dashes_underscores_and_short_names_are_one_flag(words: list[str]) -> None:
    assert flags(*words) == {"learning_rate": "2e-4"}


def test_flags_that_are_not_given_leave_no_trace() -> None:
    assert flags() == {}
    assert flags("--no_use_ema") == {"use_ema": False}
    assert flags("--use-ema") == {"use_ema": True}


def test_a_flag_of_two_words() -> None:
    assert flags("--bounds", "0.2", "0.8") == {"bounds": ["0.2", "0.8"]}
    assert flags("--bounds", "-1", "-.5", "--name", "x") == {"bounds": ["-1", "-.5"], "name": "x"}
    for words in (["--bounds", "0.2"], ["--bounds", "0.2", "--name", "x"]):
        assert "--bounds: expected 2 arguments" in sentence(lambda words=words: flags(*words))  # type: ignore[misc]
    assert "unknown argument '0.9'" in sentence(lambda: flags("--bounds", "0.2", "0.8", "0.9"))


def test_values_keep_their_underscores() -> None:
    assert flags("--name", "my_run_1", "--folder=/a_b/c-d=e") == {"name": "my_run_1", "folder": "/a_b/c-d=e"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rat", "1"], "unknown argument '--learning-rat'; did you mean '--learning-rate'?"),
        (["--learning_rat=1"], "did you mean '--learning-rate'?"),
        (["--learning", "1"], "unknown argument '--learning'"),  # no abbreviations
        (["stray"], "unknown argument 'stray'"),
        (["--name"], "--name: expected one argument"),
        (["--zzzzzz"], "unknown argument '--zzzzzz'"),
    ],
)
def test_wrong_flags_are_answered_in_one_sentence(words: list[str], message: str) -> None:
    refused = sentence(lambda: flags(*words))
    assert message in refused
    assert "example.py --help" in refused


def test_help_shows_defaults_and_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        flags("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for words in (
        "a rate, 10% of it (default: 0.0001)",
        "--lr",
        "(default: none)",
        "1,3,1,1",
        "{constant,cosine}",
        "--no-use-ema",
        "--bounds LOW HIGH",
    ):
        assert words in shown
