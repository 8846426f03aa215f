# One image for every role: `tandem router`, `tandem worker`, … docs/image.md says how to build and
# run it, and what of it was checked.
ARG ACCELERATOR=cpu
# Python 3.11 to 3.13 on Debian; name one by its digest where builds must repeat.
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS base

# ---- the pinned packages: all wheels, so that nothing is compiled here

# The secret is a pip.conf, for those who have an index of their own; without it pip uses its own.
FROM base AS packages-cpu
COPY requirements/ /src/requirements/
RUN --mount=type=cache,target=/pip-cache \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    python -m venv /opt/tandem \
    && PIP_CACHE_DIR=/pip-cache /src/requirements/install.sh /opt/tandem/bin/python runtime

FROM base AS packages-gpu
COPY requirements/ /src/requirements/
RUN --mount=type=cache,target=/pip-cache \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    python -m venv /opt/tandem \
    && PIP_CACHE_DIR=/pip-cache /src/requirements/install.sh /opt/tandem/bin/python gpu

# ---- our own, by the setuptools that is pinned

# hadolint ignore=DL3006
FROM packages-${ACCELERATOR} AS build
COPY . /src/
RUN /opt/tandem/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation /src

# ---- what is shipped

FROM base AS runtime-cpu
# libnuma: vLLM's CPU build links it. g++ at run time: vLLM compiles kernels when it loads a model,
# and without a compiler a worker starts only with --enforce-eager; on a GPU, Triton needs it too.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

FROM runtime-cpu AS runtime-gpu
# For the runtimes that lend GPUs by environment. CUDA itself comes with the packages.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM runtime-${ACCELERATOR} AS image
ARG ACCELERATOR
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tandem" \
      org.opencontainers.image.description="Disaggregated LLM serving: prefill and decode on different workers" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.tandem.accelerator="${ACCELERATOR}"

# All that is ever written: caches (and models made or fetched) here, short-lived files in /tmp.
RUN mkdir -p /cache /models && chown 10001:10001 /cache
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    USER=tandem \
    VLLM_NO_USAGE_STATS=1
# USER=tandem: torch asks for the user's name, and a uid without a passwd entry has no other.

COPY --from=build /opt/tandem /opt/tandem

# A number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 10001:10001
WORKDIR /cache
STOPSIGNAL SIGTERM
# No HEALTHCHECK: each role has its own probe, at a port that its command line names.
ENTRYPOINT ["tandem"]
CMD ["--help"]
