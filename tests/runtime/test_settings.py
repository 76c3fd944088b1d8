"""Training settings: four layers of precedence, the method's own options, and values that no run can use."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from models import METHODS
from runtime.config import InputError, to_mapping
from runtime.settings import MAY_CHANGE, TrainingSettings, changed, check, parse_training


def refusal(*words: str) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(InputError) as caught:
        parse_training(words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def yaml_file(folder: Path, content: str) -> str:
    (folder / "run.yaml").write_text(content)
    return str(folder / "run.yaml")


def test_defaults_are_the_released_recipe() -> None:
    settings, options = parse_training([])
    assert (settings.model, settings.method, options) == ("DiT-XL/2", "sparsedit", {})
    assert (settings.global_batch_size, settings.learning_rate, settings.weight_decay) == (256, 1e-4, 0.0)
    assert (settings.ema_decay, settings.label_drop, settings.resume) == (0.9999, 0.1, "auto")
    assert parse_training(["--method", "dense"])[0].min_snr_gamma is None


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (None, [], 5.0),
        (None, ["--min-snr-gamma", "3"], 3.0),
        (None, ["--min-snr-gamma", "none"], None),
        ("min_snr_gamma: 4", [], 4.0),
        ("min-snr-gamma: 4e-1", [], 0.4),
        ("min_snr_gamma: none", [], None),
        ("min_snr_gamma: null", [], None),
        ("min_snr_gamma: 4", ["--min_snr_gamma=3"], 3.0),
        ("min_snr_gamma: none", ["--min-snr-gamma", "3"], 3.0),
        ("method: dense", [], None),
        ("method: dense", ["--method", "sparsedit"], 5.0),
        ("method: sparsedit\nmin_snr_gamma: 4", ["--method", "dense"], 4.0),
    ],
)
def test_flags_win_over_yaml_over_the_recipe_over_defaults(
    content: str | None, flags: list[str], expected: float | None, tmp_path: Path
) -> None:
    config = ["--config", yaml_file(tmp_path, content)] if content else []
    assert parse_training([*config, *flags])[0].min_snr_gamma == expected
    assert parse_training([*flags, *config])[0].min_snr_gamma == expected


def test_options_of_the_method_come_from_yaml_and_flags(tmp_path: Path) -> None:
    content = "model: DiT-T/2\noptions:\n  sparse-grid: [8, 4]\n  top_blocks: 1\n"
    _, options = parse_training(["--config", yaml_file(tmp_path, content), "--top_blocks", "3", "--readd-position"])
    assert options == {"density": "8x4", "top_blocks": 3, "readd_position": True}
    assert parse_training(["--module-blocks", "1,3,1,1", "--sparse-grid", "8"])[1] == {
        "module_blocks": (1, 3, 1, 1),
        "density": "8",
    }
    assert parse_training(["--config", yaml_file(tmp_path, "options:\n")])[1] == {}


def test_settings_of_one_run_do_not_leak_into_the_next(tmp_path: Path) -> None:
    parse_training(["--config", yaml_file(tmp_path, "seed: 7\noptions: {top_blocks: 3}"), "--lr", "1"])
    assert parse_training([]) == parse_training([])
    assert parse_training([])[0].seed == 0


def test_other_names_of_flags() -> None:
    settings, _ = parse_training(["--global-seed", "3", "--ckpt_every", "5", "--lr", "2e-4"])
    assert (settings.seed, settings.checkpoint_every, settings.learning_rate) == (3, 5, 2e-4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rat: 1", ["run.yaml: unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
        ("option: {}", ["unknown key 'option'", "did you mean 'options'?"]),
        ("options: {densty: 8}", ["run.yaml: options: unknown key 'densty'", "did you mean 'density'?"]),
        ("options: [8]", ["run.yaml: options must be a group"]),
        ("options: {top_blocks: a}", ["run.yaml: options: top_blocks must be a whole number, not 'a'"]),
        ("seed: 1.5", ["run.yaml: seed must be a whole number, not 1.5"]),
        ("learning_rate_schedule: cosinus", ["run.yaml: learning_rate_schedule is 'cosinus'", "did you mean 'cosine'?"]),
        ("method: sparsdit", ["'sparsdit'", "did you mean 'sparsedit'?"]),
        ("method:", ["method"]),
        ("method: [dense]", ["method"]),
        ("method: dense\noptions: {density: 8}", ["options", "'density'"]),
    ],
)
def test_wrong_yaml_is_answered_in_one_sentence(content: str, words: list[str], tmp_path: Path) -> None:
    message = refusal("--config", yaml_file(tmp_path, content))
    for word in words:
        assert word in message
    assert "choose from ." not in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "dens"], ["--method 'dens' is not known", "did you mean 'dense'?"]),
        (["--config", "no.yaml"], ["no.yaml: no such configuration file"]),
        (["--config"], ["--config"]),
        (["--method", "dense", "--density", "8"], ["--density is a flag of --method sparsedit", "leave it out"]),
        (["--seed", "x"], ["command line: seed must be a whole number, not 'x'"]),
        (["--learning-rate-schedule", "linear"], ["choose from constant, cosine"]),
        (["--ema"], ["unknown argument '--ema'"]),
    ],
)
def test_wrong_flags_are_answered_in_one_sentence(flags: list[str], words: list[str]) -> None:
    message = refusal(*flags)
    for word in words:
        assert word in message


def impossible() -> list[tuple[str, str]]:
    positive = (
        "image_size",
        "global_batch_size",
        "gradient_accumulation",
        "density_groups",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
    )
    zero = [(name, "0") for name in positive]
    shares = [(name, value) for name in ("label_drop", "ema_decay") for value in ("-0.1", "1.1", "nan")]
    rates = [("learning_rate", value) for value in ("0", "-1e-4", "nan", "inf")]
    rest = [("epochs", "0"), ("warmup_steps", "-1"), ("weight_decay", "-1"), ("weight_decay", "nan"), ("gradient_clip", "0")]
    more = [
        ("gradient_clip", "-1"),
        ("sample_count", "0"),
        ("sample_every", "-1"),
        ("non_finite_limit", "0"),
        ("timestep_strata", "0"),
        ("timestep_strata", "3"),
        ("skip_gradient_norm", "0"),
        ("skip_gradient_norm", "nan"),
    ]
    return [*zero, *shares, *rates, ("max_steps", "0"), *rest, *more]


@pytest.mark.parametrize(("name", "value"), impossible())
def test_values_that_no_run_can_use(name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    assert flag in refusal(f"{flag}={value}")


def test_strata_that_do_not_divide() -> None:
    assert "timestep-strata is 4; it must divide the 1000 timesteps and --global-batch-size, 6" in refusal(
        "--method", "dydit", "--global-batch-size", "6"
    )
    assert "it must divide the 1000 timesteps" in refusal("--timestep-strata", "16")
    check(TrainingSettings(timestep_strata=8))


def test_possible_values_pass() -> None:
    check(TrainingSettings(label_drop=0.0, ema_decay=1.0, max_steps=1, gradient_clip=1.0, min_snr_gamma=5.0))


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_every_setting_and_the_methods_options(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help", "--method", method], ["--method", method, "-h"]):
        with pytest.raises(SystemExit) as caught:
            parse_training(words)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        for field in (*fields(TrainingSettings), *fields(METHODS[method].options_type)):
            assert f"--{field.name.replace('_', '-')}" in shown
        assert ("--density " in shown) == (method == "sparsedit")


def test_every_field_has_a_help_text() -> None:
    for cls in (TrainingSettings, *(kind.options_type for kind in METHODS.values())):
        assert [field.name for field in fields(cls) if not field.metadata.get("help")] == []


def test_no_option_of_a_method_hides_a_setting() -> None:
    names = {field.name for field in fields(TrainingSettings)}
    for kind in METHODS.values():
        assert not names & {field.name for field in fields(kind.options_type)}
        assert set(kind.recipe) <= names


# Resuming ------------------------------------------------------------------------------------------------------------


def test_what_may_change_is_named_by_fields() -> None:
    assert {field.name for field in fields(TrainingSettings)} >= MAY_CHANGE


OTHER = {"model": "DiT-S/2", "method": "dense", "learning_rate_schedule": "cosine"}


@pytest.mark.parametrize("name", [field.name for field in fields(TrainingSettings)])
def test_a_resumed_run_may_change_what_leaves_the_numbers_alone(name: str) -> None:
    """Every setting in turn: the ones that decide the numbers are refused by name."""
    settings = TrainingSettings()
    value = getattr(settings, name)
    changes = {bool: lambda: not value, str: lambda: f"{value}x"}
    other: Any = OTHER.get(name) or changes.get(type(value), lambda: (value or 0) + 1)()
    differences = changed(to_mapping(settings), replace(settings, **{name: other}))
    assert (differences == []) == (name in MAY_CHANGE)
    assert all(difference.startswith(f"{name} ({value}, not ") for difference in differences)


def test_the_length_of_a_cosine_may_not_change() -> None:
    settings = TrainingSettings(learning_rate_schedule="cosine", max_steps=100)
    assert changed(to_mapping(settings), replace(settings, max_steps=200)) == ["max_steps (100, not 200)"]
    constant = replace(settings, learning_rate_schedule="constant")
    assert changed(to_mapping(constant), replace(constant, max_steps=200)) == []


def test_a_checkpoint_from_before_a_setting_existed() -> None:
    """The default stands for what an older checkpoint does not know; in any case not a traceback."""
    saved = to_mapping(TrainingSettings())
    del saved["weight_decay"]
    assert changed(saved, TrainingSettings()) == []
    del saved["density_groups"]  # then all timesteps had one token count: one group
    assert changed(saved, TrainingSettings(density_groups=1)) == []
    assert changed(saved, TrainingSettings(density_groups=4)) == ["density_groups (1, not 4)"]


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        ([], "ddpm"),
        (["--method", "dense"], "ddpm"),
        (["--method", "sprint"], "flow"),
        (["--model", "SiT-XL/2"], "flow"),
        (["--method", "sprint", "--objective", "ddpm"], "ddpm"),
        (["--objective", "flow"], "flow"),
    ],
)
def test_the_objective_is_the_published_one_unless_given(words: list[str], objective: str) -> None:
    settings, _ = parse_training(words)
    assert (settings.objective, settings.learn_sigma) == (objective, objective == "ddpm")
    assert settings.flow_times == ("logit-normal" if objective == "flow" else None)
    assert settings.min_snr_gamma == (5.0 if objective == "ddpm" and settings.method == "sparsedit" else None)
