"""OmniLearned against the reference (arXiv:2510.24066, 2606.14870), through `hepzoo convert` and `from_pretrained`."""

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hepzoo.conversion import main as convert
from hepzoo.modeling.modeling_omnilearned import nearest_neighbors, pack_slots, put_slots, scaled_noise, take_slots
from tests.golden_sets import DEFAULT_FOLDER, GoldenSet

ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
JET_CLASSES = 200  # published: labels from here on are classes of events


def sets(name: str, known: tuple[str, ...] = ()) -> list[str]:
    """The set and its sub-folders, those that are known and whatever else is there."""
    root = Path(os.environ.get("HEPZOO_GOLDEN_DIR", DEFAULT_FOLDER))
    found = {path.parent.name for path in (root / name).glob("*/config.json")}
    return [name, *(f"{name}/{part}" for part in sorted({*known, *found}))]


def converted(golden: GoldenSet, folder, auto_class, attn_implementation="sdpa"):
    output = folder / f"{golden.folder.name}_{attn_implementation}"
    arguments = ["--checkpoint", golden.path("state_dict.safetensors"), "--config", golden.path("config.json")]
    assert convert(["omnilearned", *arguments, "--output", str(output)]) == 0
    model, info = auto_class.from_pretrained(output, attn_implementation=attn_implementation, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def jets(golden: GoldenSet, config) -> dict:
    """The inputs of the reference under our names, those that the network has."""
    inputs = golden.inputs
    batch = {"particles": inputs["X"]}
    if config.num_particle_types:
        batch["particle_ids"] = inputs["pid"]
    if config.num_additional_features:
        batch["additional_features"] = inputs["add_info"]
    if config.num_conditions:
        batch["conditions"] = inputs["cond"]
    return batch


class Captured:
    """What parts of the body return while the context is open."""

    PARTS = ("embed_particles", "local_embedding", "interaction", "embed_conditions", "embed_time")

    def __init__(self, body):
        self.parts = {name: part for name in self.PARTS if (part := getattr(body, name)) is not None}

    def __enter__(self):
        self.hooks = [
            part.register_forward_hook(lambda _, __, output, name=name: setattr(self, name, output))
            for name, part in self.parts.items()
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def compare_parts(golden: GoldenSet, body, particles: torch.Tensor, captured: Captured, prefix: str = ""):
    """Embeddings, neighbours and attention bias, laid out by slots as in the reference."""
    config = body.config
    is_real = particles[..., 2] != 0
    for name, part in (("x_embed", "embed_particles"), ("local_features", "local_embedding")):
        by_slot = torch.zeros(*is_real.shape, config.hidden_size)
        by_slot[is_real] = getattr(captured, part)
        golden.compare(prefix + name, by_slot, **TOLERANCE)

    slots, is_particle = pack_slots(is_real)
    packed = take_slots(particles, slots)
    neighbors, is_neighbor = nearest_neighbors(
        packed[..., : config.num_coordinates], is_particle, config.num_neighbors, config.published_neighbors
    )
    neighbors = slots[torch.arange(len(slots))[:, None, None], neighbors].masked_fill(~is_neighbor, -1)
    missing = config.num_neighbors - neighbors.shape[-1]
    neighbors = torch.nn.functional.pad(neighbors, (0, missing), value=-1)
    index = torch.full((*is_real.shape, config.num_neighbors), -1)
    index[is_real] = neighbors[is_particle]
    golden.compare(prefix + "knn_index", index, rtol=0, atol=0)

    if config.use_interaction:
        bias = put_slots(captured.interaction.permute(0, 2, 3, 1), slots, is_real.shape[1])
        bias = put_slots(bias.transpose(1, 2), slots, is_real.shape[1]).permute(0, 3, 2, 1)
        bias = bias * (is_real[:, None, :, None] & is_real[:, None, None])
        golden.compare(f"{prefix}interaction_bias", bias.flatten(0, 1), **TOLERANCE)
    if config.num_conditions:
        golden.compare("cond_token", captured.embed_conditions, **TOLERANCE)


@pytest.mark.parametrize("name", sets("omnilearned_classifier", ("kin_int", "kin_noint")))
@ATTENTION
@torch.no_grad()
def test_golden_omnilearned_classifier(name, attn_implementation, tmp_path):
    with GoldenSet(name) as golden:
        model = converted(golden, tmp_path, AutoModelForSequenceClassification, attn_implementation)
        batch = jets(golden, model.config)
        with Captured(model.model) as captured:
            outputs = model(**batch)
        compare_parts(golden, model.model, batch["particles"], captured)
        golden.compare("y_pred", outputs.logits, **TOLERANCE)
        if model.config.problem_type != "regression":
            golden.compare("probabilities", outputs.logits.softmax(dim=-1), **TOLERANCE)
        golden.compare("x_body", model.model(**batch).last_hidden_state, **TOLERANCE)

        # the base model alone from the same folder
        body = AutoModel.from_pretrained(tmp_path / f"{golden.folder.name}_{attn_implementation}")
        torch.testing.assert_close(body(**batch).last_hidden_state, golden.outputs["x_body"], **TOLERANCE)


@pytest.mark.parametrize("name", sets("omnilearned_generator", ("int_pid_add", "unconditional")))
@ATTENTION
@torch.no_grad()
def test_golden_omnilearned_generator(name, attn_implementation, tmp_path):
    with GoldenSet(name) as golden:
        model = converted(golden, tmp_path, AutoModelForPreTraining, attn_implementation)
        inputs = golden.inputs
        batch = jets(golden, model.config)
        with Captured(model.model) as captured:
            outputs = model(**batch, labels=inputs["y"], time=inputs["time"], noise=inputs["noise"])
        compare_parts(golden, model.model, outputs.noisy_particles, captured, prefix="z_")
        golden.compare("time_token", captured.embed_time, **TOLERANCE)
        assert (golden.outputs["time_token"][inputs["time"] == 0] == 0).all()
        for theirs, ours in (
            ("eps", "noise"),
            ("z", "noisy_particles"),
            ("v_target", "target"),
            ("v_pred", "velocity"),
            ("loss_gen", "loss"),
        ):
            golden.compare(theirs, outputs[ours], **TOLERANCE)
        batch["particles"] = outputs.noisy_particles
        golden.compare("z_body", model.model(**batch, time=inputs["time"]).last_hidden_state, **TOLERANCE)

        # the published sampler
        del batch["particles"]
        counts = model.multiplicity(inputs["cond"])
        mask = torch.arange(inputs["X"].shape[1]) < counts.unsqueeze(1)
        golden.compare("ode_mask", mask)
        start = scaled_noise(model.config, inputs["ode_noise"])
        golden.compare("ode_x_start", start * mask.unsqueeze(-1), **TOLERANCE)
        velocity, times = model.velocity, []

        def recorded(x, time, attention_mask, **prepared):
            times.append(time)
            return velocity(x, time, attention_mask, **prepared)

        model.velocity = recorded
        sample = model.generate(
            attention_mask=mask,
            noise=start,
            labels=inputs["y"],
            num_inference_steps=golden.config["ode_nsteps"] - 1,
            **batch,
        )
        assert model.config.solver == "midpoint" and model.config.num_inference_steps == 127
        assert sample.num_function_evaluations == golden.config["ode_nfe"]
        # every batch of similar jets goes through the same times
        expected = golden.expected("ode_times")
        for part in torch.stack(times).split(len(expected)):
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-7)
        golden.compare("ode_x_end", sample.particles, **TOLERANCE)


@pytest.mark.parametrize("name", sets("omnilearned_ftag"))
@ATTENTION
@torch.no_grad()
def test_golden_omnilearned_ftag(name, attn_implementation, tmp_path):
    with GoldenSet(name) as golden:
        model = converted(golden, tmp_path, AutoModelForTokenClassification, attn_implementation)
        batch = jets(golden, model.config)
        # a regression per particle (segmentation) has no classes of jets
        has_classes = model.classifier is not None
        outputs = model(
            **batch, labels=golden.inputs["data_pid"], jet_labels=golden.inputs["y"] if has_classes else None
        )
        golden.compare("x_body", model.model(**batch).last_hidden_state, **TOLERANCE)
        golden.compare("z_pred", outputs.logits, **TOLERANCE)
        if has_classes:
            golden.compare("y_pred", outputs.jet_logits, **TOLERANCE)
            golden.compare("loss_class", outputs.jet_loss.view(1), **TOLERANCE)
        golden.compare("loss_gen", outputs.particle_loss.view(1), **TOLERANCE)
        golden.compare("loss", outputs.loss.view(1), **TOLERANCE)


def zero_if_missing(loss: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(1) if loss is None else loss.view(1)


@pytest.mark.parametrize("name", sets("omnilearned_pretrain"))
@ATTENTION
@torch.no_grad()
def test_golden_omnilearned_pretrain(name, attn_implementation, tmp_path):
    with GoldenSet(name) as golden:
        model = converted(golden, tmp_path, AutoModelForPreTraining, attn_implementation)
        inputs, config = golden.inputs, model.config
        batch = jets(golden, config)
        for setting in (name.removeprefix("total_") for name in golden.names("total_")):
            config.num_event_classes = config.num_labels - JET_CLASSES if "event" in setting else 0
            config.contrastive_loss_weight = 1.0 if "clip" in setting else 0.0
            outputs = model(**batch, labels=inputs["y"], time=inputs["time"], noise=inputs["noise"])
            golden.compare(f"total_{setting}", outputs.loss.view(1), **TOLERANCE)
            log = f"log_{setting}_loss"
            golden.compare(log, outputs.loss.view(1), **TOLERANCE)
            golden.compare(f"{log}_class", (outputs.class_loss + outputs.perturbed_class_loss).view(1), **TOLERANCE)
            golden.compare(
                f"{log}_class_event", (outputs.event_loss + outputs.perturbed_event_loss).view(1), **TOLERANCE
            )
            golden.compare(f"{log}_gen", outputs.generation_loss.view(1), **TOLERANCE)
            golden.compare(f"{log}_clip", zero_if_missing(outputs.contrastive_loss), **TOLERANCE)
        compare_joint(golden, model, batch, outputs)


def compare_joint(golden: GoldenSet, model, batch: dict, outputs):
    """Outputs of the clean and of the noised pass."""
    inputs = golden.inputs
    is_real = inputs["X"][..., 2:3] != 0
    golden.compare("alpha", (1 - inputs["time"]).square()[:, None, None], **TOLERANCE)
    for theirs, ours in (
        ("y_pred", "logits"),
        ("y_perturb", "perturbed_logits"),
        ("y_masked_input", "masked_input_logits"),
        ("z_pred", "velocity"),
    ):
        if theirs in golden.outputs:
            golden.compare(theirs, outputs[ours], **TOLERANCE)
    if "x_body" in golden.outputs:
        golden.compare("x_body", model.model(**batch).last_hidden_state, **TOLERANCE)
    if "z_body" in golden.outputs:
        noise = scaled_noise(model.config, inputs["noise"]) * is_real
        share = inputs["time"][:, None, None]
        noised = {**batch, "particles": (1 - share) * inputs["X"] * is_real + share * noise}
        golden.compare("z_body", model.model(**noised, time=inputs["time"]).last_hidden_state, **TOLERANCE)
        golden.compare("v", noise - inputs["X"] * is_real, **TOLERANCE)
        golden.compare("v_weight", torch.ones_like(noise))


@pytest.mark.parametrize("name", sets("omnilearned_mpm", ("pretrain_perturb", "sort_all", "tokens")))
@ATTENTION
@torch.no_grad()
def test_golden_omnilearned_mpm(name, attn_implementation, tmp_path):
    with GoldenSet(name) as golden:
        model = converted(golden, tmp_path, AutoModelForPreTraining, attn_implementation)
        inputs, config = golden.inputs, model.config
        batch = jets(golden, config)
        if "centroids" in inputs:
            model.set_codebook(inputs["centroids"], inputs["scale_factors_x"])
            codes = model.codes(inputs["X"])
            golden.compare("token_ids_all_slots", codes, rtol=0, atol=0)
            golden.compare("tokenizer_reconstruction", inputs["centroids"][codes] * inputs["scale_factors_x"])
        is_real = inputs["mask_before"].bool()
        is_masked = is_real & ~inputs["mask_after"].bool()
        captured = []
        hook = model.masked_head.register_forward_pre_hook(lambda _, arguments: captured.extend(arguments))
        flow = {"time": inputs["time"], "noise": inputs["noise"]} if "generation" in config.objectives else {}
        outputs = model(**batch, labels=inputs["y"], masked_positions=is_masked, **flow)
        hook.remove()

        slots, _ = pack_slots(is_real)
        states, visible = captured
        golden.compare("mpm_head_input", model.model.unpack(states, slots, is_real.shape[1]), **TOLERANCE)
        visible = model.model.unpack(visible.unsqueeze(-1), slots, is_real.shape[1])
        golden.compare("mpm_head_mask", visible)
        golden.compare("mask_valid_particle", is_real.unsqueeze(-1))
        golden.compare("mask_valid_particle_but_masked", outputs.masked_positions.unsqueeze(-1))
        golden.compare("masked_pred", outputs.masked_predictions, **TOLERANCE)
        golden.compare("loss_masked", outputs.masked_loss.view(1), **TOLERANCE)
        golden.compare("loss_masked_input_class", zero_if_missing(outputs.masked_input_loss), **TOLERANCE)
        golden.compare("loss_total", outputs.loss.view(1), **TOLERANCE)
        of_classes = zero_if_missing(outputs.class_loss) + zero_if_missing(outputs.perturbed_class_loss)
        of_flow = zero_if_missing(outputs.generation_loss)
        if "log_loss_class" in golden.outputs:
            golden.compare("log_loss_class", of_classes, **TOLERANCE)
            golden.compare("log_loss_gen", of_flow, **TOLERANCE)
            golden.compare("loss_omnilearned_part", of_classes + of_flow, **TOLERANCE)
        compare_joint(golden, model, batch, outputs)
