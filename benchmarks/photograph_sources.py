"""Where the benchmark's photographs come from: Debian's wallpaper packages and scikit-image. Paths of files out.

Packages are downloaded and unpacked into a folder, never installed, so it takes no rights: about 170 MB. Each keeps
its copyright file in usr/share/doc. Only photographs are listed: drawn pictures compress and decode unlike the web's.
"""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Of a package: folder, then what each file shows.
_LOMIRI = "usr/share/backgrounds"
_MATE = "usr/share/backgrounds/mate/nature"
_KDE = "usr/share/wallpapers"

DEBIAN: dict[str, dict[str, str]] = {
    "lomiri-wallpapers-16.04": {
        f"{_LOMIRI}/Dragonfly_by_Bolly.jpg": "a dragonfly on a shrub",
        f"{_LOMIRI}/Picture_0B_by_freespace.jpg": "a fig cut in half on a red plate",
        f"{_LOMIRI}/Picture_1A_by_freespace.jpg": "brushes covered in bright paint",
        f"{_LOMIRI}/Wine_by_Jakkub_Mede.jpg": "a wooden bottle holder on a table",
        f"{_LOMIRI}/aitzgorri_by_Aitzol_Berasategi.jpg": "the Aizkorri mountains in autumn",
        f"{_LOMIRI}/free_by_Peter_Nerlich.jpg": "a toy bird hanging from a lamp",
        f"{_LOMIRI}/friends_by_Aitzol_Berasategi.jpg": "two dogs at a wooden door",
        f"{_LOMIRI}/greentock_by_Peter_Nerlich.jpg": "the face of a wall clock",
        f"{_LOMIRI}/life_by_Aitzol_Berasategi.jpg": "a stream between mossy rocks",
        f"{_LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg": "a hiking trail in the Picos de Europa",
        f"{_LOMIRI}/sunset_by_Aitzol_Berasategi.jpg": "sunset over rocky hills",
    },
    "lomiri-wallpapers-20.04": {
        f"{_LOMIRI}/Bridge_by_Sander_Klootwijk.jpg": "bridge cables over a beach",
        f"{_LOMIRI}/Kleiber_by_Lukas_Baubkus.jpg": "a nuthatch on the trunk of a tree",
        f"{_LOMIRI}/seeding_by_Clements_Engelhardt.jpg": "dandelion clocks in evening light",
    },
    "mate-backgrounds": {
        f"{_MATE}/Aqua.jpg": "a drop falling into water",
        f"{_MATE}/Blinds.jpg": "a green leaf close up",
        f"{_MATE}/Dune.jpg": "dune grass by the sea",
        f"{_MATE}/FreshFlower.jpg": "an orange flower",
        f"{_MATE}/Garden.jpg": "red and yellow marigolds in a garden",
        f"{_MATE}/GreenMeadow.jpg": "blades of grass on a meadow",
        f"{_MATE}/LadyBird.jpg": "a ladybird on forget-me-nots",
        f"{_MATE}/RainDrops.jpg": "rain drops on leaves",
        f"{_MATE}/Storm.jpg": "storm clouds over a country road",
        f"{_MATE}/TwoWings.jpg": "dandelion seeds in front of flowers",
        f"{_MATE}/Wood.jpg": "pale wood planks",
        f"{_MATE}/YellowFlower.jpg": "a yellow flower in the dark",
    },
    "plasma-workspace-wallpapers": {
        f"{_KDE}/BytheWater/contents/images/2560x1600.jpg": "a wooden jetty by the water",
        f"{_KDE}/ColdRipple/contents/images/2560x1600.jpg": "a pier in the fog, black and white",
        f"{_KDE}/ColorfulCups/contents/images/2560x1600.jpg": "rows of coloured cups",
        f"{_KDE}/DarkestHour/contents/images/2560x1600.jpg": "a misty lake before dawn",
        f"{_KDE}/EveningGlow/contents/images/2560x1600.jpg": "rowing boats on a lake shore at sunset",
        f"{_KDE}/FallenLeaf/contents/images/2560x1600.jpg": "fallen maple leaves in autumn",
        f"{_KDE}/Grey/contents/images/2560x1600.jpg": "the white ribs of a modern building",
        f"{_KDE}/Kite/contents/images/2560x1600.jpg": "a kite in a blue sky",
        f"{_KDE}/OneStandsOut/contents/images/2560x1600.jpg": "star moss from above",
        f"{_KDE}/Path/contents/images/2560x1600.jpg": "a path through a pine forest",
        f"{_KDE}/Volna/contents/images/5120x2880.jpg": "waves on a sandy beach from the air",
    },
}
"""Package -> file in it -> what it shows."""

