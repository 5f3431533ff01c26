"""Package metadata: what the project needs, pinned where another version changes numbers or breaks, and the optional extras.

The settings of the tools are in pyproject.toml.
"""

from setuptools import find_packages, setup

REQUIRED = [
    "torch==2.13.0",  # what sglang 0.5.21 pins too; `make setup` takes the CPU build
    'megatron-core==0.16.1; python_version < "3.12"',  # the last line that runs on Python 3.11
    'megatron-core==0.19.2; python_version >= "3.12"',
    "einops>=0.8",  # megatron-core imports it without declaring it
    "psutil>=6",  # so does its dist_checkpointing; we name ranks' parents with it
    "packaging>=24.2",
    "transformers==5.12.1",  # what sglang 0.5.21 pins too
    "sentencepiece==0.2.3",
    "safetensors==0.8.0",
    "numpy==2.4.6",
    "PyYAML>=6.0.2,<7",
    "webdataset==1.0.2",
    "math-verify==0.9.0",
    "rich>=14,<16",
    "tensorboard>=2.20,<3",
    "matplotlib==3.11.2",  # the report's charts
    "Jinja2>=3.1.6,<4",  # the report's page, and chat templates, for which transformers does not declare it
    "MarkupSafe>=3,<4",
    "httpx>=0.28,<1",  # speech and judge endpoints
    "pyarrow==26.0.1",  # the record of rollouts, and questions from Parquet and saved Hugging Face datasets
]

EXTRAS = {
    # CUDA machines: fused kernels, FP8, context parallelism with packed sequences. It compiles against the CUDA toolkit and must not be
    # half-installed on a machine without one. NVIDIA's apex is not on PyPI (the name there is another project): build it from
    # source, as the Dockerfile does.
    "gpu": [
        'transformer-engine[core_cu13,pytorch]==2.11.0; python_version < "3.12"',  # megatron-core 0.16.1 wants < 2.12
        'transformer-engine[core_cu13,pytorch]==2.20.2; python_version >= "3.12"',
    ],
    # The rollout server. It goes into an environment of its own (.venv-sglang): its many pins need not agree with ours.
    "sglang": ["sglang==0.5.21"],
    # Audio decoded and turned into features on the GPU, for large data sets.
    "dali": ["nvidia-dali-cuda130==2.4.0"],
    # The synthesiser that speaks the quickstart's questions: espeak-ng's library and voices in a wheel. GPL, hence optional.
    # soundfile reads recordings of benchmarks in any usual format.
    "speech": ["espeakng-loader==0.2.4", "soundfile==0.14.0"],
    # Piper's neural voices for questions of your own. GPL, hence optional.
    "piper": ["piper-tts==1.8.0"],
    # Kokoro, the paper's synthesiser, on the CPU; its phonemizer is GPL, hence optional.
    "kokoro": ["kokoro-onnx==0.6.1"],
    # Tests and checks, pinned so that a new rule or type stub does not fail an unchanged tree. Triton's kernels run in its interpreter there.
    "dev": [
        "pytest==9.2.0",
        "hypothesis==6.170.15",
        "ruff==0.17.6",
        "mypy==2.4.1",
        'triton==3.9.0; platform_system == "Linux"',
    ],
    # The rivals in benchmarks/: the trainer beside ours in benchmarks/train.py, and the losses in benchmarks/loss.py.
    "bench": ["trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "liger-kernel==0.8.5"],
    # Metrics to Weights & Biases as well (metrics.wandb).
    "wandb": ["wandb==0.31.0"],
    # The documentation as a site; the Markdown files read as well without it.
    "docs": ["mkdocs-material==9.8.1"],
}

setup(
    name="megatron-cord",
    version="0.1.0",
    description="Cross-modal on-policy distillation of large audio language models on Megatron-Core",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_cord", "megatron_cord.*"]),
    package_data={
        "megatron_cord.report": ["assets/*"],
        "megatron_cord.evaluation": ["assets/*"],
        "megatron_cord.losses": ["*.cpp"],
        "megatron_cord.rollout.sglang": [
            "plugin/*.py",
            "plugin/external/cord_models/*.py",
        ],  # run and imported by the server's interpreter
    },
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
