"""The models of a server: loaded from the disk, looked up by name and version, swapped without a gap."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakSet

from bundle.errors import BadInput, MissingExtra
from bundle.host import trim_memory
from bundle.log import log
from serve.config import ServeConfig
from serve.errors import Cancelled, Closed, ConfigRefused, LoadFailed, NotReady, StartError, UnknownModel
from serve.index import IndexEntry, make_index
from serve.layout import VERSION, Failure, Layout, Place, find_places, parse_versions
from serve.loading import Loaded, Refused, Served, load_place, reason
from serve.scheduler import Scheduler

Answer = TypeVar("Answer")


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
        self._loaded: Mapping[str, Mapping[int, Loaded]] = {}  # by the name of the bundle or graph
        self._refused: dict[tuple[str, int], Refused] = {}
        self._unloaded: dict[str, list[Place]] = {}  # by a client, with what was served
        self._draining: dict[threading.Thread, Loaded] = {}
        self._loading: list[Place] = []
        self._failures: Sequence[Failure] = ()
        self._told: set[str] = set()  # what was logged of the disk as it is
        self._closed = False
        self._cut_off: WeakSet[Scheduler] = WeakSet()  # whose calls outlived a drain
        self._open()

    def _open(self) -> None:
        layout = self._look()
        if layout.failures:
            raise _located(layout.failures[0].error, layout.failures[0].path)
        if not layout.places:
            raise StartError("there is nothing to serve. Give at least one bundle, folder of bundles or .onnx file.")
        for name, places in _by_name(layout.places).items():
            refused = self._update(name, places, ())
            if refused:
                raise _located(refused[0].error, refused[0].place.path)

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
        """Every version that is served, was refused or unloaded, or is on its way, by name and version."""
        return make_index(
            served=self,
            loading=list(self._loading),
            draining=[loaded.place for loaded in list(self._draining.values())],
            unloaded=[place for places in list(self._unloaded.values()) for place in places],
            refused=list(self._refused.values()),
            failures=self._failures,
        )

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

    def load(self, name: str, given_up: Callable[[], bool] = lambda: False) -> None:
        """Load a model as it is on the disk now, also where it was refused or unloaded before.

        Args:
            name: of the model.
            given_up: asked when the changes before this one have been made, whether nobody waits for it any more.

        Raises:
            Cancelled: nobody does; nothing was changed.
            UnknownModel: there is none of that name below the server's paths.
            LoadFailed: it was not loaded; what was served is served still.
        """
        with self._in_turn(given_up):
            layout = self._look()
            places = [place for place in layout.places if name in place.names]
            failure = next((failure for failure in layout.failures if failure.name == name), None)
            if failure:
                raise LoadFailed(f"failed to load {name!r}: {reason(failure.error)}")
            if not places and name in self._served:
                raise LoadFailed(f"failed to load {name!r}: it is not there any more; it is served on as it was")
            if not places:
                raise UnknownModel(f"failed to load {name!r}: no such model is in the repository")
            self._unloaded.pop(places[0].name, None)
            self._forget(places[0].name)
            refused = self._update(places[0].name, places, layout.failures)
            if refused:
                version, why = refused[0].place.version, reason(refused[0].error)
                raise LoadFailed(f"failed to load {name!r}, version {version}: {why}")

    def unload(self, name: str, given_up: Callable[[], bool] = lambda: False) -> None:
        """Take a model away and wait until its calls have ended. `refresh` leaves it unloaded, `load` brings it back.

        Args:
            name: of the model.
            given_up: see `load`.

        Raises:
            Cancelled: nobody waits for it any more; nothing was changed.
            UnknownModel: there is none of that name.
        """
        with self._in_turn(given_up):
            bundle = name if name in self._loaded else name.removesuffix(".onnx")
            places = [loaded.place for loaded in self._loaded.get(bundle, {}).values()]
            if not any(name in place.names for place in places):
                if any(entry.name == name for entry in self.index()):
                    return  # it is not loaded
                raise UnknownModel(f"failed to unload {name!r}: no such model is in the repository")
            self._unloaded[bundle] = places
            self._forget(bundle)
            drains = self._publish(bundle, {})
        for drain in drains:
            drain.join()

    def close(self, drain_s: float) -> bool:
        """Take no more calls, let those that came end, and say whether all did, also those of versions that are gone.

        Args:
            drain_s: how long they may go on.
        """
        self._closed = True
        for versions in self._loaded.values():
            for loaded in versions.values():
                self._retire(loaded, drain_s)
        for drain in list(self._draining):
            drain.join()
        return not any(scheduler.running for scheduler in self._cut_off)

    @contextmanager
    def _in_turn(self, given_up: Callable[[], bool]) -> Iterator[None]:
        with self._changing:
            if given_up():
                raise Cancelled("the call was given up before its turn came; nothing was changed.")
            yield

    def _look(self) -> Layout:
        served = {loaded.place.path for versions in self._loaded.values() for loaded in versions.values()}
        layout = find_places(self._config.paths, self._policy, served)
        self._failures = layout.failures
        lines = {*layout.skipped, *(str(_located(failure.error, failure.path)) for failure in layout.failures)}
        for line in sorted(lines - self._told):
            log.warning("not served", because=line)
        self._told = lines
        return layout

    def _forget(self, name: str) -> None:
        self._refused = {key: refused for key, refused in self._refused.items() if key[0] != name}

    def _update(self, name: str, places: Sequence[Place], failures: Sequence[Failure]) -> list[Refused]:
        """Serve these versions of a model; where one is refused, or cannot be looked at, keep all there were."""
        current = self._loaded.get(name, {})
        outcomes = [self._take(place, current.get(place.version)) for place in places]
        refused = [each for each in outcomes if isinstance(each, Refused)]
        self._forget(name)
        self._refused |= {(name, each.place.version): each for each in refused}
        new = {each.place.version: each for each in outcomes if isinstance(each, Loaded)}
        for version, loaded in current.items():
            if refused or any(loaded.place.path.is_relative_to(failure.path) for failure in failures):
                new.setdefault(version, loaded)
        if not self._closed:
            self._publish(name, new)
        return refused

    def _take(self, place: Place, current: Loaded | None) -> Loaded | Refused:
        """What is at a place: as it is known, or loaded if its files are others."""
        before = self._refused.get((place.name, place.version))
        for known in (current, before):
            if known and (known.place.path, known.place.stamp) == (place.path, place.stamp):
                return known
        self._loading.append(place)
        try:
            return load_place(place, self._config)
        finally:
            self._loading.clear()

    def _publish(self, name: str, new: Mapping[int, Loaded]) -> list[threading.Thread]:
        """Swap the versions of a model in one step, and drain those that are no longer served."""
        old = self._loaded.get(name, {})
        self._loaded = {key: versions for key, versions in {**self._loaded, name: new}.items() if versions}
        before, self._served = self._served, _by_version(self._loaded)
        for each in sorted(before.keys() ^ self._served.keys()):
            self.on_change(each, each in self._served)
        kept = set(new.values())
        return [self._retire(loaded, self._config.drain_s) for loaded in old.values() if loaded not in kept]

    def _retire(self, loaded: Loaded, drain_s: float) -> threading.Thread:
        thread = threading.Thread(target=self._drain, args=(drain_s,), name=f"drain-{loaded.place.name}", daemon=True)
        self._draining[thread] = loaded
        thread.start()
        return thread

    def _drain(self, drain_s: float) -> None:
        thread = threading.current_thread()
        self._cut_off.update(_close(self._draining[thread], drain_s))
        del self._draining[thread]  # and with it the session
        trim_memory()


def open_repository(config: ServeConfig) -> Repository:
    """Find, load and self-test everything below the paths of a server.

    What is there afterwards stays, and the garbage collector need not go through it again.

    Raises:
        EdgewardError: a path holds nothing that can be served, or something on it cannot be loaded or may not be.
    """
    repository = Repository(config)
    gc.collect()
    gc.freeze()
    trim_memory()
    return repository


def _close(loaded: Loaded, drain_s: float) -> list[Scheduler]:
    """Those whose calls did not end in time."""
    deadline = time.monotonic() + drain_s
    schedulers = [served.scheduler for served in loaded.served]
    late = [each for each in schedulers if not each.close(max(0.0, deadline - time.monotonic()))]
    level = log.warning if late else log.info
    level("unloaded", model=loaded.place.name, version=loaded.place.version, all_calls_ended=not late)
    return late


def _by_name(places: Sequence[Place]) -> dict[str, list[Place]]:
    named: dict[str, list[Place]] = {}
    for place in places:
        named.setdefault(place.name, []).append(place)
    return named


def _by_version(loaded: Mapping[str, Mapping[int, Loaded]]) -> dict[str, dict[int, Served]]:
    served: dict[str, dict[int, Served]] = {}
    for one in [one for versions in loaded.values() for one in versions.values()]:
        for each in one.served:
            served.setdefault(each.model.name, {})[each.model.version] = each
    return served


def _located(error: Exception, path: object) -> Exception:
    """The same for the operator; the text of a ConfigRefused is for clients, too, and names no path."""
    return type(error)(f"{path}: {error}") if isinstance(error, ConfigRefused | MissingExtra) else error
