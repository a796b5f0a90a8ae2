"""CMHCA-DIRC models against the reference, through `hepzoo convert` and `from_pretrained`."""

import re

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper

from hepzoo.conversion import main as convert
from hepzoo.modeling.conversion_cmhca_dirc import KEY_PATTERNS
from hepzoo.modeling.conversion_common import convert_key
from hepzoo.modeling.generation_multistream import (
    ExponentialTemperatureLogitsProcessor,
    LinearTemperatureLogitsProcessor,
    NucleusLogitsWarper,
)
from hepzoo.modeling.modeling_cmhca_dirc import (
    CMHCADircForCausalLM,
    CMHCADircForSequenceClassification,
    CMHCADircForTokenClassification,
    average_experts,
    load_balance_loss,
)
from tests.golden_sets import GoldenSet

ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def converted(golden: GoldenSet, folder, model_class, attn_implementation="sdpa", state_dict="state_dict"):
    output = folder / f"{golden.folder.name}_{attn_implementation}_{state_dict}"
    checkpoint = golden.path(f"{state_dict}.safetensors")
    arguments = ["--checkpoint", checkpoint, "--config", golden.path("config.json"), "--output", str(output)]
    assert convert(["cmhca_dirc", *arguments]) == 0
    model, info = model_class.from_pretrained(output, attn_implementation=attn_implementation, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def model_inputs(golden: GoldenSet, model, length: int | None = None, mask: bool = True) -> dict:
    """Reference inputs (tokens from SOS, kinematics scaled to [-1, 1]) to ours (slots, physical kinematics)."""
    slots = model.config.num_conditioning_tokens
    ids = torch.stack([golden.inputs["space_tokens"], golden.inputs["time_tokens"]], dim=-1)[:, :length]
    ids = torch.nn.functional.pad(ids, (0, 0, slots, 0), value=0)
    ranges = torch.tensor(model.config.conditioning_ranges, dtype=torch.float64)
    scaled = golden.inputs["kinematics"].double()
    inputs = {
        "input_ids": ids,
        "kinematics": (ranges[:, 0] + (scaled + 1) / 2 * (ranges[:, 1] - ranges[:, 0])).float(),
    }
    if mask:
        inputs["attention_mask"] = (ids[..., 0] != model.config.pad_token_id).long()
    if "class_label" in golden.inputs:
        inputs["class_ids"] = golden.inputs["class_label"].long()
    return inputs


def next_token_labels(inputs: dict, model) -> torch.Tensor:
    labels = inputs["input_ids"].clone()
    labels[labels == torch.tensor(model.config.stream_pad_token_ids)] = -100
    labels[:, : model.config.num_conditioning_tokens + 1] = -100
    return labels


def compare_streams(golden: GoldenSet, model, inputs: dict):
    """Both input streams, the output of every block, and the final norm; returns the outputs of the model."""
    captured = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, index=index: captured.__setitem__(index, output[0]))
        for index, layer in enumerate(model.model.layers)
    ]
    hooks.append(model.model.layers[0].register_forward_pre_hook(lambda _, args: captured.update(streams=args[:2])))
    with torch.no_grad():
        base = model.model(**inputs)
        outputs = model(**inputs)
    for hook in hooks:
        hook.remove()
    golden.compare("space_stream_in", captured["streams"][0])
    golden.compare("time_stream_in", captured["streams"][1])
    for index in range(len(model.model.layers)):
        golden.compare(f"hidden_after_block_{index}", captured[index])
    golden.compare("hidden_final_norm", base.last_hidden_state)
    return base, outputs


