"""`hepzoo convert omnijet`: Lightning checkpoints and configurations in the published layouts."""

import copy
import functools
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import hepzoo
from hepzoo.conversion import main as convert
from tests import lightning_checkpoints
from tests.golden_sets import DEFAULT_FOLDER

VQVAES = ("omnijet_vqvae_mlp", "omnijet_vqvae_transformer", "omnijet_c/vqvae", "omnijet_ntp/vqvae")
# golden set -> class, and the name that Lightning puts before the published parameters
KINDS = {
    **dict.fromkeys(VQVAES, ("OmniJetVQVAEModel", "model.")),
    "omnijet_gpt": ("OmniJetForCausalLM", ""),
    "omnijet_c/gpt": ("OmniJetForCausalLM", ""),
    "omnijet_classifier/summation": ("OmniJetForSequenceClassification", ""),
    "omnijet_classifier/class_attention": ("OmniJetForSequenceClassification", ""),
    "omnijet_classifier/particleflow_tokens": ("OmniJetForSequenceClassification", ""),
    "omnijet_classifier/normformer_continuous": ("OmniJetForSequenceClassification", ""),
    "omnijet_ntp/hybrid": ("OmniJetForPreTraining", ""),
}
EVERY_KIND = pytest.mark.parametrize("name", list(KINDS))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Parameters and configuration of a reference implementation."""
    folder = DEFAULT_FOLDER / name
    return load_file(folder / "state_dict.safetensors"), json.loads((folder / "config.json").read_text())


run_conversion = functools.partial(lightning_checkpoints.run_conversion, "omnijet")
assert_refused = functools.partial(lightning_checkpoints.assert_refused, "omnijet")


# ---------------------------------------------------------------------------------------------------------------------
# What converts
# ---------------------------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("protocol", [2, 4])
def test_lightning_checkpoint_to_an_equal_model(name, protocol, tmp_path):
    """The class, the sizes and every number of a plain checkpoint; of the rest of the file nothing is imported."""
    class_name, prefix = KINDS[name]
    state_dict, config = reference(name)
    output = run_conversion(tmp_path, {prefix + key: value for key, value in state_dict.items()}, config, protocol)
    found, info = getattr(hepzoo, class_name).from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((output / "config.json").read_text())["architectures"] == [class_name]

    folder = DEFAULT_FOLDER / name
    arguments = ["--checkpoint", str(folder / "state_dict.safetensors"), "--config", str(folder / "config.json")]
    assert convert(["omnijet", *arguments, "--output", str(tmp_path / "plain")]) == 0
    expected = getattr(hepzoo, class_name).from_pretrained(tmp_path / "plain").state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    assert not [module for module in sys.modules if module.partition(".")[0].endswith("_gone")]


@pytest.mark.parametrize("name", ["omnijet_gpt", "omnijet_c/gpt", "omnijet_classifier/class_attention"])
def test_buffers_are_no_parameters(name, tmp_path):
    """`*.tril` is a mask and `criterion.weight` holds the weight of the stop: they are left out, of whatever size."""
    state_dict, config = reference(name)
    for key in [key for key in state_dict if key.endswith(".tril")]:
        del state_dict[key]
    state_dict.pop("criterion.weight", None)
    without = run_conversion(tmp_path, state_dict, config)
    state_dict["module.GPT_blocks.0.mha_block.tril"] = torch.ones(1700, 1700).tril()
    state_dict["module.GPT_blocks.1.mha_block.tril"] = torch.ones(3)
    (tmp_path / "with").mkdir()
    output = run_conversion(tmp_path / "with", state_dict, config)
    stored = [load_file(folder / "model.safetensors") for folder in (without, output)]
    assert stored[0].keys() == stored[1].keys() and all(
        torch.equal(stored[0][key], stored[1][key]) for key in stored[0]
    )


def test_criterion_weight_becomes_the_weight_of_the_stop(tmp_path):
    state_dict, config = reference("omnijet_c/gpt")
    del config["model_kwargs"]["stop_token_weight"]
    state_dict["criterion.weight"][-1] = 0.25
    output = run_conversion(tmp_path, state_dict, config)
    assert hepzoo.OmniJetConfig.from_pretrained(output).stop_token_weight == 0.25
    assert not [key for key in load_file(output / "model.safetensors") if "criterion" in key]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in VQVAES])
def test_without_tokenizer_the_command_says_where_it_is(name, tmp_path, capsys):
    output = run_conversion(tmp_path, *reference(name))
    assert "no tokenizer written, it belongs to the tokenizer network" in capsys.readouterr().out
    assert not (output / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", VQVAES)
def test_the_tokenizer_of_a_vqvae_is_saved(name, tmp_path, capsys):
    state_dict, config = reference(name)
    output = run_conversion(tmp_path, state_dict, config)
    assert "no tokenizer" not in capsys.readouterr().out
    tokenizer, vqvae = AutoTokenizer.from_pretrained(output), AutoModel.from_pretrained(output)
    num_codes = vqvae.config.codebook_size
    # published generators have no id of their own for padding
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (num_codes + 2, num_codes + 1, 0)
    is_shower = "z" in tokenizer.feature_names
    assert tokenizer.sorting == ("energy" if is_shower else None)
    assert tokenizer.model_max_length == (1700 if is_shower else 128)
    for key, tensor in vqvae.state_dict().items():
        assert torch.equal(tensor, tokenizer.vqvae.state_dict()[key]), key
    row = {feature: [0.3, 0.2, 0.1] for feature in tokenizer.feature_names}
    ids = tokenizer(row)["input_ids"]
    assert len(ids) == 5 and ids[0] == 0 and ids[-1] == num_codes + 1
    assert tokenizer.decode(ids)["num_constituents"] == 3


def test_a_vqvae_without_features_says_that_it_has_no_tokenizer(tmp_path, capsys):
    state_dict, config = reference("omnijet_vqvae_transformer")
    del config["feature_dict"]
    output = run_conversion(tmp_path, state_dict, config)
    assert "no tokenizer written" in capsys.readouterr().out
    assert type(AutoModel.from_pretrained(output)).__name__ == "OmniJetVQVAEModel"


def test_settings_of_generation(tmp_path):
    state_dict, config = reference("omnijet_c/gpt")
    config["model_kwargs"] |= {"temperature": 0.75, "stop_token_threshold": 0.125}
    output = run_conversion(tmp_path, state_dict, config)
    stored = json.loads((output / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 0.75, "stop_token_threshold": 0.125, "bos_token_id": 0}
    expected["eos_token_id"] = config["stop_token_id"]
    assert {name: stored[name] for name in expected} == expected


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit: one line with all problems, and nothing written
# ---------------------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_hostile_unknown_parameters_are_listed(name, tmp_path):
    state_dict, config = reference(name)
    unknown = {"val_metric.total": torch.tensor(3.0), "ema.embedding.weight": torch.ones(4, 4)}
    assert_refused(tmp_path, state_dict | unknown, config, "unknown parameters", "model.ckpt", *unknown)


@pytest.mark.parametrize(
    ("name", "removed", "missing"),
    [
        (
            "omnijet_gpt",
            ["module.GPT_blocks.2.layernorm_1.bias", "head.fc1.bias"],
            ["model.layers.2.post_attention_norm.bias", "lm_head.bias"],
        ),
        (
            "omnijet_vqvae_transformer",
            ["decoder_normformer.blocks.1.norm2.bias", "vqlayer.affine_transform.bias"],
            ["decoder.layers.1.attention_output_norm.bias", "quantizer.affine_bias"],
        ),
        ("omnijet_vqvae_mlp", ["decoder.2.bias"], ["decoder.layers.2.bias"]),
        ("omnijet_ntp/hybrid", ["head_class.final_mlp.bias"], ["class_head.classifier.bias"]),
    ],
)
def test_hostile_missing_parameters_are_listed(name, removed, missing, tmp_path):
    state_dict, config = reference(name)
    for key in removed:
        del state_dict[key]
    assert_refused(tmp_path, state_dict, config, "model.ckpt", *(f"missing {key}" for key in missing))


def test_hostile_shapes_are_listed(tmp_path):
    state_dict, config = reference("omnijet_gpt")
    state_dict["head.fc1.bias"] = torch.zeros(7)
    state_dict["module.GPT_blocks.1.mha_block.key.weight"] = torch.zeros(32, 8)
    words = ["lm_head.bias has shape (7,), expected (50,)", "self_attn.k_proj.weight has shape (32, 8)"]
    assert_refused(tmp_path, state_dict, config, "model.ckpt", *words)


@pytest.mark.parametrize("shape", [(), (16,), (2, 3, 4), (0,), (0, 0), (1, 1)])
@EVERY_KIND
def test_hostile_parameters_that_give_sizes(name, shape, tmp_path):
    whole, config = reference(name)
    ends = ("embedding_table.weight", "codebook.weight", "0.ff_block.net.0.weight", "masked_feature_vector")
    ends += ("input_projection.weight", "phi_1.weight", "decoder.0.weight", "embed_part.weight", "output_layer.weight")
    # a layer that the forward pass never uses
    names = [key for key in whole if key.endswith(ends) and not key.startswith("head.input_projection")]
    assert names
    for key in names:
        assert_refused(tmp_path, whole | {key: torch.zeros(shape)}, config, "model.ckpt")


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith(("_mlp", "particleflow_tokens"))])
def test_hostile_blocks_are_refused_before_anything_is_built(name, tmp_path):
    state_dict, config = reference(name)
    first = next(key for key in state_dict if ".0." in key and "blocks" in key)
    state_dict[first.replace(".0.", ".100000000.", 1)] = state_dict[first]
    assert_refused(tmp_path, state_dict, config, "100000000", "model.ckpt")


def changed(config: dict, path: str, value) -> dict:
    """The configuration with one setting changed, or without it (`...`)."""
    config = copy.deepcopy(config)
    level = config
    *folders, name = path.split("/")
    for folder in folders:
        level = level[folder]
    if value is ...:
        del level[name]
    else:
        level[name] = value
    return config


GPT, SHOWERS, JETS, CAUSAL = "omnijet_gpt", "omnijet_c/gpt", "omnijet_vqvae_transformer", "omnijet_ntp/vqvae"
HYBRID, TAGGER = "omnijet_ntp/hybrid", "omnijet_classifier/class_attention"


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        # against the shapes
        (GPT, "model_kwargs/embedding_dim", 64, "embedding_dim = 64, but the checkpoint has 32"),
        (GPT, "model_kwargs/n_GPT_blocks", 10**9, "n_GPT_blocks = 1000000000, but the checkpoint has 3"),
        (GPT, "model_kwargs/vocab_size", 51, "vocab_size = 51, but the checkpoint has 50"),
        (GPT, "stop_token_id", 3, "stop_token_id = 3, but the checkpoint has 49"),
        (JETS, "vq_kwargs/num_codes", 97, "num_codes = 97, but the checkpoint has 96"),
        (JETS, "latent_dim", 5, "latent_dim = 5, but the checkpoint has 4"),
        (JETS, "num_blocks", 4, "num_blocks = 4, but the checkpoint has 3"),
        (SHOWERS, "model_kwargs/stop_token_weight", 0.5, "stop_token_weight = 0.5, but the checkpoint has 1.0"),
        # what the checkpoint does not hold
        (JETS, "vq_kwargs/affine_lr", ..., "no vq_kwargs.affine_lr"),
        (JETS, "vq_kwargs/affine_lr", 0, "no vq_kwargs.affine_lr"),
        (JETS, "vq_kwargs/replace_freq", 0, "replace_freq = 0, but the checkpoint has counts"),
        # not supported
        (JETS, "vq_kwargs/norm", "batch", "norm = 'batch', which is not supported"),
        (HYBRID, "gen_head_cfg/apply_causal_mask", False, "gen_head_cfg.apply_causal_mask = False"),
        # wrong types and values
        (GPT, "model_kwargs/n_heads", 5, "`hidden_size` = 32 is not a multiple of `num_attention_heads` = 5"),
        (GPT, "model_kwargs/n_heads", "four", "n_heads = 'four', expected a finite number"),
        (GPT, "model_kwargs/n_heads", [4], "n_heads = [4], expected a finite number"),
        (GPT, "model_kwargs/n_heads", True, "n_heads = True, expected a finite number"),
        (GPT, "model_kwargs/max_sequence_len", 2.5, "max_sequence_len = 2.5, expected a whole number"),
        (GPT, "model_kwargs/attention_dropout", float("nan"), "attention_dropout = nan, expected a finite number"),
        (JETS, "num_heads", 0, "num_heads = 0"),
        (JETS, "vq_kwargs", 3, "vq_kwargs = 3, expected a mapping"),
        (JETS, "feature_dict", ["part_pt"], "feature_dict = ['part_pt'], expected a mapping"),
        (JETS, "feature_dict/part_pt/func", "os.system", "feature_dict.part_pt.func = 'os.system', expected one of"),
        (JETS, "feature_dict/part_pt/inv_func", "np.log", "feature_dict.part_pt.inv_func = 'log', expected 'exp'"),
        (JETS, "feature_dict/part_pt/subtract_by", "1.8 GeV", "subtract_by = '1.8 GeV', expected a finite number"),
        (JETS, "feature_dict/part_pt/multiply_by", 0, "features.part_pt.multiply must be a number other than 0"),
        (JETS, "feature_dict/part_pt", {"scale": 2}, "feature_dict.part_pt.scale, which is not supported"),
        (JETS, "feature_dict/part_pt", ..., "vqvae has num_features = 3, but the tokenizer has 2"),
        (HYBRID, "backbone_cfg", "large", "backbone_cfg = 'large', expected a mapping"),
        (HYBRID, "masked_input_treatment", ["exclude"], "masked_input_treatment = ['exclude'], expected one of"),
        (HYBRID, "pos_encoding_type", {"a": 1}, "pos_encoding_type = {'a': 1}, expected one of"),
        (CAUSAL, "attn_cfg", "torch", "attn_cfg = 'torch', expected a mapping"),
        (CAUSAL, "mlp_cfg", [2], "mlp_cfg = [2], expected a mapping"),
        (CAUSAL, "residual_cfg", 1.0, "residual_cfg = 1.0, expected a mapping"),
        (CAUSAL, "causal_decoder", "yes", "causal_decoder = 'yes', expected true or false"),
        (TAGGER, "class_attention_head", 2, "class_attention_head = 2, expected a mapping"),
        (TAGGER, "dropout_rate", 1.5, "`classifier_dropout` is 1.5, expected 0 or more and less than 1"),
    ],
)
def test_hostile_settings(name, path, value, message, tmp_path):
    state_dict, config = reference(name)
    assert_refused(tmp_path, state_dict, changed(config, path, value), message, "model.ckpt")


@pytest.mark.parametrize("config", [[], "omnijet", 3, None])
def test_hostile_configuration_files(config, tmp_path):
    assert_refused(tmp_path, reference(GPT)[0], config, "config.yaml: expected a mapping of settings")


def test_hostile_checkpoint_of_something_else(tmp_path):
    assert_refused(tmp_path, {"weight": torch.ones(3)}, {}, "unknown parameters: weight")
    backbone = {key: value for key, value in reference(GPT)[0].items() if not key.startswith("head.")}
    assert_refused(tmp_path, backbone, reference(GPT)[1], "neither the head of a generator nor that of a classifier")