SCIKIT_IMAGE = {
    "astronaut.png": "an astronaut in front of a space shuttle model",
    "chelsea.png": "a tabby cat looking up",
    "coffee.png": "a cup of coffee on a wooden table",
    "hubble_deep_field.jpg": "galaxies in the Hubble deep field",
    "motorcycle_left.png": "a motorcycle in a garage",
    "rocket.jpg": "a rocket on the launch pad at night",
}
"""Of the pictures that its wheel brings along: file -> what it shows."""

_FEWEST = 10
_MISSING = (
    "apt-get and dpkg-deb are not both on PATH, so Debian's wallpaper packages cannot be fetched; give a folder of "
    "your own photographs with --photographs DIR"
)


@dataclass(frozen=True)
class Photograph:
    """A picture to cut crops from."""

    path: Path
    subject: str
    """What it shows, in a few words."""
    package: str
    """Where it is from, and whose terms hold."""


def own_photographs(folder: Path) -> list[Photograph]:
    """Returns the JPEG and PNG files of a folder, by name. Raises ValueError where there is none."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError(f"--photographs {folder}: no .jpg or .png file in it; give a folder of photographs")
    return [Photograph(path, path.stem.replace("_", " ").replace("-", " "), "own") for path in paths]


def fetched_photographs(folder: Path) -> list[Photograph]:
    """Returns the listed photographs; packages that are not in `folder` yet are downloaded into it.

    Raises ValueError in one line where apt is missing or its archive holds too few of them.
    """
    found = [*_debian(folder), *_scikit_image()]
    if len(found) < _FEWEST:
        raise ValueError(
            f"only {len(found)} of the photographs could be had, {_FEWEST} are needed: `apt-get update` as root may "
            "help; or give a folder of your own with --photographs DIR"
        )
    return found


def _debian(folder: Path) -> list[Photograph]:
    photographs: list[Photograph] = []
    for package, pictures in DEBIAN.items():
        unpacked = folder / package
        if not unpacked.exists():
            _fetch(package, unpacked)
        photographs += [
            Photograph(unpacked / path, subject, package)
            for path, subject in pictures.items()
            if (unpacked / path).is_file()
        ]
    return photographs


def _fetch(package: str, unpacked: Path) -> None:
    """Downloads a package and unpacks it; nothing is left where apt does not have it, which other releases may not."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ValueError(_MISSING)
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as scratch:
        print(f"fetching {package}", flush=True)
        command = ["apt-get", "download", "-qq", package]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        files = list(Path(scratch).glob("*.deb"))
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            print(f"{package} is left out: {reason}", flush=True)
            return
        content = Path(scratch) / "content"
        subprocess.run(["dpkg-deb", "-x", str(files[0]), str(content)], check=True)
        content.replace(unpacked)


def _scikit_image() -> list[Photograph]:
    try:
        from skimage import data
    except ImportError:
        return []
    folder = Path(data.__file__).parent
    return [
        Photograph(folder / name, subject, "scikit-image")
        for name, subject in SCIKIT_IMAGE.items()
        if (folder / name).is_file()
    ]
