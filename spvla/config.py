"""One frozen dataclass per command; its fields are the command's flags, named as OpenVLA's users know them.

A flag's help is the string below its field. Values are checked in `check()`, before anything heavy is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from spvla.errors import UserError
from spvla.files import expanded, paths_in

# Named, because draccus misses the text below a field whose annotation holds quotation marks.
Objective = Literal["spin", "spvla", "sft"]
LossType = Literal["sigmoid", "hinge"]
Reduction = Literal["sum", "mean"]
OpponentUpdate = Literal["iteration", "ema"]
DecayOn = Literal["all", "matrices"]
LossColumns = Literal["all", "action"]
LrSchedule = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "bf16", "fp32"]
FrameMode = Literal["auto", "decoded", "stored"]
AugmentOn = Literal["auto", "host", "device"]
ExportFormat = Literal["rlds", "lerobot"]
CropOffsets = Literal["diagonal", "independent"]
WandbMode = Literal["online", "offline"]
ModelFamily = Literal["openvla"]
Starts = Literal["fresh", "test"]
Metric = Literal["success_rate", "val_action_accuracy"]

# What a number may be, in every command that has the flag. None is no number: it stands for a default.
ABOVE_0 = (
    *("batch_size", "beta", "call_timeout_s", "grad_accumulation_steps", "iterations", "learning_rate", "logit_scale"),
    *("logit_softcap", "lora_rank", "max_grad_norm", "max_nonfinite_steps", "max_steps", "max_trial_steps"),
    *("num_demos_per_task", "num_images_in_input", "num_open_loop_steps", "num_samples", "num_trials_per_task"),
    *("promote_level", "save_steps", "skip_hard_above"),
    *("worker_memory_gb",),
)
AT_LEAST_0 = (
    *("adam_beta1", "adam_beta2"),
    *(
        "adam_beta1",
        "adam_beta2",
        "decode_batch_size",
        "lora_dropout",
        "max_concurrent",
        "max_failure_videos",
        "max_failures",
        "max_retries",
    ),
    *(
        "num_decoders",
        "num_envs",
        "port",
        "num_steps_wait",
        "num_videos",
        "num_workers",
        "opponent_temperature",
        "seed",
    ),
    *("noise", "noise_share", "sft_weight", "val_steps", "wait_ms", "warmup_steps", "weight_decay"),
)
AT_MOST_1 = ("noise", "noise_share")
BELOW_1 = ("adam_beta1", "adam_beta2", "lora_dropout", "promote_level")


def require(condition: bool, got: str, *, expected: str, remedy: str) -> None:
    if not condition:
        raise UserError(got, expected=expected, remedy=remedy)


def require_values(config: Any, *, above_0: Sequence[str] = ABOVE_0) -> None:
    """Raises UserError for a value that a flag cannot have, whatever the others are."""
    for field in fields(config):
        flag, value = field.name, getattr(config, field.name)
        if isinstance(value, Path):
            expanded(value, flag=f"--{flag}")
        bounds = [(value is not None or type(None) in get_args(field.type), "a value")]
        if isinstance(value, int | float):
            bounds += [
                (math.isfinite(value), "a finite number"),
                (flag not in above_0 or value > 0, "a number above 0"),
                (flag not in AT_LEAST_0 or value >= 0, "0 or more"),
                (flag not in BELOW_1 or value < 1, "a number below 1"),
                (flag not in AT_MOST_1 or value <= 1, "1 or less"),
            ]
        for holds, expected in bounds:
            require(holds, f"--{flag} {value}", expected=expected, remedy=f"Correct --{flag}.")


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Record demonstrations with the scripted experts, as an indexed data set."""

    task_suite_name: str = "libero_object"
    """libero_spatial, libero_object, libero_goal or libero_10, or several separated by commas: a data set each"""
    num_demos_per_task: int = 50
    """successful demonstrations to keep for each task"""
    tasks: tuple[int, ...] = ()
    """task numbers, such as 0,3; all by default"""
    data_root_dir: Path = Path("datasets")
    """folder that gets the data set <suite>_no_noops"""
    libero_assets: Path | None = None
    """folder of LIBERO's assets, or `primitives`; default LIBERO_ASSETS, else those that are installed"""
    num_workers: int = 0
    """parallel environments; 0: one for each CPU of the cluster"""
    starts: Starts = "fresh"
    """fresh: drawn as LIBERO draws them; test: the init states that evaluation begins at"""
    noise: float = 0.0
    """disturbs what the expert does, from 0 to 1, and records its clean answer (DART); 0.12 is a good value"""
    noise_share: float = 0.6
    """share of the demonstrations that is disturbed"""
    seed: int = 7

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """Replay LIBERO's own HDF5 demonstrations, drop no-ops, keep successes, as an indexed data set."""

    demos: Path
    """folder with LIBERO's *_demo.hdf5 files of one suite"""
    task_suite_name: str = "libero_spatial"
    data_root_dir: Path = Path("datasets")
    libero_assets: Path | None = None
    num_workers: int = 0
    """parallel environments; 0: one for each CPU of the cluster"""

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a data set in the RLDS form that OpenVLA's own scripts read, or as a LeRobotDataset v3."""

    data_root_dir: Path = Path("datasets")
    dataset_name: str = "libero_object_no_noops"
    format: ExportFormat = "rlds"
    """rlds: of a recorded data set; lerobot: of any indexed one, its pictures as video"""
    out: Path | None = None
    """folder that gets NAME/1.0.0, or NAME for lerobot; default: --data_root_dir (and NAME_lerobot)"""

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Read a TFDS data set or a LeRobotDataset v3 once into an indexed store, with its statistics."""

    data_root_dir: Path = Path("datasets")
    """folder that holds the data set's folder"""
    dataset_name: str = "libero_object_no_noops"
    skip_corrupt: bool = False
    """go on past corrupt records, counting them"""
    num_workers: int = 0
    """parallel shards; 0: one for each CPU of the cluster"""

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class PairFlags:
    """Read by the objectives that compare two actions (train/objectives/pairs.py)."""

    beta: float = 0.1
    """strength of the self-play margin"""
    sft_weight: float = 0.0
    """weight of the cross entropy added to the self-play loss"""
    logp_reduction: Reduction = "sum"
    """how an action's token log-probs become one; the fork averaged"""
    opponent_temperature: float = 0.0
    """0: the opponent acts greedily; 1: its answer is drawn, as SPIN has it"""
    drop_collisions: bool = False
    """leave pairs whose generated action equals the real one out of the mean"""


