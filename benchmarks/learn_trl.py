"""A peer of benchmarks/learn.py, in an environment of its own: TRL's KTO, DPO, RLOO or PPO on the job's feedback.

    python -m benchmarks.learn_trl job.json

All train an adapter of rank 16 on all linear layers, in float32. RLOO and PPO take eight batches of 128 rollouts, 32 an optimiser
step, two epochs; their reward is a sequence classifier with an adapter and a head of its own, fitted to thumbs by binary
cross-entropy or to preferences by TRL's RewardTrainer, then put on mean 0 and standard deviation 1 over the rated replies.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import TrainingArguments as Arguments

from benchmarks.meter import Json, Meter

RANK, ALPHA = 16, 32
ROLLOUTS, MINIBATCH, EPOCHS, BATCHES, NEW = 128, 32, 2, 8, 128
FEEDBACK_EPOCHS, FEEDBACK_BATCH = 4, 16
REWARD_LR, REWARD_EPOCHS, REWARD_BATCH = 1e-3, 6, 16
BETA = 0.05


class Learner:
    """One job: its base, tokenizer and feedback."""

    def __init__(self, job: Json, meter: Meter) -> None:
        self.job, self.meter = job, meter
        self.tokenizer = AutoTokenizer.from_pretrained(job["base"])
        self.tokenizer.padding_side = (
            "left"  # transformers 5.23 leaves it out on saving, and generation then goes quietly wrong
        )
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
        self.found: Json = {"rollouts": 0, "ppo_s": 0.0}
        torch.manual_seed(job["seed"])

    def lora(self, task: str) -> LoraConfig:
        return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type=task)

    def settings(self, **more: object) -> Json:
        """What all trainers are told alike."""
        return {
            "output_dir": self.job["work"],
            "learning_rate": self.job["lr"],
            "seed": self.job["seed"],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "lr_scheduler_type": "constant",
            **more,
        }

    def text(self, prompt: str) -> str:
        """The prompt by the template."""
        asked = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    @torch.no_grad()
    def check(self) -> float:
        """log p of the reply that all learners are asked about, by the ids that this tokenizer makes of it."""
        check = self.job["check"]
        prompt = self.tokenizer(self.text(check["prompt"]), add_special_tokens=False)["input_ids"]
        reply = self.tokenizer(check["reply"], add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        logprobs_TV = self.model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
        return sum(float(logprobs_TV[place, one]) for place, one in zip(places, reply, strict=True))

    def keep(self, model: nn.Module) -> None:
        assert isinstance(model, PeftModel)
        model.save_pretrained(self.job["adapter"])

    # straight from feedback

    def kto(self) -> None:
        """KTO (2402.01306) on the thumbs, both sides weighing alike (its equation 8)."""
        from trl import KTOConfig, KTOTrainer

        rows = [
            {"prompt": self.text(row["prompt"]), "completion": row["reply"], "label": bool(row["label"])}
            for row in self.job["thumbs"]
        ]
        liked = max(sum(row["label"] for row in rows), 1)
        ratio = max(len(rows) - liked, 1) / liked
        args = KTOConfig(
            **self.settings(num_train_epochs=FEEDBACK_EPOCHS, per_device_train_batch_size=FEEDBACK_BATCH),
            desirable_weight=max(ratio, 1.0), undesirable_weight=max(1 / ratio, 1.0),
        )  # fmt: skip
        self.train(KTOTrainer, args, Dataset.from_list(rows))

    def dpo(self) -> None:
        """DPO (2305.18290) on pairs."""
        from trl import DPOConfig, DPOTrainer

        rows = [
            {"prompt": self.text(row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in self.job["pairs"]
        ]
        args = DPOConfig(**self.settings(num_train_epochs=FEEDBACK_EPOCHS, per_device_train_batch_size=FEEDBACK_BATCH))
        self.train(DPOTrainer, args, Dataset.from_list(rows))

    def train(self, trainer_class: Callable[..., object], args: Arguments, rows: Dataset, **more: object) -> None:
        with self.meter.phase("policy"):
            trainer = trainer_class(
                model=self.model, args=args, train_dataset=rows, processing_class=self.tokenizer,
                peft_config=self.lora("CAUSAL_LM"), **more,
            )  # fmt: skip
            trainer.train()
        self.keep(trainer.model)

    # by way of a reward model

    def rloo(self) -> None:
        """RLOO (2402.14740), four replies a prompt."""
        from trl import RLOOConfig, RLOOTrainer

        classifier = self.reward_model()

        def reward(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
            asked = [tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
            scores_B = torch.cat([*self.scores(classifier, list(zip(asked, completion_ids, strict=True)))])
            cut = [ids[-1] != self.tokenizer.eos_token_id for ids in completion_ids]
            return (scores_B - torch.tensor(cut).float()).tolist()

        steps = ROLLOUTS // MINIBATCH
        args = RLOOConfig(
            **self.settings(
                max_steps=BATCHES * EPOCHS * steps, per_device_train_batch_size=MINIBATCH, steps_per_generation=steps,
                num_iterations=EPOCHS, num_generations=4, max_completion_length=NEW, temperature=1.0, beta=BETA,
            )
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": self.text(one["text"])} for one in self.job["prompts"]])
        self.train(RLOOTrainer, args, rows, reward_funcs=reward)
        self.found |= {"rollouts": BATCHES * ROLLOUTS, "ppo_s": self.meter.seconds["policy"]}

    def ppo(self) -> None:
        """PPO as trl.experimental.ppo has it; the value starts from the reward model. One big batch, no accumulation:
        with it fewer steps are taken than it says."""
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        classifier = self.reward_model()
        value = copy.deepcopy(classifier)
        classifier.requires_grad_(False)
        args = PPOConfig(
            **self.settings(
                total_episodes=BATCHES * ROLLOUTS, per_device_train_batch_size=ROLLOUTS, gradient_accumulation_steps=1,
                num_mini_batches=ROLLOUTS // MINIBATCH, num_ppo_epochs=EPOCHS, response_length=NEW, stop_token="eos",
                temperature=1.0, missing_eos_penalty=1.0, kl_coef=BETA, kl_estimator="k1", cliprange=0.2, vf_coef=0.1,
                gamma=1.0, lam=0.95, num_sample_generations=0,
            )
        )  # fmt: skip
        asked = [{"input_ids": one["ids"]} for one in self.job["prompts"]]
        rows = Dataset.from_list(asked * -(-ROLLOUTS * BATCHES // len(asked)))
        with self.meter.phase("policy"):
            trainer = PPOTrainer(
                args=args, processing_class=self.tokenizer, model=self.model, ref_model=None, reward_model=classifier,
                value_model=value, train_dataset=rows, eval_dataset=rows, peft_config=self.lora("CAUSAL_LM"),
            )  # fmt: skip
            started = time.perf_counter()
            trainer.train()
            self.found |= {"rollouts": BATCHES * ROLLOUTS, "ppo_s": time.perf_counter() - started}
        self.keep(trainer.model.policy)

    def reward_model(self) -> PreTrainedModel:
        """A classifier on the same base, fitted to the feedback and standardised over it."""
        with self.meter.phase("reward"):
            classifier = AutoModelForSequenceClassification.from_pretrained(
                self.job["base"], num_labels=1, dtype=torch.float32, pad_token_id=self.tokenizer.pad_token_id
            )
            inject_adapter_in_model(self.lora("SEQ_CLS"), classifier.model)
            classifier.score = nn.Linear(classifier.config.hidden_size, 1)
            nn.init.zeros_(classifier.score.weight)
            nn.init.zeros_(classifier.score.bias)
            (self.fit_thumbs if self.job["kind"] == "thumb" else self.fit_pairs)(classifier)
            self.standardise(classifier)
        return classifier

    def fit_thumbs(self, classifier: PreTrainedModel) -> None:
        rows = self.job["thumbs"]
        parameters = [one for one in classifier.parameters() if one.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=REWARD_LR, weight_decay=0.01)
        for _ in range(REWARD_EPOCHS):
            for some in torch.randperm(len(rows)).split(REWARD_BATCH):
                label_B = torch.tensor([float(rows[row]["label"]) for row in some])
                logit_B = self.logits(classifier, [(rows[row]["prompt_ids"], rows[row]["reply_ids"]) for row in some])
                functional.binary_cross_entropy_with_logits(logit_B, label_B).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()

    def fit_pairs(self, classifier: PreTrainedModel) -> None:
        from trl import RewardConfig, RewardTrainer

        args = RewardConfig(
            **self.settings(num_train_epochs=REWARD_EPOCHS, per_device_train_batch_size=REWARD_BATCH)
            | {"learning_rate": REWARD_LR}
        )
        rows = [
            {f"{side}_ids": [*row["prompt_ids"], *row[f"{side}_ids"]] for side in ("chosen", "rejected")}
            for row in self.job["pairs"]
        ]
        RewardTrainer(
            model=classifier, args=args, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer
        ).train()

    @torch.no_grad()
    def standardise(self, classifier: PreTrainedModel) -> None:
        pairs = [(row["prompt_ids"], row["reply_ids"]) for row in self.job["thumbs"]]
        scores_B = torch.cat([*self.scores(classifier, pairs)])
        mean, std = float(scores_B.mean()), max(float(scores_B.std()), 1e-6)
        classifier.score.weight /= std
        classifier.score.bias.copy_((classifier.score.bias - mean) / std)

    def scores(
        self, classifier: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[Tensor]:
        with torch.no_grad():
            for start in range(0, len(pairs), MINIBATCH):
                yield self.logits(classifier, pairs[start : start + MINIBATCH])

    def logits(self, classifier: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """[B], of the last token of each reply."""
        rows = [torch.tensor([*prompt, *reply]) for prompt, reply in pairs]
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        logits_B: Tensor = classifier(ids_BT, attention_mask=(ids_BT != self.tokenizer.pad_token_id).long()).logits[
            :, 0
        ]
        return logits_B


def main() -> None:
    meter, job = Meter(), json.loads(Path(sys.argv[1]).read_text("utf-8"))
    learner = Learner(job, meter)
    check = learner.check()
    getattr(learner, job["method"])()
    meter.write(Path(job["found"]), learner.found | {"check": check, "refused": []})


if __name__ == "__main__":
    main()
