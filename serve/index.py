"""What became of every version that the server knows of: in the words of the protocol, and for clients to read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from serve.layout import Failure, Place
from serve.loading import Refused, Served, reason

State = Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]


@dataclass(frozen=True)
class IndexEntry:
    """What became of one version of a model."""

    name: str
    version: str  # empty where none is known
    state: State
    reason: str = ""  # also of a version that is served on because its new files were refused


def make_index(
    *,
    served: Iterable[Served],
    loading: Sequence[Place],
    draining: Sequence[Place],
    unloaded: Sequence[Place],
    refused: Sequence[Refused],
    failures: Sequence[Failure],
) -> list[IndexEntry]:
    """One entry for each name and version, in this order. What is true of the same version later is said first.

    Args:
        served: can be called.
        loading: on its way, perhaps to take the place of a version of the same number.
        draining: answers the calls that it has.
        unloaded: by a client.
        refused: was not loaded.
        failures: could not be looked at.
    """
    reasons = {(name, str(one.place.version)): reason(one.error) for one in refused for name in one.place.names}
    entries = {
        (one.name, ""): IndexEntry(one.name, "", "UNAVAILABLE", reason(one.error)) for one in failures if one.name
    }
    for key, why in reasons.items():
        entries[key] = IndexEntry(*key, "UNAVAILABLE", why)
    for key in _keys(unloaded):
        entries[key] = IndexEntry(*key, "UNAVAILABLE", "unloaded")
    for key in _keys(draining):
        entries[key] = IndexEntry(*key, "UNLOADING")
    for key in _keys(loading):
        entries[key] = IndexEntry(*key, "LOADING")
    for one in served:
        key = one.model.name, str(one.model.version)
        entries[key] = IndexEntry(*key, "READY", reasons.get(key, ""))
    return sorted(entries.values(), key=lambda entry: (entry.name, int(entry.version or 0)))


def _keys(places: Iterable[Place]) -> list[tuple[str, str]]:
    return [(name, str(place.version)) for place in places for name in place.names]
