"""Configuration: frozen dataclasses filled from defaults, then a YAML file, then command-line flags.

One declaration serves all three: a field's name is its YAML key and its flag (`--image-size`, dashes and underscores
alike), its annotation is checked in both, its help text appears in `--help`. Whatever cannot be used raises `InputError`
with one sentence that names the thing and the remedy.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

Config = TypeVar("Config")

LARGEST = 2**63
"""No setting needs a number this large, and no counter holds one."""


class InputError(ValueError):
    """Something the user gave cannot work. The message is one sentence: what is wrong, with its name, and what to do."""


def option(
    default: Any,
    help: str,
    *,
    flags: Sequence[str] = (),
    words: Sequence[str] = (),
    bare: str | None = None,
    off: str | None = None,
) -> Any:
    """A dataclass field with its help text, further names for its flag (`flags=("--global-seed",)`), names for the words of a
    flag that takes a fixed number (`words=("LOW", "HIGH")`), what the flag means that is given without a value (`bare`), and
    what its opposite, `--no-...`, means (`off`).
    """
    metadata = {"help": help, "flags": tuple(flags), "words": tuple(words), "bare": bare, "off": off}
    return dataclasses.field(default=default, metadata=metadata)


def nearest(word: str, choices: Sequence[str]) -> str:
    """', did you mean X?' where a choice is close to `word`, and the list of choices where none is."""
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if close:
        # Two letters swapped are the commonest slip, and difflib prefers a longer word to them.
        return f"; did you mean {next((choice for choice in close if sorted(choice) == sorted(word)), close[0])!r}?"
    return f"; choose from {', '.join(choices)}." if choices else "; there is nothing to set."


def from_mapping(cls: type[Config], mapping: Mapping[str, Any], where: str) -> Config:
    """Builds the dataclass `cls` from `mapping`; dashes in keys count as underscores.

    Raises InputError for an unknown key (with the nearest valid one) or a value of the wrong type, naming `where`.
    """
    return cls(**checked_values(cls, mapping, where))


def checked_values(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`mapping` with keys and values checked against the fields of `cls`, not yet completed with defaults.

    A class whose older files hold other fields translates them in a static method `upgraded(mapping)`.
    """
    mapping = getattr(cls, "upgraded", dict)(mapping)
    annotations = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise InputError(f"{where}: unknown key {key!r}{nearest(name, names)}")
        if name in values:
            raise InputError(f"{where}: {name} is given twice.")
        values[name] = coerce(value, annotations[name], f"{where}: {key}")
    return values


