# One image for both: `docker run heed` serves, `docker run heed learn` learns (same volume), `docker run heed up` does both.
# With a GPU build of PyTorch: docker build --build-arg TORCH_INDEX=https://pypi.org/simple .
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# The compiler is for the native step (serving/native.py), which is made for the processor it will run on.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN pip install --index-url "$TORCH_INDEX" "torch~=2.13.0"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY feedback feedback
COPY serving serving
COPY learner learner
COPY deploy deploy
RUN pip install . && rm -rf /src

RUN useradd --create-home --uid 10001 heed && install --directory --owner heed /data
USER heed
WORKDIR /data
# In a container, loopback is reachable by nobody. A server then wants HEED_API_KEYS_FILE, or --insecure where the port is
# published to this machine alone.
ENV HEED_DATA=/data HEED_HOST=0.0.0.0 HEED_PORT=8000
VOLUME /data
EXPOSE 8000 9464

HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"HEED_PORT\"]}/health', timeout=2)"]

ENTRYPOINT ["heed"]
CMD ["serve"]
