"""The EPiC flow against the reference (arXiv:2312.00123), through `hepzoo convert` and `from_pretrained`."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

from hepzoo.conversion import main as convert
from hepzoo.tokenization.feature_extraction_epic_fm import PUBLISHED_STATISTICS, EpicFMFeatureExtractor
from hepzoo.tokenization.jet_sets import CONDITIONS
from tests.golden_sets import DEFAULT_FOLDER, GoldenSet

ROOT = Path(os.environ.get("HEPZOO_GOLDEN_DIR", DEFAULT_FOLDER)) / "epic_fm"
FOLDERS = sorted(
    {"", "freq16", "kin_uncond"} | {path.name for path in ROOT.glob("*/") if (path / "config.json").exists()}
)
SETS = pytest.mark.parametrize("folder", FOLDERS)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def converted(golden: GoldenSet, folder):
    output = folder / "converted"
    arguments = ["--checkpoint", golden.path("state_dict.safetensors"), "--config", golden.path("config.json")]
    assert convert(["epic_fm", *arguments, "--output", str(output)]) == 0
    model, info = AutoModelForPreTraining.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    # without published constants of a feature or condition there is none
    if (output / "preprocessor_config.json").exists():
        extractor = AutoFeatureExtractor.from_pretrained(output)
        assert extractor.feature_names == golden.config["feature_names"]
        assert len(extractor.condition_names) == len(model.config.condition_names)
    else:
        known = {*PUBLISHED_STATISTICS, *CONDITIONS}
        assert not known.issuperset([*golden.config["feature_names"], *model.config.condition_names])
    return model.eval()


@SETS
def test_golden_epic_fm(folder, tmp_path):
    with GoldenSet(f"epic_fm/{folder}".rstrip("/")) as golden:
        model = converted(golden, tmp_path)
        inputs = golden.inputs
        mask = inputs["mask"].squeeze(-1)
        conditions = inputs.get("cond")
        slots = mask.shape[1]
        times = inputs["t_per_jet"]

        # time embedding: what is the same for all constituents stands in every slot of the reference
        def embedded(time):
            return model.model.time_embedding(time).unsqueeze(-2).expand(len(mask), slots, -1)

        golden.compare("time_emb_per_jet", embedded(times), **TOLERANCE)
        for index, time in enumerate(golden.config["scalar_t"]):
            golden.compare(f"time_emb_scalar_t{index}", embedded(torch.tensor([time])), **TOLERANCE)

        # vector field, and every layer of it
        on_the_way, target = model.flow_path(inputs["x"], times, inputs["z"], mask)
        golden.compare("y_t", on_the_way, **TOLERANCE)
        golden.compare("u_t", target, **TOLERANCE)
        with torch.no_grad():
            outputs = model.model(on_the_way, times, mask, conditions=conditions, output_hidden_states=True)
        golden.compare("v_t", outputs.velocity, **TOLERANCE)
        assert len(outputs.hidden_states) == len(golden.names("layer")) // 2
        for index, states in enumerate(zip(outputs.hidden_states, outputs.latent_states, strict=True)):
            golden.compare(f"layer{index}_local", states[0], **TOLERANCE)
            golden.compare(f"layer{index}_global", states[1], **TOLERANCE)
        masked_noise = inputs["z"] * inputs["mask"]
        for index, time in enumerate(golden.config["scalar_t"]):
            with torch.no_grad():
                velocity = model.model(masked_noise, time, mask, conditions=conditions).velocity
            golden.compare(f"v_scalar_t{index}", velocity, **TOLERANCE)

        # loss
        outputs = model(inputs["x"], mask, conditions=conditions, time=times, noise=inputs["z"])
        golden.compare("loss", outputs.loss.reshape(1), **TOLERANCE)
        torch.testing.assert_close(outputs.velocity, golden.outputs["v_t"], **TOLERANCE)
        torch.testing.assert_close(outputs.target, golden.outputs["u_t"], **TOLERANCE)

        # sampling: times to the last bit, because the embedding can tell
        for name in golden.names("sample_"):
            _, solver, points = name.split("_")
            with recorded_times(model) as calls:
                sample = model.generate(
                    attention_mask=mask,
                    conditions=conditions,
                    noise=inputs["z"],
                    num_inference_steps=int(points) - 1,
                    solver=solver,
                )
            golden.compare(name, sample.particles, **TOLERANCE)
            assert torch.equal(sample.attention_mask, mask.long())
            expected = golden.expected(f"times_{solver}_{points}")
            assert sample.num_function_evaluations == len(expected)
            for batch in calls:
                assert torch.equal(torch.stack(batch), expected)

        # physical features
        extractor = EpicFMFeatureExtractor(
            golden.config["feature_names"],
            means=inputs["means"].numpy(),
            stds=inputs["stds"].numpy(),
            label_names=[],
            condition_names=[],
            feature_ranges={
                f"part_{name}": golden.config[f"{name}_clip"]
                for name in ("ptrel", "energyrel")
                if f"{name}_clip" in golden.config
            },
        )
        first = golden.outputs[f"sample_midpoint_{golden.config['ode_steps'][0]}"]
        physical = extractor.denormalise(first, mask)
        golden.compare("denormalised", torch.from_numpy(physical), **TOLERANCE)
        if "postprocessed" in golden.outputs:
            processed = extractor.postprocess(golden.outputs["denormalised"], mask)
            golden.compare("postprocessed", torch.from_numpy(processed), **TOLERANCE)
        if "keep_at_least_3" in golden.outputs:
            jets = extractor.batch_decode(first, mask, min_num_particles=3)
            keep = torch.zeros(len(mask))
            keep[jets["row_index"]] = 1
            golden.compare("keep_at_least_3", keep)


class recorded_times:
    """Times of the network calls of `generate`, one list per batch."""

    def __init__(self, model):
        self.model = model
        self.calls: list[list[torch.Tensor]] = []

    def __enter__(self) -> list[list[torch.Tensor]]:
        prepare, velocity = self.model.prepare_sampling, self.model.velocity

        def prepare_sampling(**inputs):
            self.calls.append([])
            return prepare(**inputs)

        def record(x, time, attention_mask, **prepared):
            self.calls[-1].append(time)
            return velocity(x, time, attention_mask, **prepared)

        self.model.prepare_sampling, self.model.velocity = prepare_sampling, record
        return self.calls

    def __exit__(self, *_):
        del self.model.prepare_sampling, self.model.velocity
