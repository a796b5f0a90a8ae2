"""OmniJet backbones: configuration, equivalences, losses written out, generation, classifiers, hybrid, bad input."""

import json
import logging

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from scipy import stats
from transformers import LogitsProcessor, Trainer, TrainingArguments

from hepzoo.modeling.configuration_omnijet import OmniJetConfig
from hepzoo.modeling.configuration_omnijet_vqvae import OmniJetVQVAEConfig
from hepzoo.modeling.conversion_omnijet_gpt import convert_config, convert_parameters
from hepzoo.modeling.modeling_omnijet import (
    OmniJetForCausalLM,
    OmniJetForPreTraining,
    OmniJetForSequenceClassification,
    OmniJetModel,
    StopThresholdLogitsProcessor,
)
from hepzoo.modeling.modeling_omnijet_vqvae import OmniJetVQVAEModel
from hepzoo.modeling.omnijet_hybrid import draw_masked, masked_ranks

CODES = 20
TINY = {
    "codebook_size": CODES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
HYBRID = {
    **TINY,
    "architecture": "hybrid",
    "num_registers": 3,
    "token_head_size": 24,
    "token_head_heads": 4,
    "token_head_layers": 1,
    "token_head_intermediate_size": 40,
    "class_head_size": 16,
    "class_head_heads": 4,
    "class_head_intermediate_size": 20,
    "num_labels": 3,
}
PUBLISHED_IDS = {"vocab_size": CODES + 2}
LENGTHS = (7, 1, 12, 4)
cross_entropy = torch.nn.functional.cross_entropy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(model_class=OmniJetForCausalLM, seed: int = 0, **settings):
    torch.manual_seed(seed)
    base = HYBRID if model_class is OmniJetForPreTraining else TINY
    model = model_class(OmniJetConfig(**{**base, **settings})).eval()
    # weights that start at 0 would hide errors
    torch.manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_batch(config: OmniJetConfig, lengths=LENGTHS, seed: int = 0, extra: int = 0) -> dict:
    """Jets with the given numbers of constituents: start, codes, stop, padding."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 2 + extra
    ids = torch.full((len(lengths), width), config.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, count in enumerate(lengths):
        codes = torch.randint(1, config.codebook_size + 1, (count,), generator=generator)
        ids[row, : count + 2] = torch.tensor([config.bos_token_id, *codes, config.eos_token_id])
        mask[row, : count + 2] = 1
        labels[row, : count + 2] = ids[row, : count + 2]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_features(lengths=LENGTHS, num_features: int = 3, seed: int = 0) -> dict:
    """Constituents behind a start position, with targets of the hybrid."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1
    mask = torch.arange(width) <= torch.tensor(lengths)[:, None]
    ids = torch.randint(1, CODES + 1, (len(lengths), width), generator=generator)
    ids[:, 0] = 0
    following = torch.cat([ids[:, 1:], torch.full((len(lengths), 1), CODES + 1)], dim=1)
    following[torch.arange(len(lengths)), torch.tensor(lengths)] = CODES + 1
    return {
        "particle_features": torch.randn(len(lengths), width, num_features, generator=generator) * mask[..., None],
        "attention_mask": mask,
        "generation_labels": following.masked_fill(~mask, -100),
        "masked_labels": ids.masked_fill(~mask, -100),
        "labels": torch.arange(len(lengths)) % 3,
    }


# Configuration


def test_ids_of_new_and_published_models():
    config = OmniJetConfig()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size) == (0, 8193, 8194, 8195)
    config = OmniJetConfig(vocab_size=8194)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 8193, 0)


