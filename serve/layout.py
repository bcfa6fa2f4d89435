"""Paths given to the server -> places of models on the disk: which versions there are, and which of them are served."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import EdgewardError
from bundle.store import DIGEST, MANIFEST, read_manifest
from protos import inference_pb2 as pb
from serve.errors import ConfigRefused, StartError
from serve.pbtxt import parse_config, read_text

VERSION = re.compile(r"[1-9][0-9]{0,17}")
GRAPH = "model.onnx"
CONFIG = "config.pbtxt"

Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, bytes, time of change and inode of every file."""


@dataclass(frozen=True)
class Place:
    """Where one version of a model lies.

    Attributes:
        name: of the model.
        version: of it.
        path: a bundle's folder, or an ONNX file.
        stamp: other than before when a file is.
        config: what a config.pbtxt says of every version of the model.
        given: whether the server was given this very path, so that no policy leaves it out.
    """

    name: str
    version: int
    path: Path
    stamp: Stamp
    config: pb.ModelConfig | None = None
    given: bool = False

    @property
    def is_bundle(self) -> bool:
        """Whether it is served with its preprocessing, too."""
        return self.path.is_dir()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is served from it."""
        return (self.name, f"{self.name}.onnx") if self.is_bundle else (self.name,)


@dataclass(frozen=True)
class Failure:
    """What cannot be served from a path; what is served from below it may go on."""

    path: Path
    name: str  # of the model, as far as one can tell; empty where one cannot
    error: EdgewardError


@dataclass(frozen=True)
class Layout:
    """What lies below the paths.

    Attributes:
        places: to serve, the versions of a name ascending.
        failures: instead of others.
        skipped: what looks like a version and is none, one line each.
    """

    places: tuple[Place, ...]
    failures: tuple[Failure, ...]
    skipped: tuple[str, ...]


def parse_versions(text: str) -> pb.ModelVersionPolicy:
    """The policy that `latest`, `latest:N`, `all` or numbers such as `1,3` are.

    Raises:
        StartError: it is none of them.
    """
    if text == "all":
        return pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())
    latest, _, number = text.partition(":")
    if latest == "latest" and (text == latest or VERSION.fullmatch(number)):
        return pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=min(int(number or 1), 2**31)))
    numbers = text.split(",")
    if not all(VERSION.fullmatch(each) for each in numbers):
        raise StartError(
            f"--versions {text!r} is not a choice; expected latest, latest:N, all, or numbers such as 1,3."
        )
    return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=map(int, numbers)))


def choose_versions(policy: pb.ModelVersionPolicy, there: Sequence[int]) -> list[int]:
    """Those of the versions that are there that a policy serves, ascending; without a choice the highest."""
    match policy.WhichOneof("policy_choice"):
        case "all":
            return sorted(there)
        case "specific":
            return sorted(set(there) & set(policy.specific.versions))
    return sorted(set(there))[-(policy.latest.num_versions or 1) :]


def find_places(paths: Sequence[Path], policy: pb.ModelVersionPolicy, served: Collection[Path] = ()) -> Layout:
    """Look at everything below the paths; nothing is loaded or verified.

    Args:
        paths: each a bundle, a folder of bundles, a repository NAME/VERSION/ of bundles or of ONNX graphs with or
            without a NAME/config.pbtxt, or an .onnx file.
        policy: for models whose config.pbtxt has none.
        served: those of places that are; of two with one name and version such a one is meant, else the first.
    """
    walk = _Walk()
    for path in paths:
        walk.attempt(path, path.stem if path.suffix == ".onnx" else "", walk.look_at)
    places = [place for name in {place.name: None for place in walk.places} for place in walk.choose(name, policy)]
    return Layout(tuple(walk.told_apart(places, served)), tuple(walk.failures), tuple(walk.skipped))


class _Walk:
    """Gathers what it comes by; nothing that is wrong with one model keeps it from the others."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.failures: list[Failure] = []
        self.skipped: list[str] = []

    def attempt(self, path: Path, name: str, look: Callable[[Path], None]) -> None:
        try:
            look(path)
        except EdgewardError as error:
            self.failures.append(Failure(path, name, error))
        except OSError as error:  # a file that goes while it is looked at, a folder that may not be read
            self.failures.append(Failure(path, name, StartError(f"{path} cannot be read: {error.strerror}.")))

    def look_at(self, path: Path) -> None:
        """A path that the server was given."""
        if path.is_file() and path.suffix == ".onnx":
            if not is_utf8(path.name):
                raise StartError(f"{path} has a name that is not UTF-8. Rename it.")
            self.places.append(Place(path.stem, 1, path, _stamp([path]), given=True))
            return
        if (path / MANIFEST).is_file():
            self._bundle(path, given=True)
            return
        if not path.is_dir():
            raise StartError(f"{path} is not there, or is neither a folder nor an .onnx file.")
        folders = self._folders(path)
        if not folders:
            raise StartError(f"{path} holds no bundle and no model. `edgeward export` writes one.")
        for folder in folders:
            self.attempt(folder, folder.name, self._look_in)

    def _look_in(self, folder: Path) -> None:
        if _holds_bundle(folder, self.skipped):
            self._bundle(folder)
        elif not (folder / MANIFEST).exists():
            self._model(folder)

    def _bundle(self, path: Path, *, given: bool = False) -> None:
        manifest = read_manifest(path)
        self.places.append(Place(manifest.name, manifest.version, path, _stamp(path.rglob("*")), given=given))

    def _model(self, folder: Path) -> None:
        config = None
        if (folder / CONFIG).exists():
            config = parse_config(read_text(folder / CONFIG), folder.name)
        found = [place for version in self._folders(folder) for place in self._version(folder, version, config)]
        if not found:
            raise StartError(
                f"{folder} is neither a bundle nor a model with a complete version: a folder called by a positive "
                f"integer, with a bundle or a {GRAPH} in it."
            )
        self.places += found

    def _version(self, folder: Path, version: Path, config: pb.ModelConfig | None) -> Iterator[Place]:
        graph = version / ((config and config.default_model_filename) or GRAPH)
        if not VERSION.fullmatch(version.name):
            self.skipped.append(f"{version} is not a version; expected a positive integer without leading zeros.")
        elif (version / MANIFEST).exists() and config:
            raise ConfigRefused(f"config.pbtxt is of an ONNX graph, but version {version.name} is a bundle.")
        elif _holds_bundle(version, self.skipped):
            yield Place(folder.name, int(version.name), version, _stamp(version.rglob("*")))
        elif graph.is_file() and not (version / MANIFEST).exists():
            stamp = _stamp([graph, *folder.iterdir()])
            yield Place(folder.name, int(version.name), graph, stamp, config)
        elif not (version / MANIFEST).exists():
            self.skipped.append(f"{version} is not complete: it holds neither a bundle nor a {graph.name}.")

    def _folders(self, path: Path) -> list[Path]:
        """Those below a path that may be models or versions: their names must fit into messages, which are UTF-8."""
        found = []
        for each in sorted(path.iterdir()):
            if each.name.startswith(".") or not each.is_dir():
                continue
            if is_utf8(each.name):
                found.append(each)
            else:
                self.skipped.append(f"{each} has a name that is not UTF-8. Rename it.")
        return found

    def choose(self, name: str, policy: pb.ModelVersionPolicy) -> list[Place]:
        """The places of one model that are served."""
        places = sorted((place for place in self.places if place.name == name), key=lambda place: place.version)
        own = next((place.config.version_policy for place in places if place.config), None)
        if own is None or own.WhichOneof("policy_choice") is None:
            own = policy
        versions = choose_versions(own, [place.version for place in places])
        chosen = [place for place in places if place.given or place.version in versions]
        if not chosen:
            there = ", ".join(str(place.version) for place in places)
            error = StartError(f"model {name!r} has none of the versions that are asked for; it has {there}.")
            self.failures.append(Failure(places[0].path, name, error))
        return chosen

    def told_apart(self, places: Sequence[Place], served: Collection[Path]) -> list[Place]:
        """The places, but for those whose names and version are another's."""
        taken: dict[tuple[str, int], Place] = {}
        for place in sorted(places, key=lambda each: each.path not in served):
            other = next((taken[name, place.version] for name in place.names if (name, place.version) in taken), None)
            if other is None:
                taken |= {(name, place.version): place for name in place.names}
                continue
            error = StartError(
                f"{other.path} and {place.path} are both model {place.name!r} version {place.version}. Serve one of "
                "them, or export one under another --name or --version."
            )
            self.failures.append(Failure(place.path, place.name, error))
        return [place for place in places if taken.get((place.name, place.version)) is place]


def _holds_bundle(folder: Path, skipped: list[str]) -> bool:
    """Whether it does, and a whole one, as far as its last file says."""
    if not (folder / MANIFEST).is_file():
        return False
    if not (folder / DIGEST).is_file():
        skipped.append(f"{folder} is not complete: it has no {DIGEST}.")
        return False
    return True


def is_utf8(name: str) -> bool:
    """Whether it can be sent; Python has the bytes of others as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stamp(paths: Iterable[Path]) -> Stamp:
    files = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    states = [(file.name, file.stat()) for file in files]
    return tuple((name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states)
