# One image for both: `docker run heed` serves, `docker run heed learn` learns (same volume), `docker run heed up` does both.
#
#   docker build -t heed .                                                            for processors
#   docker build -t heed:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .       for NVIDIA GPUs: some gigabytes more
#   docker build -t heed --build-arg EXTRAS=parquet,tensorboard .                     with extras of pyproject.toml
#
# It runs as nobody special (uid 10001), and where the root file system is read-only (docker run --read-only --tmpfs /tmp …):
# all that is kept goes to /data. /adapters and /models are for volumes that containers share (HEED_ADAPTERS, HF_HOME).
FROM python:3.12.13-slim-bookworm AS base
ENV PATH=/opt/heed/bin:$PATH PYTHONUNBUFFERED=1
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# What Heed needs, by pyproject.toml alone: a change of the source does not fetch these gigabytes anew.
FROM base AS needed
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
RUN python -m venv /opt/heed && pip install --index-url "$TORCH_INDEX" "torch~=2.13.0"
WORKDIR /src
COPY pyproject.toml ./
# hadolint ignore=DL3013
RUN touch README.md LICENSE && mkdir feedback serving learner deploy \
  && pip install ".${EXTRAS:+[$EXTRAS]}" && pip uninstall --yes heed

FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY feedback feedback
COPY serving serving
COPY learner learner
COPY deploy deploy
RUN pip wheel --no-deps --wheel-dir /wheel .

FROM base
# The compiler is for the native step (serving/native.py), which is made for the very processor it will run on, once; then it
# lies in /data/.cache. Made here it would fit this machine only, or be slower everywhere. No version of gcc is named: Debian
# removes each when a corrected one comes.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
  && useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin heed \
  && install --directory --owner heed --group heed /data /adapters /models
COPY --from=needed /opt/heed /opt/heed
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps --no-index /wheel/*.whl && pip check && rm -r /wheel

ARG REVISION=unknown
LABEL org.opencontainers.image.title="Heed" \
  org.opencontainers.image.description="A chat server that learns from its users." \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="0.1.0" \
  org.opencontainers.image.revision="$REVISION"

# by number: Kubernetes (runAsNonRoot) cannot see what a name stands for
USER 10001:10001
WORKDIR /data
# HOME, whoever runs it: models from the hub and the native step are kept there. In a container, loopback is reachable by
# nobody; listening on more, a server wants HEED_API_KEYS_FILE, or --insecure where the port is published to this machine alone.
ENV HOME=/data HEED_DATA=/data HEED_HOST=0.0.0.0 NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /data
EXPOSE 8000 9464

# whether this container serves or learns, it finds out by itself
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-P", "-m", "deploy.health"]

ENTRYPOINT ["heed"]
CMD ["serve"]