def compare_gradients(golden: GoldenSet, model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in golden.names("grad."):
        golden.compare(name, gradients.pop(convert_key(name.removeprefix("grad."), KEY_PATTERNS)))
    assert not gradients, f"parameters without a reference gradient: {', '.join(gradients)}"
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    golden.compare("grad_norm_total", norm)


def generate_greedily(golden: GoldenSet, model, steps: int, **kwargs) -> torch.Tensor:
    """(batch, 1 + steps, 2) ids from SOS; finished tracks carry EOS as in the reference, not pads."""
    inputs = model_inputs(golden, model, length=1, mask=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=steps, **kwargs)
    ids = ids[:, model.config.num_conditioning_tokens :]
    # a pad id before the end was drawn by the model: nothing forbids it
    eos = torch.tensor(model.config.stream_eos_token_ids)
    ended = (ids == eos).any(dim=-1, keepdim=True).cumsum(dim=1) > 0
    return torch.where(ended, eos, ids)


def compare_generator(golden: GoldenSet, tmp_path, attn_implementation: str):
    model = converted(golden, tmp_path, CMHCADircForCausalLM, attn_implementation)
    length = golden.inputs["space_tokens"].shape[1]
    inputs = model_inputs(golden, model, length=length - 1)
    base, outputs = compare_streams(golden, model, inputs)
    for stream, name in enumerate(("space", "time")):
        golden.compare(f"logits_{name}", outputs.logits[stream])

    for output in golden.names("nomask"):
        # e.g. nomask7_logits_space: the first 7 tokens, no padding mask
        length, stream = re.fullmatch(r"nomask(\d+)_logits_(space|time)", output).groups()
        with torch.no_grad():
            short = model(**model_inputs(golden, model, length=int(length), mask=False))
        golden.compare(output, short.logits[("space", "time").index(stream)])

    full = model_inputs(golden, model)
    labels = next_token_labels(full, model)
    shift_labels = labels[:, 1:]
    evaluated = model(**inputs, shift_labels=shift_labels)
    trained = model.train()(**inputs, shift_labels=shift_labels)
    assert trained.logits is None
    for losses in (evaluated.stream_losses, trained.stream_losses):
        golden.compare("loss_space", losses[0])
        golden.compare("loss_time", losses[1])
    if model.config.num_experts > 0:
        for index, probs in enumerate(base.router_probs):
            golden.compare(f"router_weights_block_{index}", probs)
            expected = golden.expected(f"router_weights_block_{index}")
            assert torch.equal(probs == 0, expected == 0)
        golden.compare("loss_load_balance", trained.aux_loss)
        balance = load_balance_loss(
            base.router_probs, inputs["class_ids"], inputs["attention_mask"], model.config.num_classes
        )
        golden.compare("loss_load_balance", balance)
    else:
        assert trained.aux_loss is None and golden.expected("loss_load_balance") == 0
    golden.compare("loss_total", trained.loss)
    trained.loss.backward()
    compare_gradients(golden, model)
    model.eval()

    # the labels of ordinary use, shifted by the model, give the same loss
    golden.compare("loss_space", model(**full, labels=labels).stream_losses[0])

    # greedy_space_tokens, and greedy_ctx5_space_tokens with a context window of 5
    runs = [name.removesuffix("_space_tokens") for name in golden.names("greedy") if name.endswith("_space_tokens")]
    assert "greedy" in runs
    # the reference ran to max_seq_len unless all tracks had ended
    steps = max(golden.outputs[f"{run}_space_tokens"].shape[1] for run in runs) - 1
    for run in runs:
        expected = [golden.expected(f"{run}_{stream}_tokens") for stream in ("space", "time")]
        if run == "greedy":
            variants = [
                {"use_cache": True},
                {"use_cache": False},
                {"cache_implementation": "static", "disable_compile": True},
            ]
        else:
            variants = [{"context_length": int(run.removeprefix("greedy_ctx"))}]
        for variant in variants:
            ids = generate_greedily(golden, model, steps, **variant)
            for stream in range(2):
                assert torch.equal(ids[..., stream], expected[stream]), f"{run} stream {stream} {variant}"
    return model


@ATTENTION
def test_golden_dirc_dense(tmp_path, attn_implementation):
    with GoldenSet("dirc_dense") as golden:
        compare_generator(golden, tmp_path, attn_implementation)
        compare_samplers(golden)


def compare_samplers(golden: GoldenSet):
    logits = golden.inputs["sampler_logits"]
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.long)
    for name in golden.names("nucleus_p"):
        top_p = float(name.removeprefix("nucleus_p").removesuffix("_probs"))
        golden.compare(name, NucleusLogitsWarper(top_p)(ids, logits).softmax(-1))
        assert torch.equal(NucleusLogitsWarper(top_p)(ids, logits).isinf(), golden.outputs[name] == 0)
    for name in golden.names("topk"):
        top_k = int(name.removeprefix("topk").removesuffix("_probs"))
        golden.compare(name, TopKLogitsWarper(top_k)(ids, logits).softmax(-1))
    for name in golden.names("minp"):
        settings = name.removeprefix("minp").removesuffix("_probs")
        min_p, keep = (0.05, 50) if settings == "_default" else settings.split("_keep")
        golden.compare(name, MinPLogitsWarper(float(min_p), min_tokens_to_keep=int(keep))(ids, logits).softmax(-1))
    processors = {
        "dynamic": ExponentialTemperatureLogitsProcessor,
        "linear": LinearTemperatureLogitsProcessor,
    }
    for kind, processor in processors.items():
        for name in golden.names(f"{kind}_temperature_"):
            # e.g. dynamic_temperature_steps0_249_L250
            steps, length = name.split("_steps")[1].split("_L")
            first, last = (int(step) for step in steps.split("_"))
            schedule = processor(prompt_length=3, num_steps=int(length))
            golden.compare(
                name,
                torch.tensor([schedule.temperature(step) for step in range(first, last + 1)], dtype=torch.float64),
                rtol=1e-12,
                atol=0,
            )
            cooled = schedule(torch.zeros(1, 3 + last, dtype=torch.long), logits[:1])
            torch.testing.assert_close(cooled, logits[:1] / schedule.temperature(last))


