"""`spvla COMMAND --flag value ...`: parse, check, and only then import what is heavy.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr), 130 interrupted.
"""

import argparse
import difflib
import importlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from spvla import __version__, config
from spvla.benchmarks.libero.versions import installed_mujoco
from spvla.errors import SpvlaError, UserError
from spvla.render.context import try_drawing

# command -> (config class, "module:function" taking that config)
COMMANDS: dict[str, tuple[type, str]] = {
    "collect": (config.CollectConfig, "spvla.collect:collect"),
    "regenerate": (config.RegenerateConfig, "spvla.collect:regenerate"),
    "export": (config.ExportConfig, "spvla.data.recorded:export"),
    "index": (config.IndexConfig, "spvla.data.index:index"),
    "train": (config.TrainConfig, "spvla.train.run:train"),
    "evaluate": (config.EvaluateConfig, "spvla.eval.evaluate:evaluate"),
    "serve": (config.ServeConfig, "spvla.serve:serve"),
    "selfplay": (config.SelfplayConfig, "spvla.train.selfplay:selfplay"),
    "sweep": (config.SweepConfig, "spvla.sweep.sweep:sweep"),
    "report": (config.ReportConfig, "spvla.report.html:report"),
    "status": (config.StatusConfig, "spvla.status:status"),
    "doctor": (config.DoctorConfig, "spvla.doctor:doctor"),
    "demo": (config.DemoConfig, "spvla.demo:demo"),
    "clean": (config.CleanConfig, "spvla.doctor:clean"),
}
# Ray would print each dead worker into stdout's table; the farm says who fell in its own words, and why.
RAY_KEEPS_QUIET = ("RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed")
SIMULATING = ("collect", "regenerate", "demo")  # import MuJoCo at once: any one, and able to draw
EXTRAS = "spvla[sim,train]"  # what every command but `serve` takes, together
# command -> (how it is typed, the flags that one needs first); --help begins with both
NEEDED = {
    "train": (
        "--vla_path openvla/openvla-7b --data_root_dir datasets --dataset_name libero_spatial_no_noops",
        "vla_path data_root_dir dataset_name run_root_dir objective batch_size learning_rate max_steps num_workers",
    ),
    "evaluate": (
        "--pretrained_checkpoint CHECKPOINT --task_suite_name libero_spatial --center_crop True",
        "pretrained_checkpoint task_suite_name center_crop num_trials_per_task local_log_dir",
    ),
    "selfplay": (
        "--vla_path CHECKPOINT --iterations 2 --max_steps 1000",
        "vla_path data_root_dir dataset_name run_root_dir iterations max_steps batch_size task_suite_name num_workers",
    ),
}
# Flags of OpenVLA's finetune.py that change nothing here -> what happens instead
ACCEPTED = {
    "shuffle_buffer_size": "there is no buffer: every epoch is a permutation of all frames",
    "use_quantization": "training is in bf16 or float32; --load_in_4bit quantises in spvla evaluate",
}
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
    if args[0] == "--version":
        print(f"spvla {__version__}")
        return 0
    try:
        name, parsed = parse(args)
        if not verbose:
            hush_warnings()
            os.environ.setdefault(*RAY_KEEPS_QUIET)  # Ray reads it when it is imported
        if name in SIMULATING:
            installed_mujoco()
            try_drawing()
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
    try:
        return cast(Callable[[Any], None], getattr(importlib.import_module(module), function))
    except ModuleNotFoundError as e:
        raise UserError(
            f"spvla {name} without the package {e.name}",
            expected=f"an installation with {EXTRAS}",
            remedy=f"pip install '{EXTRAS}', and then what the README says under Installing.",
        ) from e


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
    if issubclass(cls, config.TrainConfig):
        rest = without_accepted(rest)
    if name in POSITIONAL and rest and not rest[0].startswith("-"):
        rest[:1] = [f"--{POSITIONAL[name]}", rest[0]]
    words = [word for arg in rest for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    words = spelled_out(words, switches_of(name))
    if cls is config.SweepConfig:
        require_known(words, [*flags_of(config.SweepFlags), *flags_of(config.TrainConfig)])
        parsed = parse_sweep(words)
    else:
        require_known(words, flags_of(cls))
        require_given(name, words)
        parsed = parse_flags(name, cls, words)
    parsed.check()
    return name, parsed


def switches_of(name: str) -> set[str]:
    """A command's flags that are true or false."""
    kinds = (config.SweepFlags, config.TrainConfig) if name == "sweep" else (COMMANDS[name][0],)
    return {f"--{f.name}" for kind in kinds for f in fields(kind) if f.type is bool}


def spelled_out(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """["--world", "--quiet", "False"] -> ["--world", "True", "--quiet", "False"]."""
    spelled: list[str] = []
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        spelled += [word, "True"] if word in switches and after.startswith("--") else [word]
    return spelled


def without_accepted(args: Sequence[str]) -> list[str]:
    """Without the flags of ACCEPTED and their values; a line on stderr says what happens instead."""
    kept: list[str] = []
    value = False  # whether the next word may be the value of a flag that was left out
    for arg in args:
        flag = arg.removeprefix("--").split("=")[0]
        if arg.startswith("--") and flag in ACCEPTED:
            print(f"--{flag} does nothing here: {ACCEPTED[flag]}", file=sys.stderr)
            value = "=" not in arg
            continue
        if not value or arg.startswith("--"):
            kept.append(arg)
        value = False
    return kept


def require_known(words: Sequence[str], known: Sequence[str]) -> None:
    for flag in [word.removeprefix("--") for word in words if word.startswith("--")]:
        if flag not in (*known, "help", "config_path"):
            raise UserError(
                f"unknown flag --{flag}",
                expected=f"a flag of this command ({len(known)} in --help)",
                remedy=did_you_mean(flag, known, prefix="--") or "Run the command with --help for all flags.",
            )


def require_given(name: str, words: Sequence[str]) -> None:
    """Every flag without a default is there. They are folders, all of them."""
    if {"-h", "--help", "--config_path"} & set(words):
        return
    for flag in [f.name for f in fields(COMMANDS[name][0]) if f.default is MISSING]:
        if f"--{flag}" not in words:
            folder = flag.upper() if name in POSITIONAL else f"--{flag} FOLDER"
            raise UserError(
                f"spvla {name} without a folder",
                expected=f"spvla {name} {folder}",
                remedy=f"See spvla {name} --help.",
            )


def parse_flags(name: str, cls: type, words: Sequence[str]) -> Any:
    """A config from flags, by draccus; its complaints become one line."""
    import draccus
    import yaml
    from draccus.utils import DraccusException

    parser = draccus.argparsing.ArgumentParser(config_class=cls, prog=f"spvla {name}")
    quiet(parser)
    if name in NEEDED and {"-h", "--help"} & set(words):
        arrange(parser.parser, *NEEDED[name], name=name, cls=cls)
    try:
        return parser.parse_args(joined(cls, words))
    except (DraccusException, yaml.YAMLError, OSError) as e:
        detail = re.sub(r"\s+", " ", str(e))
        raise UserError(detail, expected="a value of the flag's type", remedy="Run with --help for types.") from e


def joined(cls: type, words: Sequence[str]) -> list[str]:
    """["--eta", "-1e-3"] -> ["--eta=-1e-3"]: apart, argparse takes the value for a flag."""
    kinds = {f"--{f.name}": f.type for f in fields(cls)}
    args: list[str] = []
    for word in words:
        if args and args[-1] in kinds and not word.startswith("--"):
            args[-1] += "=" + in_yaml(kinds[args[-1]], word)
        else:
            args.append(word)
    return args


def in_yaml(kind: Any, word: str) -> str:
    """A value as draccus reads it: `--tasks 0,3` is a list, `--run_id 1.10` a text, `--logit_softcap None` nothing."""
    if word == "None" and type(None) in get_args(kind):
        return "null"
    if get_origin(kind) is tuple:
        return f"[{word.strip('[]() ')}]"
    return json.dumps(word, ensure_ascii=False) if kind in (str, str | None, Path, Path | None) else word


def quiet(parser: Any) -> None:
    """Argparse prints its usage and exits; here it raises. It also takes each percent sign in a text for a format, and
    shows no default where there is no text."""

    def error(message: str) -> None:
        raise UserError(message, expected="flags as --name value", remedy="Run the command with --help.")

    parser.parser.error = error
    for action in parser.parser._actions:
        action.help = re.sub(r"%(?!\()", "%%", (action.help or "").strip()) or "(default: %(default)s)"
        if get_origin(action.type) is tuple:
            action.metavar = "int,int,..."


def arrange(parser: argparse.ArgumentParser, example: str, needed: str, *, name: str, cls: type) -> None:
    """--help begins with an example and the flags in `needed`; the rest is grouped by the class that declares it."""
    homes = {field: base for base in cls.__mro__ for field in vars(base).get("__annotations__", ())}
    flags = {action.dest: action for action in parser._actions if action.dest in homes}
    parser._action_groups[:] = [parser._optionals]
    first = parser.add_argument_group("what one needs")
    first._group_actions.extend(flags.pop(flag) for flag in needed.split())
    for base in cls.__mro__[:-1]:
        own = [action for flag, action in flags.items() if homes[flag] is base]
        if own:
            parser.add_argument_group(doc_line(base).rstrip("."))._group_actions.extend(own)
    parser._action_groups.append(parser._action_groups.pop(0))  # --help itself comes last
    listing = parser.format_help()[len(parser.format_usage()) :]
    text = f"example: spvla {name} {example}\n\nusage: spvla {name} [-h] [--flag value ...]\n{listing}"
    parser.format_help = lambda: text  # type: ignore[method-assign]


def parse_sweep(words: Sequence[str]) -> config.SweepConfig:
    """A training flag with a list or range joins the space; with one value, the sweep's TrainConfig."""
    own = flags_of(config.SweepFlags)
    if {"-h", "--help"} & set(words):
        print(
            "Any training flag (spvla train --help) takes a list, uniform(a,b) or loguniform(a,b). A sweep's own flags:"
        )
        parse_flags("sweep", config.SweepFlags, ["--help"])
    sweep_args: list[str] = []
    train_args: list[str] = []
    space: dict[str, str] = {}
    for i in range(0, len(words), 2):
        pair = words[i : i + 2]
        name, value = pair[0].removeprefix("--"), pair[-1]
        if name in own:
            sweep_args += pair
        elif name in flags_of(config.TrainConfig) and re.search(r",|uniform\(", value) and name != "dataset_name":
            space[name] = value
        else:
            train_args += pair
    train = parse_flags("sweep", config.TrainConfig, train_args)
    return config.SweepConfig(space=space, train=train, **vars(parse_flags("sweep", config.SweepFlags, sweep_args)))


def flags_of(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def did_you_mean(word: str, known: Collection[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {prefix}{near[0]}?" if near else ""


if __name__ == "__main__":
    main()