@dataclass(frozen=True, kw_only=True)
class ForkFlags(PairFlags):
    """The original self-play fork's own additions to them."""

    eta: float = 0.0
    """weight of the fork's entropy term: sigmoid's loss is
    -log sigmoid(beta margin - eta (opponent_real - policy_generated))"""
    loss_type: LossType = "sigmoid"
    opponent_update: OpponentUpdate = "iteration"
    """iteration: the opponent stays the start policy; ema: it follows the policy after each step"""
    ema_decay: float = 0.9999
    skip_hard_above: float | None = None
    """skip a batch whose cross entropy is at least this"""
    logit_scale: float = 1.0
    """logits are divided by this before log-probs are taken"""


@dataclass(frozen=True, kw_only=True)
class StepConfig(ForkFlags):
    """The training flags that one optimiser step depends on."""

    objective: Objective = "spin"
    """spin: SPIN (arXiv 2401.01335); spvla: the original self-play fork's form; sft: behaviour cloning"""
    loss_columns: LossColumns = "all"
    """action: sft takes the loss of the action tokens alone, not of the end of sequence, and computes no logits of
    other words. Their rows of the output head must be zeros, as in the presets, and stay so; the probabilities are
    those of all"""
    logit_softcap: float | None = None
    """cap logits smoothly: cap * tanh(logits / cap)"""
    use_lora: bool = True
    """False trains every weight (sft only)"""
    lora_dropout: float = 0.0
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    weight_decay_on: DecayOn = "all"
    """matrices: not norms, biases and scales, as is usual where a policy is learnt from nothing"""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    """0.95 is usual where a policy is learnt from nothing"""
    lr_schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    max_steps: int = 200_000
    """optimiser steps"""
    seed: int = 7
    max_nonfinite_steps: int = 10
    """stop after so many non-finite steps in a row"""
    compile: bool = False
    """torch.compile the forward passes (GPU)"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """Fine-tune a policy by self-play (or plain behaviour cloning), as a Ray Train run."""

    vla_path: str = "openvla/openvla-7b"
    """start policy: a checkpoint or adapter folder, a Hugging Face name in the local cache, or random weights
    (from --seed) of the presets 'small' and 'tiny', or in chunks of 'small-oft' and 'tiny-oft'"""
    data_root_dir: Path = Path("datasets")
    """folder of TFDS data sets; an index is built beside each when it is missing"""
    dataset_name: str = "libero_spatial_no_noops"
    """one data set, or several with weights: 'libero_spatial_no_noops:1,libero_goal_no_noops:2'"""
    run_root_dir: Path = Path("runs")
    """folder that gets the run's folder"""
    adapter_tmp_dir: Path = Path("adapter-tmp")
    """where adapters wait while they are being merged"""
    run_id: str | None = None
    """name of the run's folder; by default made from the flags, so that the same command goes on where it stopped"""
    run_id_note: str | None = None
    """added to that name"""

    use_l1_regression: bool | None = None
    """OpenVLA-OFT: actions are regressed; this and the next two make a chunk policy of a plain one, or must agree with
    what the start policy is"""
    use_proprio: bool | None = None
    """OpenVLA-OFT: the policy reads the robot's state"""
    num_images_in_input: int | None = None
    """OpenVLA-OFT: 2 with the wrist camera's image"""

    lora_rank: int = 32
    batch_size: int = 16
    """samples a worker and a pass; the effective batch is this x num_workers x grad_accumulation_steps"""
    grad_accumulation_steps: int = 1
    save_steps: int = 5000
    """optimiser steps between checkpoints"""
    save_latest_checkpoint_only: bool = True
    save_merged: bool = False
    """also write the merged model with each checkpoint, beside training"""
    image_aug: bool = True
    augment_on: AugmentOn = "auto"
    """host: in the original's arithmetic, to the bit; device: the same formulas, within two levels of 255;
    auto: the device where that is a GPU"""
    crop_offsets: CropOffsets = "diagonal"
    """diagonal: one draw for both offsets of a crop, as the original does; independent: one for each"""
    frames: FrameMode = "auto"
    """decoded: decode every picture once, into shared memory or the cache; stored: for every batch anew; auto: decoded
    where they fit, if the run sees each frame at least once"""
    skip_corrupt: bool = False
    """while indexing: go on past corrupt records, counting them"""
    val_split_from_train: bool = True
    """hold out the last 5% of episodes when the data set has no validation split, as the original does"""
    val_steps: int = 0
    """optimiser steps between passes over the validation split; 0: never"""
    precision: Precision = "auto"
    """of weights and activations; auto: bf16 on a GPU, fp32 on a CPU"""

    num_workers: int = 1
    """Ray Train workers (data-parallel ranks); a run that --run_id names may go on with another number, from the very
    next sample, and with the effective batch that follows from it"""
    use_gpu: bool | None = None
    """one GPU a worker; by default when the cluster has enough"""
    max_failures: int = 3
    """times a failed worker group is restarted from the last checkpoint"""

    use_wandb: bool = False
    wandb_project: str = "spvla"
    wandb_entity: str | None = None
    wandb_mode: WandbMode = "online"

    def check(self) -> None:
        require_values(self, above_0=(*ABOVE_0, "num_workers"))
        require(
            self.use_lora or not self.lora_dropout,
            f"--use_lora False with --lora_dropout {self.lora_dropout}",
            expected="LoRA, whose rows the dropout is for",
            remedy="Drop one of the two.",
        )
        require(
            0 <= self.ema_decay <= 1,
            f"--ema_decay {self.ema_decay}",
            expected="a number from 0 to 1",
            remedy="The fork used 0.9999.",
        )


