"""Settings: precedence, and one clear line for whatever is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from feedback.config import (
    UNBUILT,
    FeedbackConfig,
    SettingDoc,
    SettingError,
    Settings,
    allowed,
    load,
    reference,
    unknown_settings,
)
from learner.config import LearnerConfig


class Inner(Settings):
    feedback: FeedbackConfig = Field(default_factory=FeedbackConfig)
    port: int = Field(8000, ge=0, le=65535, description="TCP port.")
    admin_token: str | None = Field(None, repr=False, min_length=8, description="Token of the admin routes.")
    adapters: Path | None = Field(None, description="Folder of the adapters.")
    dtype: Literal["auto", "float32"] = Field("auto", description="Type of the weights.")


class Outer(Settings):
    serving: Inner = Field(default_factory=Inner)
    rate: float = Field(0.5, gt=0, lt=1, description="A share.")
    verbose: bool = Field(False, description="Whether to say more.")
    names: list[str] = Field(["a"], max_length=3, description="Names.")
    even: int = Field(2, description="An even number.")

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even, such as 2")
        return value


def given(
    environ: Mapping[str, str] | None = None, toml: Path | None = None, flags: Mapping[str, object] | None = None
) -> Outer:
    return load(Outer, environ=environ or {}, toml=toml, flags=flags or {})


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "heed.toml"


def test_defaults_stand_where_nothing_is_given(toml: Path) -> None:
    assert given(toml=toml) == Outer()
    assert given().serving.feedback.data == Path("heed-data")


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(toml: Path) -> None:
    toml.write_text('port = 1\npolicy = "file"\nrate = 0.25\n')
    config = given({"HEED_PORT": "2", "HEED_POLICY": "variable"}, toml, {"port": 3, "policy": None})
    assert config.serving.port == 3
    assert config.serving.feedback.policy == "variable"
    assert config.rate == 0.25
    assert config.even == 2


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("HEED_PORT", " 81 ", "serving.port", 81),
        ("HEED_VERBOSE", "1", "verbose", True),
        ("HEED_VERBOSE", "no", "verbose", False),
        ("HEED_NAMES", "a, b ,c,", "names", ["a", "b", "c"]),
        ("HEED_ADAPTERS", "/srv/adapters", "serving.adapters", Path("/srv/adapters")),
        ("HEED_ADAPTERS", "~/adapters", "serving.adapters", Path.home() / "adapters"),
        ("HEED_ADAPTERS", "", "serving.adapters", None),
        ("HEED_PORT", "", "serving.port", 8000),
        ("HEED_JOIN_WAIT_S", "1.5", "serving.feedback.join_wait_s", 1.5),
        ("HEED_DTYPE", "float32", "serving.dtype", "float32"),
    ],
)
def test_a_variable_s_text_becomes_the_field_s_type(name: str, text: str, path: str, value: object) -> None:
    found: object = given({name: text})
    for step in path.split("."):
        found = getattr(found, step)
    assert found == value


def test_the_file_s_own_types_are_taken(toml: Path) -> None:
    toml.write_text('names = ["x", "y"]\nverbose = true\ndata = "~/heed"\njoin_wait_s = 60\n')
    config = given(toml=toml)
    assert config.names == ["x", "y"]
    assert config.verbose is True
    assert config.serving.feedback.data == Path.home() / "heed"
    assert config.serving.feedback.join_wait_s == 60


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"HEED_PORT": "70000"}, "HEED_PORT=70000: must be a whole number from 0 to 65535"),
        ({"HEED_PORT": "many"}, "HEED_PORT=many: must be a whole number from 0 to 65535"),
        ({"HEED_PORT": "80.5"}, "HEED_PORT=80.5: must be a whole number from 0 to 65535"),
        ({"HEED_RATE": "1"}, "HEED_RATE=1: must be a number above 0 and below 1"),
        ({"HEED_RATE": "nan"}, "HEED_RATE=nan: must be a number above 0 and below 1"),
        ({"HEED_JOIN_WAIT_S": "inf"}, "HEED_JOIN_WAIT_S=inf: must be a number from 0 to 31536000"),
        ({"HEED_JOIN_WAIT_S": "nan"}, "HEED_JOIN_WAIT_S=nan: must be a number from 0 to 31536000"),
        ({"HEED_VERBOSE": "maybe"}, "HEED_VERBOSE=maybe: must be true or false"),
        ({"HEED_DTYPE": "int4"}, "HEED_DTYPE=int4: must be one of auto, float32"),
        ({"HEED_POLICY": "Über uns"}, "HEED_POLICY=Über uns: must be text that matches ^[a-z0-9-]{1,40}$"),
        ({"HEED_POLICY": "../up"}, "HEED_POLICY=../up: must be text that matches ^[a-z0-9-]{1,40}$"),
        ({"HEED_EVEN": "3"}, "HEED_EVEN: must be even, such as 2"),
        (
            {"HEED_NAMES": "a,b,c,d"},
            "HEED_NAMES=a,b,c,d: must be a list (in a variable: separated by commas) of at most 3 items",
        ),
    ],
)
def test_a_wrong_variable_is_named_with_its_value_and_what_is_allowed(environ: dict[str, str], line: str) -> None:
    with pytest.raises(SettingError) as error:
        given(environ)
    assert str(error.value) == line


def test_where_a_wrong_value_came_from_is_said(toml: Path) -> None:
    toml.write_text("port = -1\n")
    with pytest.raises(SettingError, match=rf"^{re.escape(str(toml))}: port=-1: must be a whole number from 0"):
        given(toml=toml)
    with pytest.raises(SettingError, match=r"^--port=-2: must be a whole number from 0 to 65535$"):
        given(flags={"port": -2})
    with pytest.raises(SettingError, match=r"^--join-wait-s=soon: must be a number from 0"):
        given(flags={"join_wait_s": "soon"})


def test_true_is_no_number(toml: Path) -> None:
    toml.write_text("port = true\n")
    with pytest.raises(SettingError, match="port=True: must be a whole number"):
        given(toml=toml)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = \n", r"heed\.toml: is not valid TOML: .*\(at line 1, column 8\)$"),
        ("port = 1\nport = 2\n", r"heed\.toml: is not valid TOML: .*line 2"),
        ("prot = 1\n", r"heed\.toml: prot: is not a setting of Heed; did you mean port\?$"),
        ("serving = 1\n", r"heed\.toml: serving: is not a setting of Heed"),
        ("[serving]\nport = 1\n", r"heed\.toml: \[serving\]: tables are not used here"),
    ],
)
def test_a_wrong_file_is_one_clear_line(toml: Path, text: str, message: str) -> None:
    toml.write_text(text)
    with pytest.raises(SettingError, match=message) as error:
        given(toml=toml)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, toml: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        given(toml=tmp_path)
    toml.write_bytes(b"policy = '\xff'")
    with pytest.raises(SettingError, match="is not UTF-8 text"):
        given(toml=toml)


@pytest.mark.parametrize("key", sorted(UNBUILT))
def test_a_setting_whose_feature_is_not_built_is_refused_wherever_it_is_given(toml: Path, key: str) -> None:
    variable = "HEED_" + key.upper()
    with pytest.raises(SettingError, match=f"^{variable}: is not built yet"):
        given({variable: "0.5"})
    toml.write_text(f"{key} = 1\n")
    with pytest.raises(SettingError, match=f"{key}: is not built yet"):
        given(toml=toml)
    with pytest.raises(SettingError, match=f"--{key.replace('_', '-')}: is not built yet"):
        given(flags={key: "x"})


def test_a_canary_share_of_zero_is_fine(toml: Path) -> None:
    toml.write_text("canary_share = 0\n")
    assert given({"HEED_CANARY_SHARE": "0.0", "HEED_INSECURE": ""}, toml) == Outer()


def test_an_unknown_variable_is_a_warning_with_the_nearest_name() -> None:
    environ = {"HEED_PROT": "1", "HEED_XYZZY": "1", "HEED_PORT": "1", "HEED_REDIS_URL": "redis://", "PATH": "/bin"}
    assert unknown_settings(environ, Outer) == [
        "HEED_PROT is not a setting of Heed and is ignored; did you mean HEED_PORT?",
        "HEED_XYZZY is not a setting of Heed and is ignored",
    ]


SECRET = "correct horse battery staple"


def test_a_secret_is_in_no_repr() -> None:
    config = given({"HEED_SECRET": SECRET, "HEED_ADMIN_TOKEN": SECRET})
    assert config.serving.feedback.secret == SECRET
    assert config.serving.admin_token == SECRET
    assert SECRET not in repr(config) + str(config)


@pytest.mark.parametrize("setting", ["secret", "admin_token"])
def test_a_wrong_secret_is_refused_without_being_shown(toml: Path, setting: str) -> None:
    with pytest.raises(SettingError) as error:
        given({f"HEED_{setting.upper()}": "hunter2"})
    assert re.match(rf"HEED_{setting.upper()}=\(hidden\): must be text of at least \d+ characters", str(error.value))
    toml.write_text(f'{setting} = ["hunter2"]\n')
    with pytest.raises(SettingError) as listed:
        given(toml=toml)
    for wrong in (error.value, listed.value):
        assert "hunter2" not in f"{wrong} {wrong!r} {wrong.value!r} {wrong.__cause__!r}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:p%40ss@10.0.0.1:6379/3",
        "rediss://user:pass@redis.example:6380",
        "redis://[::1]:6379/0",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_a_redis_may_be_named_in_all_ways_that_redis_has(url: str) -> None:
    assert given({"HEED_REDIS_URL": url}).serving.feedback.redis_url == url


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://:hunter2@localhost",
        "redis://",
        "redis://localhost:hunter2",
        "redis://:hunter2/@localhost",
        "redis://localhost/hunter2",
        "unix:hunter2.sock",
    ],
)
def test_a_wrong_redis_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingError, match=r"^HEED_REDIS_URL: must be redis://\[\[user\]:password@\]host") as error:
        given({"HEED_REDIS_URL": url})
    assert "hunter2" not in f"{error.value} {error.value!r} {error.value.value!r} {error.value.__cause__!r}"
    assert "hunter2" not in repr(given({"HEED_REDIS_URL": "redis://:hunter2@localhost"}))


def test_a_configuration_made_by_hand_does_not_show_what_was_wrong() -> None:
    with pytest.raises(ValidationError) as error:
        FeedbackConfig(secret="hunter2")
    assert "hunter2" not in str(error.value)


def test_a_needed_setting_that_is_missing_is_named() -> None:
    class Needy(Settings):
        name: str = Field(description="A name.")

    with pytest.raises(SettingError, match=r"^HEED_NAME: is needed: text$"):
        load(Needy, environ={}, toml=None, flags={})
    assert load(Needy, environ={"HEED_NAME": "x"}, toml=None, flags={}).name == "x"


def test_the_same_name_twice_is_a_mistake_of_ours() -> None:
    class Twice(Settings):
        feedback: FeedbackConfig = Field(default_factory=FeedbackConfig)
        data: Path = Field(Path())

    with pytest.raises(ValueError, match="'data' twice"):
        reference(Twice)


def test_a_flag_that_is_no_setting_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="prot"):
        given(flags={"prot": 1})


def test_the_reference_lists_every_setting_with_default_and_bounds() -> None:
    docs = {doc.name: doc for doc in reference(Outer)}
    assert list(docs)[:2] == ["HEED_DATA", "HEED_POLICY"]
    assert docs.keys() >= {"HEED_KAFKA_BOOTSTRAP", "HEED_JOIN_WAIT_S", "HEED_PORT"}
    assert docs["HEED_PORT"] == SettingDoc("HEED_PORT", "port", "8000", "a whole number from 0 to 65535", "TCP port.")
    assert docs["HEED_SECRET"].default == "not set"
    assert docs["HEED_VERBOSE"].default == "false"
    assert docs["HEED_NAMES"].default == "a"


def test_every_setting_of_ours_is_described_with_bounds_in_words() -> None:
    for doc in reference(FeedbackConfig):
        assert not doc.description.endswith(".")
        assert doc.description[0].islower()
    assert allowed(FeedbackConfig.model_fields["secret"]) == "text of at least 16 characters (or not set)"


@pytest.mark.parametrize(
    "wrong", ["broker", "broker:port", ":9092", "broker:99999", "http://broker:9092", "broker:-1", "a:1, b"]
)
def test_brokers_are_named_with_their_ports(wrong: str) -> None:
    with pytest.raises(SettingError, match=r"HEED_KAFKA_BOOTSTRAP.*must be host:port, or several"):
        load(FeedbackConfig, environ={"HEED_KAFKA_BOOTSTRAP": wrong}, toml=None, flags={})


def test_several_brokers_are_separated_by_commas() -> None:
    made = load(FeedbackConfig, environ={"HEED_KAFKA_BOOTSTRAP": "a:1, [::1]:9092,b.c:65535"}, toml=None, flags={})
    assert made.kafka.kafka_bootstrap == ("a:1", "[::1]:9092", "b.c:65535")


def test_aspects_are_named_with_their_weights() -> None:
    made = load(LearnerConfig, environ={"HEED_ASPECT_WEIGHTS": "helpful=1, safe=2.5,tone=0"}, toml=None, flags={})
    assert made.aspects == {"helpful": 1.0, "safe": 2.5, "tone": 0.0}
    assert LearnerConfig().aspects == {}


@pytest.mark.parametrize("wrong", ["safe", "safe=", "safe=-1", "safe=101", "Safe=1", "safe=nan", "safe=1;tone=2"])
def test_weights_of_aspects_are_numbers_from_0_to_100(wrong: str) -> None:
    with pytest.raises(SettingError, match=r"HEED_ASPECT_WEIGHTS.*must be aspect=weight, or several"):
        load(LearnerConfig, environ={"HEED_ASPECT_WEIGHTS": wrong}, toml=None, flags={})
