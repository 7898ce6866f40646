"""Settings of training on a model's own answers: what is sampled, how it is scored, and what is learned from it.

No torch here: the command line reads this module to print its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from arriero.errors import check
from arriero.io.paths import PathText
from arriero.train.config import LoopConfig, OptimConfig, TuneConfig


@dataclass(frozen=True)
class PromptConfig:
    """What is asked."""

    train: PathText = ""
    """Prompts: a file (JSONL, JSON, CSV, Parquet) with a column `prompt` (text or messages), a directory of them, or a
    Hub data set id. All other columns are for the reward."""
    validation: PathText = "0.1"
    """A file, or the share of what is asked to hold out; 0 validates on nothing."""
    max_prompt: int = 1024
    """Longest prompt, in tokens."""
    max_truncated: float = 0.05
    """Largest share of prompts longer than max_prompt that is tolerated (they are left out); above it, an error."""
    raw: bool = False
    """Give the prompts as plain text to continue, without the chat template."""
    validation_prompts: int = 256
    """Held-out prompts that are answered at each validation, at most."""

    def __post_init__(self) -> None:
        check(self.max_prompt >= 1, f"max_prompt is {self.max_prompt}; it must be at least 1")
        check(0 <= self.max_truncated <= 1, f"max_truncated is {self.max_truncated}; it is a share, in [0, 1]")
        check(self.validation_prompts >= 1, f"validation_prompts is {self.validation_prompts}; it must be at least 1")


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled, by the inference engine with the current weights."""

    answers: int = 8
    """Answers to each prompt: a group."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; longer ones are cut."""
    environment: str = ""
    """What replies to answers, over several turns, and gives the rewards: FILE.py:CLASS, or one that
    rewards/environment.py knows, as guess-number. Empty: an answer is all, and `reward` scores it."""
    turns: int = 8
    """Answers in an episode of an environment, at most."""
    max_reply: int = 128
    """Longest reply of an environment, in tokens, the template's included; a longer one counts as a crash."""
    turn_seconds: float = 10.0
    """What an environment may take for a turn; one that takes longer ends its episode with the outcome timeout."""
    temperature: float = 1.0
    """Of sampling, over the whole vocabulary. The trainer computes its log-probabilities at the same one; top-k and
    top-p would need them renormalised, so there are none."""
    truncated: Literal["mask", "score"] = "mask"
    """What becomes of cut answers: mask leaves them out of the group and of every denominator, score takes what the
    reward gives them (verifiers: 0)."""
    overlong_margin: int = 0
    """Tokens before max_new_tokens over which a penalty on the reward grows from 0 to 1 (DAPO, arXiv 2503.14476,
    section 3.4: a fifth of max_new_tokens); wants truncated = score. 0: none."""
    dynamic: int = 0
    """Further rounds of prompts in a step, at most, to make up for groups whose answers all have one reward (DAPO,
    section 3.2); 0: such groups are left out."""
    prefer_middle: bool = False
    """Prefer prompts that were solved 20 to 80% of the time when last seen, and new ones."""
    at_once: int = 128
    """Answers that are decoded at a time."""
    rollout: str = "here"
    """Where answers are sampled: here, in this process; ray, in a process of its own on this machine; ray:HOST:PORT, in
    one of a Ray cluster, where `model` has to name the same files; or http://HOST:PORT, by a server, vLLM's or `arriero
    serve`, that has the base and is sent adapters."""
    rollout_lag: int = 0
    """Steps by which the weights that sample lie behind those that learn; with ray both go on at the same time. The
    importance weights (`correction`) make up for it. The first steps have answers of the first weights."""
    mismatch_stop: float = 1.05
    """Mean of exp|difference| of the sampler's and the trainer's log-probabilities above which the run stops: the same
    weights should give 1.00 to 1.02 in bf16."""
    validation_answers: int = 4
    """Answers to each held-out prompt, sampled as in training: their mean reward is pass@1."""

    def __post_init__(self) -> None:
        for name in ("answers", "max_new_tokens", "at_once", "validation_answers", "turns", "max_reply"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(
            0 < self.temperature < math.inf,
            f"temperature is {self.temperature}; it must be above 0: greedy answers to one prompt are all the same",
        )
        check(self.dynamic >= 0, f"dynamic is {self.dynamic}; it must be at least 0 (0: no further rounds)")
        check(self.mismatch_stop > 1, f"mismatch_stop is {self.mismatch_stop}; it must be above 1")
        check(
            0 <= self.overlong_margin <= self.max_new_tokens,
            f"overlong_margin is {self.overlong_margin}; it is from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        check(
            not self.overlong_margin or self.truncated == "score",
            f"overlong_margin is {self.overlong_margin} and truncated is mask: an answer that is left out is not "
            "penalised; set truncated to score",
        )
        check(
            self.rollout in ("here", "ray") or self.rollout.startswith(("ray:", "http://", "https://")),
            f"rollout is {self.rollout!r}; it is here, ray, ray:HOST:PORT, or http://HOST:PORT",
        )
        check(self.rollout_lag >= 0, f"rollout_lag is {self.rollout_lag}; it must be at least 0 (0: none)")
        check(
            not (self.rollout_lag and self.dynamic),
            f"rollout_lag is {self.rollout_lag} and dynamic {self.dynamic}: further rounds would wait for the rewards "
            "of steps to come; set one of them to 0",
        )
        check(0 < self.turn_seconds < math.inf, f"turn_seconds is {self.turn_seconds}; it must be above 0")

    @property
    def own_tokens(self) -> int:
        """Most tokens of an episode that the policy chooses."""
        return self.max_new_tokens * (self.turns if self.environment else 1)

    @property
    def longest(self) -> int:
        """Most tokens behind a prompt: answers, and replies between them."""
        return self.own_tokens + (self.max_reply * (self.turns - 1) if self.environment else 0)


@dataclass(frozen=True)
class PolicyConfig:
    """What is learned from the answers; docs/rl.md says which to choose."""

    loss: Literal["clipped", "gspo", "cispo", "dppo", "reinforce"] = "clipped"
    """PPO's clipped surrogate; GSPO (one ratio an answer; wants clips of 3e-4); CISPO (clipped weights); DPPO (a mask
    by divergence); REINFORCE."""
    normalise: Literal["tokens", "answers", "longest"] = "tokens"
    """What counts alike: every token (DAPO), every answer (GRPO's paper), or every token, divided by max_new_tokens
    (Dr. GRPO)."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high are clipped; above clip_low is DAPO's clip-higher, which keeps entropy up."""
    dual_clip: float = 0.0
    """Largest weight of a token with a negative advantage (usual: 3); 0 leaves it free."""
    dppo_threshold: float = 0.1
    """Divergence above which DPPO masks a token that moves on outward."""
    correction: Literal["none", "truncate", "mask"] = "truncate"
    """Importance weights for what sampler and trainer differ by: at most correction_high, or no tokens outside both."""
    correction_low: float = 0.5
    """Smallest weight that mask keeps."""
    correction_high: float = 2.0
    """Largest weight."""
    kl: float = 0.0
    """Weight of the KL divergence from the model as it was before the run; 0 does not compute it in steps."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the divergence is: taken off the reward (k1 is unbiased there), or a term of the loss (k2 is)."""
    kl_kind: Literal["k1", "k2", "k3"] = "k2"
    """Its estimator."""
    updates: int = 1
    """Optimizer steps on one batch of answers: each takes a share of its prompts. More go on from older answers."""
    passes: int = 1
    """Passes over one batch of answers."""

    def __post_init__(self) -> None:
        check(0 <= self.clip_low <= 1, f"clip_low is {self.clip_low}; it is in [0, 1]")
        for name in ("clip_high", "dual_clip", "kl", "dppo_threshold"):
            check(0 <= getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; it must be at least 0")
        check(self.dual_clip == 0 or self.dual_clip > 1, f"dual_clip is {self.dual_clip}; it must be above 1, or 0")
        check(
            0 <= self.correction_low < 1 < self.correction_high,
            f"correction_low {self.correction_low} and correction_high {self.correction_high} must lie around 1",
        )
        for name in ("updates", "passes"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(
            not (self.kl and self.kl_in == "loss" and self.kl_kind == "k1"),
            "kl_kind is k1 in the loss, where its gradient has mean 0; take k2 there, or kl_in reward",
        )


@dataclass(frozen=True)
class RlConfig(TuneConfig):
    """What every recipe is told that learns from a model's own answers."""

    reward: str = ""
    """What scores the answers: exact or numeric, against the row's `answer`, or another that rewards/open.py knows, as
    python:mine.py:reward. Empty: exact, or the environment."""
    validation_reward: str = ""
    """What scores held-out answers, where that is another: a verifier beside a reward model, whose score is only a
    proxy. The weights that are kept are the best by it; `proxy` logs what `reward` gives the same answers."""
    samples: int = 8
    """Held-out prompts whose answers are shown in the report, over time; 0 for none."""
    data: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, schedule="constant"))
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=100, batch_rows=16, micro_rows=4, precision="fp32")
    )
    """fp32 by default: sampler and trainer then agree to 1e-5, in bf16 to two hundredths of a nat a token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.samples >= 0, f"samples is {self.samples}; it must be at least 0")
        check(
            not (self.reward not in ("", NO_REWARD) and self.rollout.environment),
            f"reward is {self.reward} and environment {self.rollout.environment}, which gives the rewards itself; "
            "leave one of them out",
        )
        check(
            not (self.validation_reward and self.rollout.environment),
            f"validation_reward is {self.validation_reward} and environment {self.rollout.environment}, which gives "
            "the rewards itself; leave one of them out",
        )
        check(
            not (self.validation_reward and self.data.validation == "0"),
            f"validation_reward is {self.validation_reward}, and validation is 0: nothing is held out that it could "
            "score; set validation to a file or a share",
        )
        check(
            not (self.data.raw and self.rollout.environment),
            "raw is on, and an environment speaks through the chat template; leave one of them out",
        )
        check(
            self.parallel.pp == 1 and self.parallel.cp == 1,
            f"pp is {self.parallel.pp} and cp {self.parallel.cp}; answers are short rows: take dp_shard, dp_replicate "
            "or tp",
        )
        check(
            self.lora.dropout == 0,
            f"dropout is {self.lora.dropout}; with it the trainer's log-probabilities are not the sampler's: set 0",
        )

    @property
    def scored_by(self) -> str:
        """What gives the rewards, for people and the journal."""
        return self.rollout.environment or self.reward or "exact"

    @property
    def learned(self) -> int:
        """Answers to a prompt that a step learns from, at most."""
        return self.rollout.answers

    @property
    def reads(self) -> int:
        """How often a step reads each of them with gradient."""
        return 1


NO_REWARD = "none"


@dataclass(frozen=True)
class OnPolicyDistillConfig(RlConfig):
    """On-policy distillation: the model answers, and is drawn to a larger model's distribution of each token there."""

    out: PathText = "out/on-policy"
    """Run directory: config, metrics, rollouts, checkpoints, report, and the trained adapter or model."""
    teacher: PathText = ""
    """The model to learn from, of the same tokenizer: a directory, a .gguf file, a Hub id, or a built-in name."""
    divergence: Literal["forward", "reverse", "symmetric"] = "reverse"
    """reverse, KL(model || teacher), keeps to what the teacher finds likely; forward covers all that it would say;
    symmetric is their mean (arXiv 2306.13649)."""
    top_k: int = 0
    """Most probable tokens of the teacher that are compared one by one, all others as one; 0 compares all."""
    reward: str = NO_REWARD
    """What the answers are worth, where that is to be watched, as in arriero grpo; nothing is learned from it."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(answers=1, truncated="score"))
    """An answer that is cut is learned from as far as it goes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.top_k >= 0, f"top_k is {self.top_k}; it must be at least 0 (0: the whole vocabulary)")
        check(
            self.parallel.tp == 1,
            f"tp is {self.parallel.tp}; distillation reads whole rows of logits: take dp_shard instead of tp",
        )
        check(
            not self.validation_reward,
            f"validation_reward is {self.validation_reward}; no reward is learned from here: give it as reward",
        )
        check(
            not self.rollout.dynamic,
            f"dynamic is {self.rollout.dynamic}; every answer is learned from here, whatever its reward: set it to 0",
        )

    @property
    def rewarded(self) -> bool:
        """Whether answers are scored."""
        return bool(self.rollout.environment) or self.reward != NO_REWARD


