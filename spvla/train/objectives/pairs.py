"""What SPIN and the original fork's form share: the loss of a pair, and its measures.

Legend: B batch, A action tokens, V vocabulary. `real` is the demonstrated action y, `generated` the other one, y'.
`policy` is what is trained; `opponent` is the reference policy, frozen while a pair is scored.
"""

from abc import abstractmethod

from torch import Tensor

from spvla.config import StepConfig
from spvla.errors import UserError
from spvla.train.family import Family
from spvla.train.losses import reduce_tokens, spin_loss
from spvla.train.measures import Columns, Measures, imitation
from spvla.train.objectives.base import Losses, Objective
from spvla.train.scoring import Inputs, ReferenceOutput


def collided(inputs: Inputs, reference: ReferenceOutput) -> Tensor:
    """(B,) bool: the opponent's action is the real one, so the pair carries no signal."""
    return (reference.generated == inputs.real).all(-1)


class PairObjective(Objective):
    """Subclasses say what y' is, and how both models score it."""

    def __init__(self, config: StepConfig) -> None:
        super().__init__(config)
        if not config.use_lora:
            raise UserError(
                f"--use_lora False with --objective {config.objective}",
                expected="LoRA, because opponent and policy are adapters on one base",
                remedy="Drop --use_lora False, or use --objective sft.",
            )
        if config.loss_columns != "all":
            raise UserError(
                f"--loss_columns {config.loss_columns} with --objective {config.objective}",
                expected="all, for self-play",
                remedy="Drop --loss_columns: the probabilities are the same.",
            )
        self.label = f"{config.objective}-beta{config.beta:g}-eta{config.eta:g}"

    @property
    def has_reference(self) -> bool:
        return True

    def counts(self, inputs: Inputs, reference: ReferenceOutput | None) -> Tensor | None:
        assert reference is not None
        return ~collided(inputs, reference) if self.config.drop_collisions else None

    @abstractmethod
    def score(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The policy's logits of the real action (B, R, V), and its log-probs of y' (B, A)."""

    def losses(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput | None, columns: Columns, patches: Tensor
    ) -> Losses:
        assert reference is not None
        logits, generated_logps = self.score(family, inputs, reference, patches)
        action_logits = logits[:, : inputs.real.shape[1]]
        imitated = imitation(logits, inputs, columns, self.config.logit_softcap)
        pairs = self.pair_measures(self.sampler.logps(action_logits, inputs.real), generated_logps, reference)
        return Losses(
            sample=self.config.sft_weight * imitated["train_loss"],
            pair=pairs.pop("selfplay_loss"),
            measures=imitated | pairs | {"collision_rate": collided(inputs, reference).float()},
            outputs=action_logits,
            is_hard=self.is_hard(imitated["train_loss"]),
        )

    def pair_measures(self, real_logps: Tensor, generated_logps: Tensor, reference: ReferenceOutput) -> Measures:
        """From the policy's log-probs of each token, (B, A) twice; names are the original fork's."""
        config = self.config
        names = ("policy_real_logps", "policy_generated_logps", "opponent_real_logps", "opponent_generated_logps")
        tokens = (real_logps, generated_logps, reference.real_logps, reference.generated_logps)
        logps = {name: reduce_tokens(t, config.logp_reduction) for name, t in zip(names, tokens, strict=True)}
        pair = spin_loss(*logps.values(), beta=config.beta, eta=config.eta, loss_type=config.loss_type)
        return {
            "selfplay_loss": pair.loss,
            **{name: value.detach() for name, value in logps.items()},
            "normalized_loss": -real_logps.detach().mean(-1),
            "real_rewards": pair.real_rewards,
            "generated_rewards": pair.generated_rewards,
            "margin": pair.real_rewards - pair.generated_rewards,
        }
