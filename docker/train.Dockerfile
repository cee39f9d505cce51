# Trainers: training, export, evaluation. Build from the repository's root:
#
#   docker build --file docker/train.Dockerfile --tag dsr-scale-train .
#   docker run --rm --gpus all --shm-size=8g dsr-scale-train dsr-smoke
#
# 26.05 is reported to have torch 2.12.0a0+5aff3928d8.nv26.05 with CUDA 13.2 (source: docs/docker.md).
# Images before 26.04 have 2.11.0a0 or older, below the 2.11 that pyproject.toml requires: the build ends.
FROM nvcr.io/nvidia/pytorch:26.05-py3

LABEL org.opencontainers.image.title="dsr-scale-train" \
      org.opencontainers.image.description="Trainers of dsr-scale on NVIDIA's PyTorch image" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/dsr-scale
COPY docker/install.sh docker/
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dsr_scale dsr_scale
RUN --mount=type=cache,target=/root/.cache/pip \
    docker/install.sh packages /opt/dsr-scale/venv constraints.txt '.[train,eval]' \
    && docker/install.sh flash-attn /opt/dsr-scale/venv pyproject.toml
# No constraints of the image for what a user installs on top; ours keep torch.
ENV PATH=/opt/dsr-scale/venv/bin:$PATH \
    PIP_CONSTRAINT=/opt/dsr-scale/venv/torch-constraints.txt
COPY configs configs
COPY docker/smoke_train.sh /usr/local/bin/dsr-smoke

# Nothing is written into the image at run time: any user id works.
WORKDIR /workspace
CMD ["dsr-scale", "--help"]
