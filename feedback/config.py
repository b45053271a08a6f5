"""Settings: what they are, where they come from, and what is said when one is wrong.

A setting `x` is a field of a configuration, the variable `HEED_X`, the key `x` of heed.toml and the flag `--x`. A flag
beats a variable beats heed.toml beats the default. Only `load` looks at them, once, at the door of a process. A field
with repr=False is a secret: its value is never shown.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

UNBUILT: Mapping[str, str | None] = {
    "canary_share": "0",
}
"""Settings whose feature is not built yet, and the one value they may have, if any."""


class Settings(BaseModel):
    """What every configuration is: frozen, without unknown fields, and silent about what it was given."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False, protected_namespaces=()
    )


class KafkaConfig(Settings):
    """The log in Kafka, where there is one."""

    kafka_bootstrap: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="the brokers, host:port, of the Kafka that keeps the log; none: it is kept in the data folder",
    )
    kafka_partitions: int = Field(
        3,
        ge=1,
        le=1000,
        description="partitions that the topics of exchanges and feedback are made with where they are missing",
    )
    kafka_replication: int = Field(
        0,
        ge=0,
        le=10,
        description="copies that the topics are made with where they are missing; 0: the broker's default",
    )
    kafka_deadline_s: float = Field(
        2.0, ge=0.2, le=60, description="how long Kafka may take to keep an event before it goes to the outbox, seconds"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to Kafka"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI"] | None = Field(
        None, description="how to log in to Kafka"
    )
    kafka_sasl_username: str | None = Field(None, min_length=1, description="name to log in to Kafka with")
    kafka_sasl_password: str | None = Field(None, min_length=1, repr=False, description="password of that name")
    kafka_ssl_cafile: Path | None = Field(
        None, description="file of the authorities that Kafka's certificate is checked with"
    )
    kafka_ssl_certfile: Path | None = Field(None, description="file of our own certificate for Kafka")
    kafka_ssl_keyfile: Path | None = Field(None, description="file of that certificate's key")
    kafka_ssl_password: str | None = Field(None, min_length=1, repr=False, description="password of that key")

    @field_validator("kafka_bootstrap")
    @classmethod
    def _brokers(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if all(_BROKER.fullmatch(broker) and int(broker.rpartition(":")[2]) <= 65535 for broker in value or ()):
            return value
        raise ValueError("must be host:port, or several of them separated by commas, with ports from 1 to 65535")


_BROKER = re.compile(r"([^\s:/\[\]]+|\[[0-9a-fA-F:.]+\]):[1-9][0-9]{0,4}")


class FeedbackConfig(Settings):
    """Where everything is kept, and for whom."""

    data: Path = Field(Path("heed-data"), description="folder of everything that this server and its learner keep")
    policy: str = Field(
        "default",
        pattern=r"^[a-z0-9-]{1,40}$",
        description="name of the line of adapters that is served and improved",
    )
    secret: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="key that signs reply and feedback ids; servers that share traffic share it; "
        "none: made once, in the data folder",
    )
    redis_url: str | None = Field(
        None,
        repr=False,
        description="the Redis that servers and the learner share for speed: `redis://:password@host:6379/0`, `rediss://…` "
        "(TLS) or `unix:///path/to/socket`; none: files in the data folder",
    )
    join_wait_s: float = Field(
        86400, ge=0, le=31_536_000, description="how long feedback waits for its exchange before it is dropped, seconds"
    )
    kafka: KafkaConfig = Field(default_factory=KafkaConfig)
    outbox_mb: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="so many megabytes of exchanges, and as many of feedback, may wait in the data folder while Kafka is "
        "away; then feedback is "
        "refused, and exchanges are not kept",
    )
    log_keep_days: float = Field(
        0,
        ge=0,
        le=36_500,
        description="days that events stay in the log; 0: for ever. A learner that is further behind, or made anew, sees only "
        "what is kept",
    )
    log_keep_mb: int = Field(
        0, ge=0, le=1_000_000_000, description="megabytes of a topic that stay in the log, the newest; 0: all"
    )

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str | None) -> str | None:
        if value is None or _is_redis(value):
            return value
        raise ValueError(
            "must be redis://[[user]:password@]host[:port][/number], the same with rediss:// (TLS), or unix:///path; "
            "in a password, %-escape / ? # @ and :"
        )


