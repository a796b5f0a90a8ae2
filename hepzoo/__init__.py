"""
A transformers-compatible model zoo for particle and nuclear physics.

`import hepzoo` registers every family with `AutoConfig`, `AutoTokenizer` or `AutoFeatureExtractor`, `AutoModel`, and
what it has of `AutoModelForCausalLM`, `AutoModelForPreTraining`, `AutoModelForSequenceClassification`,
`AutoModelForTokenClassification` and `AutoModelForInstanceSegmentation`. Model code is imported when an Auto class or
an attribute of this module asks for it.
"""

from hepzoo._registration import FAMILIES, register_families

__version__ = "0.1.0"

register_families()

_EXPORTS = {name: module for family in FAMILIES for name, module in family.exports().items()}
__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hepzoo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