@ATTENTION
def test_golden_dirc_moe(tmp_path, attn_implementation):
    with GoldenSet("dirc_moe") as golden:
        compare_generator(golden, tmp_path, attn_implementation)


@ATTENTION
def test_golden_dirc_classifier(tmp_path, attn_implementation):
    with GoldenSet("dirc_classifier") as golden:
        model = converted(golden, tmp_path, CMHCADircForSequenceClassification, attn_implementation)
        inputs = model_inputs(golden, model)
        _, outputs = compare_streams(golden, model, inputs)
        golden.compare("logits", outputs.logits[:, 0])
        golden.compare("probability", outputs.logits[:, 0].sigmoid())
        outputs = model.train()(**inputs, labels=golden.inputs["labels"])
        golden.compare("loss_bce", outputs.loss)
        outputs.loss.backward()
        compare_gradients(golden, model)
        model.eval()

        heads = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith("classifier.") or name == "model.cls_token"
        }
        averaged = converted(
            golden, tmp_path, CMHCADircForSequenceClassification, state_dict="state_dict_after_moe_init"
        )
        for source, output in (("dirc_moe", "logits_after_moe_init"), ("dirc_dense", "logits_after_dense_init")):
            generator_set = GoldenSet(source)
            generator = converted(generator_set, tmp_path, CMHCADircForCausalLM)
            generator.save_pretrained(tmp_path / f"generator_{source}")
            fine_tuned, info = CMHCADircForSequenceClassification.from_pretrained(
                tmp_path / f"generator_{source}", attn_implementation=attn_implementation, output_loading_info=True
            )
            assert sorted(info["missing_keys"]) == sorted(heads)
            fine_tuned.load_state_dict({**fine_tuned.state_dict(), **heads})
            golden.compare(output, fine_tuned.eval()(**inputs).logits[:, 0])
            if source == "dirc_moe":
                for name, tensor in averaged.state_dict().items():
                    torch.testing.assert_close(fine_tuned.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@ATTENTION
def test_golden_dirc_filter(tmp_path, attn_implementation):
    with GoldenSet("dirc_filter") as golden:
        model = converted(golden, tmp_path, CMHCADircForTokenClassification, attn_implementation)
        inputs = model_inputs(golden, model)
        slots = model.config.num_conditioning_tokens
        _, outputs = compare_streams(golden, model, inputs)
        golden.compare("logits_all", outputs.logits[..., 0])

        hit_labels = golden.inputs["hit_labels"]
        specials = torch.tensor([0, model.config.vocab_size - 2, model.config.vocab_size - 1])
        valid = ~torch.isin(golden.inputs["space_tokens"], specials)
        assert torch.equal(valid, golden.expected("valid_mask"))
        labels = torch.nn.functional.pad(torch.where(valid, hit_labels, -100), (slots, 0), value=-100)
        outputs = model.train()(**inputs, labels=labels)
        golden.compare("loss_focal", outputs.loss)
        outputs.loss.backward()
        compare_gradients(golden, model)
        model.eval()

        predicted = (outputs.logits[:, slots:, 0][valid].sigmoid() > 0.5).double()
        truth = hit_labels[valid].double()
        true_positives = (predicted * truth).sum()
        precision = true_positives / predicted.sum().clamp(min=1)
        recall = true_positives / truth.sum().clamp(min=1)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        golden.compare("precision_recall_f1", torch.stack([precision, recall, f1]))

        unmasked = model_inputs(golden, model, mask=False)
        golden.compare("logits_all_nomask", model(**unmasked).logits[..., 0])
        model.config.is_causal = True
        golden.compare("logits_all_causal_variant", model(**inputs).logits[..., 0])


def test_golden_dirc_expert_average_is_the_unweighted_mean():
    state = {f"model.layers.0.mlp.experts.{e}.fc1.weight": torch.full((2, 2), float(e)) for e in range(4)}
    state["model.layers.0.mlp.router.weight"] = torch.zeros(4, 2)
    assert torch.equal(average_experts(state)["model.layers.0.mlp.fc1.weight"], torch.full((2, 2), 1.5))
    assert len(average_experts(state)) == 1