def _is_redis(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # what stands there is no port, or no address
        return False
    if parts.scheme == "unix":
        return parts.path.startswith("/")
    return parts.scheme in ("redis", "rediss") and host is not None and (parts.path.strip("/") or "0").isdigit()


class SettingError(Exception):
    """A setting is wrong; one line says which, what it is (unless it is secret), and what is allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name, self.value, self.allowed = name, value, allowed
        super().__init__(f"{name}: {allowed}" if value is None else f"{name}={_shown(value)}: must be {allowed}")


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One setting, for the documentation, the command line and the tests."""

    name: str
    """The variable, e.g. HEED_PORT."""
    key: str
    """The key in heed.toml and the name of the field, e.g. port."""
    default: str
    allowed: str
    """Type and bounds in words, e.g. "a whole number from 0 to 65535"."""
    description: str
    """What it is, with its unit."""


C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class _Given:
    name: str
    """As its giver knows it: --port, HEED_PORT or heed.toml: port."""
    value: object


def load(config: type[C], *, environ: Mapping[str, str], toml: Path | None, flags: Mapping[str, object]) -> C:
    """The configuration from flags (None: not given), HEED_* variables (empty: not given) and heed.toml, in this order.

    A heed.toml that does not exist is an empty one. Raises SettingError for the first setting that is wrong, unknown in
    heed.toml, or not built yet.
    """
    leaves = dict(_leaves(config))
    given = _from_toml(toml, leaves) | _from_environ(environ, leaves) | _from_flags(flags, leaves)
    for key in UNBUILT.keys() & given.keys():
        _refuse_unbuilt(key, given[key])
    values = {key: _value(leaves[key], one) for key, one in given.items() if key in leaves}
    try:
        made = config.model_validate(_nested(config, values))
    except ValidationError as error:
        raise _setting_error(error, leaves, given) from None  # pydantic's own text would show a secret
    for key, value in _flat(made):
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(given[key].name, value, allowed(leaves[key]))
    return made


def unknown_settings(environ: Mapping[str, str], config: type[BaseModel]) -> list[str]:
    """A warning for each HEED_* variable that is no setting, with the nearest name that is one."""
    known = [key for key, _ in _leaves(config)] + list(UNBUILT)
    strangers = sorted(name.removeprefix("HEED_").lower() for name in environ if name.startswith("HEED_"))
    return [
        f"{variable(key)} is not a setting of Heed and is ignored{_nearest(key, known, variable)}"
        for key in strangers
        if key not in known
    ]


def reference(config: type[BaseModel]) -> list[SettingDoc]:
    """Every setting of a configuration and of those inside it, in the order in which they are written down."""
    return [
        SettingDoc(variable(key), key, _default(field), allowed(field), field.description or "")
        for key, field in _leaves(config)
    ]


def differing(made: Settings) -> dict[str, str]:
    """Variable → value, of each setting that is not its default; of a secret only that it is set."""
    leaves = dict(_leaves(type(made)))
    return {
        variable(key): _words(value) if leaves[key].repr else "(hidden)"
        for key, value in _flat(made)
        if value != leaves[key].default
    }


def variable(key: str) -> str:
    """The environment variable of a setting."""
    return "HEED_" + key.upper()


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    kind, optional = _kind(field)
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(str(choice) for choice in get_args(kind))
    else:
        words = _KINDS.get(get_origin(kind) or kind, "valid") + _bounds(field)
    return words + (" (or not set)" if optional else "")


_KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list (in a variable: separated by commas)",
    tuple: "a list (in a variable: separated by commas)",
}

_BOUNDS = (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))


def _bounds(field: FieldInfo) -> str:
    found = {name: value for item in field.metadata for name, value in _constraints(item)}
    if "ge" in found and "le" in found:
        return f" from {found['ge']} to {found['le']}"
    words = [text.format(found[name]) for name, text in _BOUNDS if name in found]
    length = " to ".join(str(found[name]) for name in ("min_length", "max_length") if name in found)
    if length:
        missing = {"max_length": "at least ", "min_length": "at most "}
        words.append("of " + "".join(text for name, text in missing.items() if name not in found) + length)
        words[-1] += (" character" if _kind(field)[0] is str else " item") + "s" * (length != "1")
    if "pattern" in found:
        words.append(f"that matches {found['pattern']}")
    return (" " + " and ".join(words)) if words else ""


def _constraints(item: object) -> Iterator[tuple[str, object]]:
    """Bounds of one piece of a field's metadata: annotated_types' objects, or pydantic's own."""
    for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern"):
        value = getattr(item, name, None)
        if value is not None:
            yield name, value


