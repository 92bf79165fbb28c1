"""Packaging of Espalier: `pip install .`, or `pip install -c constraints.txt -e ".[test]"` to work on it."""

from setuptools import find_packages, setup

setup(
    name="espalier",
    version="0.2.0",
    description="Pretrains transformers whose weights are low-rank products, and grows their ranks while they train",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(
        include=["configs", "launch", "model", "model.*", "pretrain", "pretrain.*", "tools", "tools.*"],
        exclude=["tools.experiments", "tools.experiments.*"],  # studies of a checkout
    ),
    package_data={
        "configs": ["*.yaml", "schema.json", "deepspeed/*.json"],
        "launch": ["*.sh", "*.sbatch", "*.yaml"],
        "tools.run_report": ["*.jinja"],
    },
    install_requires=[
        "accelerate>=1.10",
        "deepspeed>=0.19.8,<0.20",
        "filelock>=4.2",
        "jinja2>=3.1",
        "liger-kernel>=0.8",
        "matplotlib>=3.9",
        "megatron-core>=0.16.1,<0.17",
        "ninja",
        "numpy>=2",
        "protobuf>=5",
        "psutil>=6",
        "pydantic>=2.10",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "torch>=2.11",
        "transformers>=5",
        "xxhash>=3.5",
        "zstandard>=0.23",
    ],
    extras_require={
        "evaluation": ["lm_eval[hf]==0.4.11"],
        "test": [
            "import-linter>=2.4",
            "mypy>=1.15",
            "peft>=0.18",
            "pytest>=8.1",
            "pytest-timeout",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "types-PyYAML",
            "types-psutil",
        ],
    },
)
