from setuptools import setup

CORE = ["torch>=2.11", "numpy>=1.26", "safetensors>=0.4.3", "scipy>=1.11", "scikit-learn>=1.4"]
FEDERATED = ["timm>=1.0.15", "matplotlib>=3.8", "pillow>=10", "tqdm>=4.66"]
DEV = [
    "setuptools>=77",
    "transformers>=4.56",
    "pytest>=8",
    "pytest-benchmark>=5",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.14",
]

setup(
    packages=["hilora", "hilora.federated", "hilora.federated.strategies", "hilora.kernels"],
    package_dir={"hilora": "hilora", "hilora.kernels": "kernels"},
    package_data={"hilora": ["py.typed"], "hilora.federated": ["assets/*.safetensors"], "hilora.kernels": ["py.typed"]},
    install_requires=CORE,
    extras_require={"federated": FEDERATED, "dev": FEDERATED + DEV},
)
