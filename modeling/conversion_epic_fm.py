"""Parameter names and configuration of the published EPiC flow (arXiv:2312.00123) to ours."""

import math
import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_epic_fm import ACTIVATIONS, TIME_EMBEDDINGS, EpicFMConfig
from .conversion_common import check_matrices, convert_state_dict, find_number, find_setting, strip_prefixes

# Lightning lists the flow a second time, as part of the loss
DUPLICATES = "loss."
FREQUENCIES = "flows.0.frequencies"

_OUTER = r"flows\.0\.net\.(fc_[lg]\d)\."
_LAYER = r"flows\.0\.net\.nn_list\.(\d+)\.(fc_\w+)\."
# name in the reference -> name here, tried in this order; PyTorch writes weight normalisation in two ways
KEY_PATTERNS = (
    (_OUTER + r"bias", r"model.\1.bias"),
    (_OUTER + r"(?:weight_g|parametrizations\.weight\.original0)", r"model.\1.magnitude"),
    (_OUTER + r"(?:weight_v|parametrizations\.weight\.original1|weight)", r"model.\1.direction"),
    (_LAYER + r"bias", r"model.layers.\1.\2.bias"),
    (_LAYER + r"(?:weight_g|parametrizations\.weight\.original0)", r"model.layers.\1.\2.magnitude"),
    (_LAYER + r"(?:weight_v|parametrizations\.weight\.original1|weight)", r"model.layers.\1.\2.direction"),
)
KINEMATICS = ["part_etarel", "part_dphi", "part_ptrel"]
PUBLISHED_FEATURES = [
    *KINEMATICS,
    *("part_d0val", "part_d0err", "part_dzval", "part_dzerr", "part_charge"),
    *("part_isChargedHadron", "part_isNeutralHadron", "part_isPhoton", "part_isElectron", "part_isMuon"),
]
# classes of JetClass, in front of the other conditions
NUM_CLASSES = 10
PUBLISHED_STEPS = 99
# the conditions that the reference can be configured with, in its order
OPTIONAL_CONDITIONS = ("pt", "energy", "eta", "sdmass", "nparticles")


