"""The command line: one clear line for bad input, before anything heavy is imported."""

import ast
import inspect
import re
import subprocess
import sys
import time
import warnings
from itertools import pairwise

import pytest

import spvla
from spvla import cli, config
from spvla.errors import UserError


def test_help_answers_in_under_a_second() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "spvla.cli", "--help"], capture_output=True, text=True)
    assert time.monotonic() - start < 1.0
    assert all(command in done.stdout for command in cli.COMMANDS)


def texts(cls: type) -> dict[str, str]:
    """flag -> the string below its field, read without draccus."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, below in pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=flag)), ast.Expr(value=ast.Constant(value=text)):
                    found[flag] = text
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_lists_its_flags_with_their_texts_and_defaults(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run([command, "--help"])
    assert ended.value.code == 0
    own = config.SweepFlags if command == "sweep" else cli.COMMANDS[command][0]
    printed = capsys.readouterr().out
    assert f"usage: spvla {command} [-h]" in printed
    assert [f for f in cli.flags_of(own) if f"--{f} " not in printed] == []
    unwrapped = "".join(printed.split())
    assert [f for f, text in texts(own).items() if "".join(text.split()) not in unwrapped] == []
    assert unwrapped.count("(default:") >= len(cli.flags_of(own))


@pytest.mark.parametrize("command", cli.NEEDED)
def test_help_begins_with_an_example_and_the_flags_that_one_needs(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run([command, "--help"])
    printed = capsys.readouterr().out
    example, needed = cli.NEEDED[command]
    assert printed.startswith(f"example: spvla {command} {example}\n")
    assert re.findall(r"^  --(\w+)", printed, re.MULTILINE)[: len(needed.split())] == needed.split()
    assert 5 <= len(needed.split()) <= 10
    assert cli.parse([command, *example.split()])[0] == command  # and it can be typed


def test_flags_of_the_original_that_do_nothing_are_accepted_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = "train --shuffle_buffer_size 100000 --use_quantization=False --max_steps 10"
    assert cli.parse(line.split())[1].max_steps == 10
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == ["--shuffle_buffer_size", "--use_quantization"]


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"spvla {spvla.__version__}\n"


def test_the_original_users_flags_parse() -> None:
    line = (
        "train --vla_path p --data_root_dir d --dataset_name libero_goal_no_noops --run_root_dir r --adapter_tmp_dir a "
        "--lora_rank 32 --batch_size 20 --grad_accumulation_steps 1 --learning_rate 5e-4 --image_aug False "
        "--save_steps 1000 --max_steps 10 --beta 0.5 --eta 0.01 --sft_weight 1.0 --loss_type hinge --num_workers 2"
    )
    _, parsed = cli.parse(line.split())
    assert (parsed.learning_rate, parsed.image_aug, parsed.loss_type, parsed.num_workers) == (5e-4, False, "hinge", 2)


def test_a_sweeps_lists_become_its_space_and_the_rest_its_training_flags() -> None:
    line = "sweep --beta 0.3,0.7 --learning_rate loguniform(1e-5,5e-4) --max_steps 4 --num_samples=3"
    _, parsed = cli.parse(line.split())
    assert parsed.space == {"beta": "0.3,0.7", "learning_rate": "loguniform(1e-5,5e-4)"}
    assert (parsed.train.max_steps, parsed.num_samples) == (4, 3)


@pytest.mark.parametrize("given", ["0,3", "[0,3]", "[0, 3]", "(0, 3)"])
@pytest.mark.parametrize("command", ["collect", "selfplay", "sweep --beta 0.3,0.7"])
def test_tasks_are_numbers_with_commas_in_brackets_or_not(command: str, given: str) -> None:
    assert cli.parse([*command.split(), "--tasks", given])[1].tasks == (0, 3)
    assert cli.parse([*command.split(), f"--tasks={given}"])[1].tasks == (0, 3)


def test_one_task_needs_no_brackets_either() -> None:
    assert cli.parse(["collect", "--tasks", "0"])[1].tasks == (0,)
    assert cli.parse(["collect", "--tasks", "[]"])[1].tasks == ()


@pytest.mark.parametrize("name", ["1.10", "2024_01", "007", "yes", "null", "12:30", "[a", 'a"b', "-x"])
def test_names_and_folders_are_taken_letter_by_letter(name: str) -> None:
    _, parsed = cli.parse(["train", "--run_id", name, f"--run_root_dir={name}"])
    assert (parsed.run_id, str(parsed.run_root_dir)) == (name, name)


def test_none_leaves_a_flag_without_a_value() -> None:
    _, parsed = cli.parse(["train", "--run_id", "None", "--logit_softcap", "None", "--use_gpu", "None"])
    assert (parsed.run_id, parsed.logit_softcap, parsed.use_gpu) == (None, None, None)


def test_a_negative_number_is_a_value_in_any_notation() -> None:
    assert cli.parse(["train", "--eta", "-1e-3"])[1].eta == cli.parse(["train", "--eta=-0.001"])[1].eta == -0.001


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trane", "Did you mean train?"),
        ("train --betta 1", "Did you mean --beta?"),
        ("train --beta much", "Couldn't parse 'much' into a float"),
        ("train --loss_type square", "choose from 'sigmoid', 'hinge'"),
        ("train --batch_size 0", "--batch_size 0; expected a number above 0"),
        ("train --use_lora False", "--objective sft"),
        ("train --use_lora False --objective sft --lora_dropout 0.1", "--lora_dropout 0.1"),
        ("evaluate --pretrained_checkpoint x --task_suite_name libero_kitchen", "libero_spatial"),
        ("evaluate", "--pretrained_checkpoint"),
        ("evaluate --pretrained_checkpoint x --num_envs -1", "--num_envs -1; expected 0 or more"),
        ("collect --tasks 0,x", "Couldn't parse 'x' into an int"),
        ("collect --tasks --seed 1", "argument --tasks: expected one argument"),
        ("report", "spvla report without a folder; expected spvla report RUN."),
        ("status --help_me 1", "unknown flag --help_me"),
        ("regenerate", "spvla regenerate without a folder; expected spvla regenerate --demos FOLDER."),
        ("sweep --max_concurent 2 --beta 0.3,0.7", "Did you mean --max_concurrent?"),
        ("sweep --beta 0.3,0.7 --max_steps", "argument --max_steps: expected one argument"),
        ("train --config_path nowhere.yaml", "No such file or directory: 'nowhere.yaml'"),
        ("train --beta [1", "expected ',' or ']'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.startswith("spvla: ") and printed.count("\n") == 1


def test_no_librarys_deprecation_reaches_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        cli.hush_warnings()
        warnings.simplefilter("always")  # as a library may do when it is imported
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == ""


def test_user_errors_survive_a_trip_through_a_pickle() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError("a", expected="b", remedy="c")))
    assert str(error) == "a; expected b. c"


def test_every_command_has_a_one_line_purpose() -> None:
    assert all(cli.doc_line(cls).endswith((".", "...`")) for cls, _ in cli.COMMANDS.values())
    assert config.TrainConfig().objective == "spin"


@pytest.mark.parametrize("line", ["doctor --world", "doctor --world True", "doctor --quiet False --world"])
def test_a_switch_alone_turns_itself_on(line: str) -> None:
    parsed = cli.parse(line.split())[1]
    assert (parsed.world, parsed.quiet, parsed.install_egl) == (True, False, False)


def test_a_switch_alone_does_not_shift_what_a_sweep_varies() -> None:
    parsed = cli.parse(["sweep", "--any_mujoco", "--image_aug", "--beta", "0.3,0.7"])[1]
    assert parsed.any_mujoco and parsed.train.image_aug and parsed.space == {"beta": "0.3,0.7"}


@pytest.mark.parametrize("line", ["collect", "demo", "regenerate --demos ."])
def test_a_command_that_simulates_says_in_one_line_that_this_machine_cannot_draw(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert cli.run(line.split()) == 2
    assert (
        capsys.readouterr().err == "spvla: MUJOCO_GL=glfw; expected egl or osmesa. Correct it, or unset it for egl.\n"
    )
