"""
Registration of the families with the Auto classes of transformers.

The Auto classes pull in torch, which takes longer to import than transformers itself. So `import hepzoo` does not
import them: what belongs to an Auto module is registered right after that module is imported, whenever that is.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The public classes of one model type; files are named after the model type (`modeling_<model_type>.py`)."""

    model_type: str
    config: str
    models: tuple[tuple[str, str], ...]  # (Auto class, model class)
    tokenizer: str | None = None

    @property
    def configuration_module(self) -> str:
        return f"hepzoo.modeling.configuration_{self.model_type}"

    @property
    def modeling_module(self) -> str:
        return f"hepzoo.modeling.modeling_{self.model_type}"

    @property
    def tokenization_module(self) -> str:
        return f"hepzoo.tokenization.tokenization_{self.model_type}"

    def exports(self) -> dict[str, str]:
        """Public class names and the modules that define them."""
        names = {self.config: self.configuration_module}
        names.update({model: self.modeling_module for _, model in self.models})
        if self.tokenizer is not None:
            names[self.tokenizer] = self.tokenization_module
        return names

    def load(self, name: str) -> type:
        return getattr(importlib.import_module(self.exports()[name]), name)


FAMILIES = (
    Family(
        model_type="cmhca_dirc",
        config="CMHCADircConfig",
        models=(
            ("AutoModel", "CMHCADircModel"),
            ("AutoModelForCausalLM", "CMHCADircForCausalLM"),
            ("AutoModelForSequenceClassification", "CMHCADircForSequenceClassification"),
            ("AutoModelForTokenClassification", "CMHCADircForTokenClassification"),
        ),
        tokenizer="CMHCADircTokenizer",
    ),
)


def _register_configs():
    from transformers.models.auto.configuration_auto import AutoConfig

    for family in FAMILIES:
        AutoConfig.register(family.model_type, family.load(family.config), exist_ok=True)


def _register_models():
    from transformers.models.auto import modeling_auto

    for family in FAMILIES:
        config_class = family.load(family.config)
        for auto_class, model in family.models:
            getattr(modeling_auto, auto_class).register(config_class, family.load(model), exist_ok=True)


def _register_tokenizers():
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    for family in FAMILIES:
        if family.tokenizer is not None:
            config_class = family.load(family.config)
            AutoTokenizer.register(config_class, tokenizer_class=family.load(family.tokenizer), exist_ok=True)


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizers,
}


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets the regular finders find an Auto module and runs the registration once it has been executed."""

    def __init__(self, pending: dict[str, Callable[[], None]]):
        self.pending = pending

    def find_spec(self, fullname, path=None, target=None):
        register = self.pending.pop(fullname, None)
        if register is None:
            return None
        spec = importlib.util.find_spec(fullname)
        exec_module = spec.loader.exec_module

        def exec_and_register(module):
            exec_module(module)
            register()

        spec.loader.exec_module = exec_and_register
        return spec


def register_families():
    """Register now what is imported already, and the rest when it is imported."""
    pending = {}
    for module, register in _AFTER_IMPORT.items():
        if module in sys.modules:
            register()
        else:
            pending[module] = register
    if pending:
        sys.meta_path.insert(0, _RegisterAfterImport(pending))
