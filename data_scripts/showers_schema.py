"""The columns of every calorimeter shower data set of this repository: one row per shower, hits as lists.

Cells are counted from 0; the layer z counts from the front of the calorimeter. Readers ignore other columns.
"""

from datasets import Features, List, Value

SHOWER_FEATURES = Features(
    {
        "incident_energy": Value("float32"),  # GeV
        "x": List(Value("int16")),  # cell index
        "y": List(Value("int16")),
        "z": List(Value("int16")),  # layer, 0 = front
        "energy": List(Value("float32")),  # energy deposited in the cell, MeV
    }
)

# Truth that the simulator adds. "Before the cut" is what the silicon of all layers got, inside the grid or not.
SIMULATION_COLUMNS = Features(
    {
        "impact_x_cm": Value("float32"),  # impact point relative to the centre of the grid
        "impact_y_cm": Value("float32"),
        "sum_before_cut_mev": Value("float32"),
        "n_cells_before_cut": Value("int32"),  # cells with any energy
    }
)


def shower_features(extra: Features | None = None) -> Features:
    """`SHOWER_FEATURES` followed by further columns, for example `SIMULATION_COLUMNS`.

    Raises:
        ValueError: a further column has the name of a shower column.
    """
    for name in extra or ():
        if name in SHOWER_FEATURES:
            raise ValueError(f"column {name} is a shower column already; expected another name")
    return Features({**SHOWER_FEATURES, **(extra or {})})
