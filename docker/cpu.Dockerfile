# The tests on a CPU, with a Slurm for them. Build from the repository's root:
#
#   docker build --file docker/cpu.Dockerfile --tag dsr-scale-cpu .
#   docker run --rm --shm-size=2g dsr-scale-cpu            # make test
#   docker run --rm dsr-scale-cpu dsr-smoke
FROM python:3.11.15-slim-bookworm

LABEL org.opencontainers.image.title="dsr-scale-cpu" \
      org.opencontainers.image.description="Tests of dsr-scale on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0"

# Debian keeps only the newest build of a package, so a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make munge slurm-client slurmctld slurmd \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 dsr

# `make install` finds this torch and keeps it; from PyPI it would be several GB of CUDA.
ENV VENV=/opt/dsr-scale/venv
RUN python3 -m venv "$VENV" \
    && "$VENV/bin/pip" install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        torch==2.13.0 torchvision==0.28.0

WORKDIR /opt/dsr-scale/source
COPY --chown=dsr:dsr . .
RUN --mount=type=cache,target=/root/.cache/pip make install && chown dsr:dsr .
ENV PATH=/opt/dsr-scale/venv/bin:$PATH \
    DSR_CONFIGS=/opt/dsr-scale/source/configs
COPY docker/smoke_train.sh /usr/local/bin/dsr-smoke

USER 1000
CMD ["make", "test"]