def to_mapping(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists, strings and numbers, fit for JSON and YAML; `from_mapping` reads it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file that holds one mapping."""
    import yaml

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_unique_keys(yaml.SafeLoader))
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file; configs/ holds the published ones.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold `key: value` lines, not {type(content).__name__}.")
    return content


def _unique_keys(loader: Any) -> Any:
    """A YAML loader that refuses a key given twice, where PyYAML takes the last one silently, and whose numbers are decimal."""

    class UniqueKeys(loader):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            # YAML 1.1 reads 0:0.5 as a number of minutes and seconds, 0x8 and 010 as other bases and 4_3 as 43: a token density
            # looks like these, and nobody means them.
            tag = super().resolve(kind, value, implicit)
            whole, number = tag.endswith(":int"), tag.endswith(":float")
            odd = (whole and not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", value)) or (number and re.search("[:_]", value))
            return "tag:yaml.org,2002:str" if odd else tag

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise InputError(f"the YAML file gives {key!r} twice; keep one of the two.")
            return super().construct_mapping(node, deep)

    return UniqueKeys


def coerce(value: Any, annotation: Any, name: str) -> Any:
    """`value`, from YAML or from a flag's text, as the type `annotation`; InputError naming `name` where it does not fit.

    Numbers may be text ("2e-4" is a string to PyYAML, and so is every flag); tuples may be "1,3,1,1", "16x16" or a list.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return coerce(value, next(a for a in arguments if a is not type(None)), name)
    if origin is typing.Literal:
        if value in arguments:
            return value
        close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InputError(f"{name} is {value!r}; choose from {', '.join(map(str, arguments))}{hint}")
    if origin is tuple:
        parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
        parts = [parts] if isinstance(parts, int) else parts
        if not isinstance(parts, list | tuple):
            raise InputError(f"{name} must be a list such as 1,3,1,1, not {value!r}.")
        if arguments[-1] is not Ellipsis and len(parts) != len(arguments):
            raise InputError(f"{name} takes {len(arguments)} values, not {len(parts)}.")
        return tuple(coerce(part, arguments[0], name) for part in parts)
    if annotation in (dict, Mapping) or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{name} must be a group of `key: value` lines, not {value!r}.")
        return dict(value)
    return _scalar(value, annotation, name)


def _scalar(value: Any, annotation: type, name: str) -> Any:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(value, bool) != (annotation is bool) and not isinstance(value, str):
        raise InputError(f"{name} must be {kinds[annotation]}, not {value!r}.")
    if annotation is str and value is not None and not isinstance(value, Mapping | list):
        return str(value)
    if annotation is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if annotation in (int, float) and isinstance(value, int | float | str):
        if annotation is int and (isinstance(value, float) or "_" in str(value)):  # Python reads 1_0 as 10
            raise InputError(f"{name} must be a whole number, not {value!r}.")
        try:
            number = annotation(value)
        except (ValueError, OverflowError):
            raise InputError(f"{name} must be {kinds[annotation]}, not {value!r}.") from None
        if annotation is int and abs(number) >= LARGEST:
            raise InputError(f"{name} is {value}, which is too large.")
        return number
    raise InputError(f"{name} must be {kinds[annotation]}, not {value!r}.")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with dashes and underscores alike, no abbreviations, and one-sentence errors (exit code 2)."""

    def __init__(self, description: str, prog: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_config(self, cls: type, title: str | None = None, defaults: Mapping[str, Any] | None = None) -> None:
        """One flag per field of the dataclass `cls`. Flags that are not given leave no trace in the parsed namespace.

        `defaults` are shown in place of the dataclass's own.
        """
        group = self.add_argument_group(title) if title else self
        annotations = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            flags = ["--" + field.name.replace("_", "-"), *field.metadata.get("flags", ())]
            default = _shown((defaults or {}).get(field.name, field.default))
            text = f"{field.metadata.get('help', '')} (default: {default})".replace("%", "%%").strip()
            if annotations[field.name] in (bool, bool | None):
                action: Any = argparse.BooleanOptionalAction
                group.add_argument(*flags, dest=field.name, default=argparse.SUPPRESS, action=action, help=text)
                continue
            metavar, count = _metavar(annotations[field.name]), _count(annotations[field.name])
            words = metavar if count is None else field.metadata.get("words") or (metavar,) * count
            bare = field.metadata.get("bare")
            group.add_argument(
                *flags,
                dest=field.name,
                default=argparse.SUPPRESS,
                nargs=count if bare is None else "?",
                const=bare,
                metavar=words,
                help=text,
            )
            if off := field.metadata.get("off"):
                opposite = flags[0].replace("--", "--no-", 1)
                group.add_argument(
                    opposite,
                    dest=field.name,
                    default=argparse.SUPPRESS,
                    action="store_const",
                    const=off,
                    help=f"{flags[0]} {off}",
                )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, with the underscores of every flag's name turned into dashes first."""
        words = list(sys.argv[1:] if args is None else args)
        for place, word in enumerate(words):
            if word == "--":
                break
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                words[place] = flag.replace("_", "-") + equals + value
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; an unknown flag is answered with the nearest valid one."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            flag = rest[0].partition("=")[0]
            self.error(f"unknown argument {rest[0]!r}{nearest(flag, known) if flag.startswith('-') else '.'}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}{'' if message[-1] in '.?' else '.'} ({self.prog} --help lists the flags.)")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _metavar(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _metavar(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    return {int: "N", float: "X", str: "TEXT"}.get(annotation, "N,N,...")


def _count(annotation: Any) -> int | None:
    """How many words a flag takes whose annotation is a tuple of a fixed length; None for every other flag."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return _count(next(a for a in arguments if a is not type(None)))
    return len(arguments) if get_origin(annotation) is tuple and arguments[-1] is not Ellipsis else None


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's `main` and exits: 0, or 2 and one sentence for a wrong input or a file out of reach, 1 for a full disk,
    130 for Ctrl-C.
    """
    script = Path(sys.argv[0]).name
    rank = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else ""
    try:
        main()
    except InputError as error:
        if rank and not rank.endswith(" 0]"):
            # Every process meets the same wrong input. The launcher ends the others when the first one leaves; they speak up
            # only when the fault is theirs alone.
            time.sleep(3)
        print(f"{script}{rank}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            print(f"{script}{rank}: error: {error.filename}: {error.strerror}; check the name and who may read and write it.",
                  file=sys.stderr, flush=True)  # fmt: skip
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{script}{rank}: error: the disk is full{where}; finished work is kept, free some space and run the same "
              "command again.", file=sys.stderr, flush=True)  # fmt: skip
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{script}{rank}: interrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
