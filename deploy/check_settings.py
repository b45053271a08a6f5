"""What was set for this process: settings, keys, probes, and the secret that ids are signed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy.finding import Finding, Seen
from learner.config import LearnerConfig


def settings(config: LearnerConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What is not as it is by default, for it is that of this shell and this folder, not of the processes that run."""
    from feedback.config import differing, unknown_settings

    toml = Path("heed.toml").absolute()
    where = f"with {toml}" if toml.exists() else f"no heed.toml in {toml.parent}"
    set_here = ", ".join(f"{name}={value}" for name, value in differing(config).items())
    yield Finding("settings", "ok", f"{set_here or 'all as they are by default'} ({where})")
    for stranger in unknown_settings(environ, LearnerConfig):
        yield Finding("settings", "warn", stranger, "Correct its name, or unset it.")


def keys(seen: Seen) -> Iterator[Finding]:
    path = seen.config.serving.api_keys_file
    if path is not None:
        from serving.keys import Keys

        yield Finding("keys", "ok", f"{path}: {', '.join(Keys(path).names)}")


def probes(seen: Seen) -> Iterator[Finding]:
    path = seen.config.probes
    if path is not None:
        from learner.probes import read_probes  # which loads torch

        yield Finding("probes", "ok", f"{path}: {', '.join(read_probes(path))}")


def secret(seen: Seen) -> Iterator[Finding]:
    """Where it comes from, whether others share it, and whether it is the one that the log's replies were signed with."""
    config = seen.config
    from serving.errors import UnknownReply
    from serving.ids import SECRET_FILE, Ids, load_secret

    serving, feedback = config.serving, config.serving.feedback
    path = feedback.data / SECRET_FILE
    if feedback.secret is None and not path.exists():
        yield Finding("secret", "ok", f"{path} is made when a server first starts")
        return
    try:
        ids = Ids(load_secret(feedback))
    except ValueError as error:
        yield Finding("secret", "fail", str(error), "A server does not start like this.")
        return
    if seen.newest is not None:
        try:
            ids.read_reply(seen.newest.id, None)
        except UnknownReply:
            do = "Put the right one back (HEED_SECRET, or the file), else feedback on what was said is answered with 404."
            yield Finding("secret", "fail", "the newest reply in the log was signed with another secret", do)
            return
    if feedback.secret is not None:
        yield Finding("secret", "ok", "HEED_SECRET, the same for all servers that are given it")
        return
    if path.stat().st_mode & 0o077:
        yield Finding("secret", "warn", f"others may read {path}, and sign ids with it", f"chmod 600 {path}")
    if serving.adapters or feedback.redis_url or feedback.kafka.kafka_bootstrap:
        do = "Where several servers share traffic, give all of them the same HEED_SECRET."
        yield Finding("secret", "warn", f"{path}: no other server accepts feedback on what this one says", do)
    else:
        yield Finding("secret", "ok", f"{path}")
