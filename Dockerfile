# The project on CUDA: torch, Megatron-Core, transformer-engine and NVIDIA's apex in .venv, SGLang in .venv-sglang.
#
# Written and linted, not built by the project's own machines, which have neither CUDA nor a registry of images.
#   docker build -t megatron_cord .                      (about an hour: apex and transformer-engine compile)
#   docker run --gpus all --ipc=host -it megatron_cord   (NCCL and the loaders need the host's shared memory)

# 13.0 is the CUDA that torch 2.13.0 is built for; devel, because SGLang and Triton compile kernels while they run.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu 24.04 brings Python 3.12. Versions of system packages follow the image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential ca-certificates git libnuma1 libsndfile1 ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 10001 cord \
    && install -d -o cord -g cord /opt/megatron_cord
USER 10001
WORKDIR /opt/megatron_cord

# SGLang pins torch and transformers for itself, in an environment of its own.
RUN python3 -m venv .venv-sglang \
    && .venv-sglang/bin/pip install sglang==0.5.21

# What the extensions below are compiled against.
RUN python3 -m venv .venv \
    && .venv/bin/pip install torch==2.13.0 numpy==2.4.6 "setuptools>=77.0.3,<85" wheel==0.48.0 packaging==26.3 pybind11==3.1.0

# Architectures to compile for: A100, H100/H200, B200. MAX_JOBS bounds the compiler's memory.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG MAX_JOBS=8

# apex is not on PyPI (the name there is another project); a commit is pinned because its tags lag behind torch.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS="${MAX_JOBS}" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
    .venv/bin/pip install --no-build-isolation "git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"

# The torch part of transformer-engine is compiled here, against the torch above. A layer of its own: apex need not compile again.
# hadolint ignore=DL3059
RUN NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS}" \
    .venv/bin/pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==2.20.2"

# Last, so that a change in the code rebuilds nothing above. pyproject.toml is the one list of what the project needs.
COPY --chown=10001:10001 . .
RUN .venv/bin/pip install --constraint requirements.lock -e ".[gpu,dali,speech]"

# The build ends here if a required part or apex does not import. A build sees no GPU, so `verify environment` says more in a container.
RUN .venv/bin/python -m megatron_cord.verify environment \
    && .venv/bin/python -c "from apex.optimizers import FusedAdam"

ENV PATH="/opt/megatron_cord/.venv/bin:${PATH}"
CMD ["python", "-m", "megatron_cord.verify", "environment"]
