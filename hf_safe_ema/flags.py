"""Settings in dataclasses, from a YAML file and from flags that override it.

Knows: TRL's parser, and what it lets pass that it should not. Does not know: which settings there are.
"""

import argparse
import difflib
import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser


class RecipeParser(TrlParser):
    """[`~trl.TrlParser`] that takes nothing it does not know, checks YAML as it checks flags, and groups its help.

    Args:
        kinds (sequence of `type`):
            Dataclasses whose fields are the settings.
        groups (`dict[str, tuple[str, ...]]`):
            Titles of the help's sections, and the settings in each. All other settings come after them.
        words (`dict[str, str]`):
            Help texts in place of the fields' own.
        arguments:
            Of `argparse.ArgumentParser`.
    """

    def __init__(self, kinds: Sequence[type], groups: dict[str, tuple[str, ...]], words: dict[str, str], **arguments):
        # A mistyped flag must not become another one by its beginning.
        super().__init__(kinds, formatter_class=_Formatter, allow_abbrev=False, **arguments)
        self._groups = groups
        self.add_argument(
            "--config", metavar="RECIPE.yaml", help="A YAML file of these settings (examples/recipes has some)."
        )
        self._hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        for action in self._settings():
            action.help = words.get(action.dest, action.help)
            action.metavar = self._metavar(action)
            if action.metavar == "{true,false}" and action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 alone can only mean one thing

    def error(self, message: str):
        """Argparse's errors as exceptions, for the caller to say in one line."""
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        """Argparse's, but unknown arguments are an error, with the nearest known one."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [text for text in unknown if text.startswith("-")] or unknown
            hints = [self._like(text.split("=")[0].lstrip("-").replace("-", "_"), "--") for text in flags]
            raise ValueError(
                f"unknown argument {', '.join(f + h for f, h in zip(flags, hints, strict=True))}; see {self.prog} --help"
            )
        return namespace, unknown

    def _like(self, name: str, mark: str = "") -> str:
        known = {action.dest for action in self._settings()}
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        return f" (did you mean {mark}{near[0]}?)" if near else ""

    def _settings(self) -> Iterator[argparse.Action]:
        """The action of each setting, without those that are the `--no_` of another."""
        return (action for action in self._actions if action.dest in self._hints and action.nargs != 0)

    def _metavar(self, action: argparse.Action) -> str | None:
        if action.choices is not None:
            few = len(action.choices) <= 8
            return "{" + ",".join(map(str, action.choices)) + "}" if few else "NAME"
        kinds = {get_origin(kind) or kind for kind in _members(self._hints[action.dest])} - {type(None)}
        return {frozenset({int}): "INT", frozenset({float}): "NUMBER", frozenset({bool}): "{true,false}"}.get(
            frozenset(kinds), "VALUE"
        )

    def named_in(self, argv: Sequence[str]) -> Iterator[str]:
        """Settings that flags are about.

        Args:
            argv (list of `str`):
                As typed.
        """
        by_flag = {flag: action.dest for action in self._actions for flag in action.option_strings}
        return (by_flag[flag] for flag in (text.split("=")[0] for text in argv) if flag in by_flag)

    def take_file(self, path: str) -> dict[str, Any]:
        """Make the values of a recipe the parser's defaults, and set the environment variables of its `env`.

        Args:
            path (`str`):
                YAML file.

        Returns:
            `dict`: what it says, by setting.

        Raises:
            ValueError, OSError: if it cannot be read, or says what no setting could be.
        """
        said = _read_yaml(path)
        environment = said.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ValueError(f"{path}: env: must be a mapping of environment variables, not {environment!r}")
        actions = {flag.removeprefix("--"): a for a in self._settings() for flag in a.option_strings}
        unknown = [f"{key}{self._like(str(key))}" for key in said if key not in actions]
        if unknown:
            raise ValueError(f"{path}: unknown key {', '.join(unknown)}; {self.prog} --help lists all")
        values = {}
        for key, value in said.items():
            try:
                values[actions[key].dest] = self._fit(actions[key], value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"{path}: {key}: {value!r} cannot be used: {error}") from None
        os.environ.update({str(key): str(value) for key, value in environment.items()})
        self.set_defaults_with_config(**values)
        return values

    def _fit(self, action: argparse.Action, value):
        """A value from YAML as the flag would have it; argparse itself looks at no default that is not text."""
        kinds = {get_origin(kind) or kind for kind in _members(self._hints[action.dest])}
        if value is None:
            if type(None) not in kinds:
                raise ValueError("it is empty; give a value or leave the key out")
            return None
        if isinstance(value, dict):
            if dict not in kinds:
                raise ValueError("a mapping has no meaning here")
            return value
        if isinstance(value, list):
            if list not in kinds:
                raise ValueError("a list has no meaning here")
            return [self._fit_one(action, part, kinds) for part in value]
        one = self._fit_one(action, value, kinds)
        return [one] if action.nargs == "+" else one

    def _fit_one(self, action: argparse.Action, value, kinds: set):
        if isinstance(value, (dict, list)):
            raise ValueError("a list here holds plain values")
        if isinstance(value, bool) and not kinds & {bool, str}:
            raise ValueError("it is true or false, where a number is wanted")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and {float, int} & kinds and str in kinds:
            return value  # such as a half-life, where 50 and 0.25 are told apart by their kind
        try:
            value = action.type(str(value)) if callable(action.type) else value
        except (ValueError, TypeError):
            raise ValueError(f"it is not {_KINDS.get(action.type, 'what is wanted')}") from None
        if action.choices is not None and value is not None and value not in action.choices:
            raise ValueError(f"choose one of {', '.join(map(str, action.choices))}")
        return value

    def format_help(self) -> str:
        """Our own and the most used settings first, in groups; the inherited ones after."""
        by_name = {action.dest: action for action in self._settings()}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        formatter.start_section("to begin with")
        formatter.add_arguments([action for action in self._actions if action.dest in ("help", "config")])
        formatter.end_section()
        shown = set()
        for title, names in self._groups.items():
            formatter.start_section(title)
            formatter.add_arguments([by_name[name] for name in names])
            formatter.end_section()
            shown |= set(names)
        formatter.start_section(
            "everything else, as transformers.TrainingArguments, trl.SFTConfig and trl.ModelConfig"
        )
        formatter.add_arguments([action for name, action in sorted(by_name.items()) if name not in shown])
        formatter.end_section()
        return formatter.format_help()


_KINDS = {int: "a whole number", float: "a number"}


def _members(hint) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _read_yaml(path: str) -> dict:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; give a YAML recipe")
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(said, dict):
        raise ValueError(f"--config {path}: must be a YAML mapping of settings (name: value), is {said!r:.60}")
    return said


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag, and no default where there is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest in ("help", "config"):
            return super()._format_action_invocation(action)
        name = f"--{action.dest}"
        if action.nargs == "?" and action.default is not None:
            return f"{name} / --no_{action.dest}" if action.default is True else name
        return f"{name} {action.metavar}{' ...' * (action.nargs == '+')}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, argparse.SUPPRESS, MISSING, False)
        return text if silent or "default" in text.lower() else f"{text} (default: %(default)s)"
