# The training image: every package at the version of constraints.txt, as `make setup` has them. Built and tested by
# `make image` and `make image-test`; docs/container.md says how it is run.
#
# CUDA's libraries come with torch's wheels, all of them: a base of the kind `runtime` would hold them twice. Any Debian or
# Ubuntu serves; one without python3 gets its own release's, which must be 3.11 or 3.12.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04

# A folder of wheels that go before the index's, torch's CPU build say: --build-context wheels=FOLDER. Empty if not given.
FROM scratch AS wheels

FROM ${BASE} AS system
# g++ and Python's headers: torch.compile builds its kernels' launchers on the node. The ibverbs: NCCL loads them where
# there is InfiniBand, and without them goes over TCP without a word. tini: a first process that passes signals on,
# which pods keep too, since they give words for the entrypoint and no command.
RUN export DEBIAN_FRONTEND=noninteractive \
 && apt-get update -qq \
 && command -v python3 > /dev/null && python="" || python="python3 libpython3-dev python3-venv" \
 && apt-get install -y -qq --no-install-recommends \
      ca-certificates g++ libc6-dev libibverbs1 ibverbs-providers tini $python > /dev/null \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*.log /var/log/apt \
 && python3 -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"python3 is {v}: not 3.11 or 3.12")'
# A number, not a name, is what Kubernetes can check not to be root. Ubuntu has given 1000 to a user of its own.
RUN if name=$(getent passwd 1000 | cut -d: -f1) && [ -n "$name" ]; then userdel -r "$name" 2> /dev/null; fi \
 && groupadd --gid 1000 loupe \
 && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /bin/bash --no-log-init loupe
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# What the layers of packages are made from, so that an edit of pyproject.toml that is about something else leaves them.
FROM system AS lock
WORKDIR /lock
COPY pyproject.toml constraints.txt ./
RUN grep -v '^#' constraints.txt > locked.txt \
 && grep -E '^(torch|triton|nvidia-.*|cuda-.*|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|setuptools|sympy|typing-extensions)==' \
      locked.txt > torch.txt \
 && python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["s3"], sep="\n")' > packages.txt

FROM system AS code
COPY . /opt/loupe
# A umask of 077 where it is built must not hide the code from the image's user. The bytecode never has to be checked
# against its source, and cannot be written when the code runs.
RUN chmod -R u=rwX,go=rX /opt/loupe \
 && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/loupe/trainer /opt/loupe/launch /opt/loupe/data /opt/loupe/ops

FROM system
# The secret `pip` is a pip.conf, `pip-ca` the certificates that it may name: how to reach an index stays out of the image.
RUN --mount=type=bind,from=lock,source=/lock,target=/lock \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip --mount=type=secret,id=pip-ca \
    python3 -m venv /opt/venv \
 && PIP_CONFIG_FILE=/run/secrets/pip /opt/venv/bin/pip install --quiet --find-links /wheels -c /lock/torch.txt torch
# mosaicml-streaming's own pins cannot be met beside diffusers; what it imports is among our dependencies (pyproject.toml)
RUN --mount=type=bind,from=lock,source=/lock,target=/lock \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip --mount=type=secret,id=pip-ca \
    export PIP_CONFIG_FILE=/run/secrets/pip \
 && /opt/venv/bin/pip install --quiet --find-links /wheels -c /lock/locked.txt -r /lock/packages.txt \
 && /opt/venv/bin/pip install --quiet --no-deps -c /lock/locked.txt mosaicml-streaming
COPY --from=code /opt/loupe /opt/loupe
RUN /opt/venv/bin/pip install --quiet --no-deps --no-index --no-build-isolation -e /opt/loupe

# HOME is /tmp, the one place that can always be written to. LOGNAME: for a user of another number, whom nobody has named.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    LOGNAME=loupe \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["loupe", "--help"]
# last, for they change with each commit
ARG VERSION=0
ARG REVISION=unknown
ARG BASE
LABEL org.opencontainers.image.title="loupe" \
      org.opencontainers.image.description="Distributed training of text-to-image latent diffusion with the latent perceptual loss" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