def test_published_sizes_have_the_published_number_of_parameters():
    for settings, expected in (
        ({"vocab_size": 8194}, 6_570_498),
        ({"codebook_size": 65536, "vocab_size": 65538, "max_position_embeddings": 1700}, 35_987_970),
    ):
        with torch.device("meta"):
            model = OmniJetForCausalLM(OmniJetConfig(**settings))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_configuration_round_trip(tmp_path):
    config = OmniJetConfig(**HYBRID, class_loss_weight=2)
    config.save_pretrained(tmp_path)
    loaded = OmniJetConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "transformers_version": None} == {**config.to_dict(), "transformers_version": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_loss": "none"}, "padding_loss"),
        ({"architecture": "cnn"}, "architecture"),
        ({"classifier_head": "mean"}, "classifier_head"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"mask_fraction": 1.0}, "mask_fraction"),
        ({"stop_token_weight": 0.0}, "stop_token_weight"),
        ({"token_head_heads": 7}, "token_head_heads"),
        ({"masked_input": "drop"}, "masked_input"),
        ({"num_registers": -1}, "num_registers"),
        ({"bos_token_id": 5}, "`bos_token_id` is 5, expected an id that is no code: one of 0, 21, 22"),
        ({"bos_token_id": None}, "`bos_token_id` is None, expected an id that is no code"),
        ({"eos_token_id": 23}, "`eos_token_id` is 23, expected an id that is no code: one of 0, 21, 22"),
        ({"eos_token_id": [21, 22]}, "eos_token_id"),
        ({"eos_token_id": 22}, "`eos_token_id` is 22, expected another id than those of start and pad"),
        ({"pad_token_id": -1}, "`pad_token_id` is -1"),
        ({"vocab_size": 22, "pad_token_id": 22}, "`pad_token_id` is 22, expected an id that is no code: one of 0, 21"),
        ({"stop_token_weight": float("nan")}, "`stop_token_weight` is nan, expected a finite number above 0"),
        ({"stop_token_weight": float("inf")}, "`stop_token_weight` is inf, expected a finite number above 0"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps"),
        ({"class_loss_weight": float("nan")}, "class_loss_weight"),
        ({"embedding_initializer_range": -1.0}, "embedding_initializer_range"),
        ({"residual_gate_value": float("inf")}, "residual_gate_value"),
        ({"num_labels": 0}, "`num_labels` is 0, expected at least 1"),
        ({"attention_dropout": 1.0}, "`attention_dropout` is 1.0, expected 0 or more and less than 1"),
        ({"hidden_dropout": -0.1}, "hidden_dropout"),
        ({"classifier_dropout": float("nan")}, "classifier_dropout"),
        ({"hidden_act": "rellu"}, "`hidden_act` is 'rellu', expected an activation of transformers: gelu, "),
        ({"classifier_sizes": [16, 0]}, r"`classifier_sizes` is \[16, 0\]"),
        ({"token_head_layers": 0}, "token_head_layers"),
    ],
)
def test_hostile_configuration(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        OmniJetConfig(**{**TINY, **settings})


# The backbone


@pytest.mark.parametrize(
    "settings",
    [{}, PUBLISHED_IDS, {"padding_loss": "trained"}, {"mask_padded_queries": True}, {"is_causal": False}],
)
def test_eager_equals_sdpa_and_padding_does_not_matter(settings):
    model = make_model(**settings)
    batch = make_batch(model.config, extra=2)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model.set_attn_implementation("eager")
        eager = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(eager[real], logits[real], rtol=1e-4, atol=1e-5)
        for row, count in enumerate(LENGTHS):
            alone = model(batch["input_ids"][row : row + 1, : count + 2]).logits[0]
            if settings.get("is_causal", True) or not settings.get("mask_padded_queries"):
                torch.testing.assert_close(logits[row, : count + 2], alone, rtol=1e-4, atol=1e-5)


def test_padded_queries_leak_only_without_causal_mask():
    """The published mask of OmniJet-alpha_C, kept by a switch."""
    for is_causal in (True, False):
        model = make_model(mask_padded_queries=True, is_causal=is_causal)
        batch = make_batch(model.config)
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            alone = model(batch["input_ids"][:1, :9]).logits
        assert torch.allclose(logits[:1, :9], alone, atol=1e-5) == is_causal


def test_no_length_squared_mask_for_right_padding(monkeypatch):
    """1700 x 1700 per shower would be larger than everything else."""
    seen = []
    model = make_model()
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    batch = make_batch(model.config)
    model(**batch)
    assert seen and all(mask is None for mask in seen)
    assert not list(model.buffers())


def test_order_matters_but_there_are_no_positions():
    model = make_model(is_causal=False)
    ids = torch.tensor([[3, 5, 9, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, [2, 0, 3, 1]], model(ids[:, [2, 0, 3, 1]]).logits)
        model = make_model()
        assert not torch.allclose(model(ids).logits[:, 3], model(ids[:, [1, 2, 0, 3]]).logits[:, 3], atol=1e-3)


def test_outputs_that_can_be_asked_for():
    model = make_model()
    model.set_attn_implementation("eager")
    batch = make_batch(model.config)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert outputs.attentions[0].shape == (4, 4, 14, 14)
    kept = model(batch["input_ids"], logits_to_keep=2).logits
    torch.testing.assert_close(kept, model(batch["input_ids"]).logits[:, -2:])


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (OmniJetModel, {}),
        (OmniJetForCausalLM, {}),
        (OmniJetForSequenceClassification, {}),
        (OmniJetForSequenceClassification, {"architecture": "particle_flow"}),
        (OmniJetForPreTraining, {}),
    ],
)
def test_tuples_of_a_configuration_that_asks_for_them(model_class, settings):
    """`config.return_dict` concerns the caller, not the models inside."""
    model = make_model(model_class, **settings)
    if model_class is OmniJetForPreTraining or settings:
        batch = {name: make_features()[name] for name in ("particle_features", "attention_mask")}
    else:
        batch = {name: make_batch(model.config)[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**batch)
        model.config.return_dict = False
        found = model(**batch)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected[0])
    if model_class is OmniJetForCausalLM:
        assert model.generate(num_return_sequences=2, max_new_tokens=3).shape[0] == 2


