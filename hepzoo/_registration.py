"""
Registration of the families with the Auto classes of transformers.

The Auto classes pull in torch, which takes longer to import than transformers itself. So `import hepzoo` does not
import them: what belongs to an Auto module is registered right after that module is imported, whenever that is.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The public classes of one model type; files are named after the model type (`modeling_<model_type>.py`)."""

    model_type: str
    config: str
    models: tuple[tuple[str, str], ...]  # (Auto class, model class)
    tokenizer: str | None = None
    feature_extractor: str | None = None

    @property
    def configuration_module(self) -> str:
        return f"hepzoo.modeling.configuration_{self.model_type}"

    @property
    def modeling_module(self) -> str:
        return f"hepzoo.modeling.modeling_{self.model_type}"

    @property
    def tokenization_module(self) -> str:
        return f"hepzoo.tokenization.tokenization_{self.model_type}"

    @property
    def feature_extraction_module(self) -> str:
        return f"hepzoo.tokenization.feature_extraction_{self.model_type}"

    def exports(self) -> dict[str, str]:
        """Public class names and the modules that define them."""
        names = {self.config: self.configuration_module}
        names.update({model: self.modeling_module for _, model in self.models})
        if self.tokenizer is not None:
            names[self.tokenizer] = self.tokenization_module
        if self.feature_extractor is not None:
            names[self.feature_extractor] = self.feature_extraction_module
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
    Family(
        model_type="spade",
        config="SpadeConfig",
        models=(("AutoModel", "SpadeModel"), ("AutoModelForCausalLM", "SpadeForCausalLM")),
        tokenizer="SpadeTokenizer",
    ),
    Family(
        model_type="omnijet_vqvae",
        config="OmniJetVQVAEConfig",
        models=(("AutoModel", "OmniJetVQVAEModel"),),
    ),
    Family(
        model_type="omnijet",
        config="OmniJetConfig",
        models=(
            ("AutoModel", "OmniJetModel"),
            ("AutoModelForCausalLM", "OmniJetForCausalLM"),
            ("AutoModelForSequenceClassification", "OmniJetForSequenceClassification"),
            ("AutoModelForPreTraining", "OmniJetForPreTraining"),
        ),
        tokenizer="OmniJetTokenizer",
    ),
    Family(
        model_type="fm4npp",
        config="Fm4nppConfig",
        models=(
            ("AutoModel", "Fm4nppModel"),
            ("AutoModelForPreTraining", "Fm4nppForPreTraining"),
            ("AutoModelForInstanceSegmentation", "Fm4nppForTrackFinding"),
            ("AutoModelForTokenClassification", "Fm4nppForTokenClassification"),
        ),
        feature_extractor="Fm4nppFeatureExtractor",
    ),
    Family(
        model_type="omnilearned",
        config="OmniLearnedConfig",
        models=(
            ("AutoModel", "OmniLearnedModel"),
            ("AutoModelForSequenceClassification", "OmniLearnedForSequenceClassification"),
            ("AutoModelForTokenClassification", "OmniLearnedForTokenClassification"),
            ("AutoModelForPreTraining", "OmniLearnedForPreTraining"),
            ("AutoModelForPreTraining", "OmniLearnedForGeneration"),
            ("AutoModelForPreTraining", "OmniLearnedForJetGeneration"),
        ),
        feature_extractor="OmniLearnedFeatureExtractor",
    ),
    Family(
        model_type="epic_fm",
        config="EpicFMConfig",
        models=(("AutoModel", "EpicFMModel"), ("AutoModelForPreTraining", "EpicFMForGeneration")),
        feature_extractor="EpicFMFeatureExtractor",
    ),
)


AUTO_PACKAGE = "transformers.models.auto"


def _register(auto_module: str, family: Family):
    """Register what `family` has for one Auto module, both of them imported."""
    auto = sys.modules[auto_module]
    config_class = family.load(family.config)
    if auto_module.endswith("configuration_auto"):
        auto.AutoConfig.register(family.model_type, config_class, exist_ok=True)
    elif auto_module.endswith("modeling_auto"):
        for auto_class in dict(family.models):
            # of several classes, the Auto class takes the one that the configuration of a checkpoint names
            models = tuple(family.load(model) for name, model in family.models if name == auto_class)
            model_class = models if len(models) > 1 else models[0]
            getattr(auto, auto_class).register(config_class, model_class, exist_ok=True)
    elif auto_module.endswith("feature_extraction_auto"):
        if family.feature_extractor is not None:
            extractor = family.load(family.feature_extractor)
            auto.AutoFeatureExtractor.register(config_class, extractor, exist_ok=True)
    elif family.tokenizer is not None:
        auto.AutoTokenizer.register(config_class, tokenizer_class=family.load(family.tokenizer), exist_ok=True)


# (Auto module, family, our module) of every registration
_REGISTRATIONS = [
    (f"{AUTO_PACKAGE}.{auto}", family, module)
    for family in FAMILIES
    for auto, module in (
        ("configuration_auto", family.configuration_module),
        ("modeling_auto", family.modeling_module),
        ("tokenization_auto", family.tokenization_module),
        ("feature_extraction_auto", family.feature_extraction_module),
    )
]
OUR_MODULES = {module for _, _, module in _REGISTRATIONS}


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """
    Lets the regular finders find a module and registers once it has been executed.

    Our modules are watched too: importing one of them can import an Auto module on the way, when ours is not complete
    yet. Then the registration follows at the end of ours.
    """

    def __init__(self):
        self.watched = {name for auto, _, module in _REGISTRATIONS for name in (auto, module)}
        self.executing: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.watched:
            return None
        # looking for a module is not importing it: it stays watched until it has been executed
        self.watched.remove(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.watched.add(fullname)
        if spec is None or fullname in sys.modules:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_register(module):
            self.watched.discard(fullname)
            self.executing.add(fullname)
            try:
                exec_module(module)
            finally:
                self.executing.discard(fullname)
            self.register(fullname)

        spec.loader.exec_module = exec_and_register
        return spec

    def register(self, imported: str):
        """
        Do the registrations that `imported`, an Auto module or one of ours, was missing for.

        While one of ours is being executed, modules that it and its siblings need may be incomplete: then everything
        waits for its end.
        """
        if self.executing & OUR_MODULES:
            return
        for auto, family, module in _REGISTRATIONS:
            is_due = imported in (auto, module) or imported in OUR_MODULES
            if is_due and auto in sys.modules and auto not in self.executing:
                _register(auto, family)


def register_families():
    """Register now with the Auto modules that are imported already, and with the others when they are."""
    finder = _RegisterAfterImport()
    sys.meta_path.insert(0, finder)
    for auto in sorted({auto for auto, _, _ in _REGISTRATIONS}):
        if auto in sys.modules:
            finder.watched.discard(auto)
            finder.register(auto)