@dataclass(frozen=True)
class PolicyRlConfig(RlConfig):
    """What recipes are told besides that learn by the gradient of a policy."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, updates = self.loop.batch_rows, self.policy.updates
        check(
            rows % updates == 0,
            f"batch_rows {rows} (prompts in a step) is not a multiple of updates {updates}; change one of them",
        )

    @property
    def reads(self) -> int:
        """How often a step reads each answer with gradient."""
        return self.policy.passes


@dataclass(frozen=True)
class ValueConfig:
    """The value model, which says at each token what reward is to come."""

    value_lr: float = 0.0
    """Its peak learning rate; 0 takes five times the policy's."""
    value_clip: float = 0.0
    """How far a value may move from the one before the updates, in reward; 0 does not clip."""
    gamma: float = 1.0
    """Discount a token."""
    gae_lambda: float = 0.95
    """1: returns less values, unbiased; 0: one step ahead; between: less variance (arXiv 1506.02438)."""
    whiten_scores: bool = False
    """Shift and scale the scores of a batch to mean 0 and deviation 1 (Llama 2, arXiv 2307.09288, section 3.2.3)."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a batch likewise."""
    warmup_steps: int = 2
    """First steps in which only the value model learns."""

    def __post_init__(self) -> None:
        for name in ("value_lr", "value_clip"):
            check(0 <= getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("gamma", "gae_lambda"):
            check(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it is in [0, 1]")
        check(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must be at least 0")


@dataclass(frozen=True)
class PpoConfig(PolicyRlConfig):
    """Proximal policy optimisation: answers are judged token by token by a value model that learns alongside."""

    out: PathText = "out/ppo"
    """Run directory: config, metrics, rollouts, checkpoints, report, and the trained adapter or model."""
    value: ValueConfig = field(default_factory=ValueConfig)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(answers=8))
    """Several answers to a prompt cost less than as many prompts: all of them read it once."""
    policy: PolicyConfig = field(
        default_factory=lambda: PolicyConfig(clip_high=0.2, kl=0.01, kl_in="reward", kl_kind="k1", updates=4)
    )
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=100, batch_rows=8, micro_rows=2, precision="fp32")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.rollout.dynamic,
            f"dynamic is {self.rollout.dynamic}; ppo learns from every answer, whatever the others of its prompt: 0",
        )
        check(
            not (self.value.whiten_scores and self.rollout.environment),
            "whiten_scores is on, and an environment's rewards stand at turns, not at answers; set it off",
        )


@dataclass(frozen=True)
class GrpoConfig(PolicyRlConfig):
    """Reinforcement learning from groups of answers, which judge each other: GRPO and its relatives."""

    out: PathText = "out/grpo"
    """Run directory: config, metrics, rollouts, checkpoints, report, and the trained adapter or model."""
    advantage: Literal["group", "centred", "rloo", "reinforce++"] = "group"
    """An answer against its group: divided by the group's deviation (GRPO), only centred (Dr. GRPO), against the others
    (RLOO); or centred, then whitened over the batch (REINFORCE++)."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(updates=4))

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rollout.answers >= 2, f"answers is {self.rollout.answers}; a group has at least 2, to be compared")
