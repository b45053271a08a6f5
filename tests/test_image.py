"""The image and the composition of containers, as far as they are known without an engine: by a linter, and by Compose.

`docker-compose config` is Compose itself: it reads the file, fills in the variables, and knows its own schema.
"""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.health import alive
from feedback.config import load, unknown_settings
from learner.config import LearnerConfig
from learner.metrics import LearnerMetrics, MetricsServer
from tests.broker import IMAGE as KAFKA
from tests.test_layout import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
DEPLOY = ROOT / "deploy"
SCRIPTS = Path(sysconfig.get_path("scripts"))
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")
SECRETS = ("HEED_SECRET", "GRAFANA_PASSWORD")
Json = dict[str, Any]


def compose(folder: Path, env: str) -> subprocess.CompletedProcess[str]:
    """What Compose makes of the file with these lines as its .env, as JSON."""
    (folder / "env").write_text(env, "utf-8")
    command = [SCRIPTS / "docker-compose", "--file", DEPLOY / "compose.yaml", "--env-file", folder / "env"]
    here = {"HOME": str(folder), "PATH": "/usr/bin:/bin"}  # a setting of this shell would beat the lines
    return subprocess.run([*command, "config", "--format", "json"], env=here, capture_output=True, text=True)


def example(**given: str) -> str:
    """deploy/.env.example as somebody filled it in."""
    text = (DEPLOY / ".env.example").read_text("utf-8")
    for name, value in given.items():
        text, times = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert times == 1, name
    return text


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def services(profile: str, tmp_path_factory: pytest.TempPathFactory) -> Json:
    filled = example(HEED_SECRET="0123456789abcdef", GRAFANA_PASSWORD="secret", COMPOSE_PROFILES=profile)
    done = compose(tmp_path_factory.mktemp("compose"), filled)
    assert done.returncode == 0, done.stderr
    found: Json = json.loads(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def ours(profile: str, services: Json) -> Json:
    suffix = "" if profile == "cpu" else "-gpu"
    return {name: services[name + suffix] for name in ("server", "learner")}


def test_the_linter_has_nothing_to_say_of_the_dockerfile():
    done = subprocess.run([SCRIPTS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_says_the_project_s_version_and_ports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f'image.version="{project["version"]}"' in DOCKERFILE
    assert f'image.description="{project["description"]}"' in DOCKERFILE
    config = LearnerConfig()
    assert f"EXPOSE {config.serving.port} {config.learner_metrics_port}\n" in DOCKERFILE


def test_the_image_sets_only_what_is_a_setting():
    found = dict(re.findall(r"\b(HEED_\w+)=(\S+)", DOCKERFILE.replace("#", "\n")))
    assert unknown_settings(found, LearnerConfig) == []
    config = load(LearnerConfig, environ=found, toml=None, flags={})
    assert (config.serving.feedback.data, config.serving.host) == (Path("/data"), "0.0.0.0")


def test_images_are_pinned(services: Json):
    bases = re.findall(r"^FROM (\S+:\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 1
    for image in [*bases, *(service["image"] for service in services.values())]:
        assert PINNED.fullmatch(image), image
    assert services["kafka"]["image"] == KAFKA  # which the tests run


@pytest.mark.parametrize("missing", [*SECRETS, "COMPOSE_PROFILES"])
def test_nothing_starts_without_a_secret_or_without_a_profile(missing: str, tmp_path: Path):
    given = dict.fromkeys(SECRETS, "0123456789abcdef") | {missing: ""}
    done = compose(tmp_path, example(**given))
    assert done.returncode != 0
    assert re.search(rf"required variable {missing} is missing.*deploy/\.env", done.stderr)


def test_a_profile_starts_the_whole_and_heed_once(profile: str, services: Json, ours: Json):
    assert len(services) == 6
    assert {*services} >= {"kafka", "redis", "prometheus", "grafana"}
    for name, service in ours.items():
        reserved = service["deploy"]["resources"].get("reservations")
        arguments = service["build"].get("args", {})
        if profile == "cpu":
            assert (reserved, arguments) == (None, {})
            continue
        assert reserved["devices"][0]["capabilities"] == ["gpu"]
        assert set(arguments) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
        assert service["networks"]["default"]["aliases"] == [name]


def test_heed_s_containers_can_do_little(ours: Json):
    for service in ours.values():
        assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
    assert "\nUSER 10001:10001\n" in DOCKERFILE


def test_each_container_comes_back_is_looked_after_and_has_limits(services: Json, ours: Json):
    assert "\nHEALTHCHECK " in DOCKERFILE
    for name, service in services.items():
        assert service["restart"] == "unless-stopped"
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        # ours are asked by the image's own HEALTHCHECK
        assert ("healthcheck" in service) == (service not in ours.values()), name
        assert all(wait["condition"] == "service_healthy" for wait in service.get("depends_on", {}).values())


def test_ports_are_published_to_this_machine_alone(services: Json):
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    assert sorted(port["target"] for port in published) == [3000, 8000, 9090]


def test_heed_s_environments_are_good_settings_and_only_the_server_has_the_secret(ours: Json):
    for name, service in ours.items():
        given = service["environment"]
        assert unknown_settings(given, LearnerConfig) == []
        config = load(LearnerConfig, environ=given, toml=None, flags={}).serving
        assert config.feedback.kafka.kafka_bootstrap == ("kafka:9092",)
        assert config.feedback.redis_url == "redis://redis:6379/0"
        assert (config.feedback.secret is not None) == (name == "server")


def test_each_process_has_its_own_data_and_both_share_adapters_and_models(ours: Json):
    server, learner = (
        {volume["target"]: volume["source"] for volume in ours[name]["volumes"]} for name in ("server", "learner")
    )
    assert {*server} == {*learner} == {"/data", "/adapters", "/models"}
    assert {path for path in server if server[path] == learner[path]} == {"/adapters", "/models"}
    for service in ours.values():
        assert service["environment"]["HEED_ADAPTERS"] == "/adapters"
        assert service["environment"]["HF_HOME"] == "/models"
    # a new volume takes its owner from the folder of the image
    assert re.search(
        r"install --directory --owner heed --group heed /data /adapters /models$", DOCKERFILE, re.MULTILINE
    )


def test_what_is_mounted_is_there(services: Json):
    bound = [
        Path(volume["source"])
        for service in services.values()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind"
    ]
    assert len(bound) >= 3
    assert [path for path in bound if not path.exists()] == []


def test_prometheus_scrapes_containers_that_there_are():
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    targets = {target for job in scraped for fixed in job["static_configs"] for target in fixed["targets"]}
    config = LearnerConfig()
    assert targets == {f"server:{config.serving.port}", f"learner:{config.learner_metrics_port}"}


@pytest.mark.parametrize("name", ["deploy/.env", "deploy/heed.env", "deploy/keys/keys.toml"])
def test_secrets_are_kept_out_of_git(name: str):
    assert subprocess.run(["git", "check-ignore", "--quiet", name], cwd=ROOT).returncode == 0


def test_a_container_is_asked_where_what_runs_in_it_answers():
    answering = MetricsServer("127.0.0.1", 0, LearnerMetrics(), health=dict)
    port = str(answering.port)
    learner = load(LearnerConfig, environ={"HEED_LEARNER_METRICS_PORT": port, "HEED_PORT": "1"}, toml=None, flags={})
    server = load(LearnerConfig, environ={"HEED_LEARNER_METRICS_PORT": "1", "HEED_PORT": port}, toml=None, flags={})
    heed = "/opt/heed/bin/heed"
    try:
        assert alive([heed, "learn"], learner)
        assert alive([heed, "serve"], server)
        assert alive([heed, "up", "--insecure"], server)
        assert not alive([heed, "learn"], server)
        assert not alive([heed, "serve"], learner)
    finally:
        answering.close()
    assert not alive([heed, "learn"], learner)
    assert alive([heed, "learn"], load(LearnerConfig, environ={"HEED_LEARNER_METRICS_PORT": "0"}, toml=None, flags={}))
