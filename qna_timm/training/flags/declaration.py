"""Declarative command-line flags: what one is, how its value is read, and a parser made of them.

A flag's value is converted by the same code whether it comes from the command line (strings) or
from YAML (typed), so both are checked alike.
"""

import argparse
import ast
import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from qna_timm.training.errors import UsageError, closest


@dataclass(frozen=True)
class Rule:
    """A condition that each value of a flag has to fulfil; `text` completes "must be ..."."""

    text: str
    holds: Callable[[Any], bool]


# Values that several flags choose from.
INTERPOLATIONS = ("", "random", "bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")
DTYPES = ("float32", "float16", "bfloat16")

POSITIVE = Rule("positive", lambda value: value > 0)
NOT_NEGATIVE = Rule("zero or more", lambda value: value >= 0)
PROBABILITY = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
INSIDE_ZERO_ONE = Rule("above 0 and below 1", lambda value: 0 < value < 1)
NUMPY_SEED = Rule("between 0 and 4294967295", lambda value: 0 <= value < 2**32)
CROP_SHARE = Rule("above 0 and at most 2 (0.95 for 95 %)", lambda value: 0 < value <= 2)
BELOW_ONE = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class Flag:
    """One command-line flag and YAML key.

    Attributes:
        names: Flags as typed and shown, "-b --batch-size"; the first long one gives the key.
        kind: Type of a value or list item: `int`, `float`, `str`, `bool` (a switch) or `dict`.
        default: Value when neither command line nor YAML gives one.
        help: One sentence; the default is added to it.
        nargs: None for one value, "?" for an optional one, "+" for a list, a number for its length.
        const: Value of a "?" flag given without one.
        choices: Every valid string; None allows any.
        unsupported: Choices of timm's that `checks` refuses with a reason: no help offers them.
        rule: Condition on each value.
        refusal: Why any value but the default is refused: such a flag exists only so that timm's
            command lines and args.yaml files can be read.
        inert: Whether a refused flag does nothing unless another refused one is set, so that any
            value of it in a YAML file is passed over.
        yaml: False for a flag of the command line alone.
    """

    names: str
    kind: type
    default: Any
    help: str
    nargs: int | str | None = None
    const: Any = None
    choices: Sequence[str] | None = None
    unsupported: Sequence[str] = ()
    rule: Rule | None = None
    refusal: str = ""
    inert: bool = False
    yaml: bool = True

    @property
    def options(self) -> list[str]:
        """The flag as typed: its short and long names, or the bare name of a positional."""
        return self.names.split()

    @property
    def long(self) -> str:
        """The first long name, "--batch-size"."""
        return next((name for name in self.options if name.startswith("--")), self.options[0])

    @property
    def key(self) -> str:
        """Attribute in the parsed namespace and key in YAML, "batch_size"."""
        return self.long.lstrip("-").replace("-", "_")

    def fresh_default(self) -> Any:
        """The default, lists and dicts as copies, so that no run changes another's."""
        return copy.copy(self.default)

    @property
    def offered(self) -> list[str]:
        """The choices that work."""
        return [choice for choice in self.choices or () if choice not in self.unsupported]

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return self.nargs == "+" or isinstance(self.nargs, int)


FlagTable = Mapping[str, Sequence[Flag]]
"""Group title to the flags of the group, in the order of `--help`."""


def all_flags(table: FlagTable) -> Iterator[Flag]:
    """Iterate over the flags of every group."""
    for flags in table.values():
        yield from flags


def flags_by_key(table: FlagTable) -> dict[str, Flag]:
    """Index a table by key."""
    return {flag.key: flag for flag in all_flags(table)}


_KIND_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _read(flag: Flag, value: Any) -> Any:
    """A value as a bool, string or finite number; None where it is not one."""
    kind = flag.kind
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if not isinstance(value, str | int | float):
        return None
    if kind is str:
        # a number is what is left of 007 or 1.10; where it may be meant, a rule reads the text
        return str(value) if isinstance(value, str) or flag.rule else None
    try:
        number = kind(value) if isinstance(value, str) else value
        return kind(number) if math.isfinite(number) and kind(number) == number else None
    except (ValueError, OverflowError):
        return None


def _convert_scalar(flag: Flag, value: Any, where: str) -> Any:
    converted = _read(flag, value)
    if converted is None:
        expected, hint = _KIND_NAMES[flag.kind], ""
        if flag.kind is str and isinstance(value, int | float) and not isinstance(value, bool):
            hint = "; put it in quotes if it is one"
        raise UsageError(f"{where}: expected {expected}, found {_shown(value)}{hint}")
    if flag.choices is not None and converted not in flag.choices:
        valid = ", ".join(_shown(choice) for choice in flag.offered)
        raise UsageError(
            f"{where}: unknown value {_shown(converted)}, valid are {valid}"
            + closest(str(converted), flag.offered)
        )
    if flag.rule is not None and not flag.rule.holds(converted):
        raise UsageError(f"{where}: must be {flag.rule.text}, found {_shown(converted)}")
    return converted


