"""Averaged weights: their values, the folder that holds them, and resumed runs."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hepzoo.training.callbacks import EMACallback


class LineConfig(PreTrainedConfig):
    model_type = "line"
    width: int = 3


class Line(PreTrainedModel):
    config_class = LineConfig

    def __init__(self, config):
        super().__init__(config)
        self.slope = nn.Linear(config.width, 1)
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.post_init()

    def forward(self, x, labels=None, **kwargs):
        values = self.slope(x).squeeze(-1) * self.scale
        return {"loss": (values - labels).square().mean(), "logits": values}


class Recorder(EMACallback):
    """Keeps the weights after every step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.weights.append(model.slope.weight.detach().clone())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        self.weights.append(model.slope.weight.detach().clone())


def train(folder, ema, steps=6, resume=None, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    data = [{"x": row.to(dtype), "labels": row.sum().to(dtype)} for row in x]
    model = Line(LineConfig()).to(dtype)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        seed=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[ema])
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def test_averages_follow_the_weights_and_are_a_model_of_their_own(tmp_path):
    ema = Recorder(decay=0.8)
    model = train(tmp_path, ema)
    expected = ema.weights[0]
    for weights in ema.weights[1:]:
        expected = 0.8 * expected + 0.2 * weights
    averaged = Line.from_pretrained(tmp_path, subfolder="ema")
    torch.testing.assert_close(averaged.slope.weight, expected)
    assert not torch.allclose(averaged.slope.weight, model.slope.weight)
    assert torch.equal(averaged.fixed, model.fixed) and averaged.scale == 2
    # training itself went on with the weights
    stored = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    torch.testing.assert_close(stored["slope.weight"], model.slope.weight)
    assert (tmp_path / "checkpoint-3" / "ema" / "model.safetensors").is_file()


def test_averages_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", EMACallback(0.9))
    train(tmp_path / "broken", EMACallback(0.9), steps=3)
    checkpoint = str(tmp_path / "broken" / "checkpoint-3")
    train(tmp_path / "broken", EMACallback(0.9, resume_from=checkpoint), resume=checkpoint)
    whole, broken = (load_file(tmp_path / name / "ema" / "model.safetensors") for name in ("whole", "broken"))
    for name, values in whole.items():
        assert torch.equal(values, broken[name]), name


def test_averages_of_a_model_in_half_precision_are_not(tmp_path):
    train(tmp_path, EMACallback(0.99), dtype=torch.bfloat16)
    stored = load_file(tmp_path / "ema" / "model.safetensors")
    assert stored["slope.weight"].dtype == torch.float32


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_hostile_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        EMACallback(decay)


def test_hostile_checkpoint_without_averages(tmp_path):
    with pytest.raises(ValueError, match="kept no averaged weights"):
        train(tmp_path, EMACallback(0.9, resume_from=tmp_path))