@dataclass(frozen=True, kw_only=True)
class FarmConfig:
    """The farm's own flags, shared by every command that evaluates."""

    libero_assets: Path | None = None
    """folder of LIBERO's assets, or `primitives`; default LIBERO_ASSETS, else those that are installed"""
    any_mujoco: bool = False
    """simulate with a MuJoCo that published checkpoints do not know; such rates compare with each other only"""
    num_envs: int = 0
    """environment actors; 0: one for each CPU of the cluster that the policy actors leave, or 32 for each policy actor
    where machines come on demand"""
    num_decoders: int = 0
    """policy actors; 0: one for each GPU, or one on CPU or where machines come on demand"""
    decode_batch_size: int = 0
    """pad every decoded batch to this many rows, so that an action does not depend on the other requests in it; 0: as
    the ledger began, or half of a policy actor's environments"""
    repeatable: bool = True
    """False decodes batches at their own size: faster when they are small, and dependent on the load on a GPU"""
    wait_ms: float | None = None
    """longest wait for a fuller batch; by default tuned from measured rates"""
    max_retries: int = 3
    """times a trial is tried again after an infrastructure error"""
    call_timeout_s: float = 120.0
    """deadline of one trial's step or reset, after which its worker is killed"""
    num_videos: int = 1
    """successes to film per task, besides every failure up to --max_failure_videos"""
    max_failure_videos: int = 3
    worker_memory_gb: float = 4.0
    """an environment actor larger than this (resident) is replaced between two trials"""
    max_steps: int | None = None
    """cut every trial short, for trying things out; part of the protocol, so never mixed with whole trials"""

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(FarmConfig):
    """Roll a policy out on LIBERO, every trial exactly once, in parallel."""

    model_family: ModelFamily = "openvla"
    """does nothing: the family is found from the checkpoint's folder"""
    pretrained_checkpoint: str = ""
    """checkpoint or adapter folder, several separated by commas, or a Hugging Face name in the local cache"""
    task_suite_name: str = "libero_spatial"
    """one suite, or several separated by commas"""
    perturb: str = ""
    """LIBERO-PRO's variants of these suites instead: object, position, language, task; several separated by commas"""
    tasks: tuple[int, ...] = ()
    """task numbers, such as 0,3; all by default"""
    num_trials_per_task: int = 50
    num_steps_wait: int = 10
    """settling steps before the policy acts: objects fall"""
    center_crop: bool = True
    """crop 90% of the area, for policies trained with image_aug"""
    unnorm_key: str | None = None
    """key of the action statistics; by default the suite's name, or that + '_no_noops'"""
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    use_l1_regression: bool | None = None
    """OpenVLA-OFT: actions are regressed; this and the next three must agree with the checkpoint, which mostly says"""
    use_proprio: bool | None = None
    """OpenVLA-OFT: the policy reads the robot's state"""
    num_images_in_input: int | None = None
    """OpenVLA-OFT: 2 with the wrist camera's image"""
    num_open_loop_steps: int | None = None
    """of a chunk's actions the first so many are executed before the policy is asked again; all by default, and 5 at
    most of a policy server's"""
    policy_server: str = ""
    """instead of a checkpoint: ws://HOST:PORT of a server that speaks openpi's protocol, several separated by commas"""
    policy: str = ""
    """instead of a checkpoint: package.module:function that makes an object of the Policy protocol"""
    seed: int = 7
    """does nothing to a trial, whose init state is numbered; recorded with the results"""
    local_log_dir: Path = Path("experiments/logs")
    """folder that gets the ledger, the logs, videos and exports"""
    run_id_note: str | None = None
    follow: Path | None = None
    """a training run: evaluate each new checkpoint while it goes on"""
    stop_when_settled: bool = False
    """two checkpoints: stop as soon as their paired difference is settled"""
    use_wandb: bool = False
    wandb_project: str = "spvla"
    wandb_entity: str | None = None
    wandb_mode: WandbMode = "online"

    def check(self) -> None:
        super().check()
        require(
            not (self.load_in_8bit and self.load_in_4bit),
            "--load_in_8bit True with --load_in_4bit True",
            expected="one of the two",
            remedy="Leave one out.",
        )
        sources = ("pretrained_checkpoint", "follow", "policy_server", "policy")
        given = [f"--{name} {getattr(self, name)}" for name in sources if getattr(self, name)]
        require(
            len(given) == 1,
            " and ".join(given) or "no policy to evaluate",
            expected=f"one of {', '.join(f'--{name}' for name in sources)}",
            remedy="Give the checkpoint to evaluate, the training run to follow, or where another policy is.",
        )
        require(
            not self.stop_when_settled or len(paths_in(self.pretrained_checkpoint)) == 2,
            f"--stop_when_settled True with --pretrained_checkpoint {self.pretrained_checkpoint or '(none)'}",
            expected="two checkpoints to compare, separated by a comma",
            remedy="Name both, or leave --stop_when_settled out.",
        )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer anyone's client of openpi's websocket protocol with a checkpoint's actions."""

    pretrained_checkpoint: str
    """checkpoint or adapter folder, a Hugging Face name in the local cache, or a preset"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 for other machines, none of which has to show who it is"""
    port: int = 8000
    unnorm_key: str | None = None
    """key of the action statistics; needed where the checkpoint has several"""
    center_crop: bool = True
    """crop 90% of an image's area, for policies trained with image_aug; not of those that come cropped from evaluate"""
    decode_batch_size: int = 0
    """requests decoded together, padded to so many; 0: 8 on a GPU, 1 on a CPU"""
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    use_l1_regression: bool | None = None
    """as in evaluate, and so are the next three"""
    use_proprio: bool | None = None
    num_images_in_input: int | None = None
    num_open_loop_steps: int | None = None

    def check(self) -> None:
        require_values(self)
        require(0 < self.port < 65536, f"--port {self.port}", expected="1 to 65535", remedy="Correct --port.")


