"""FM4NPP backbones and heads against the references, through their conversion."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, adjusted_rand_score, precision_score, recall_score

import hepzoo
from hepzoo.conversion import main as convert
from hepzoo.modeling.conversion_fm4npp import convert_parameters, split_heads
from hepzoo.modeling.modeling_fm4npp import Fm4nppHungarianMatcher, encode_positions
from tests.golden_sets import GoldenSet

ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def converted(golden: GoldenSet, folder):
    checkpoint, config = golden.path("state_dict.safetensors"), golden.path("config.json")
    assert convert(["fm4npp", "--checkpoint", checkpoint, "--config", config, "--output", str(folder)]) == 0
    return folder


def loaded(folder, **kwargs):
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(hepzoo, name).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def compare_gradients(model, expected: dict[str, torch.Tensor], is_head: bool, rtol: float = 1e-3):
    """To a fraction of the largest number of each tensor of the reference, whatever tensor that is a part of here."""
    parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
    references = convert_parameters(expected, is_head)
    largest = {name: torch.full_like(gradient, gradient.abs().max()) for name, gradient in expected.items()}
    largest = convert_parameters(largest, is_head)
    # what takes no part, such as the positions of prototypes without refinement layers, has no gradient
    assert set(references) == {name for name, gradient in parameters.items() if gradient is not None}
    for name, reference in references.items():
        excess = (parameters[name] - reference).abs() - rtol * largest[name]
        assert excess.max() <= 1e-9, (name, excess.max(), largest[name].max())


def tolerance(golden: GoldenSet, name: str, atol: float = 1e-5) -> float:
    """Absolute tolerance: at least some times what the reference itself deviates by in float32."""
    return max(atol, 4 * golden.config.get("float32_deviation", {}).get(name, 0.0))


def compare_loss(golden: GoldenSet, name: str, loss: torch.Tensor):
    """The reference divides 0 by 0 where there is no target; here the loss is then 0."""
    if golden.expected(name).isnan():
        assert loss == 0, name
    else:
        golden.compare(name, loss, rtol=1e-5, atol=0)


# "auto" takes compiled loops for Mamba-1 where numba is installed
@pytest.mark.parametrize("kernel_backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["fm4npp_mamba1", "fm4npp_mamba2"])
def test_golden_fm4npp_backbone(name, kernel_backend, tmp_path):
    with GoldenSet(name) as golden:
        model = loaded(converted(golden, tmp_path / "converted"), kernel_backend=kernel_backend)
        padded, targets = golden.inputs["points"], golden.inputs["knn_targets"]
        lengths = golden.inputs["lengths"]
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        is_real = mask.bool()
        assert model.config.num_neighbors == golden.config["klen"]
        assert torch.equal((padded == golden.config["pad_value"]).all(dim=-1), ~is_real)

        # the reference runs through the padding, with zeros for points: as unpadded rows here
        points = padded.masked_fill(~is_real.unsqueeze(-1), 0.0)
        with torch.no_grad():
            outputs = model.model(points, output_hidden_states=True)
            predictions = model(points).predictions
        for name, values in {
            "embeddings": outputs.hidden_states[0],
            "features": torch.stack(outputs.block_outputs),
            "last_hidden": outputs.last_hidden_state,
            "predictions": predictions,
        }.items():
            golden.compare(name, values, atol=tolerance(golden, name))
        if "wrong_ema_fallback_predictions" in golden.outputs:
            wrong = golden.expected("wrong_ema_fallback_predictions")
            assert (predictions - wrong)[is_real].abs().max() > 0.1

        # with the mask the padding does not count, whatever its values are, and no point notices
        with torch.no_grad():
            masked = model.model(padded, attention_mask=mask)
        for output, reference in zip(masked.block_outputs, golden.expected("features")):
            atol = tolerance(golden, "features")
            torch.testing.assert_close(output[is_real], reference[is_real], rtol=1e-4, atol=atol)

        # losses: target numbers count equally, events are weighted, predictions are compared with later targets
        outputs = model(padded, attention_mask=mask, neighbor_labels=targets)
        compare_loss(golden, "loss", outputs.loss)
        # the reference divides 0 by 0 where an event has no target
        has_targets = (targets != golden.config["pad_value"]).any(dim=2).any(dim=1)
        per_event = outputs.loss_per_event.detach().masked_fill(~has_targets, torch.nan)
        torch.testing.assert_close(per_event, golden.expected("loss_per_event"), rtol=1e-5, atol=0, equal_nan=True)
        outputs.loss.backward()
        expected = load_file(golden.path("grads.safetensors"))
        if has_targets.any():
            compare_gradients(model, expected, is_head=False)
        golden.compare("loss_event_weight", model.event_weights(lengths))
        assert model.config.loss_bin_edges == golden.config["loss_bin"]
        with torch.no_grad():
            model.config.loss_reweight = True
            loss = model(padded, attention_mask=mask, neighbor_labels=targets).loss
            if has_targets.all():
                golden.compare("loss_reweighted", loss, rtol=1e-5, atol=0)
            else:
                assert golden.expected("loss_reweighted").isnan() and loss.isfinite()
            model.config.loss_reweight = False
            for shift in (1, 2):
                model.config.label_shift = shift
                loss = model(padded, attention_mask=mask, neighbor_labels=targets).loss
                compare_loss(golden, f"loss_rep{shift}", loss)
            model.config.label_shift = 0

        # states behind the last point: of the event alone, and of the padded batch
        event = golden.config["state_event"]
        length = int(lengths[event])
        with torch.no_grad():
            alone = model.model(points[event : event + 1, :length], use_cache=True).cache_params
            batch = model.model(padded, attention_mask=mask, use_cache=True).cache_params
            windows = []
            if length > 1:
                windows = model.model(points[event : event + 1, : length - 1], use_cache=True).cache_params.conv_windows
        for layer in range(model.config.num_hidden_layers):
            golden.compare(f"final_ssm_state.{layer}", alone.states[layer], atol=1e-5)
            golden.compare(f"final_ssm_state.{layer}", batch.states[layer][event : event + 1], atol=1e-5)
            if f"final_conv_state.{layer}" in golden.outputs:
                window = alone.conv_windows[layer]
                torch.testing.assert_close(batch.conv_windows[layer][event : event + 1], window, rtol=1e-4, atol=1e-5)
                # the reference keeps one input more than the next point needs: the first of one point earlier
                first = windows[layer][:, :1] if windows else torch.zeros_like(window[:, :1])
                window = torch.cat([first, window], dim=1).transpose(1, 2)
                golden.compare(f"final_conv_state.{layer}", window, atol=1e-5)

        # of the padding of a short event nothing is said
        coordinates, is_point = padded[:1, :6, 1:], is_real[:1, :6]
        for output in golden.names("pe_"):
            encoded = encode_positions(coordinates, output.removeprefix("pe_"), golden.config["embed_dim"])
            reference = golden.expected(output)
            assert encoded.shape == reference.shape
            torch.testing.assert_close(encoded[is_point], reference[is_point], rtol=1e-4, atol=2e-5)


def track_outputs(golden: GoldenSet, model, prefix: str):
    """The losses and matches of the final prediction, with or without padding as a track."""
    inputs = golden.inputs
    mask, labels = inputs["mask"], inputs["track_ids"]
    outputs = model(attention_mask=mask, track_labels=labels, block_outputs=inputs["features"])
    golden.compare(f"track.{prefix}loss_terms", outputs.loss_terms, rtol=1e-4, atol=1e-6)
    golden.compare(f"track.{prefix}loss_total", outputs.loss, rtol=1e-4, atol=1e-6)
    matcher = Fm4nppHungarianMatcher(model.config)
    tracks = matcher.tracks(labels, mask.bool())
    events, prototypes, ids = matcher(outputs.class_logits, outputs.mask_logits, labels, mask.bool())
    for event, event_tracks in enumerate(tracks):
        golden.compare(f"track.{prefix}n_gt{event}", torch.tensor(len(event_tracks)))
        logits = (outputs.class_logits[event], outputs.mask_logits[event])
        costs = matcher.costs(*logits, labels[event], mask[event].bool(), event_tracks)
        golden.compare(f"track.{prefix}cost{event}", costs, rtol=1e-4, atol=1e-5)
        columns = torch.searchsorted(event_tracks, ids[events == event])
        match = torch.stack([prototypes[events == event], columns])
        assert torch.equal(match, golden.expected(f"track.{prefix}match{event}"))
    return outputs


@ATTENTION
def test_golden_fm4npp_tracking(attn_implementation, tmp_path):
    with GoldenSet("fm4npp_tracking") as golden:
        folder = converted(golden, tmp_path / "converted")
        features, mask = golden.inputs["features"], golden.inputs["mask"]
        is_real = mask.bool()
        attention = {"attn_implementation": attn_implementation}

        model = loaded(folder / "track", **attention)
        assert model.config.num_prototypes == golden.config["n_proto"]
        assert model.config.match_padding
        outputs = track_outputs(golden, model, "")
        golden.compare("track.class_logits", outputs.class_logits, atol=tolerance(golden, "class_logits", 2e-5))
        golden.compare("track.class_probs", outputs.class_logits.softmax(-1), atol=2e-5)
        golden.compare("track.mask_logits", outputs.mask_logits, atol=tolerance(golden, "mask_logits", 2e-5))
        golden.compare("track.mask_probs", outputs.mask_logits.sigmoid(), atol=2e-5)
        golden.compare("track.points", outputs.point_features, atol=2e-5)
        golden.compare("track.refined", outputs.prototypes, atol=2e-5)
        auxiliary = zip(outputs.auxiliary_class_logits, outputs.auxiliary_mask_logits)
        for index, (class_logits, mask_logits) in enumerate(auxiliary):
            golden.compare(f"track.aux{index}.class_probs", class_logits.softmax(-1), atol=2e-5)
            golden.compare(f"track.aux{index}.mask_probs", mask_logits.sigmoid(), atol=2e-5)
        outputs.loss.backward()
        (expected,) = split_heads(load_file(golden.path("grads.safetensors"))).values()
        compare_gradients(model, expected, is_head=True)

        scores = []
        for option, use_classes in ((1, False), (2, True)):
            # the reference assigns the padding too
            tracks = model.assign_tracks(outputs, use_classes=use_classes)
            assert torch.equal(tracks, golden.expected(f"track.assign_option{option}"))
            tracks = tracks.masked_fill(~is_real, -1)
            assert torch.equal(tracks, model.assign_tracks(outputs, mask, use_classes=use_classes))
            events = zip(golden.inputs["track_ids"], tracks, is_real)
            scores.append([adjusted_rand_score(labels[real], found[real]) for labels, found, real in events])
        golden.compare("track.ari", torch.tensor(scores))

        model.config.match_padding = False
        with torch.no_grad():
            track_outputs(golden, model, "nopad_")

        model = loaded(folder / "joint", **attention)
        with torch.no_grad():
            outputs = model(attention_mask=mask, block_outputs=features)
        golden.compare("joint.class_probs", outputs.class_logits.softmax(-1), atol=2e-5)
        golden.compare("joint.mask_probs", outputs.mask_logits.sigmoid(), atol=2e-5)
        golden.compare("joint.pid_logits", outputs.pid_logits, atol=2e-5)
        golden.compare("joint.track_reg_result", outputs.track_parameters, atol=2e-5)
        golden.compare("joint.noise_logits", outputs.noise_logits, atol=2e-5)

        for task in ("pid", "noise"):
            model = loaded(folder / task, **attention)
            labels = golden.inputs[task].masked_fill(~is_real, -100)
            with torch.no_grad():
                outputs = model(attention_mask=mask, labels=labels, block_outputs=features)
            golden.compare(f"{task}.logits", outputs.logits, atol=2e-5)
            golden.compare(f"{task}.loss", outputs.loss, rtol=1e-4, atol=0)
            truth, found = labels[is_real], outputs.logits.argmax(-1)[is_real]
            scores = [
                precision_score(truth, found, average="macro", zero_division=0),
                recall_score(truth, found, average="macro", zero_division=0),
                accuracy_score(truth, found),
            ]
            golden.compare(f"{task}.metrics", torch.tensor(scores))
