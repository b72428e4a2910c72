# The training image: the same packages, from the same constraints, as `make setup` installs.
# The base is an argument; CUDA libraries come with torch's own wheels, so a plain Python base serves GPU nodes too.
#   buildah bud --build-arg BASE=python:3.11-slim -t loupe .
ARG BASE=python:3.11-slim
FROM ${BASE}

LABEL org.opencontainers.image.title="loupe" \
      org.opencontainers.image.description="Distributed training of latent diffusion with the latent perceptual loss" \
      org.opencontainers.image.licenses="Apache-2.0"

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/loupe
# dependencies first: this layer is rebuilt only when they change
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir trainer launch data ops \
 && python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install -c constraints.txt -e '.[s3]' \
 && /opt/venv/bin/pip install --no-deps -c constraints.txt mosaicml-streaming
ENV PATH=/opt/venv/bin:$PATH
COPY trainer trainer
COPY launch launch
COPY data data
COPY ops ops
# the editable install of the empty packages above knows only what existed then
RUN pip install --no-deps -e .

RUN useradd --create-home --uid 1000 loupe
USER loupe
WORKDIR /home/loupe
ENTRYPOINT ["loupe"]
CMD ["--help"]
