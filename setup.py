"""Map the rooms of the repository under one import name: `hepzoo.modeling` lives in `modeling/`, and so on."""

from setuptools import setup

ROOMS = ("modeling", "tokenization", "data_scripts", "training", "evaluation")

setup(
    packages=["hepzoo", *(f"hepzoo.{room}" for room in ROOMS)],
    package_dir={"hepzoo": "hepzoo", **{f"hepzoo.{room}": room for room in ROOMS}},
    package_data={"hepzoo": ["py.typed"], "hepzoo.training": ["configs/*.yaml"]},
)