def _leaves(config: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a configuration and of the configurations inside it, in the order in which they are written down."""
    inner, seen = _inner(config), set[str]()
    for name, field in config.model_fields.items():
        for key, leaf in _leaves(inner[name]) if name in inner else [(name, field)]:
            if key in seen:
                raise ValueError(
                    f"{config.__name__} has the setting {key!r} twice: names are flat, so each may occur once"
                )
            seen.add(key)
            yield key, leaf


def _inner(config: type[BaseModel]) -> dict[str, type[BaseModel]]:
    fields = config.model_fields.items()
    return {
        key: field.annotation
        for key, field in fields
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _nested(config: type[BaseModel], values: Mapping[str, object]) -> dict[str, object]:
    """Flat values in the shape of the configuration."""
    inner: dict[str, object] = {key: _nested(kind, values) for key, kind in _inner(config).items()}
    return inner | {key: values[key] for key in config.model_fields if key in values}


def _flat(made: BaseModel) -> Iterator[tuple[str, object]]:
    for key in type(made).model_fields:
        value = getattr(made, key)
        if isinstance(value, BaseModel):
            yield from _flat(value)
        else:
            yield key, value


def _from_toml(path: Path | None, leaves: Mapping[str, FieldInfo]) -> dict[str, _Given]:
    if path is None or not path.exists():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingError(str(path), None, f"is not valid TOML: {error}") from None
    except UnicodeDecodeError:
        raise SettingError(str(path), None, "is not UTF-8 text") from None
    except OSError as error:
        raise SettingError(str(path), None, f"cannot be read: {error.strerror}") from None
    known = [*leaves, *UNBUILT]
    for key, value in table.items():
        if isinstance(value, dict):
            raise SettingError(
                f"{path}: [{key}]", None, "tables are not used here: write its settings as `key = value` lines"
            )
        if key not in known:
            raise SettingError(f"{path}: {key}", None, f"is not a setting of Heed{_nearest(key, known)}")
    return {key: _Given(f"{path}: {key}", value) for key, value in table.items()}


def _from_environ(environ: Mapping[str, str], leaves: Mapping[str, FieldInfo]) -> dict[str, _Given]:
    names = {variable(key): key for key in (*leaves, *UNBUILT)}
    return {key: _Given(name, environ[name]) for name, key in names.items() if environ.get(name, "").strip()}


def _from_flags(flags: Mapping[str, object], leaves: Mapping[str, FieldInfo]) -> dict[str, _Given]:
    strangers = flags.keys() - leaves.keys() - UNBUILT.keys()
    if strangers:
        raise ValueError(f"flags that are no settings: {sorted(strangers)}")
    given = {key: value for key, value in flags.items() if value is not None}
    return {key: _Given("--" + key.replace("_", "-"), value) for key, value in given.items()}


def _refuse_unbuilt(key: str, given: _Given) -> None:
    only = UNBUILT[key]
    if only is None:
        raise SettingError(given.name, None, "is not built yet in this version of Heed: remove it")
    try:
        neutral = float(str(given.value)) == float(only)
    except ValueError:
        neutral = False
    if not neutral:
        raise SettingError(
            given.name, None, f"is not built yet in this version of Heed: remove it, or set it to {only}"
        )


def _value(field: FieldInfo, given: _Given) -> object:
    """A given value, made ready for pydantic: lists from text, `~` in paths; refused where true would pass for 1."""
    kind, _ = _kind(field)
    if isinstance(given.value, bool) and kind is not bool:
        raise SettingError(given.name, _hidden(field, given.value), allowed(field))
    if isinstance(given.value, str) and (get_origin(kind) or kind) in (list, tuple):
        return [part.strip() for part in given.value.split(",") if part.strip()]
    if isinstance(given.value, str | Path) and kind is Path:
        return Path(given.value).expanduser()
    return given.value.strip() if isinstance(given.value, str) else given.value


def _kind(field: FieldInfo) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether that was there."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return field.annotation, False
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    return kinds[0], len(kinds) < len(get_args(field.annotation))


def _setting_error(
    error: ValidationError, leaves: Mapping[str, FieldInfo], given: Mapping[str, _Given]
) -> SettingError:
    """Pydantic's first complaint in our words; a validator's own message where it has one."""
    first = error.errors(include_url=False, include_context=False)[0]
    own = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else None
    key = next((str(part) for part in reversed(first["loc"]) if part in leaves), None)
    if key is None:
        return SettingError("settings", None, own or first["msg"])
    one = given.get(key)
    if one is None:
        return SettingError(variable(key), None, own or f"is needed: {allowed(leaves[key])}")
    if own is not None:
        return SettingError(one.name, None, own)
    return SettingError(one.name, _hidden(leaves[key], one.value), allowed(leaves[key]))


def _hidden(field: FieldInfo, value: object) -> object:
    return value if field.repr else _Hidden()


class _Hidden:
    """Stands for the value of a secret wherever it would be shown."""

    def __repr__(self) -> str:
        return "(hidden)"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "needed"
    return "not set" if field.default is None else _words(field.default)


def _words(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _nearest(key: str, known: Sequence[str], spell: Callable[[str], str] = str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {spell(near[0])}?" if near else ""
