"""A learner killed in the middle of an update makes the same version as one that was let be, byte for byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import open_log
from learner.config import LearnerConfig
from learner.state import State
from learner.trainer import Trainer
from learner.update import difference
from serving.config import ServingConfig
from tests import bases
from tests.told import NOW, POLICY, exchange, feedback

ROOT = Path(__file__).resolve().parent.parent
THUMBS, PROMPTS, RATERS = 80, 12, 8
NICE = 70
# gentle, so that the gate lets the version pass
SETTINGS = {
    "ROLLOUTS": 32, "MINIBATCH": 16, "UPDATE_BATCHES": 3, "ROLLOUT_TOKENS": 12, "GATE_SAMPLES": 48, "KL_LIMIT": 50,
    "KL_TARGET": 50, "PPO_EPOCHS": 2, "LEARNING_RATE": 0.001, "UPDATE_MIN_FEEDBACK": THUMBS, "LEARNER_METRICS_PORT": 0,
    "LEARNER_THREADS": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and a log in which people liked a certain token."""
    folder = tmp_path_factory.mktemp("taught")
    bases.llama().save_pretrained(folder / "model")
    bases.byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    config = FeedbackConfig(data=folder / "data")
    trainer = Trainer(LearnerConfig(serving=ServingConfig(feedback=config, model=str(folder / "model"))))
    prompts = [tuple(trainer.chat.encode([bases.message(f"say {number}")])) for number in range(PROMPTS)]
    log = open_log(config, writes=[EXCHANGES, FEEDBACK])
    for number, said in enumerate(trainer.sampler.sample([prompts[n % PROMPTS] for n in range(THUMBS)], None, 5)):
        reply_ids = (NICE, *said.reply_ids[1:]) if number % 2 else said.reply_ids
        spoken = exchange(
            f"r{number}", base=trainer.base.fingerprint, prompt_ids=said.prompt_ids, reply_ids=reply_ids, at=time.time()
        )
        log.append(EXCHANGES, spoken.id, spoken.to_json())
        thumb = feedback(f"f{number}", spoken.id, value=float(NICE in reply_ids), user=f"u{number // 2 % RATERS}")
        log.append(FEEDBACK, spoken.id, thumb.to_json())
    log.close()
    return folder


def learner(folder: Path, lines: Path) -> subprocess.Popen[bytes]:
    """`heed learn` on the data in this folder, until it has nothing to do; its lines go into a file."""
    told = {f"HEED_{name}": str(value) for name, value in SETTINGS.items()}
    told |= {"HEED_DATA": str(folder / "data"), "HEED_MODEL": str(folder / "model")}
    command = [sys.executable, "-m", "deploy.cli", "learn", "--until-idle"]
    with lines.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | told, stdout=file, stderr=subprocess.STDOUT)


def made(folder: Path) -> bytes:
    """The weights of the only version that the learner made."""
    [path] = (folder / "data" / "adapters").glob("default/v*/adapter_model.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(taught, folder, dirs_exist_ok=True)
    lines = folder / "lines"
    assert learner(folder, lines).wait(240) == 0, lines.read_text()
    return made(folder)


@pytest.mark.parametrize("phase", ["reward", "rollouts", "ppo", "gate"])
def test_an_update_cut_short_by_a_kill_ends_in_the_same_bytes(
    taught: Path, undisturbed: bytes, tmp_path: Path, phase: str
) -> None:
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    lines = tmp_path / "lines"
    killed = learner(tmp_path, lines)
    while f"update 1: {phase}" not in lines.read_text():
        assert killed.poll() is None, lines.read_text()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert "v1 is released" not in lines.read_text()
    assert learner(tmp_path, lines).wait(240) == 0, lines.read_text()
    assert made(tmp_path) == undisturbed


def test_an_update_after_another_ends_in_the_same_bytes_as_in_a_process_of_its_own(
    taught: Path, tmp_path: Path
) -> None:
    feedback_config = FeedbackConfig(data=taught / "data")
    serving = ServingConfig(feedback=feedback_config, model=str(taught / "model"))
    config = LearnerConfig(serving=serving, **{name.lower(): value for name, value in SETTINGS.items()})
    used, fresh = Trainer(config), Trainer(config)
    with (
        contextlib.closing(State(tmp_path / "state.db", policy=POLICY, base=used.base.fingerprint)) as state,
        contextlib.closing(open_log(feedback_config, writes=())) as log,
    ):
        state.absorb([*log.read(EXCHANGES, {}, 999), *log.read(FEEDBACK, {}, 999)], NOW)
        judgements, prompts = state.judgements(), state.prompts(PROMPTS)
    first = used.learn(judgements, prompts, parent=None, seed=1)
    after, alone = (one.learn(judgements, prompts, parent=first.weights, seed=2) for one in (used, fresh))
    assert difference(after.weights, first.weights) > 0
    assert after.gate == alone.gate
    for path, pair in alone.weights.tensors.items():
        assert all(map(torch.equal, after.weights.tensors[path], pair)), path