def test_bfloat16_is_close():
    model = make_model()
    batch = make_batch(model.config)
    with torch.no_grad():
        reference = model(**batch)
        outputs = model.to(torch.bfloat16)(**batch)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    assert abs(outputs.loss - reference.loss) < 0.05 * reference.loss


# Losses


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stop_weight", [1.0, 3.0])
@pytest.mark.parametrize("padding_loss", ["ignored", "counted", "trained"])
def test_loss_written_out(padding_loss, stop_weight, training):
    model = make_model(padding_loss=padding_loss, stop_token_weight=stop_weight).train(training)
    config = model.config
    batch = make_batch(config)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    is_padding = targets == -100
    targets = targets.masked_fill(is_padding, config.pad_token_id)
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    weights = torch.where(targets == config.eos_token_id, stop_weight, 1.0)
    if padding_loss != "trained":
        losses = losses.masked_fill(is_padding, 0.0)
    counted = weights.masked_fill(is_padding, 0.0) if padding_loss == "ignored" else weights
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, (weights * losses).sum() / counted.sum())
    assert (outputs.logits is None) == training
    # targets at the position that predicts them are the same thing
    shifted = model(
        batch["input_ids"][:, :-1],
        attention_mask=batch["attention_mask"][:, :-1],
        shift_labels=batch["labels"][:, 1:],
    )
    torch.testing.assert_close(shifted.loss, outputs.loss)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = make_model().train()
    batch = make_batch(model.config)
    model(**batch).loss.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        model(**{name: values[rows] for name, values in batch.items()}, num_items_in_batch=num_items).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**make_batch(model.config)).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*gradients)