def _number_with_exponent(value: Any) -> Any:
    """YAML 1.1 takes 1e-8 for a string, since it has no point; nobody means that."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        return float(value)
    return value


def _convert_dict(value: Any, where: str) -> dict[str, Any]:
    """Read keyword arguments from a mapping, or from strings "name=value"."""
    if isinstance(value, Mapping):
        return {str(key): _number_with_exponent(item) for key, item in value.items()}
    if not isinstance(value, list):
        raise UsageError(f"{where}: expected name=value pairs, found {_shown(value)}")
    result: dict[str, Any] = {}
    for item in value:
        name, equals, text = str(item).partition("=")
        if not equals or not name:
            raise UsageError(f"{where}: expected name=value, found {_shown(item)}")
        try:
            result[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            # A bare word is a string: nobody wants to quote twice on a command line.
            result[name] = text
    return result


def convert(flag: Flag, value: Any, where: str) -> Any:
    """Convert a raw value to a flag's type.

    Args:
        flag: The flag.
        value: Strings from the command line, or what YAML holds. None means the default.
        where: Flag or file and key, to begin an error message with.

    Raises:
        UsageError: The value is of the wrong type or length, no valid choice, or out of range.
    """
    if value is None:
        return flag.fresh_default()
    if flag.kind is dict:
        return _convert_dict(value, where)
    if flag.nargs == "?" and isinstance(value, bool):
        # YAML has no bare flag: `torchcompile: true` is one.
        return flag.const if value else flag.default
    if not flag.is_list:
        return _convert_scalar(flag, value, where)
    if not isinstance(value, list | tuple):
        raise UsageError(f"{where}: expected a list, found {_shown(value)}")
    if isinstance(flag.nargs, int) and len(value) != flag.nargs:
        raise UsageError(f"{where}: expected {flag.nargs} values, found {len(value)}")
    return [_convert_scalar(flag, item, where) for item in value]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError`s."""

    def error(self, message: str) -> Any:
        raise UsageError(re.sub(r"^argument ", "", message))


def _metavar(flag: Flag) -> str:
    if flag.choices is not None and len(flag.offered) <= 4:
        return "{" + ",".join(flag.offered) + "}"
    return {int: "N", float: "X", str: "TEXT", dict: "NAME=VALUE"}[flag.kind]


def _help_text(flag: Flag) -> str:
    if flag.refusal:
        return f"Refused: {flag.refusal}.".replace("%", "%%")
    text = flag.help
    if len(flag.offered) > 4:
        text += f" One of {', '.join(choice or repr(choice) for choice in flag.offered)}."
    if flag.kind is not bool and flag.default not in (None, "", [], {}):
        default = flag.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _opposite(flag: Flag) -> str:
    """The switch that turns a switch off again: --no-amp, --aug."""
    name = flag.long.removeprefix("--")
    return "--" + (name.removeprefix("no-") if name.startswith("no-") else f"no-{name}")


def _add_flag(group: Any, flag: Flag) -> None:
    if not flag.options[0].startswith("-"):
        group.add_argument(flag.key, nargs="?", default=argparse.SUPPRESS, help=_help_text(flag))
        return
    common: dict[str, Any] = {"dest": flag.key, "default": argparse.SUPPRESS}
    if flag.kind is bool:
        group.add_argument(*flag.options, action="store_true", help=_help_text(flag), **common)
        group.add_argument(_opposite(flag), action="store_false", help=argparse.SUPPRESS, **common)
        return
    nargs = "*" if flag.kind is dict else flag.nargs
    const = {"const": flag.const} if flag.nargs == "?" else {}
    group.add_argument(
        *flag.options, nargs=nargs, metavar=_metavar(flag), help=_help_text(flag), **const, **common
    )


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30)


_OF_RECIPES = (
    "A switch that a recipe turns on is turned off by --no-NAME (and --no-NAME by --NAME)."
)


def build_parser(table: FlagTable, prog: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a flag table; it yields raw values of only the flags that were given."""
    takes_recipes = "config" in flags_by_key(table)
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s [flags] [DATA]",
        formatter_class=_formatter,
        description=description,
        allow_abbrev=False,
        epilog="Names may be written with - or _. " + _OF_RECIPES * takes_recipes,
    )
    for title, flags in table.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
    return parser


def _normalized(argv: Sequence[str], table: FlagTable) -> list[str]:
    """Write flags as the table does (--batch_size=8) and numbers such as -1e-3 without exponent.

    argparse takes a number for a flag when it begins with a minus and has an exponent.
    """
    options = (option for flag in all_flags(table) for option in flag.options)
    spelled = {option.replace("_", "-"): option for option in options}
    result = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return [*result, *argv[index:]]
        name, equals, value = argument.partition("=")
        if re.fullmatch(r"--[A-Za-z][\w-]*", name):
            name = name.replace("_", "-")
            argument = spelled.get(name, name) + equals + value
        elif re.fullmatch(r"-(\d+\.?\d*|\.\d+)[eE][+-]?\d{1,2}", argument):
            argument = f"{Decimal(argument):f}"
        result.append(argument)
    return result


def parse_command_line(
    table: FlagTable, argv: Sequence[str], prog: str, description: str
) -> dict[str, Any]:
    """Parse a command line into converted values of the given flags, by key.

    Raises:
        UsageError: An unknown flag (with the closest valid one), a missing or wrong value.
        SystemExit: `--help` was asked for.
    """
    parser = build_parser(table, prog, description)
    namespace, unknown = parser.parse_known_args(_normalized(argv, table))
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise UsageError(
                f"unexpected argument '{name}' (a value too many, or no flag before it)"
            )
        known = [option for flag in all_flags(table) for option in flag.options]
        raise UsageError(f"unknown flag {name}" + closest(name, [k for k in known if k[0] == "-"]))
    by_key = flags_by_key(table)
    return {
        key: convert(by_key[key], value, by_key[key].long) for key, value in vars(namespace).items()
    }
