"""`spvla COMMAND --flag value ...`: parse, check, and only then import what is heavy.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr), 130 interrupted.
"""

import difflib
import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from spvla import config
from spvla.errors import SpvlaError, UserError

# command -> (config class, "module:function" taking that config)
COMMANDS: dict[str, tuple[type, str]] = {
    "collect": (config.CollectConfig, "spvla.collect:collect"),
    "regenerate": (config.RegenerateConfig, "spvla.collect:regenerate"),
    "index": (config.IndexConfig, "spvla.data.index:index"),
    "train": (config.TrainConfig, "spvla.selfplay.train:train"),
    "evaluate": (config.EvaluateConfig, "spvla.farm.evaluate:evaluate"),
    "selfplay": (config.SelfplayConfig, "spvla.selfplay.iterate:selfplay"),
    "sweep": (config.SweepConfig, "spvla.sweep.sweep:sweep"),
    "report": (config.ReportConfig, "spvla.report.html:report"),
    "status": (config.StatusConfig, "spvla.status:status"),
    "doctor": (config.DoctorConfig, "spvla.doctor:doctor"),
    "demo": (config.DemoConfig, "spvla.demo:demo"),
    "clean": (config.CleanConfig, "spvla.doctor:clean"),
}
# Ray would print each dead worker into stdout's table; the farm says who fell in its own words, and why.
RAY_KEEPS_QUIET = ("RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed")
POSITIONAL = {"report": "run", "status": "run"}


def main(args: Sequence[str] | None = None) -> None:
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    verbose = "-v" in args
    args = [a for a in args if a != "-v"]
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    try:
        name, parsed = parse(args)
        if not verbose:
            hush_warnings()
            os.environ.setdefault(*RAY_KEEPS_QUIET)  # Ray reads it when it is imported
        entry_point(name)(parsed)
    except UserError as e:
        print(f"spvla: {e}", file=sys.stderr)
        return 2
    except SpvlaError as e:
        print(f"spvla: {e}", file=sys.stderr)
        if verbose:
            traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        print("spvla: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def hush_warnings() -> None:
    """Deprecations inside libraries are no news to who runs a command. By no filter: gymnasium sets its own."""
    warnings.showwarning = lambda *_, **__: None


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {doc_line(cls)}" for name, (cls, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: spvla COMMAND [--flag value ...]   (spvla COMMAND --help lists its flags; -v says more)", "", *lines]
    )


def doc_line(cls: type) -> str:
    return (cls.__doc__ or "").splitlines()[0]


def entry_point(name: str) -> Callable[[Any], None]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported anywhere: no banners
    module, function = COMMANDS[name][1].split(":")
    return getattr(importlib.import_module(module), function)


def parse(args: Sequence[str]) -> tuple[str, Any]:
    """["train", "--beta", "0.5"] -> ("train", TrainConfig(beta=0.5)), checked. Raises UserError."""
    name, rest = args[0], list(args[1:])
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {name!r}",
            expected=f"one of {', '.join(COMMANDS)}",
            remedy=did_you_mean(name, COMMANDS) or "See spvla --help.",
        )
    cls = COMMANDS[name][0]
    if name in POSITIONAL and rest and not rest[0].startswith("-"):
        rest[:1] = [f"--{POSITIONAL[name]}", rest[0]]
    parsed = parse_sweep(rest) if cls is config.SweepConfig else parse_flags(cls, rest)
    parsed.check()
    return name, parsed


def parse_flags(cls: type, args: Sequence[str]) -> Any:
    """A config from flags, by draccus; its complaints become one line."""
    import draccus
    from draccus.utils import DraccusException

    known = flags_of(cls)
    for arg in args:
        flag = arg.split("=")[0].removeprefix("--")
        if arg.startswith("--") and flag not in (*known, "help", "config_path"):
            raise UserError(
                f"unknown flag --{flag}",
                expected=f"a flag of this command ({len(known)} in --help)",
                remedy=did_you_mean(flag, known, prefix="--") or "Run the command with --help for all flags.",
            )
    parser = draccus.argparsing.ArgumentParser(config_class=cls)
    quiet(parser)
    try:
        return parser.parse_args(args)
    except DraccusException as e:
        detail = re.sub(r"\s+", " ", str(e))
        raise UserError(detail, expected="a value of the flag's type", remedy="Run with --help for types.") from e


def quiet(parser: Any) -> None:
    """Argparse prints its usage and exits; here it raises. And a percent sign in a flag's text is one."""

    def error(message: str) -> None:
        raise UserError(message, expected="flags as --name value", remedy="Run the command with --help.")

    parser.parser.error = error
    for action in parser.parser._actions:
        action.help = re.sub(r"%(?!\()", "%%", action.help or "")


def parse_sweep(args: Sequence[str]) -> config.SweepConfig:
    """A training flag with a list or range joins the space; with one value, the sweep's TrainConfig."""
    own = flags_of(config.SweepFlags)
    if {"-h", "--help"} & set(args):
        print(
            "Any training flag (spvla train --help) takes a list, uniform(a,b) or loguniform(a,b). A sweep's own flags:"
        )
        parse_flags(config.SweepFlags, ["--help"])
    sweep_args: list[str] = []
    train_args: list[str] = []
    space: dict[str, str] = {}
    tokens = [t for a in args for t in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]
    for flag, value in zip(tokens[::2], tokens[1::2], strict=False):
        name = flag.removeprefix("--")
        if name in own:
            sweep_args += [flag, value]
        elif name in flags_of(config.TrainConfig) and re.search(r",|uniform\(", value) and name != "dataset_name":
            space[name] = value
        else:
            train_args += [flag, value]
    train = parse_flags(config.TrainConfig, train_args)
    return config.SweepConfig(space=space, train=train, **vars(parse_flags(config.SweepFlags, sweep_args)))


def flags_of(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {prefix}{near[0]}?" if near else ""


if __name__ == "__main__":
    main()
