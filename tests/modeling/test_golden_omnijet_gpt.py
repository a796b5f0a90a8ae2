"""OmniJet generators, classifiers, taggers and the hybrid against the references, through their conversion."""

import pytest
import torch
from safetensors.torch import load_file

from hepzoo.conversion import load_checkpoint, load_reference_config, load_strictly
from hepzoo.modeling import modeling_omnijet
from hepzoo.modeling.conversion_common import convert_key
from hepzoo.modeling.conversion_omnijet_gpt import (
    KEY_PATTERNS,
    architecture_of,
    convert_config,
    convert_generation_settings,
    convert_parameters,
)
from tests.golden_sets import GoldenSet

ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def converted(golden: GoldenSet, attn_implementation: str = "sdpa"):
    checkpoint = golden.path("state_dict.safetensors")
    reference_config = load_reference_config(golden.path("config.json"))
    reference = load_checkpoint(checkpoint)
    state_dict = convert_parameters(reference)
    config = convert_config(reference_config, state_dict, reference.get("criterion.weight"))
    config._attn_implementation = attn_implementation
    model = getattr(modeling_omnijet, architecture_of(state_dict))(config).eval()
    load_strictly(model, state_dict, checkpoint)
    for name, value in convert_generation_settings(reference_config).items():
        setattr(model.generation_config, name, value)
    return model


def without_padding(targets, mask):
    return targets.masked_fill(~mask.bool(), -100)


@ATTENTION
def test_golden_omnijet_gpt(attn_implementation):
    with GoldenSet("omnijet_gpt") as golden:
        model = converted(golden, attn_implementation)
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
def test_golden_omnijet_c(name, attn_implementation):
    with GoldenSet(f"omnijet_c/{name}") as golden:
        model = converted(golden, attn_implementation)
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
def test_golden_omnijet_classifier_on_the_gpt(name, attn_implementation):
    with GoldenSet(f"omnijet_classifier/{name}") as golden:
        model = converted(golden, attn_implementation)
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
def test_golden_omnijet_taggers(name, attn_implementation):
    with GoldenSet(f"omnijet_classifier/{name}") as golden:
        model = converted(golden, attn_implementation)
        inputs = golden.inputs["x"]
        inputs = {"particle_features": inputs} if inputs.is_floating_point() else {"input_ids": inputs.squeeze(-1)}
        with torch.no_grad():
            golden.compare("logits", model(**inputs, attention_mask=golden.inputs["mask"]).logits)


@ATTENTION
@pytest.mark.parametrize("name", ["hybrid", "plain"])
def test_golden_omnijet_ntp(name, attn_implementation):
    with GoldenSet(f"omnijet_ntp/{name}") as golden:
        model = converted(golden, attn_implementation)
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