def convert_parameters(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The parameters of a reference checkpoint under our names.

    Raises:
        ValueError: for unknown parameters, and for duplicates under `loss.` that are different.
    """
    reference = {strip_prefixes(name): tensor for name, tensor in reference.items()}
    flow = {name: tensor for name, tensor in reference.items() if not name.startswith(DUPLICATES)}
    for name, tensor in reference.items():
        if not name.startswith(DUPLICATES):
            continue
        original = flow.get(name.removeprefix(DUPLICATES))
        if original is None:
            raise ValueError(f"checkpoint has {name}, but not {name.removeprefix(DUPLICATES)}")
        if original.shape != tensor.shape or not torch.equal(original, tensor):
            raise ValueError(f"checkpoint has two different versions of {name.removeprefix(DUPLICATES)}")
    return convert_state_dict({name: value for name, value in flow.items() if name != FREQUENCIES}, KEY_PATTERNS)


def _find_integer(reference_config: dict[str, Any], name: str, default: int, least: int) -> int:
    value = find_number(reference_config, name)
    if value is None:
        return default
    if value != int(value) or value < least:
        raise ValueError(f"configuration says {name} = {value:g}, expected an integer from {least}")
    return int(value)


def _find_switch(reference_config: dict[str, Any], name: str, default: bool) -> bool:
    value = find_setting(reference_config, name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"configuration says {name} = {value!r}, expected true or false")
    return value


def _find_choice(reference_config: dict[str, Any], name: str, default: Any, choices: tuple) -> Any:
    value = find_setting(reference_config, name)
    if value is None:
        return default
    if not isinstance(value, (str, bool)) or value not in choices:
        raise ValueError(f"configuration says {name} = {value!r}, expected one of {', '.join(map(str, choices))}")
    return value


def convert_conditions(reference_config: dict[str, Any], width: int) -> tuple[int, list[str]]:
    """
    Number of classes and names of the other conditions of a condition vector of `width` numbers.

    Raises:
        ValueError: the configuration names other conditions than there are.
    """
    if width < NUM_CLASSES:
        return 0, [f"condition_{i}" for i in range(width)]
    switches = {name: find_setting(reference_config, f"conditioning_{name}") for name in OPTIONAL_CONDITIONS}
    if any(value is not None for value in switches.values()):
        # of the reference's data configuration; pt and eta are on unless it says no
        is_on = {name: value if value is not None else name in ("pt", "eta") for name, value in switches.items()}
        names = [f"jet_{name}" for name in OPTIONAL_CONDITIONS if is_on[name]]
    elif width == NUM_CLASSES + 2:
        names = ["jet_pt", "jet_eta"]
    else:
        names = [f"condition_{i}" for i in range(width - NUM_CLASSES)]
    if len(names) != width - NUM_CLASSES:
        raise ValueError(
            f"configuration says {NUM_CLASSES} classes and {names} as conditions, but global_cond_dim = {width}"
        )
    return NUM_CLASSES, names


def convert_config(
    reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor], frequencies: torch.Tensor | None = None
) -> EpicFMConfig:
    """
    Configuration of a *converted* state dict, with the published time embedding, output activation and number of steps
    (its velocity is not smooth in time, and fewer steps, enough for models trained here, were not tried with its
    weights). The reference's settings have the published values where the configuration does not name them,
    and must not contradict the shapes.

    Args:
        frequencies: that the checkpoint brings.

    Raises:
        ValueError: naming the option that is not supported, or the setting that disagrees with the checkpoint.
    """
    for name, supported in (
        ("n_transforms", (1,)),
        ("use_normaliser", (False,)),
        ("loss_type", ("FM-OT",)),
    ):
        value = find_setting(reference_config, name)
        if value is not None and value not in supported:
            raise ValueError(f"configuration says {name} = {value!r}, which is not supported")
    wrapper = _find_choice(reference_config, "wrapper_func", "weight_norm", ("weight_norm", "", "none", "None", False))
    use_weight_norm = wrapper == "weight_norm"

    needed = ("model.fc_l2.direction", "model.fc_g2.direction", "model.fc_l3.direction")
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)
    layers = {int(match.group(1)) for name in state_dict if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        raise ValueError(f"checkpoint has the layers {sorted(layers)}, expected 0 to {len(layers) - 1}")
    sizes = {
        "hidden_dim": len(state_dict["model.fc_l2.direction"]),
        "latent": len(state_dict["model.fc_g2.direction"]),
        "features": len(state_dict["model.fc_l3.direction"]),
        "layers": len(layers),
    }
    for name, size in sizes.items():
        value = _find_integer(reference_config, name, size, 0)
        if value != size:
            raise ValueError(f"configuration says {name} = {value}, but the checkpoint has {size}")

    num_frequencies = _find_integer(reference_config, "frequencies", 16, 1)
    time_embedding = _find_choice(reference_config, "t_emb", "cosine", TIME_EMBEDDINGS)
    if frequencies is not None:
        expected = math.pi * 2.0 ** torch.arange(num_frequencies, dtype=torch.float64)
        if frequencies.shape != expected.shape:
            found = tuple(frequencies.shape)
            raise ValueError(f"configuration says frequencies = {num_frequencies}, but {FREQUENCIES} has shape {found}")
        # the published model does not use them
        if time_embedding == "sincos" and not torch.allclose(frequencies.double(), expected, rtol=1e-6):
            raise ValueError(f"{FREQUENCIES} is {frequencies.tolist()}, expected pi 2^j")
    global_width = _find_integer(reference_config, "global_cond_dim", NUM_CLASSES + 2, 0)
    local_width = _find_integer(reference_config, "local_cond_dim", 0, 0)
    if global_width and local_width and global_width != local_width:
        raise ValueError(
            f"configuration says global_cond_dim = {global_width}, local_cond_dim = {local_width}; expected equal or 0"
        )
    num_classes, condition_names = convert_conditions(reference_config, max(global_width, local_width))
    sigma = find_number(reference_config, "sigma")
    sum_scale, dropout = find_number(reference_config, "sum_scale"), find_number(reference_config, "dropout")
    try:
        return EpicFMConfig(
            num_features=sizes["features"],
            hidden_size=sizes["hidden_dim"],
            latent_size=sizes["latent"],
            num_hidden_layers=sizes["layers"],
            hidden_act=_find_choice(reference_config, "activation", "leaky_relu", ACTIVATIONS),
            output_activation=True,
            use_weight_norm=use_weight_norm,
            sum_scale=0.01 if sum_scale is None else sum_scale,
            dropout=0.0 if dropout is None else dropout,
            num_frequencies=num_frequencies,
            time_embedding=time_embedding,
            time_in_input=_find_switch(reference_config, "add_time_to_input", False),
            time_in_local=_find_switch(reference_config, "t_local_cat", True),
            time_in_global=_find_switch(reference_config, "t_global_cat", True),
            num_classes=num_classes,
            condition_names=condition_names,
            local_conditions=local_width > 0,
            global_conditions=global_width > 0,
            sigma_min=1e-4 if sigma is None else sigma,
            max_num_particles=_find_integer(reference_config, "num_particles", 128, 1),
            solver="midpoint",
            num_inference_steps=PUBLISHED_STEPS,
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def convert_features(reference_config: dict[str, Any], config: EpicFMConfig) -> list[str] | None:
    """
    Names of the features of a constituent; `None` if the configuration does not name them.

    Raises:
        ValueError: other than `config.num_features` names.
    """
    names = find_setting(reference_config, "feature_names")
    additional = find_setting(reference_config, "additional_part_features")
    if names is None and additional is not None:
        names = [*KINEMATICS, *additional] if isinstance(additional, list) else additional
    if names is None:
        # the published model
        return PUBLISHED_FEATURES if config.num_features == len(PUBLISHED_FEATURES) else None
    is_good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_good or len(names) != config.num_features:
        raise ValueError(f"configuration says feature_names = {names!r}, expected {config.num_features} names")
    return names
