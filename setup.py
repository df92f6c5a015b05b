from pathlib import Path

from setuptools import find_packages, setup

CORE = ["torch>=2.11", "numpy>=1.26", "safetensors>=0.4.3", "scipy>=1.11", "scikit-learn>=1.4"]
FEDERATED = ["timm>=1.0.15", "matplotlib>=3.8", "pillow>=10", "tqdm>=4.66", "pydantic>=2.7"]
DEV = [
    "setuptools>=64",
    "wheel",
    "transformers>=4.56",
    "peft>=0.17",
    "pytest>=8",
    "pytest-benchmark>=5",
    "hypothesis>=6.100",
]
CHECKS = ["ruff>=0.9", "mypy>=1.14"]
SITE = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "griffe-pydantic>=1.1"]

setup(
    name="hilora",
    version="0.1.0",
    description="Hierarchical low-rank adaptation of Vision Transformers for many clients at once",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hilora", "hilora.*"]),
    package_data={"hilora": ["py.typed", "**/*.safetensors", "**/*.json"]},
    install_requires=CORE,
    extras_require={"federated": FEDERATED, "dev": FEDERATED + DEV + CHECKS + SITE},
)
