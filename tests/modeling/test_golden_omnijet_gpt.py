"""OmniJet generators, classifiers, taggers and the hybrid against the references, through their conversion."""

import json

import pytest
import torch
from safetensors.torch import load_file

import hepzoo
from hepzoo.conversion import main as convert
from hepzoo.modeling.conversion_common import convert_key
from hepzoo.modeling.conversion_omnijet_gpt import KEY_PATTERNS
from tests.golden_sets import GoldenSet

ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def converted(golden: GoldenSet, folder, attn_implementation: str = "sdpa"):
    """Model of the golden checkpoint through `hepzoo convert` and `from_pretrained`."""
    checkpoint, config = golden.path("state_dict.safetensors"), golden.path("config.json")
    assert convert(["omnijet", "--checkpoint", checkpoint, "--config", config, "--output", str(folder)]) == 0
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(hepzoo, name).from_pretrained(
        folder, attn_implementation=attn_implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def without_padding(targets, mask):
    return targets.masked_fill(~mask.bool(), -100)


@ATTENTION
def test_golden_omnijet_gpt(attn_implementation, tmp_path):
    with GoldenSet("omnijet_gpt") as golden:
        model = converted(golden, tmp_path / "converted", attn_implementation)
        ids, mask = golden.inputs["input_ids"], golden.inputs["mask"]
        targets = without_padding(golden.inputs["targets"], mask)
        outputs = model(ids, attention_mask=mask, shift_labels=targets)
        golden.compare("embeddings", model.model(ids, attention_mask=mask).last_hidden_state)
        golden.compare("logits", outputs.logits)
        with torch.no_grad():
            logits_no_mask = model(ids).logits
        golden.compare("logits_no_mask", logits_no_mask)
        losses = torch.nn.functional.cross_entropy(
            outputs.logits.transpose(1, 2), golden.inputs["targets"], reduction="none"
        )
        golden.compare("per_position_ce", losses)
        golden.compare("loss", outputs.loss)

        # gradients, also of the loss that never holds the logits
        expected = load_file(golden.path("grads.safetensors"))
        for training in (False, True):
            model.zero_grad()
            model.train(training)
            model.config.attention_dropout = 0.0
            model(ids, attention_mask=mask, shift_labels=targets).loss.backward()
            parameters = dict(model.named_parameters())
            names = {convert_key(name, KEY_PATTERNS): name for name in expected}
            assert set(names) == set(parameters)
            for name, reference in names.items():
                gradient, scale = expected[reference], expected[reference].abs().max()
                difference = (parameters[name].grad - gradient).abs().max()
                assert difference <= 1e-5 * scale + 1e-8, (reference, difference, scale)

        model.eval()
        model.config.padding_loss = "ignored"
        with torch.no_grad():
            golden.compare("loss_valid_only", model(ids, attention_mask=mask, shift_labels=targets).loss)

        # greedy continuation, with and without cache, by the short loop and by the library's
        prompt = golden.inputs["greedy_prompt"]
        steps = golden.expected("greedy_last_logits").shape[1]
        kwargs = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "stop_token_threshold": 0.0}
        for settings in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            sequences = model.generate(prompt, **kwargs, **settings)
            assert torch.equal(sequences, golden.expected("greedy_ids"))
        generated = model.generate(prompt, **kwargs, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(generated.sequences, golden.expected("greedy_ids"))
        golden.compare("greedy_last_logits", torch.stack(generated.logits, dim=1))
        generated = model.generate(max_new_tokens=1, return_dict_in_generate=True, output_scores=True, do_sample=True)
        golden.compare("first_step_probs", generated.scores[0][0].softmax(-1)[1:])


@ATTENTION
@pytest.mark.parametrize("name", ["gpt", "gpt_noncausal"])
def test_golden_omnijet_c(name, attn_implementation, tmp_path):
    with GoldenSet(f"omnijet_c/{name}") as golden:
        model = converted(golden, tmp_path / "converted", attn_implementation)
        ids, mask = golden.inputs["input_ids"], golden.inputs["mask"]
        targets = without_padding(golden.inputs["targets"], mask)
        with torch.no_grad():
            outputs = model(ids, attention_mask=mask, shift_labels=targets)
            golden.compare("logits", outputs.logits)
            assert model.config.padding_loss == "counted"
            golden.compare("loss_exclude_padded", outputs.loss)
            model.config.padding_loss = "trained"
            golden.compare("loss_include_padded", model(ids, attention_mask=mask, shift_labels=targets).loss)
        generated = model.generate(
            ids[:, :3],
            attention_mask=torch.ones_like(ids[:, :3]),
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_scores=True,
        )
        golden.compare("sampling_probs_after_3", generated.scores[0].softmax(-1)[:, 1:])


@ATTENTION
@pytest.mark.parametrize("name", ["summation", "class_attention"])
def test_golden_omnijet_classifier_on_the_gpt(name, attn_implementation, tmp_path):
    with GoldenSet(f"omnijet_classifier/{name}") as golden:
        model = converted(golden, tmp_path / "converted", attn_implementation)
        ids, mask = golden.inputs["input_ids"], golden.inputs["mask"]
        with torch.no_grad():
            golden.compare("embeddings", model.model(ids, attention_mask=mask).last_hidden_state)
            outputs = model(ids, attention_mask=mask, labels=golden.inputs["labels"])
            one_hot = torch.nn.functional.one_hot(golden.inputs["labels"], model.config.num_labels)
            torch.testing.assert_close(model(ids, attention_mask=mask, labels=one_hot).loss, outputs.loss)
        golden.compare("logits", outputs.logits)
        golden.compare("probs", outputs.logits.softmax(-1))
        golden.compare("loss", outputs.loss)


@ATTENTION
@pytest.mark.parametrize("name", ["particleflow_continuous", "particleflow_tokens", "normformer_continuous"])
def test_golden_omnijet_taggers(name, attn_implementation, tmp_path):
    with GoldenSet(f"omnijet_classifier/{name}") as golden:
        model = converted(golden, tmp_path / "converted", attn_implementation)
        inputs = golden.inputs["x"]
        inputs = {"particle_features": inputs} if inputs.is_floating_point() else {"input_ids": inputs.squeeze(-1)}
        with torch.no_grad():
            golden.compare("logits", model(**inputs, attention_mask=golden.inputs["mask"]).logits)


@ATTENTION
@pytest.mark.parametrize("name", ["hybrid", "plain"])
def test_golden_omnijet_ntp(name, attn_implementation, tmp_path):
    with GoldenSet(f"omnijet_ntp/{name}") as golden:
        model = converted(golden, tmp_path / "converted", attn_implementation)
        inputs = golden.inputs
        is_real, survived = inputs["mask"], inputs["survived_mask"].bool()
        with torch.no_grad():
            features = model.with_start(inputs["part_features"])
            golden.compare("model_input", features)
            jets = inputs["jet_features"]
            golden.compare("backbone_causal_full", model.backbone(features, is_real, True, jets))
            golden.compare("backbone_bidirectional_survived", model.backbone(features, is_real & survived, False, jets))
            outputs = model(
                inputs["part_features"],
                attention_mask=is_real,
                jet_features=jets,
                masked_positions=~survived,
                generation_labels=without_padding(inputs["target_ids"], is_real),
                masked_labels=without_padding(inputs["input_ids"], is_real),
                labels=inputs["jet_type_labels"],
            )
        golden.compare("logits_gen", outputs.generation_logits)
        golden.compare("logits_mpm", outputs.masked_logits)
        golden.compare("logits_class", outputs.logits)
        golden.compare("loss_gen", outputs.generation_loss)
        golden.compare("loss_mpm", outputs.masked_loss)
        golden.compare("loss_class", outputs.class_loss)
        golden.compare("loss", outputs.loss)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static", "disable_compile": True},
    ],
)
@pytest.mark.parametrize("name", ["omnijet_gpt", "omnijet_c/gpt"])
def test_converted_generators_continue_padded_prompts(name, settings, tmp_path):
    """Prompts of two lengths in one batch, with every cache, as each on its own: padding in front is never seen."""
    model = converted(GoldenSet(name), tmp_path / "converted")
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    prompts = [[0, 3, 7, 9, 4], [0, 5]]
    expected = [model.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in prompts]
    padded = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    with torch.no_grad():
        alone = model(torch.tensor([prompts[1]])).logits
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[1:, 3:], alone, rtol=1e-4, atol=1e-5)
    generated = model.generate(padded, attention_mask=mask, **greedy, **settings)
    assert getattr(generated, "sequences", generated)[:, 5:].tolist() == expected


