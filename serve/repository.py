"""The models of a server: loaded from the disk, looked up by name and version, swapped without a gap."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import structlog

from bundle.errors import BadInput, EdgewardError
from serve.config import ServeConfig
from serve.errors import Closed, ConfigRefused, LoadFailed, NotReady, StartError, UnknownModel
from serve.layout import VERSION, Failure, Layout, Place, find_places, parse_versions
from serve.loading import load_place, reason
from serve.models import ServedModel
from serve.scheduler import Scheduler
from serve.statistics import Statistics

log = structlog.get_logger()

Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model that can be called, its queue and its counts."""

    model: ServedModel
    scheduler: Scheduler
    statistics: Statistics
    loaded_s: float  # how long loading took


@dataclass(frozen=True)
class IndexEntry:
    """What became of one version of a model."""

    name: str
    version: str  # empty where there is none yet
    state: Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
    reason: str = ""  # for clients; also of a version that is served while its new files were refused


@dataclass(frozen=True, eq=False)
class _Loaded:
    place: Place
    served: tuple[Served, ...]  # a bundle and its bare graph, or one graph


@dataclass(frozen=True)
class _Refused:
    place: Place
    error: Exception


class Repository:
    """Models by name and version. Every method may be called from any thread.

    A bundle and its bare graph are loaded and unloaded together, under the name of either.

    Lookups read a mapping that is replaced whole, so a swap is one assignment. Changes are made one at a time.

    Attributes:
        on_change: called with a name and whether it can be called from now on. It must not change the repository.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Load everything that the policy serves.

        Raises:
            EdgewardError: a path holds nothing that can be served, or something on it cannot be loaded or may not be.
        """
        self.on_change: Callable[[str, bool], None] = lambda name, ready: None
        self._config = config
        self._policy = parse_versions(config.versions)
        self._changing = threading.Lock()
        self._served: Mapping[str, Mapping[int, Served]] = {}  # never changed in place, nor is the next
        self._loaded: Mapping[str, Mapping[int, _Loaded]] = {}  # by the name of the bundle or graph
        self._refused: dict[tuple[str, int], _Refused] = {}
        self._unloaded: dict[str, tuple[tuple[str, int], ...]] = {}  # by a client, with what was served
        self._draining: dict[_Loaded, threading.Thread] = {}
        self._loading: Place | None = None
        self._failures: Sequence[Failure] = ()
        self._told: set[str] = set()  # what was logged of the disk as it is
        self._closed = False
        self._cut_off = False  # whether calls outlived a drain
        self._open()

    def _open(self) -> None:
        layout = self._look()
        for failure in layout.failures:
            raise _located(failure.error, failure.path)
        if not layout.places:
            raise StartError("there is nothing to serve. Give at least one bundle, folder of bundles or .onnx file.")
        for name, places in _by_name(layout.places).items():
            for refused in self._update(name, places, ()):
                raise _located(refused.error, refused.place.path)

    def __iter__(self) -> Iterator[Served]:
        """Of what can be called."""
        for versions in self._served.values():
            yield from versions.values()

    def names(self) -> list[str]:
        """Of every model that can be called."""
        return list(self._served)

    def versions(self, name: str) -> list[int]:
        """Of one model that can be called, ascending; none when there is no such model."""
        return sorted(self._served.get(name, ()))

    def find(self, name: str, version: str) -> Served:
        """The model that a request means. By the time it is called a successor may have taken its place: see `call`.

        Args:
            name: of the model.
            version: a positive integer, or "" for the highest there is.

        Raises:
            BadInput: the name or version is one that no model can have.
            UnknownModel: there is no such model.
            NotReady: there is, but it cannot be called.
        """
        if version and not VERSION.fullmatch(version):
            raise BadInput(
                f"failed to get model version from specified version string {version!r} (model: {name!r}); expected a "
                "positive integer, or none."
            )
        if "\0" in name:
            raise BadInput(f"model name {name!r} holds a NUL character; expected none.")
        versions = self._served.get(name, {})
        number = int(version) if version else max(versions, default=0)
        if number in versions:
            return versions[number]
        wanted = f"{name!r} version {version}" if version else f"{name!r}"
        known = {entry.version for entry in self.index() if entry.name == name}
        if known and (not version or version in known):
            raise NotReady(f"Request for unknown model: {wanted} is not at ready state")
        there = f"; it has versions {', '.join(map(str, sorted(versions)))}" if versions else ""
        raise UnknownModel(f"Request for unknown model: {wanted} is not found{there}")

    def call(self, name: str, version: str, use: Callable[[Served], Answer]) -> Answer:
        """What `use` returns for the model that a request means.

        When the model closes before `use` has submitted a job to it, `use` is called again with its successor; so a
        swap leaves no moment in which the name cannot be called.

        Args:
            name: see `find`.
            version: see `find`.
            use: submits a job; it may be called more than once.

        Raises:
            EdgewardError: see `find`, and what `use` raises.
        """
        while True:
            served = self.find(name, version)
            try:
                return use(served)
            except Closed:
                if self._closed or self.find(name, version) is served:
                    raise

    def index(self) -> list[IndexEntry]:
        """Every version that is served, was refused, unloaded, or is on its way, by name and version."""
        entries: dict[tuple[str, str], IndexEntry] = {}

        def put(names: Sequence[str], version: object, state: str, why: str = "") -> None:
            for name in names:
                entries[name, str(version)] = IndexEntry(name, str(version), state, why)  # type: ignore[arg-type]

        refused = {(name, one.place.version): one for one in list(self._refused.values()) for name in one.place.names}
        for failure in self._failures:
            put([failure.name], "", "UNAVAILABLE", reason(failure.error))
        for (name, version), one in refused.items():
            put([name], version, "UNAVAILABLE", reason(one.error))
        for name, version in [pair for pairs in list(self._unloaded.values()) for pair in pairs]:
            put([name], version, "UNAVAILABLE", "unloaded")
        for loaded in list(self._draining):
            put(loaded.place.names, loaded.place.version, "UNLOADING")
        if (loading := self._loading) is not None:
            put(loading.names, loading.version, "LOADING")
        for served in self:
            name, version = served.model.name, served.model.version
            put([name], version, "READY", reason(refused[name, version].error) if (name, version) in refused else "")
        return [entries[key] for key in sorted(entries, key=lambda key: (key[0], int(key[1] or 0)))]

    def refresh(self) -> None:
        """Look at the disk again.

        New and changed versions are loaded and swapped in, those that went, or that the policy drops, are drained. A
        version that is refused is logged, `index` says why, and what was served of that model is served still; it is
        not tried again before its files change. What a client unloaded stays unloaded.
        """
        with self._changing:
            layout = self._look()
            places = _by_name(layout.places)
            for name in list(self._unloaded):
                if name not in places:
                    del self._unloaded[name]
            for name in {**places, **self._loaded}:
                if name not in self._unloaded and not self._closed:
                    self._update(name, places.get(name, ()), layout.failures)

    def load(self, name: str) -> None:
        """Load a model as it is on the disk now, also where it was refused or unloaded before.

        Raises:
            UnknownModel: there is none of that name below the server's paths.
            LoadFailed: it was not loaded; what was served is served still.
        """
        with self._changing:
            layout = self._look()
            places = [place for place in layout.places if name in place.names]
            for failure in layout.failures:
                if failure.name == name:
                    raise LoadFailed(f"failed to load {name!r}: {reason(failure.error)}")
            if not places:
                raise UnknownModel(f"failed to load {name!r}: no such model is in the repository")
            self._unloaded.pop(places[0].name, None)
            self._forget(places[0].name)
            for refused in self._update(places[0].name, places, layout.failures):
                raise LoadFailed(f"failed to load {name!r}, version {refused.place.version}: {reason(refused.error)}")

    def unload(self, name: str) -> None:
        """Take a model away and wait until its calls have ended. `refresh` leaves it unloaded, `load` brings it back.

        Raises:
            UnknownModel: there is none of that name.
        """
        with self._changing:
            bundle = name if name in self._loaded else name.removesuffix(".onnx")
            versions = self._loaded.get(bundle, {})
            pairs = tuple((each, version) for version in versions for each in versions[version].place.names)
            if name not in {each for each, _ in pairs}:
                if any(entry.name == name for entry in self.index()):
                    return  # it is not loaded
                raise UnknownModel(f"failed to unload {name!r}: no such model is in the repository")
            self._unloaded[bundle] = pairs
            self._forget(bundle)
            drains = self._publish(bundle, {})
        for drain in drains:
            drain.join()

    def close(self, drain_s: float) -> bool:
        """Take no more calls, let those that came end, and say whether all did.

        Args:
            drain_s: how long they may go on.
        """
        self._closed = True
        self._cut_off = False
        for versions in self._loaded.values():
            for loaded in versions.values():
                self._retire(loaded, drain_s)
        for drain in list(self._draining.values()):
            drain.join()
        return not self._cut_off

    def _look(self) -> Layout:
        layout = find_places(self._config.paths, self._policy)
        self._failures = layout.failures
        lines = {*layout.skipped, *(str(_located(failure.error, failure.path)) for failure in layout.failures)}
        for line in sorted(lines - self._told):
            log.warning("not served", because=line)
        self._told = lines
        return layout

    def _forget(self, name: str) -> None:
        self._refused = {key: refused for key, refused in self._refused.items() if key[0] != name}

    def _update(self, name: str, places: Sequence[Place], failures: Sequence[Failure]) -> list[_Refused]:
        """Serve these versions of a model, and where one is refused keep those there were. Returns the refused."""
        current = self._loaded.get(name, {})
        before = {key: refused for key, refused in self._refused.items() if key[0] == name}
        self._forget(name)
        new: dict[int, _Loaded] = {}
        refused: list[_Refused] = []
        for place in places:
            old = before.get((name, place.version))
            have = current.get(place.version)
            if have is not None and _same(have.place, place):
                new[place.version] = have
            elif old is not None and _same(old.place, place):
                refused.append(old)
            else:
                got = self._load(place)
                if isinstance(got, _Refused):
                    refused.append(got)
                else:
                    new[place.version] = got
        self._refused |= {(name, each.place.version): each for each in refused}
        for version, have in current.items():
            if refused or any(have.place.path.is_relative_to(failure.path) for failure in failures):
                new.setdefault(version, have)
        if not self._closed:
            self._publish(name, new)
        return refused

    def _load(self, place: Place) -> "_Loaded | _Refused":
        self._loading = place
        start = time.perf_counter()
        try:
            models = load_place(place, self._config)
        except EdgewardError as error:
            log.error("not loaded", model=place.name, version=place.version, path=str(place.path), because=str(error))
            return _Refused(place, error)
        except Exception as error:
            log.exception("not loaded", model=place.name, version=place.version, path=str(place.path))
            return _Refused(place, error)
        finally:
            self._loading = None
        loaded_s = time.perf_counter() - start
        log.info("loaded", model=place.name, version=place.version, device=models[0].device, seconds=round(loaded_s, 3))
        return _Loaded(place, tuple(_served(model, loaded_s) for model in models))

    def _publish(self, name: str, new: Mapping[int, _Loaded]) -> list[threading.Thread]:
        """Swap the versions of a model in one step, and drain those that are no longer served."""
        old = self._loaded.get(name, {})
        self._loaded = {key: versions for key, versions in {**self._loaded, name: new}.items() if versions}
        before, self._served = self._served, _by_version(self._loaded)
        for each in sorted(before.keys() ^ self._served.keys()):
            self.on_change(each, each in self._served)
        kept = set(new.values())
        return [self._retire(loaded, self._config.drain_s) for loaded in old.values() if loaded not in kept]

    def _retire(self, loaded: _Loaded, drain_s: float) -> threading.Thread:
        thread = threading.Thread(
            target=self._drain, args=(loaded, drain_s), name=f"drain-{loaded.place.name}", daemon=True
        )
        self._draining[loaded] = thread
        thread.start()
        return thread

    def _drain(self, loaded: _Loaded, drain_s: float) -> None:
        deadline = time.monotonic() + drain_s
        place = loaded.place
        for served in loaded.served:
            if not served.scheduler.close(max(0.0, deadline - time.monotonic())):
                self._cut_off = True
                log.warning("calls cut off", model=served.model.name, version=place.version, drain_s=drain_s)
        log.info("unloaded", model=place.name, version=place.version)
        del self._draining[loaded]