def test_training_learns_the_length_of_a_jet(tmp_path):
    """Jets of exactly five codes: what is generated has five codes."""
    torch.manual_seed(0)
    model = OmniJetForCausalLM(OmniJetConfig(**TINY))
    batches = make_batch(model.config, lengths=(5,) * 256)
    data = [{name: values[row] for name, values in batches.items()} for row in range(256)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        num_train_epochs=12,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    sequences = model.eval().generate(num_return_sequences=50)
    counts = ((sequences >= 1) & (sequences <= CODES)).sum(dim=1)
    # without positions the model has to count
    assert (counts == 5).float().mean() > 0.5 and abs(counts.float().mean() - 5) < 0.5


# Generation


@pytest.mark.parametrize("settings", [{}, PUBLISHED_IDS])
def test_generated_jets(settings, caplog):
    model = make_model(**settings)
    config = model.config
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        for sequences in (
            model.generate(num_return_sequences=40),
            model.generate(torch.full((40, 1), config.bos_token_id)),
        ):
            assert sequences.shape[0] == 40 and sequences.shape[1] <= config.max_position_embeddings + 1
            assert (sequences[:, 0] == config.bos_token_id).all()
            for row in sequences[:, 1:]:
                ends = (row == config.eos_token_id).nonzero()
                end = int(ends[0]) if len(ends) else len(row)
                assert ((row[:end] >= 1) & (row[:end] <= CODES)).all()
                assert (row[end + 1 :] == config.pad_token_id).all()
    assert not [record for record in caplog.records if "padding" in record.message]


def test_greedy_generation_is_the_same_everywhere():
    model = make_model()
    prompt = torch.tensor([[0, 3], [0, 11], [0, 7], [0, 19]])
    kwargs = {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(prompt, **kwargs, use_cache=False)
    for settings in (
        {},
        {"drop_finished_rows": False},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        generated = model.generate(prompt, **kwargs, **settings)
        generated = generated.sequences if settings.get("return_dict_in_generate") else generated
        assert torch.equal(generated, expected), settings
    ids = prompt
    with torch.no_grad():
        for _ in range(12):
            scores = model(ids).logits[:, -1].clone()
            scores[:, [0, model.config.pad_token_id]] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    for row, other in zip(expected, ids, strict=True):
        end = int((row == model.config.eos_token_id).nonzero()[0]) + 1 if (row == CODES + 1).any() else len(row)
        assert torch.equal(row[:end], other[:end])


def test_rows_that_finish_at_different_steps_come_back_in_order():
    """The row of the prompt's code n continues with n: whatever was left out meanwhile is put back in its place."""

    class StopAfter(LogitsProcessor):
        keeps_rows = False

        def __call__(self, input_ids, scores):
            code = input_ids[:, 1]
            scores = torch.full_like(scores, -torch.inf)
            is_done = input_ids.shape[1] - 1 >= code
            scores[torch.arange(len(code)), torch.where(is_done, CODES + 1, code)] = 0.0
            return scores

    model = make_model()
    codes = torch.tensor([9, 1, 4, 12, 2, 7, 3, 11])
    prompt = torch.stack([torch.zeros_like(codes), codes], dim=1)
    for do_sample in (True, False):
        sequences = model.generate(prompt, logits_processor=[StopAfter()], do_sample=do_sample)
        for code, row in zip(codes.tolist(), sequences.tolist(), strict=True):
            expected = [0, *[code] * code, CODES + 1]
            assert row == expected + [model.config.pad_token_id] * (len(row) - len(expected))


def test_both_loops_draw_from_the_distribution_of_the_model():
    model = make_model()
    with torch.no_grad():
        logits = model(torch.tensor([[0]])).logits[0, -1]
    allowed = [*range(1, CODES + 2)]
    expected = logits[allowed].softmax(-1).double().numpy()
    torch.manual_seed(3)
    for settings in ({}, {"return_dict_in_generate": True}):
        drawn = model.generate(num_return_sequences=20_000, max_new_tokens=1, **settings)
        drawn = drawn.sequences if settings else drawn
        counts = np.bincount(drawn[:, 1].numpy(), minlength=CODES + 3)
        assert counts[[0, CODES + 2]].sum() == 0
        assert stats.chisquare(counts[allowed], expected / expected.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("settings", [{}, PUBLISHED_IDS])
def test_left_padded_prompts_equal_separate_ones(settings):
    model = make_model(**settings)
    pad = model.config.pad_token_id
    prompts = [[0, 4, 9, 9], [0, 12], [0]]
    padded = torch.tensor([[pad] * (4 - len(prompt)) + prompt for prompt in prompts])
    together = model.generate(padded, do_sample=False, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :]
        continued = together[row, 4 : 4 + len(alone)]
        assert torch.equal(continued, alone)
        assert (together[row, 4 + len(alone) :] == pad).all()


def test_stop_token_threshold():
    scores = torch.tensor([[0.0, 0.0, 0.0, 2.0], [3.0, 0.0, 0.0, -2.0]])
    processed = StopThresholdLogitsProcessor(3, 0.3)(None, scores)
    assert processed[0, 3] == 2.0 and processed[1, 3] == -torch.inf
    assert torch.equal(processed[:, :3], scores[:, :3]) and scores[1, 3] == -2.0
    model = make_model()
    sequences = model.generate(num_return_sequences=30, stop_token_threshold=1.0)
    assert not (sequences == model.config.eos_token_id).any()
    with pytest.raises(ValueError, match="stop_token_threshold"):
        model.generate(stop_token_threshold=1.5)


def test_generation_settings_are_saved(tmp_path):
    model = make_model()
    model.generation_config.stop_token_threshold = 0.2
    model.save_pretrained(tmp_path)
    loaded = OmniJetForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.stop_token_threshold == 0.2
    assert loaded.generation_config.do_sample and loaded.generation_config.top_k == 0
    assert loaded.generation_config.max_new_tokens == TINY["max_position_embeddings"]
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForPreTraining"] == "modeling_omnijet.OmniJetForPreTraining"
    batch = make_batch(model.config)
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)


# Classifiers


@pytest.mark.parametrize("head", ["summation", "class_attention"])
def test_classifier_of_a_generator(head, tmp_path):
    generator = make_model()
    generator.save_pretrained(tmp_path)
    classifier, info = OmniJetForSequenceClassification.from_pretrained(
        tmp_path, classifier_head=head, num_labels=4, output_loading_info=True
    )
    assert info["missing_keys"] and all(name.startswith("head.") for name in info["missing_keys"])
    assert set(info["unexpected_keys"]) == {"lm_head.weight", "lm_head.bias"}
    state_dict = classifier.state_dict()
    for name, tensor in generator.model.state_dict().items():
        assert torch.equal(state_dict[f"model.{name}"], tensor)
    batch = make_batch(classifier.config)
    labels = torch.tensor([0, 3, 1, 2])
    outputs = classifier.train()(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape == (4, 4)
    assert all(torch.isfinite(p.grad).all() for p in classifier.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "settings",
    [
        {"classifier_head": "summation"},
        {"classifier_head": "class_attention"},
        {"architecture": "particle_flow", "num_features": 0},
        {"architecture": "particle_flow"},
        {"architecture": "normformer", "classifier_sizes": [16, 8]},
    ],
)
def test_padding_does_not_change_a_classification(settings, tmp_path):
    model = make_model(OmniJetForSequenceClassification, **settings)
    if settings.get("architecture") and settings.get("num_features", 3):
        batch = make_features()
        name = "particle_features"
        counts = [count + 1 for count in LENGTHS]
    else:
        batch, name = make_batch(model.config), "input_ids"
        counts = [count + 2 for count in LENGTHS]
    with torch.no_grad():
        logits = model(**{name: batch[name]}, attention_mask=batch["attention_mask"]).logits
        for row, count in enumerate(counts):
            alone = model(**{name: batch[name][row : row + 1, :count]}).logits[0]
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = OmniJetForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        again = loaded(**{name: batch[name]}, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(again, logits)


def test_taggers_do_not_depend_on_the_order():
    for architecture in ("particle_flow", "normformer"):
        model = make_model(OmniJetForSequenceClassification, architecture=architecture)
        features = torch.randn(2, 6, 3)
        with torch.no_grad():
            logits = model(particle_features=features).logits
            shuffled = model(particle_features=features[:, [3, 1, 5, 0, 2, 4]]).logits
        torch.testing.assert_close(shuffled, logits, rtol=1e-4, atol=1e-5)


# The hybrid


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_hybrid_passes": False},
        {"use_hybrid_passes": False, "is_causal": False, "masked_input": "zero", "masked_position": "rank"},
        {"num_registers": 0, "residual_gate": "global", "masked_position": "position", "masked_input": "keep"},
        {"residual_gate": "constant", "final_norm": False, "trainable_start": False, "num_predictions": 3},
        {"num_jet_features": 2, "token_head_size": 32},
    ],
)
def test_hybrid_trains_and_comes_back(settings, tmp_path):
    model = make_model(OmniJetForPreTraining, **settings)
    batch = make_features()
    if settings.get("num_jet_features"):
        batch["jet_features"] = torch.randn(4, 2)
    hidden = torch.zeros_like(batch["attention_mask"])
    hidden[:, 1::3] = True
    batch["masked_positions"] = hidden
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.generation_logits.shape == (4, 13, CODES + 3, settings.get("num_predictions", 1))
    assert outputs.masked_logits.shape == (4, 13, CODES + 3) and outputs.logits.shape == (4, 3)
    model.save_pretrained(tmp_path)
    loaded = OmniJetForPreTraining.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, outputs.loss)
    model.train()
    trained = model(**batch)
    assert trained.generation_logits is None and trained.masked_logits is None
    trained.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_hybrid_losses_written_out():
    model = make_model(
        OmniJetForPreTraining,
        num_predictions=2,
        generation_loss_weight=0.5,
        masked_loss_weight=2.0,
        class_loss_weight=0.25,
    )
    batch = make_features()
    hidden = torch.rand(batch["attention_mask"].shape, generator=torch.Generator().manual_seed(0)) < 0.4
    for padding_loss in ("ignored", "counted"):
        model.config.padding_loss = padding_loss
        with torch.no_grad():
            outputs = model(**batch, masked_positions=hidden)
        terms = []
        for offset in range(2):
            targets = batch["generation_labels"][:, offset:]
            logits = outputs.generation_logits[:, : targets.shape[1], :, offset]
            total = cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
            terms.append(total / (targets.numel() if padding_loss == "counted" else (targets != -100).sum()))
        torch.testing.assert_close(outputs.generation_loss, sum(terms) / 2)
        targets = batch["masked_labels"].masked_fill(~hidden, -100)
        total = cross_entropy(outputs.masked_logits.transpose(1, 2), targets, reduction="sum")
        count = targets.numel() if padding_loss == "counted" else (targets != -100).sum()
        torch.testing.assert_close(outputs.masked_loss, total / count)
        torch.testing.assert_close(outputs.class_loss, cross_entropy(outputs.logits, batch["labels"]))
        expected = 0.5 * outputs.generation_loss + 2 * outputs.masked_loss + 0.25 * outputs.class_loss
        torch.testing.assert_close(outputs.loss, expected)


def test_hybrid_hides_what_it_must():
    model = make_model(OmniJetForPreTraining, masked_position="position")
    batch = make_features()
    features, mask = batch["particle_features"], batch["attention_mask"]
    hidden = torch.zeros_like(mask)
    hidden[:, 2] = True
    with torch.no_grad():
        reference = model(features, attention_mask=mask, masked_positions=hidden)
        changed = features.clone()
        changed[:, 2] += 5.0
        other = model(changed, attention_mask=mask, masked_positions=hidden)
        # a masked constituent is not seen by the heads that have to find it
        torch.testing.assert_close(other.masked_logits[mask], reference.masked_logits[mask])
        torch.testing.assert_close(other.logits, reference.logits)
        # and the future not by the generation head
        torch.testing.assert_close(other.generation_logits[:, :2], reference.generation_logits[:, :2])
        assert not torch.allclose(other.generation_logits[0, 2:8], reference.generation_logits[0, 2:8], atol=1e-3)
        # what stands at position 0 is the model's own
        changed = features.clone()
        changed[:, 0] = 9.0
        torch.testing.assert_close(
            model(changed, attention_mask=mask, masked_positions=hidden).generation_logits, reference.generation_logits
        )
        for row, count in enumerate(LENGTHS):
            alone = model(features[row : row + 1, : count + 1], masked_positions=hidden[row : row + 1, : count + 1])
            torch.testing.assert_close(alone.logits[0], reference.logits[row], rtol=1e-4, atol=1e-5)


DECODERS = {
    "causal": {"architecture": "transformer", "causal_decoder": True},
    "causal_normformer": {"causal_decoder": True},
    "bidirectional": {"architecture": "transformer"},
    "mlp": {"architecture": "mlp", "encoder_layer_sizes": [8], "decoder_layer_sizes": [8]},
}


def make_vqvae(decoder: str = "causal", **settings) -> OmniJetVQVAEModel:
    sizes = {"codebook_size": CODES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5)
    model = OmniJetVQVAEModel(OmniJetVQVAEConfig(**{**sizes, **DECODERS[decoder], **settings})).eval()
    for parameter in model.decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("settings", "decoder", "use_cache"),
    [
        ({}, "causal", True),
        ({}, "causal", False),
        ({"num_registers": 0, "residual_gate": "constant"}, "causal", True),
        ({"num_jet_features": 2, "trainable_start": False}, "causal", True),
        ({"use_hybrid_passes": False, "num_predictions": 2}, "causal_normformer", True),
        ({"vocab_size": CODES + 2}, "mlp", True),
        ({}, "bidirectional", True),
        ({}, "bidirectional", False),
    ],
)
def test_hybrid_draws_from_what_forward_predicts(settings, decoder, use_cache):
    """Codes so far, decoded, the last constituent of each step appended: the scores are those of `forward`."""
    model, vqvae = make_model(OmniJetForPreTraining, **settings), make_vqvae(decoder)
    jets = torch.randn(3, 2) if model.config.num_jet_features else None
    start = torch.zeros(3, 1, dtype=torch.long)
    torch.manual_seed(3)
    options = {"suppress_tokens": [CODES + 1], "use_cache": use_cache}
    output = model.generate(
        vqvae, start, jets, max_new_tokens=8, return_dict_in_generate=True, output_logits=True, **options
    )
    ids = output.sequences
    assert ids.shape == (3, 9) and ids[:, 1:].min() > 0 and ids.max() <= CODES
    assert len(set(ids[:, 1:].flatten().tolist())) > 8
    with torch.no_grad():
        features = torch.zeros(3, 1, 3)
        for end in range(1, 9):
            features = torch.cat([features, vqvae.decode(ids[:, 1 : end + 1] - 1)[:, -1:]], dim=1)
        expected = model(features[:, :-1], jet_features=jets).generation_logits[..., 0]
        if decoder.startswith("causal"):
            torch.testing.assert_close(features[:, 1:], vqvae.decode(ids[:, 1:] - 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=1e-4, rtol=1e-4)

    # a jet that is begun goes on as if it had not been interrupted
    going_on = model.generate(
        vqvae, ids[:, :5], jets, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **options
    )
    torch.testing.assert_close(going_on.logits[0], expected[:, 4], atol=1e-4, rtol=1e-4)


def test_hybrid_jets_end_at_the_stop(tmp_path):
    model, vqvae = make_model(OmniJetForPreTraining), make_vqvae()
    torch.manual_seed(1)
    ids = model.generate(vqvae, num_return_sequences=40)
    stop, pad = model.config.eos_token_id, model.config.pad_token_id
    assert ids.shape[1] <= model.config.max_position_embeddings + 1
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] > 0).all()
    behind = (ids == stop).cumsum(dim=1).bool()
    ended = behind.any(dim=1)
    assert ended.sum() > 0 and ((ids == pad) == (behind & (ids != stop))).all()
    # the settings of the other generator, kept in the same way
    model.generation_config.stop_token_threshold = 1.0
    model.save_pretrained(tmp_path)
    loaded = OmniJetForPreTraining.from_pretrained(tmp_path)
    assert not (loaded.generate(vqvae, num_return_sequences=5, max_new_tokens=6) == stop).any()
    beams = model.generate(vqvae, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=5)
    assert len(beams.unique(dim=0)) == 3
    assert torch.equal(model.generate(vqvae, num_beams=3, do_sample=False, max_new_tokens=5)[0], beams[0])


