"""SPADE against the reference (arXiv:2606.11304), through `hepzoo convert` and `from_pretrained`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hepzoo.conversion import main as convert
from tests.golden_sets import GoldenSet

MODES = pytest.mark.parametrize("mode", ["split", "combined"])
ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
# compared in tests/tokenization
PREPROCESSING = ("hit_features", "hit_mask", "n_hits", "incident_energy_cond", "n_hits_cond", "x_token", "y_token")
PREPROCESSING += ("z_token", "token_ids", "energy", "attention_mask", "valid_mask_", "physical_", "roundtrip_")


def converted(golden: GoldenSet, folder, attn_implementation="sdpa"):
    output = folder / f"{golden.folder.name}_{attn_implementation}"
    arguments = ["--checkpoint", golden.path("state_dict.safetensors"), "--config", golden.path("config.json")]
    assert convert(["spade", *arguments, "--output", str(output)]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(
        output, attn_implementation=attn_implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval(), AutoTokenizer.from_pretrained(output)


def streams(golden: GoldenSet, prefix: str = "") -> torch.Tensor:
    """Ids of a batch of the reference, (batch, length, streams)."""
    if golden.config["dataset"]["axis_mode"] == "combined":
        return golden.expected(f"{prefix}token_ids").unsqueeze(-1)
    return torch.stack([golden.expected(f"{prefix}{axis}_token") for axis in "xyz"], dim=-1)


@MODES
@ATTENTION
def test_golden_spade_forward_losses_and_stop(mode, attn_implementation, tmp_path):
    with GoldenSet(f"spade/{mode}") as golden:
        golden.compared.update(name for name in golden.outputs if name.startswith((*PREPROCESSING, "gen_")))
        model, tokenizer = converted(golden, tmp_path, attn_implementation)
        slots = model.config.num_registers
        incident_energy = golden.inputs["incident_energy_gev"]
        batch = tokenizer(
            {"showers": golden.inputs["raw_showers"], "incident_energy": incident_energy},
            padding="max_length",
            return_tensors="pt",
        )
        assert torch.equal(batch["input_ids"][:, slots:], streams(golden))

        captured = {}
        layers = model.model.layers
        hooks = [
            layer.register_forward_hook(lambda _, __, output, index=index: captured.__setitem__(index, output))
            for index, layer in enumerate(layers)
        ]
        hooks.append(layers[0].register_forward_pre_hook(lambda _, args: captured.update(input=args[0])))
        with torch.no_grad():
            hidden_states = model.model(**batch).last_hidden_state
            outputs = model(**batch, labels=batch["input_ids"])
        for hook in hooks:
            hook.remove()
        golden.compare("decoder_input", captured["input"])
        for index in range(len(layers)):
            golden.compare(f"decoder_layer{index}_out", captured[index])
        golden.compare("out_hidden_states", hidden_states[:, slots:])
        golden.compare("out_register_hidden", hidden_states[:, :slots])
        golden.compare("out_mask", batch["attention_mask"][:, slots:])
        names = [f"_{axis}" for axis in model.config.stream_names] if mode == "split" else [""]
        for name, logits in zip(names, outputs.logits, strict=True):
            golden.compare(f"out_token_logits{name}", logits[:, slots:])
        for name, values in zip(("mog_logits", "mog_means", "mog_log_scales"), outputs.energy_mixture, strict=True):
            golden.compare(f"out_{name}", values[:, slots:])
        weights, means, _ = outputs.energy_mixture
        golden.compare("out_raw_energy", (weights.softmax(-1) * means).sum(-1, keepdim=True)[:, slots:])

        # losses
        token_loss = sum(outputs.stream_losses)
        if mode == "split":
            for name, loss in zip(names, outputs.stream_losses, strict=True):
                golden.compare(f"loss_token_ce{name}", loss)
        golden.compare("loss_token_ce", token_loss)
        for name in ("loss_energy_loss", "loss_energy_mog_nll"):
            golden.compare(name, outputs.energy_loss)
        total = token_loss + model.config.energy_loss_weight * outputs.energy_loss
        for name in ("loss_loss", "loss_total"):
            golden.compare(name, total)
        torch.testing.assert_close(outputs.loss, total + model.config.stop_loss_weight * outputs.stop_loss)

        # the stop network sees every hit, also those whose energy was cut off the streams
        cells = torch.stack([golden.outputs[f"physical_{axis}_token"] for axis in "xyz"], dim=-1)
        index = torch.arange(cells.shape[1]).expand(cells.shape[:2])
        with torch.no_grad():
            logits = model.stop_head(
                cells, golden.outputs["physical_energy"], incident_energy[:, None].expand_as(index), index
            )
        num_hits = golden.outputs["n_hits"].long()
        golden.compare("stop_logits", logits)
        golden.compare("stop_hit_counter", index)
        golden.compare("stop_position_ratio", index / (model.config.max_num_hits - 1))
        golden.compare("stop_targets", index == num_hits[:, None] - 1)
        golden.compare("stop_mask", index < num_hits[:, None])
        # of the order of 100, with a weight of 1000
        for name in ("stop_loss_weighted", "stop_metric_physics_stop_loss"):
            golden.compare(name, model.stop_head.loss(logits, num_hits))
        is_hit, is_last = index < num_hits[:, None], index == num_hits[:, None] - 1
        says_stop = (logits.sigmoid() >= 0.5) & is_hit
        right = (says_stop & is_last).sum()
        golden.compare("stop_metric_physics_stop_precision", right / says_stop.sum().clamp(min=1))
        golden.compare("stop_metric_physics_stop_recall", right / is_last.sum())
        golden.compare(
            "stop_metric_physics_stop_go_accuracy", (is_hit & ~is_last & ~says_stop).sum() / (is_hit & ~is_last).sum()
        )

        # the loss of the stop network inside forward, on showers that the streams hold completely
        complete = golden.outputs["attention_mask"].sum(1) == num_hits + model.config.max_stream_delay + 1
        rows = {name: values[complete] for name, values in batch.items()}
        with torch.no_grad():
            inside = model(**rows, labels=rows["input_ids"]).stop_loss
        expected = model.stop_head.loss(logits[complete], num_hits[complete])
        torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)


def golden_generate(model, golden, **kwargs):
    kwargs = {"max_new_tokens": golden.config["sampling"]["max_len"] - 1, **kwargs}
    return model.generate(
        incident_energy=golden.inputs["gen_incident_energy_gev"], do_sample=False, trim_sequences=False, **kwargs
    )


def most_probable_energy(model, outputs) -> torch.Tensor:
    logits, means, _ = outputs.energy_mixture
    energy = means.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    return energy.clamp(model.config.energy_min, model.config.energy_max)


def as_buffers(model, golden, generated):
    """
    Generated streams as the reference's buffers, (batch, max_len, ...): behind the registers, zero behind the end, and
    with the energies that the network gave at the positions where it was fed 0.
    """
    slots, length = model.config.num_registers, golden.config["sampling"]["max_len"]
    ids, energy = generated.sequences, generated.continuous["hit_energy"].clone()
    prompt_energy = energy.clone()
    with torch.no_grad():
        outputs = model(ids, hit_energy=prompt_energy, incident_energy=golden.inputs["gen_incident_energy_gev"])
    given = most_probable_energy(model, outputs)
    unused = slice(slots + 1, slots + 1 + model.config.energy_delay)
    energy[:, unused] = given[:, slots : slots + model.config.energy_delay]
    missing = slots + length - ids.shape[1]
    assert missing >= 0
    ids = torch.nn.functional.pad(ids, (0, 0, 0, missing))[:, slots:]
    return ids, torch.nn.functional.pad(energy, (0, missing))[:, slots:]


def compare_buffers(golden, prefix, ids, energy):
    torch.testing.assert_close(ids, streams(golden, prefix), rtol=0, atol=0)
    golden.compare(f"{prefix}energy", energy.unsqueeze(-1))


def compare_hits(golden, prefix, tokenizer, ids, energy, num_hits):
    """
    Decoded hits. The reference lets a shower that was cut off end with a hit of the default energy, transformed 0: one
    more position with it stands for that.
    """
    slots = tokenizer.num_conditioning_tokens
    missing = torch.tensor(tokenizer.missing_token_ids).expand(len(ids), slots + 1, -1)
    ids = torch.cat([missing[:, :slots], ids, missing[:, slots:]], dim=1)
    energy = torch.nn.functional.pad(energy, (slots, 1))
    rows = tokenizer.batch_decode(ids, hit_energy=energy, num_hits=num_hits)
    width = golden.config["sampling"]["max_len"]
    features, mask = torch.zeros(len(ids), width, 4), torch.zeros(len(ids), width)
    for row in range(len(ids)):
        hits = [torch.as_tensor(rows[name][row]).float() for name in ("x", "y", "z", "energy")]
        features[row, : len(hits[0])] = torch.stack(hits, dim=-1)
        mask[row, : len(hits[0])] = 1
    golden.compare(f"{prefix}hit_mask", mask)
    golden.compare(f"{prefix}hit_features", features)


@MODES
@pytest.mark.parametrize("how", ["decoder", "cache", "no_cache", "static"])
def test_golden_spade_generation(mode, how, tmp_path, monkeypatch):
    with GoldenSet(f"spade/{mode}") as golden:
        others = (*PREPROCESSING, "decoder_", "out_", "loss_", "stop_")
        golden.compared.update(name for name in golden.outputs if name.startswith(others))
        model, tokenizer = converted(golden, tmp_path)
        kwargs = {"no_cache": {"use_cache": False}, "static": {"cache_implementation": "static"}}.get(how, {})
        if how == "static":
            kwargs["disable_compile"] = True
        if how == "cache":
            monkeypatch.setattr(type(model), "_decodes_directly", lambda *args: False)
        max_len = golden.config["sampling"]["max_len"]
        delay = model.config.max_stream_delay
        wanted = golden.inputs["gen_force_n_hits"]

        # the physics stop; with two votes; never
        for prefix, settings in (
            ("gen_physics_stop_", {}),
            ("gen_twovotes_", {"stop_votes": 2}),
            ("gen_nolimit_", {"stop_threshold": 2.0}),
        ):
            generated = golden_generate(model, golden, **settings, **kwargs)
            ids, energy = as_buffers(model, golden, generated)
            compare_buffers(golden, prefix, ids, energy)
            stop_step = golden.expected(f"{prefix}stop_step")
            stopped = stop_step >= 0
            complete = max_len - 1 - delay
            assert torch.equal(generated.num_hits[stopped], (stop_step[stopped] - 1).clamp(max=complete))
            assert (generated.num_hits[~stopped] == complete).all()
            # hits that the reference keeps, the last of a cut shower with the default energy
            num_hits = torch.where(stopped, stop_step - 1, complete + 1)
            compare_hits(golden, prefix, tokenizer, ids, energy, num_hits)
            if f"{prefix}ar_hit_mask" in golden.outputs:
                ends = torch.where(stopped, stop_step, max_len)
                golden.compare(f"{prefix}ar_hit_mask", torch.arange(max_len) < ends[:, None])

        # an exact number of hits; the reference goes on for some positions, which are fed again here
        golden.compare("gen_force_stop_step", wanted)
        golden.compare("gen_force_ar_hit_mask", torch.arange(max_len) < wanted[:, None])
        generated = golden_generate(model, golden, num_hits=wanted, **kwargs)
        assert torch.equal(generated.num_hits, wanted)
        ids, energy = as_buffers(model, golden, generated)
        slots = model.config.num_registers
        missing = torch.tensor(model.config.stream_missing_token_ids)
        for row, count in enumerate(wanted.tolist()):
            for position in range(count + 1 + delay, count + 5):
                prompt = torch.cat([missing.expand(slots, -1), ids[row, :position]])[None]
                fed = torch.cat([torch.zeros(slots), energy[row, :position]])[None]
                fed[:, : slots + 1 + model.config.energy_delay] = 0
                incident = golden.inputs["gen_incident_energy_gev"][row : row + 1]
                with torch.no_grad():
                    outputs = model(prompt, hit_energy=fed, incident_energy=incident)
                ids[row, position] = missing
                energy[row, position] = most_probable_energy(model, outputs)[0, -1]
        compare_buffers(golden, "gen_force_", ids, energy)
        compare_hits(golden, "gen_force_", tokenizer, ids, energy, wanted - 1)

        # the reference's other way to count simply stops the loop
        golden.compare("gen_nhitsstop_stop_step", wanted - 1)
        buffers = [
            as_buffers(
                model,
                golden,
                golden_generate(model, golden, stop_threshold=2.0, max_new_tokens=int(count) - 1, **kwargs),
            )
            for count in wanted
        ]
        ids = torch.stack([ids[row] for row, (ids, _) in enumerate(buffers)])
        energy = torch.stack([energy[row] for row, (_, energy) in enumerate(buffers)])
        compare_buffers(golden, "gen_nhitsstop_", ids, energy)
        # its last hit has the default energy too
        ids[torch.arange(len(wanted)), wanted] = missing
        compare_hits(golden, "gen_nhitsstop_", tokenizer, ids, energy, wanted - (3 if mode == "split" else 2))