def open_repository(config: ServeConfig) -> Repository:
    """Find, load and self-test everything below the paths of a server.

    What is there afterwards is for good, and the garbage collector need not go through it again.

    Raises:
        EdgewardError: a path holds nothing that can be served, or something on it cannot be loaded or may not be.
    """
    repository = Repository(config)
    gc.collect()
    gc.freeze()
    return repository


def _served(model: ServedModel, loaded_s: float) -> Served:
    statistics = Statistics()
    return Served(model, Scheduler(model, model.policy, statistics), statistics, loaded_s)


def _by_name(places: Sequence[Place]) -> dict[str, list[Place]]:
    named: dict[str, list[Place]] = {}
    for place in places:
        named.setdefault(place.name, []).append(place)
    return named


def _by_version(loaded: Mapping[str, Mapping[int, _Loaded]]) -> dict[str, dict[int, Served]]:
    served: dict[str, dict[int, Served]] = {}
    for one in [one for versions in loaded.values() for one in versions.values()]:
        for each in one.served:
            served.setdefault(each.model.name, {})[each.model.version] = each
    return served


def _same(one: Place, other: Place) -> bool:
    return (one.path, one.stamp) == (other.path, other.stamp)


def _located(error: Exception, path: object) -> Exception:
    """The same for the operator; the text of a ConfigRefused is for clients, too, and names no path."""
    return ConfigRefused(f"{path}: {error}") if isinstance(error, ConfigRefused) else error