@pytest.mark.parametrize(
    ("settings", "decoder", "arguments", "message"),
    [
        ({"use_hybrid_passes": False, "is_causal": False}, {}, {}, "constituents see later ones"),
        ({}, {"num_features": 4}, {}, "the VQ-VAE has `num_features` = 4, expected that of the model, 3"),
        ({}, {"codebook_size": 9}, {}, "the VQ-VAE has `codebook_size` = 9, expected that of the model, 20"),
        ({}, {"num_jet_features": 1}, {}, "expected one that decodes codes alone"),
        ({}, {}, {"jet_features": torch.zeros(2, 2)}, r"shape \(2, 2\), expected none"),
        ({"num_jet_features": 2}, {}, {}, r"`jet_features` has shape None, expected \(1, 2\)"),
        ({}, {}, {"input_ids": torch.tensor([[0, 3, 22]])}, "must be the start id and codes"),
        ({}, {}, {"input_ids": torch.tensor([[3, 4]])}, "must be the start id and codes"),
        ({}, {}, {"input_ids": torch.tensor([[0, 99]])}, "ids from 0 to 99, expected 0 to 22"),
        ({}, {}, {"cache_implementation": "static"}, "there are several networks"),
    ],
)
def test_hostile_generation_of_the_hybrid(settings, decoder, arguments, message):
    model = make_model(OmniJetForPreTraining, **settings)
    with pytest.raises(ValueError, match=message):
        model.generate(make_vqvae(**decoder), **arguments)


