"""Photon showers by Geant4 (through geant4-pybind, extra `sim`): the other engine of simulate_showers.py.

Geometry: the silicon sheets and tungsten plates of `EcalGeometry` in vacuum, no field, nothing in front. Scored is the
energy that each step deposits in silicon, at the middle of the step. Geant4 reads cross sections from data sets that
are distributed apart from its code; where they are is said by environment variables.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hepzoo.data_scripts.shower_profiles import EcalGeometry

# What electromagnetic showers read, and the name of the folder, which a version number follows.
DATA_SETS = {
    "G4LEDATA": "G4EMLOW",
    "G4LEVELGAMMADATA": "PhotonEvaporation",
    "G4ENSDFSTATEDATA": "G4ENSDFSTATE",
    "G4PARTICLEXSDATA": "G4PARTICLEXS",
}
PHYSICS_LISTS = ("option1", "option0", "option4")
RANGE_CUT = 0.7  # mm
_START_DISTANCE = 10.0  # mm, of the photon from the first layer

_running = None


def find_data_sets(environment: Mapping[str, str]) -> dict[str, Path | None]:
    """The folder of each variable of `DATA_SETS`: its value, or else below GEANT4_DATA_DIR or ~/.geant4_pybind.

    None where there is no such folder.
    """
    place = Path(environment.get("GEANT4_DATA_DIR") or Path.home() / ".geant4_pybind")
    found = {}
    for variable, name in DATA_SETS.items():
        if environment.get(variable):
            folders = [Path(environment[variable])]
        else:
            folders = sorted(place.glob(f"{name}[0-9]*"))
        found[variable] = next((folder for folder in folders if folder.is_dir()), None)
    return found


def check_installation() -> None:
    """Checks that Geant4 can start, without starting it.

    Raises:
        ValueError: geant4-pybind or a data set is missing.
    """
    if importlib.util.find_spec("geant4_pybind") is None:
        raise ValueError('engine geant4 needs geant4-pybind; install it with: pip install "hepzoo[sim]"')
    missing = [name for name, folder in find_data_sets(os.environ).items() if folder is None]
    if missing:
        names = ", ".join(f"{name} ({DATA_SETS[name]})" for name in missing)
        raise ValueError(
            f"engine geant4 finds no data for {names}; set the variables to the folders of the data sets that the "
            "Geant4 collaboration distributes with its release, or GEANT4_DATA_DIR to the folder that holds them all"
        )


def shower_deposits(
    energy: np.ndarray,
    impact: np.ndarray,
    seed: int,
    geometry: EcalGeometry | None = None,
    physics: str = "option1",
) -> tuple[np.ndarray, ...]:
    """Simulates photons at perpendicular incidence.

    Geant4 is set up at the first call of a process; later calls must name the same geometry and physics.

    Args:
        energy: GeV, shape (showers,).
        impact: x and y, mm, shape (2, showers).
        seed: of the random engine, positive; the same seed gives the same showers.
        physics: electromagnetic physics list, one of `PHYSICS_LISTS`.

    Returns:
        shower, layer (int64), x, y (mm), deposit (MeV), each of shape (deposits,).

    Raises:
        ValueError: Geant4 or its data are missing, or the process runs another geometry already.
    """
    global _running
    if physics not in PHYSICS_LISTS:
        raise ValueError(f"physics must be one of {', '.join(PHYSICS_LISTS)}, got {physics!r}")
    geometry = geometry or EcalGeometry()
    if _running is None:
        check_installation()
        _running = _Geant4(geometry, physics)
    elif (_running.geometry, _running.physics) != (geometry, physics):
        raise ValueError("Geant4 runs with another geometry or physics in this process; expected one per process")
    return _running.run(np.asarray(energy), np.asarray(impact), int(seed))


class _Geant4:
    """A run manager with its geometry, source and scoring; Geant4 allows one per process."""

    def __init__(self, geometry: EcalGeometry, physics: str):
        folders = find_data_sets(os.environ)
        os.environ.update({name: str(folder) for name, folder in folders.items() if folder})
        # With this variable set, geant4-pybind does not ask on the terminal for data sets that are not needed.
        os.environ.setdefault("GEANT4_DATA_DIR", str(Path(os.environ["G4LEDATA"]).parent))
        import geant4_pybind as g4

        self.g4, self.geometry, self.physics = g4, geometry, physics
        self.deposits: list[tuple] = []
        self.photons: list[tuple] = []
        self.manager = g4.G4RunManagerFactory.CreateRunManager(g4.G4RunManagerType.Serial)
        # Geant4 keeps bare pointers to these; Python must not free them.
        self.parts = [
            _detector(g4, geometry, self.deposits),
            _physics_list(g4, physics),
            _actions(g4, self.photons, geometry),
        ]
        for part in self.parts:
            self.manager.SetUserInitialization(part)
        for command in ("/run/verbose 0", "/process/verbose 0", "/process/em/verbose 0", "/cuts/verbose 0"):
            g4.G4UImanager.GetUIpointer().ApplyCommand(command)
        self.manager.Initialize()

    def run(self, energy: np.ndarray, impact: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
        self.g4.G4Random.setTheSeed(seed)
        self.deposits.clear()
        # Events are numbered from 0 in each run.
        self.photons[:] = [(float(e), float(x), float(y)) for e, x, y in zip(energy, *impact)]
        self.manager.BeamOn(len(self.photons))
        values = np.array(self.deposits, dtype=np.float64).reshape(-1, 5)
        shower, layer = values[:, :2].T.astype(np.int64)
        return shower, layer, *values[:, 2:].T


def _detector(g4, geometry: EcalGeometry, deposits: list):
    class Scoring(g4.G4VSensitiveDetector):
        """Appends (event, layer, x, y, MeV) of every step that deposits energy."""

        def Initialize(self, collections):
            self.event = g4.G4RunManager.GetRunManager().GetCurrentEvent().GetEventID()

        def ProcessHits(self, step, history):
            energy = step.GetTotalEnergyDeposit()
            if energy <= 0:
                return False
            before, after = step.GetPreStepPoint(), step.GetPostStepPoint()
            start, end = before.GetPosition(), after.GetPosition()
            layer = before.GetTouchable().GetCopyNumber()
            deposits.append((self.event, layer, (start.x + end.x) / 2, (start.y + end.y) / 2, energy / g4.MeV))
            return True

    class Detector(g4.G4VUserDetectorConstruction):
        def Construct(self):
            nist = g4.G4NistManager.Instance()
            vacuum, tungsten, silicon = (nist.FindOrBuildMaterial(f"G4_{name}") for name in ("Galactic", "W", "Si"))
            half = geometry.half_width * g4.mm
            depth = geometry.layer_positions[-1] - geometry.layer_positions[0] + 100.0
            self.kept = []

            def volume(name, size, thickness, material):
                solid = g4.G4Box(name, size, size, thickness / 2)
                logical = g4.G4LogicalVolume(solid, material, name)
                self.kept += [solid, logical]
                return logical

            def place(logical, name, z, mother, number):
                where = g4.G4ThreeVector(0, 0, z)
                placed = g4.G4PVPlacement(None, where, logical, name, mother, False, number, False)
                self.kept.append(placed)
                return placed

            # The first sheet starts at z = 0.
            world = volume("World", half + 10 * g4.mm, 2 * depth * g4.mm, vacuum)
            top = place(world, "World", 0, None, 0)
            self.sheet = volume("Silicon", half, geometry.silicon * g4.mm, silicon)
            plates = {t: volume(f"Tungsten{t}", half, t * g4.mm, tungsten) for t in set(geometry.tungsten) if t > 0}
            for layer, (position, plate) in enumerate(zip(geometry.layer_positions, geometry.tungsten)):
                front = position - geometry.layer_positions[0]
                place(self.sheet, "Silicon", (front + geometry.silicon / 2) * g4.mm, world, layer)
                if plate > 0:
                    place(plates[plate], "Tungsten", (front - plate / 2) * g4.mm, world, layer)
            return top

        def ConstructSDandField(self):
            self.scoring = Scoring("silicon")
            g4.G4SDManager.GetSDMpointer().AddNewDetector(self.scoring)
            self.SetSensitiveDetector(self.sheet, self.scoring)

    return Detector()


def _physics_list(g4, physics: str):
    name = "G4EmStandardPhysics" + ("" if physics == "option0" else f"_{physics}")
    physics_list = g4.G4VModularPhysicsList()
    physics_list.RegisterPhysics(getattr(g4, name)())
    physics_list.SetVerboseLevel(0)
    physics_list.SetDefaultCutValue(RANGE_CUT * g4.mm)
    return physics_list


def _actions(g4, photons: list, geometry: EcalGeometry):
    class Source(g4.G4VUserPrimaryGeneratorAction):
        def __init__(self):
            super().__init__()
            self.gun = g4.G4ParticleGun(1)
            self.gun.SetParticleByName("gamma")
            self.gun.SetParticleMomentumDirection(g4.G4ThreeVector(0, 0, 1))

        def GeneratePrimaries(self, event):
            energy, x, y = photons[event.GetEventID()]
            start = -(geometry.tungsten[0] + _START_DISTANCE)
            self.gun.SetParticleEnergy(energy * g4.GeV)
            self.gun.SetParticlePosition(g4.G4ThreeVector(x * g4.mm, y * g4.mm, start * g4.mm))
            self.gun.GeneratePrimaryVertex(event)

    class Actions(g4.G4VUserActionInitialization):
        def Build(self):
            self.source = Source()
            self.SetUserAction(self.source)

    return Actions()
