"""The base model with everything that learns on it: what a learner holds from one update to the next."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from learner import probes
from learner.config import LearnerConfig
from learner.crossfit import RewardConfig
from learner.improve import Progress
from learner.judgement import Judgement, Key, Tokens, key_of
from learner.live import LiveReply
from learner.model import Batch, LearnerModel, length_sorted
from learner.recipe import ppo_config
from learner.reward import RewardModel
from learner.rollouts import Prompt, Rollout, Sampler
from learner.steps import POLICY
from learner.update import Candidate, Round
from serving.base import Base, describe_base
from serving.engine import Engine
from serving.lora import AdapterWeights
from serving.model import ModelError, load_model, twin

RANK = 16
SCALING = 2.0
ROLLOUT_CONTEXT = 1024
"""Positions of a rollout, prompt included, where `max_model_len` sets no limit."""
ROWS = 128
"""Rollouts that the engine makes side by side."""

T = TypeVar("T", bound=Tokens)


class Trainer:
    """The base model with everything that learns on it. One round at a time."""

    def __init__(self, config: LearnerConfig) -> None:
        """Load the base. Raises ModelError, and SettingError where the operator's probes are wrong."""
        serving = config.serving
        self.probes = probes.read_probes(config.probes)
        model, self.chat = load_model(serving.model, serving.device, serving.dtype)
        if model.device.type == "cpu":
            model = model.float()  # training in half types would be slower here, and less exact
        self.config = config
        self.base: Base = describe_base(model, self.chat, serving.model)
        self.model = LearnerModel(twin(model), (POLICY,), rank=RANK, scaling=SCALING, seed=config.seed)
        self._check_logits()
        self.reward = RewardModel(
            model.get_input_embeddings().get_parameter("weight").float().cpu(),
            self.chat.eos_ids,
            RewardConfig(),
            self.states,
        )
        reach = getattr(model.config, "max_position_embeddings", None) or ROLLOUT_CONTEXT
        self.max_len = min(serving.max_model_len or ROLLOUT_CONTEXT, int(reach))
        rows = min(ROWS, max(config.rollouts, config.gate_samples))
        engine = Engine(model, self.chat, rows=rows, max_len=self.max_len, slots=1, rank=RANK, seed=config.seed)
        self.sampler = Sampler(engine, config.rollout_tokens)
        self.probed = probes.encode(self.probes, self.chat, self.max_len - config.rollout_tokens)
        self.remembered: dict[Key, Tensor] | None = None
        """While a round runs: the states of the replies that it has asked for, since it asks for them again and again."""
        self.ppo = ppo_config(config, parameters=sum(p.numel() for p in model.parameters()))

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Some architectures scale or cap the logits after the head, which the learner does not. Raises ModelError."""
        ids_BT = torch.arange(1, 13, device=self.model.base.device)[None]
        whole_BTV = self.model.base(input_ids=ids_BT).logits.float()
        ours_BTV = self.model.logits(self.model.base.base_model(input_ids=ids_BT).last_hidden_state)
        if not torch.allclose(ours_BTV, whole_BTV, rtol=1e-2, atol=1e-2 * float(whole_BTV.std())):
            kind = type(self.model.base).__name__
            raise ModelError(f"Heed cannot learn on {kind}: it changes the logits after its head. It can be served.")

    def learn(
        self,
        judgements: Sequence[Judgement],
        prompts: Sequence[Prompt],
        *,
        parent: AdapterWeights | None,
        seed: int,
        served: Sequence[LiveReply] = (),
        progress: Progress = lambda phase, fraction, batch=None: None,
    ) -> Candidate:
        """A candidate from all judgements that count. `parent`: the version it would replace, None for the base.

        `served`: replies that may be experience beside fresh ones.

        When the reward model knows nothing the policy is not moved, and the gate says so.
        """
        self.remembered = {}
        try:
            return Round(self, judgements, prompts, parent, seed, served, progress).run()
        finally:
            self.remembered = None
            give_back_memory()

    def mean_kl(self, rollouts: Sequence[Rollout]) -> float:
        """Full-vocabulary KL of the policy to the reference, nats a reply, on replies that the policy made."""
        total, known = 0.0, {} if self.remembered is None else self.remembered
        for some, part in self.groups(rollouts):
            kl_B, states_BS = self.model.full_kl(part, POLICY)
            known.update(zip(map(key_of, some), states_BS, strict=True))
            total += float(kl_B.sum())
        return total / len(rollouts)

    def states(self, samples: Sequence[Tokens]) -> Tensor:
        """What the bare base makes of replies to their prompts, [B, 2H]: see LearnerModel.states."""
        known = {} if self.remembered is None else self.remembered
        new = {key_of(one): one for one in samples if key_of(one) not in known}
        for some, part in self.groups(list(new.values())):
            known.update(zip(map(key_of, some), self.model.states(part), strict=True))
        return torch.stack([known[key_of(one)] for one in samples])

    def groups(self, samples: Sequence[T]) -> Iterator[tuple[list[T], Batch]]:
        """The samples in groups of like length."""
        lengths = [len(one.prompt_ids) + len(one.reply_ids) for one in samples]
        for rows in length_sorted(lengths, self.ppo.micro_tokens):
            some = [samples[row] for row in rows]
            yield some, Batch.of(some)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that was trained, for a checkpoint."""
        reward_tensors, meta = self.reward.state()
        tensors = {f"{POLICY}.{name}": tensor for name, tensor in self.model.adapter(POLICY).state_dict().items()}
        return {**tensors, **{f"reward.{name}": tensor for name, tensor in reward_tensors.items()}}, {"reward": meta}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` gave. Raises KeyError or RuntimeError on a checkpoint of another base."""
        policy = self.model.adapter(POLICY)
        policy.load_state_dict({name: tensors[f"{POLICY}.{name}"] for name in policy.state_dict()})
        self.reward.restore(
            {name.removeprefix("reward."): t for name, t in tensors.items() if name.startswith("reward.")},
            meta["reward"],
        )


def give_back_memory() -> None:
    """What an update needed of the host's memory and left behind goes back to it: a server may need it until the next one."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc alone keeps so much
        libc.malloc_trim(0)