def test_share_of_masked_positions():
    mask = torch.arange(50) < torch.tensor([[50], [20], [3]])
    torch.manual_seed(0)
    drawn = draw_masked(mask, 0.4)
    assert int(drawn.sum()) == int(0.4 * 73) and not (drawn & ~mask).any()
    assert not draw_masked(mask, 0.0).any()


def test_ranks_of_masked_positions():
    first = torch.tensor([[5.0, 1.0, 9.0, 7.0, 99.0]])
    real = torch.tensor([[True, True, True, True, False]])
    hidden = torch.tensor([[True, True, False, True, False]])
    assert masked_ranks(first, real, hidden, "position").tolist() == [[0, 1, 2, 3, 4]]
    assert masked_ranks(first, real, hidden, "rank")[0, :4].tolist() == [2, 3, 0, 1]
    assert masked_ranks(first, real, hidden, "rank_among_masked")[0, [0, 1, 3]].tolist() == [1, 2, 0]


# Bad input


def test_hostile_inputs_of_the_models():
    model = make_model()
    with pytest.raises(ValueError, match="`input_ids` has shape"):
        model(torch.zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="labels have shape"):
        model(torch.zeros(2, 5, dtype=torch.long), labels=torch.zeros(2, 4, dtype=torch.long))
    classifier = make_model(OmniJetForSequenceClassification, architecture="normformer")
    with pytest.raises(ValueError, match="`particle_features` is missing"):
        classifier(input_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`particle_features` has shape \(2, 3, 4\), expected \(batch, length, 3\)"):
        classifier(particle_features=torch.zeros(2, 3, 4))
    # what is left of a batch whose jets were all dropped
    with pytest.raises(ValueError, match=r"`input_ids` has shape \(0, 0\), expected at least one jet"):
        make_model(OmniJetForSequenceClassification)(torch.zeros(0, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`particle_features` has shape \(0, 5, 3\), expected at least one jet"):
        classifier(particle_features=torch.zeros(0, 5, 3))
    hybrid = make_model(OmniJetForPreTraining, num_jet_features=2)
    with pytest.raises(ValueError, match="`jet_features` has shape None"):
        hybrid(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="17 positions, expected at most 16"):
        hybrid(torch.zeros(2, 17, 3))


@pytest.mark.parametrize("model_class", [OmniJetModel, OmniJetForCausalLM, OmniJetForPreTraining])
def test_hostile_architecture_of_another_class(model_class):
    config = OmniJetConfig(**{**TINY, "architecture": "particle_flow"})
    with pytest.raises(ValueError, match="`architecture` is 'particle_flow'"):
        model_class(config)


def reference_checkpoint() -> dict[str, torch.Tensor]:
    """A generator under its published names, as a Lightning checkpoint has it."""
    state_dict = {}
    for name, tensor in make_model(vocab_size=CODES + 2).state_dict().items():
        for ours, theirs in (
            ("model.embed_tokens", "module.embedding_table"),
            ("model.layers", "module.GPT_blocks"),
            ("self_attn.q_proj", "mha_block.query"),
            ("self_attn.k_proj", "mha_block.key"),
            ("self_attn.v_proj", "mha_block.value"),
            ("self_attn.o_proj", "mha_block.proj"),
            ("post_attention_norm", "layernorm_1"),
            ("post_mlp_norm", "layernorm_2"),
            ("mlp.fc1", "ff_block.net.0"),
            ("mlp.fc2", "ff_block.net.2"),
            ("lm_head", "head.fc1"),
        ):
            name = name.replace(ours, theirs)
        state_dict[name] = tensor
    for block in range(2):
        state_dict[f"module.GPT_blocks.{block}.mha_block.tril"] = torch.ones(16, 16).tril()
    return state_dict


def test_conversion_of_a_generator():
    state_dict = convert_parameters(reference_checkpoint())
    assert set(state_dict) == set(make_model(vocab_size=CODES + 2).state_dict())
    config = convert_config({"model_kwargs": {"n_heads": 4, "max_sequence_len": 16}}, state_dict)
    assert (config.pad_token_id, config.eos_token_id, config.padding_loss) == (0, CODES + 1, "trained")
    assert not config.mask_padded_queries
    weights = torch.ones(CODES + 2)
    weights[-1] = 2.5
    config = convert_config({"n_heads": 4}, state_dict, weights)
    assert (config.stop_token_weight, config.padding_loss, config.mask_padded_queries) == (2.5, "counted", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module.surprise": torch.zeros(2)}, "unknown parameters: module.surprise"),
        ({"module.embedding_table.weight": None}, "lacks parameters: model.embed_tokens.weight"),
        ({"module.embedding_table.weight": torch.zeros(3)}, "expected a matrix"),
        ({"module.GPT_blocks.0.layernorm_1.weight": torch.zeros(3), "GPT_blocks.0.layernorm_1.weight": 0}, "twice"),
        ({"module.GPT_blocks.7.layernorm_1.weight": torch.zeros(3)}, r"the parts \[0, 1, 7\] of model.layers"),
    ],
)
def test_hostile_checkpoints(change, message):
    checkpoint = {name: tensor for name, tensor in {**reference_checkpoint(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert_config({}, convert_parameters(checkpoint))


@pytest.mark.parametrize(
    ("reference_config", "message"),
    [
        ({"embedding_dim": 64}, "embedding_dim = 64, but the checkpoint has 32"),
        ({"model_kwargs": {"n_GPT_blocks": 5}}, "n_GPT_blocks = 5, but the checkpoint has 2"),
        ({"n_heads": 5}, "not a multiple"),
        ({"n_heads": "many"}, "n_heads = 'many', expected a finite number"),
        ({"n_heads": 4.5}, "n_heads = 4.5, expected a whole number"),
        ({"stop_token_id": 3}, "stop_token_id = 3, but the checkpoint has 21"),
        ({"attention_dropout": float("nan")}, "attention_dropout"),
        ({"apply_causal_mask": "no"}, "apply_causal_mask = 'no', expected true or false"),
        ({"stop_token_weight": -1}, "`stop_token_weight` is -1"),
    ],
)
def test_hostile_reference_configurations(reference_config, message):
    with pytest.raises(ValueError, match=message):
        convert_config(reference_config, convert_parameters(reference_checkpoint()))
