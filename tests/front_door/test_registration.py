"""`import hepzoo`: what it registers, in any order of imports, and what it does not import."""

import json
import statistics
import time

import pytest

import hepzoo
from hepzoo._registration import FAMILIES
from tests.subprocesses import checked, run_python

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# sizes of a small model of each family
SIZES = {
    "cmhca_dirc": {**TINY, "vocab_size": 20, "time_vocab_size": 10},
    "spade": {**TINY, "nbins": [3, 3, 3], "max_num_hits": 10},
    "omnijet_vqvae": {**TINY, "codebook_size": 8},
    "omnijet": {**TINY, "codebook_size": 17, "vocab_size": 20},
    "fm4npp": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "head_size": 16, "num_prototypes": 4},
    "omnilearned": {**TINY, "use_time": True},
    "epic_fm": {"hidden_size": 16, "num_hidden_layers": 2},
}

# settings that one model of a family needs
SETTINGS = {
    "OmniJetForPreTraining": {"architecture": "hybrid"},
    "OmniLearnedForJetGeneration": {"num_conditions": 2},
}

# Auto class -> class of what turns rows into inputs
READERS = {
    family.model_type: {
        auto_class: name
        for auto_class, name in {
            "AutoTokenizer": family.tokenizer,
            "AutoFeatureExtractor": family.feature_extractor,
        }.items()
        if name is not None
    }
    for family in FAMILIES
}

ORDERS = {
    "hepzoo_first": "import hepzoo",
    "auto_classes_first": "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer; import hepzoo",
    "auto_tokenizer_first": "from transformers import AutoTokenizer; import hepzoo",
    "modeling_first": "import hepzoo.modeling.modeling_cmhca_dirc",
    "configuration_first": "import hepzoo.modeling.configuration_cmhca_dirc",
    "tokenizer_first": "import hepzoo.tokenization.tokenization_cmhca_dirc",
    "auto_classes_then_modeling": (
        "from transformers import AutoModel, AutoTokenizer; import hepzoo.modeling.modeling_cmhca_dirc"
    ),
    "class_from_hepzoo": "from hepzoo import CMHCADircForCausalLM",
    # asking where a module is must not use up its registration
    "looked_for_before_import": (
        "import hepzoo, importlib.util; importlib.util.find_spec('transformers.models.auto.modeling_auto'); "
        "importlib.util.find_spec('hepzoo.modeling.modeling_cmhca_dirc')"
    ),
    "reloaded": "import hepzoo, importlib; importlib.reload(hepzoo)",
    "transformers_first": "import transformers; import hepzoo",
    "both_models": "import hepzoo.modeling.modeling_spade, hepzoo.modeling.modeling_cmhca_dirc",
    "feature_extractor_first": "import hepzoo.tokenization.feature_extraction_fm4npp",
    "auto_feature_extractor_first": "from transformers import AutoFeatureExtractor; import hepzoo",
    "auto_classes_then_flow_model": (
        "from transformers import AutoFeatureExtractor, AutoModel; import hepzoo.modeling.modeling_epic_fm"
    ),
}

