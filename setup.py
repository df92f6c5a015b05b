import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "hilora/version.py").read_text(encoding="utf-8"), re.M)[1]

CORE = [
    "torch>=2.11",
    "numpy>=1.26",
    "safetensors>=0.4.3",
    "scipy>=1.11",
    "scikit-learn>=1.4",
    "lazy-loader>=0.4",
]
FEDERATED = ["timm>=1.0.15", "matplotlib>=3.8", "pillow>=10", "tqdm>=4.66", "pydantic>=2.7", "shtab>=1.7"]
FLOWER = ["flwr>=1.41,<1.43"]
DEV = [
    "setuptools>=64",
    "wheel",
    "build>=1.2",
    "twine>=6,<7",  # later ones want a newer packaging than flwr has
    "transformers>=4.56",
    "torchvision>=0.26",
    "open_clip_torch>=3",
    "peft>=0.17",
    "accelerate>=1.0",
    "onnxscript>=0.5",
    "onnxruntime>=1.20",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "nbclient>=0.10",
    "ipykernel>=6.29",
]
CHECKS = ["ruff>=0.9", "mypy>=1.14"]
SITE = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "griffe-pydantic>=1.1"]

setup(
    name="hilora",
    version=VERSION,
    description="Hierarchical low-rank adaptation of Vision Transformers for many clients at once",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The authors of hilora",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="lora peft vision-transformer federated-learning personalization triton",
    project_urls={"Paper": "https://arxiv.org/abs/2603.02785"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["hilora", "hilora.*"]),
    package_data={"hilora": ["py.typed", "*.pyi", "**/*.safetensors", "**/*.json", "**/*.css", "**/*.js", "**/*.c"]},
    install_requires=CORE,
    extras_require={"federated": FEDERATED, "flower": FLOWER, "dev": FEDERATED + FLOWER + DEV + CHECKS + SITE},
    entry_points={"console_scripts": ["hilora = hilora.cli.main:main"]},
)
