"""Hierarchical low-rank adaptation (HiLoRA) of Vision Transformers for many clients at once.

What there is stands in `__init__.pyi`, and is loaded when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
