# The encoder service alone. Build from the repository's root:
#
#   docker build --file docker/encoder.Dockerfile --tag dsr-scale-encoder .
#   docker run --rm --gpus all dsr-scale-encoder dsr-smoke
#
# The same base as train.Dockerfile, so that nodes keep its layers once and latents come from the same
# kernels; without DeepSpeed, Megatron and the data tools.
FROM nvcr.io/nvidia/pytorch:26.05-py3

LABEL org.opencontainers.image.title="dsr-scale-encoder" \
      org.opencontainers.image.description="Encoder service of dsr-scale on NVIDIA's PyTorch image" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/dsr-scale
COPY docker/install.sh docker/
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dsr_scale dsr_scale
RUN --mount=type=cache,target=/root/.cache/pip \
    docker/install.sh packages /opt/dsr-scale/venv constraints.txt '.[serve]'
ENV PATH=/opt/dsr-scale/venv/bin:$PATH \
    PIP_CONSTRAINT=/opt/dsr-scale/venv/torch-constraints.txt
COPY configs configs
COPY docker/smoke_encoder.sh /usr/local/bin/dsr-smoke

# Nothing is written into the image at run time: any user id works.
WORKDIR /workspace
CMD ["dsr-scale", "serve", "--help"]
