"""Checkpoints and configurations as Lightning and Hydra leave them, put through `hepzoo convert`."""

import enum
import functools
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
import yaml

from hepzoo.conversion import main as convert


class Stateful:
    """Base of the classes that a Lightning checkpoint names: anything with attributes."""

    def __init__(self, **state):
        self.__dict__.update(state)


def write_lightning_checkpoint(state_dict: dict, path: pathlib.Path, protocol: int = 2) -> pathlib.Path:
    """What Lightning writes: weights beside (partial) objects of packages that are gone when the file is read."""
    names = {
        "omegaconf_gone.dictconfig": ("DictConfig", "AnyNode"),
        "lightning_gone.utilities": ("AttributeDict",),
        "published_gone.models": ("Backbone", "Scheduler"),
        "published_gone.config": ("Mode",),
    }
    before = set(sys.modules)
    made = {}
    for module_name, classes in names.items():
        for parent in (module_name.split(".")[0], module_name):
            sys.modules.setdefault(parent, types.ModuleType(parent))
        for name in classes:
            if name == "Mode":
                made[name] = enum.Enum(name, {"SPLIT": "split"}, module=module_name)
            else:
                base = dict if name == "AttributeDict" else Stateful
                made[name] = type(name, (base,), {"__module__": module_name})
            setattr(sys.modules[module_name], name, made[name])
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RAdam([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    settings = made["DictConfig"](_content={"lr": made["AnyNode"](_val=1e-3)}, _metadata={"object_type": dict})
    checkpoint = {
        "epoch": 3,
        "global_step": 8000,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": torch.nn.Module().state_dict() | state_dict,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val/loss'}": {
                "best_model_score": torch.tensor(1.5),
                "dirpath": pathlib.PurePosixPath("/checkpoints"),
                "kth_value": np.float64(2.5),
                "history": np.arange(3.0),
            }
        },
        "optimizer_states": [optimizer.state_dict(), optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": made["AttributeDict"](
            backbone=functools.partial(made["Backbone"], dim=16),
            scheduler=functools.partial(made["Scheduler"]),
            optimizer=functools.partial(torch.optim.AdamW, lr=3e-4),
            config=settings,
            mode=made["Mode"].SPLIT,
            names={"x", "y"},
            nothing=None,
            best=np.float64(2.5),
        ),
    }
    try:
        torch.save(checkpoint, path, pickle_protocol=protocol)
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
    return path


def run_conversion(family: str, folder: pathlib.Path, state_dict: dict, config: dict, protocol: int = 2):
    """`hepzoo convert` of a Lightning checkpoint with these weights; returns the folder of the model."""
    checkpoint = write_lightning_checkpoint(state_dict, folder / "model.ckpt", protocol)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    output = folder / "out" / family
    arguments = ["--checkpoint", str(checkpoint), "--config", str(folder / "config.yaml"), "--output", str(output)]
    assert convert([family, *arguments]) == 0
    return output


def assert_refused(family: str, folder: pathlib.Path, state_dict: dict, config: dict, *expected: str) -> str:
    """The conversion fails with one line that has the `expected` words, and writes nothing; returns the line."""
    with pytest.raises(ValueError) as caught:
        run_conversion(family, folder, state_dict, config)
    message = str(caught.value)
    assert "\n" not in message
    for words in expected:
        assert words in message
    assert not list((folder / "out").glob("**/*"))
    return message