def test_adapters_take_part_in_generation(tmp_path):
    """The short loop merges weights: a wrapped layer, whose `weight` is that of what it wraps, must not get lost."""

    class Adapter(torch.nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped
            self.added = torch.nn.Linear(wrapped.in_features, wrapped.out_features)

        @property
        def weight(self):
            return self.wrapped.weight

        def forward(self, hidden_states):
            return self.wrapped(hidden_states) + 3 * self.added(hidden_states)

    model = converted(GoldenSet("omnijet_gpt"), tmp_path / "converted")
    greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    before = model.generate(**greedy)
    torch.manual_seed(0)
    model.model.layers[1].self_attn.v_proj = Adapter(model.model.layers[1].self_attn.v_proj)
    adapted = model.generate(**greedy)
    assert not torch.equal(adapted, before)
    assert torch.equal(adapted, model.generate(**greedy, use_cache=False))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[0, 3]], "is list, expected a tensor"),
        (torch.tensor([0, 3]), r"is \(2,\), expected a tensor"),
        (torch.tensor([[0, 50]]), "from 0 to 50, expected 0 to 49"),
        (torch.tensor([[-1, 3]]), "from -1 to 3, expected 0 to 49"),
    ],
)
def test_hostile_prompts(prompt, message, tmp_path):
    model = converted(GoldenSet("omnijet_gpt"), tmp_path / "converted")
    with pytest.raises(ValueError, match=message):
        model.generate(prompt)


@pytest.mark.parametrize("name", ["attention_mask", "masked_positions", "generation_labels", "masked_labels"])
def test_hostile_shapes_of_the_hybrid(name, tmp_path):
    """One value per position: a shape that PyTorch would stretch is an error too."""
    golden = GoldenSet("omnijet_ntp/hybrid")
    model = converted(golden, tmp_path / "converted")
    features = golden.inputs["part_features"]
    inputs = {name: torch.ones(len(features), 1, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"`{name}` has shape"):
        model(features, jet_features=golden.inputs["jet_features"], **inputs)