# Forked children share what no order is about and takes longest to import.
RUN_ORDERS = """
import json, os, sys, traceback
import scipy.optimize, sklearn.metrics, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
import PIL.Image, accelerate, huggingface_hub, jinja2, safetensors.torch, tokenizers, yaml

assert not {"hepzoo", "transformers"} & set(sys.modules)

orders, folder, families = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def observe(code):
    exec(code, {})
    import transformers
    from transformers import AutoConfig
    objects = {}
    for family, (sizes, models, readers) in families.items():
        saved = os.path.join(folder, family)
        config = AutoConfig.for_model(family, **sizes)
        made = {"AutoConfig.for_model": config, "AutoConfig": AutoConfig.from_pretrained(saved)}
        made |= {name: getattr(transformers, name).from_pretrained(saved) for name in readers}
        for name, model, settings in models:
            config = AutoConfig.for_model(family, **sizes, **settings, architectures=[model])
            made[f"{name} {model}"] = getattr(transformers, name).from_config(config)
        objects[family] = {name: f"{type(value).__module__}.{type(value).__qualname__}" for name, value in made.items()}
    return objects

results, names = {}, list(orders)
for pair in zip(names[::2], names[1::2] + [None] * (len(names) % 2)):
    pipes = {}
    for name in filter(None, pair):
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                answer = observe(orders[name])
            except BaseException:
                answer = traceback.format_exc()[:1500]
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
        os.close(writing)
        pipes[name] = reading
    for name, reading in pipes.items():
        with os.fdopen(reading) as pipe:
            results[name] = json.load(pipe)
        os.wait()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def observations(tmp_path_factory) -> dict:
    """Order of imports -> family -> {Auto class: class of the object it made}, or a traceback."""
    folder = tmp_path_factory.mktemp("registration")
    families = {}
    for family in FAMILIES:
        sizes = SIZES[family.model_type]
        family.load(family.config)(**sizes).save_pretrained(folder / family.model_type)
        for name in READERS[family.model_type].values():
            family.load(name)().save_pretrained(folder / family.model_type)
        models = [(auto_class, model, SETTINGS.get(model, {})) for auto_class, model in family.models]
        families[family.model_type] = (sizes, models, list(READERS[family.model_type]))
    result = run_python(RUN_ORDERS, folder, json.dumps(ORDERS), folder, json.dumps(families))
    return json.loads(checked(result))


def test_every_family_is_observed():
    assert list(SIZES) == [family.model_type for family in FAMILIES]


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_auto_class_makes_our_classes_in_any_order_of_imports(observations, order, model_type):
    classes = observations[order]
    assert isinstance(classes, dict), classes
    (family,) = (family for family in FAMILIES if family.model_type == model_type)
    expected = {
        "AutoConfig.for_model": f"{family.configuration_module}.{family.config}",
        "AutoConfig": f"{family.configuration_module}.{family.config}",
    }
    for auto_class, model in family.models:
        expected[f"{auto_class} {model}"] = f"{family.modeling_module}.{model}"
    for auto_class, name in READERS[model_type].items():
        expected[auto_class] = f"{family.exports()[name]}.{name}"
    assert classes[model_type] == expected


def test_import_of_hepzoo_imports_nothing_heavy(tmp_path):
    """In a process that has the extras installed, `import hepzoo` does not touch them, nor torch."""
    code = """
import json, sys
import transformers
before = set(sys.modules)
import hepzoo
names = dir(hepzoo)
print(json.dumps([sorted({name.partition(".")[0] for name in sys.modules}), sorted(set(sys.modules) - before)]))
"""
    packages, new = json.loads(checked(run_python(code, tmp_path)))
    heavy = "torch matplotlib mplhep h5py uproot awkward scipy sklearn pandas pyarrow datasets accelerate evaluate"
    assert not set(heavy.split()) & set(packages)
    assert not [name for name in new if name.startswith("transformers.")]
    assert {name for name in new if name.startswith("hepzoo")} == {"hepzoo", "hepzoo._registration"}


def test_import_of_hepzoo_costs_little_above_transformers(tmp_path):
    """A loose bound; what keeps the cost low is the absence of heavy modules, tested above."""
    code = """
import time
import transformers
start = time.perf_counter()
import hepzoo
print(time.perf_counter() - start)
"""
    times = [float(checked(run_python(code, tmp_path))) for _ in range(3)]
    assert statistics.median(times) < 1.0


def test_imports_of_the_models_need_no_optional_package(tmp_path):
    optional = ("matplotlib", "mplhep", "h5py", "uproot", "awkward", "fastjet", "pythia8mc", "mamba_ssm", "datasets")
    code = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # import raises ImportError
import hepzoo
for name in hepzoo.__all__:
    getattr(hepzoo, name)
"""
    start = time.perf_counter()
    checked(run_python(code, tmp_path, *optional))
    assert time.perf_counter() - start < 120


def test_exports_are_listed_and_resolve():
    names = {name for family in FAMILIES for name in family.exports()}
    assert set(hepzoo.__all__) == names | {"__version__"}
    assert names <= set(dir(hepzoo))
    for family in FAMILIES:
        for name, module in family.exports().items():
            exported = getattr(hepzoo, name)
            assert exported.__name__ == name and exported.__module__ == module


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hepzoo' has no attribute 'CMHCAGlue'"):
        hepzoo.CMHCAGlue  # noqa: B018
    with pytest.raises(ImportError, match="CMHCAGlue"):
        from hepzoo import CMHCAGlue  # noqa: F401


def test_a_config_class_is_not_registered_for_a_foreign_model_type():
    from transformers import AutoConfig

    for family in FAMILIES:
        assert family.load(family.config).model_type == family.model_type
        assert type(AutoConfig.for_model(family.model_type)) is family.load(family.config)
    with pytest.raises(ValueError, match="cmhca_dirk"):
        AutoConfig.for_model("cmhca_dirk")
