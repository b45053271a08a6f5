"""How long the reward model takes to learn from so many judgements: simulated thumbs on the built-in model's own replies.

python -m benchmarks.fit [JUDGEMENTS …]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from feedback.raters import crowd
from learner.config import LearnerConfig
from learner.judgement import key_of
from learner.trainer import Trainer
from learner.trial import RATERS, Halves, feedback

REFERENCE = 256
"""Replies that fix the scale of the score, as many as the gate asks for by default."""


def main(counts: Sequence[int]) -> None:
    """A JSON line for each: seconds of the clock and of the processor, the latter little changed by others' work."""
    trainer = Trainer(LearnerConfig())
    given = feedback(trainer, Halves.of(None).seen, crowd("emoji", RATERS), max(counts), 0, "thumb")
    reference = trainer.sampler.sample([one.reply.prompt_ids for one in given[:REFERENCE]], None, 1)
    for count in counts:
        judgements = given[-count:]
        started, worked = time.perf_counter(), time.process_time()
        trainer.reward.fit(judgements, reference, 0)
        took_s, cpu_s = time.perf_counter() - started, time.process_time() - worked
        distinct = len({key_of(one.reply) for one in judgements})
        row = {"judgements": count, "replies": distinct, "seconds": round(took_s, 1), "cpu_s": round(cpu_s, 1)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(one) for one in sys.argv[1:]] or [300, 1000, 2000, 4000])
