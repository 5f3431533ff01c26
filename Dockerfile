# The project on CUDA: torch, Megatron-Core and transformer-engine in .venv, SGLang in .venv-sglang.
#
# Written and linted, not built by the project's own machines, which have neither CUDA nor a registry of images.
#   docker build -t megatron_cord .                              (transformer-engine may compile: up to half an hour)
#   docker run --gpus all --ipc=host -it megatron_cord           (NCCL and the loaders need the host's shared memory)
#   docker build --target tests -t megatron_cord-tests .         (with pytest and what it needs)
#   docker run --gpus all --ipc=host megatron_cord-tests         (runs the tests; make inside it for other targets)

# 13.0 is the CUDA that torch 2.13.0 is built for; devel, because SGLang and Triton compile kernels while they run.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 AS base

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu 24.04 brings Python 3.12. Versions of system packages follow the image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential ca-certificates cmake git libnuma1 libsndfile1 ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 10001 cord \
    && install -d -o cord -g cord /opt/megatron_cord
USER 10001
WORKDIR /opt/megatron_cord

# SGLang pins torch and transformers for itself, in an environment of its own. One of its pins, cuda-tile 1.6.0rc5, is a
# stub on PyPI: while pip builds it, it downloads the wheel from NVIDIA's own index. A build behind a
# mirror must reach that address too, or be given the wheel by PIP_FIND_LINKS.
RUN python3 -m venv .venv-sglang \
    && .venv-sglang/bin/pip install sglang==0.5.21 \
    && echo cuda > .venv-sglang/.device

# What the extensions below are compiled against.
RUN python3 -m venv .venv \
    && .venv/bin/pip install torch==2.13.0 numpy==2.4.6 "setuptools>=77.0.3,<85" wheel==0.48.0 packaging==26.4 pybind11==3.1.0

# Architectures to compile for: A100, H100/H200, B200. MAX_JOBS bounds the compiler's memory.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG MAX_JOBS=8

# The torch part of transformer-engine is compiled here, against the torch above.
RUN NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS}" \
    .venv/bin/pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==2.20.2"

# NVIDIA's apex is left out: transformer-engine has the fused Adam and the gradient clipping that Megatron-Core looks for.
# --build-arg WITH_APEX=1 compiles it all the same, half an hour more. It is not on PyPI (the name there is another
# project); a commit is pinned because its tags lag behind torch.
ARG WITH_APEX=0
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN if [ "${WITH_APEX}" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS="${MAX_JOBS}" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
        .venv/bin/pip install --no-build-isolation "git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}" \
        && .venv/bin/python -c "from apex.optimizers import FusedAdam"; \
    fi

# Last, so that a change in the code rebuilds nothing above. pyproject.toml is the one list of what the project needs.
COPY --chown=10001:10001 . .
RUN .venv/bin/pip install --constraint requirements.lock -e ".[gpu,dali,speech]" \
    && echo cuda > .venv/.device

# The build ends here if a required part does not import. A build sees no GPU, so `verify environment` says more in a container.
RUN .venv/bin/python -m megatron_cord.verify environment

ENV PATH="/opt/megatron_cord/.venv/bin:${PATH}"

# The tests beside it, under the Triton that torch pins. The stamp tells make that the environment is complete.
FROM base AS tests
RUN pip install --constraint requirements.lock -e ".[dev,docs,gguf,lhotse,speech,wandb]" \
    && touch .venv/.installed
CMD ["python", "-m", "pytest", "-m", "not slow and not slurm"]

# What `docker build` makes: no tests.
FROM base
CMD ["python", "-m", "megatron_cord.verify", "environment"]