@dataclass(frozen=True, kw_only=True)
class SelfplayConfig(TrainConfig):
    """Self-play iterations: train against the last policy, evaluate, promote the better one."""

    iterations: int = 2
    task_suite_name: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    """task numbers, such as 0,3; all by default"""
    num_trials_per_task: int = 50
    num_steps_wait: int = 10
    center_crop: bool | None = None
    """by default as image_aug"""
    libero_assets: Path | None = None
    any_mujoco: bool = False
    """as in evaluate"""
    num_envs: int = 0
    num_decoders: int = 0
    promote_level: float = 0.05
    """significance level at which a worse policy is not promoted"""
    max_trial_steps: int | None = None
    """cut every trial short, for trying things out"""


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """A sweep's own flags."""

    num_samples: int = 1
    """draws of each range; lists are a grid"""
    metric: Metric = "success_rate"
    max_concurrent: int = 0
    """trials at once; 0: what the cluster holds"""
    task_suite_name: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    """task numbers, such as 0,3; all by default"""
    num_trials_per_task: int = 10
    libero_assets: Path | None = None
    any_mujoco: bool = False
    """as in evaluate"""
    num_envs: int = 0
    max_trial_steps: int | None = None
    """cut every trial short, for trying things out"""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SweepFlags):
    """Ray Tune over any training flags. `spvla sweep --beta 0.3,0.7 --learning_rate 'loguniform(1e-5,5e-4)' ...`"""

    space: dict[str, str]
    """training flag -> a comma list, uniform(a,b) or loguniform(a,b); made from the command line"""
    train: TrainConfig
    """every other training flag"""

    def check(self) -> None:
        self.train.check()
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML file about a run."""

    run: Path
    """run folder (also the first argument)"""
    out: Path | None = None
    """default: report.html in the run folder"""

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say where a run stands, from its folder alone."""

    run: Path
    """run folder (also the first argument)"""

    def check(self) -> None:
        require_values(self)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Report what this machine has, with a remedy for each gap."""

    install_egl: bool = False
    """install a missing EGL library where that is possible (root on Debian or Ubuntu)"""
    quiet: bool = False
    """print only what is missing to render"""
    world: bool = False
    """settle and draw LIBERO's forty tasks, and compare with stock LIBERO: a minute or two"""

    def check(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Remove the caches that this project wrote."""

    yes: bool = False
    """do it; without, only list"""

    def check(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Play the whole way once, in small: collect, index, warm start, self-play, evaluate, report."""

    out: Path = Path("demo")

    def check(self) -> None:
        require_values(self)
