"""The configuration of rollout: which responses a step samples, from which engine, and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.errors import CordError
from megatron_cord.rollout.schedule import ScheduleConfig
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How many responses a step samples, how, from which engine, and when."""

    engine: Literal["local", "sglang"] = "local"  #: local: transformers in the trainer's processes; sglang: servers
    prompts_per_step: int = 32  #: each gives one response to L_tok
    temperature: float = 1.0  #: of the responses for L_tok
    policy_prompts_per_step: int = 8  #: the first of the step's prompts also give groups to L_seq
    policy_rollouts: int = 4  #: N, responses a group; streams of the kind policy_gradient have their own
    policy_temperature: float = 1.5  #: of the responses for L_seq
    #: responses, those for L_seq too, are drawn from the likeliest tokens whose probabilities at their temperature
    #: reach this sum; 1 draws from all. The loss stays that of the whole distribution
    top_p: float = 1.0
    top_k: int = 0  #: and from so many of the likeliest tokens at most; 0 draws from all
    #: so often a step replaces groups whose rewards are all equal by groups of its next prompts (DAPO); what is left
    #: then stays as it is; 0 replaces none, as the paper
    dynamic_sampling: int = 0
    share: bool = False  #: L_tok scores the responses of L_seq instead of sampling its own
    max_new_tokens: int = 200  #: responses are cut there
    #: of a mixture of experts: responses carry the experts that the engine's routers chose, and the student chooses the
    #: same for the same tokens in training, so that its log-probabilities are the engine's
    router_replay: bool = False

    #: mean |difference| of trainer's and engine's log-probabilities, nats a token, beyond which a step stops the run;
    #: null never does
    max_logprob_mismatch: float | None = 0.25
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)

    def __post_init__(self) -> None:
        if self.max_logprob_mismatch is not None and self.max_logprob_mismatch <= 0:
            raise CordError("rollout.max_logprob_mismatch must be positive, or null for none")
        if self.prompts_per_step < 1 or self.policy_rollouts < 2:
            raise CordError("rollout.prompts_per_step must be at least 1 and rollout.policy_rollouts at least 2")
        if not 0 <= self.policy_prompts_per_step <= self.prompts_per_step:
            raise CordError(
                f"rollout.policy_prompts_per_step ({self.policy_prompts_per_step}) must lie between 0 and "
                f"rollout.prompts_per_step ({self.prompts_per_step})"
            )
        if self.dynamic_sampling < 0:
            raise CordError(f"rollout.dynamic_sampling cannot be negative, got {self.dynamic_sampling}")
        if self.dynamic_sampling and self.policy_prompts_per_step == self.prompts_per_step:
            raise CordError(
                "rollout.dynamic_sampling takes the step's other prompts, and there are none: make "
                f"rollout.prompts_per_step larger than rollout.policy_prompts_per_step ({self.policy_prompts_per_step})"
            )
        if self.dynamic_sampling and self.schedule.ahead:
            raise CordError(
                "rollout.dynamic_sampling needs rollout.schedule.ahead=0: which groups are replaced is known only "
                "when a step's responses have their rewards"
            )
        if self.temperature <= 0 or self.policy_temperature <= 0:
            raise CordError("rollout.temperature and rollout.policy_temperature must be positive")
        if not 0 < self.top_p <= 1:
            raise CordError(f"rollout.top_p is above 0 and at most 1, not {self.top_p}; 1 draws from all tokens")
        if self.top_k < 0:
            raise CordError(f"rollout.top_k cannot be negative, got {self.top_k}; 0 draws from all tokens")
        if self.engine == "sglang" and bool(self.sglang.servers) == (self.sglang.servers_file is not None):
            raise CordError(
                "rollout.engine=sglang needs rollout.sglang.servers or rollout.sglang.servers_file, one of the two; "
                "cord serve starts servers and writes such a file"
            )
        if self.engine == "sglang" and self.schedule.colocated and self.weight_sync.transport == "process_group":
            raise CordError(
                "rollout.schedule.colocated puts servers on the trainer's GPUs, and NCCL refuses a process group with "
                "two ranks on one GPU; set rollout.weight_sync.transport to shared_memory, or to disk"
            )
