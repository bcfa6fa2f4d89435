"""What resuming a training needs, on disk: whole or not there, without pickle.

Nothing random is kept. Every random number of the loop is a function of the seed and of where the training stands.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bundle import store
from bundle.errors import CheckpointError, EdgewardError
from bundle.manifest import Record

FORMAT: Final = "edgeward-training-state"
TENSORS = "state.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class State:
    """Where a training stands.

    Attributes:
        step: steps that are done.
        losses: sum of the losses of the epoch so far, of each process.
        history: of the epochs that are done.
        best_epoch: number of the best one from 1; 0 when there is none yet.
        scaler: state of the gradient scaler; empty unless the precision is fp16.
        tensors: by what they are and by name: "model", "average", "best", "optimizer.KEY".
    """

    step: int
    losses: list[float]
    history: list[dict[str, float]]
    best_epoch: int
    scaler: dict[str, float]
    tensors: dict[str, dict[str, Tensor]]


class _StateFile(Record, frozen=True, kw_only=True):
    """The whole of state.json."""

    format: Literal["edgeward-training-state"]
    fingerprint: str
    step: int
    losses: list[float]
    history: list[dict[str, int | float]]  # an int comes back as one, for the checkpoint's provenance
    best_epoch: int
    scaler: dict[str, int | float]
    sha256: str  # of state.safetensors


@dataclass(frozen=True)
class Progress:
    """A folder with the last state of a training, and when to write it.

    Attributes:
        folder: holds one folder per state, named by its step; all but the newest are removed.
        fingerprint: digest of all that the result depends on; only the same training is resumed.
        save_steps: save every so many steps, besides after every epoch.
    """

    folder: Path
    fingerprint: str
    save_steps: int | None = None

    def save(self, state: State) -> None:
        """Write a state, and then remove the one before it.

        Raises:
            EdgewardError: the disk is full, or cannot be written; the state before is still there.
        """
        out = self.folder / str(state.step)
        try:
            with store.new_directory(out) as directory:
                save_file(_flat(state.tensors), directory / TENSORS)
                digest = store.sha256_file(directory / TENSORS)
                (directory / STATE).write_text(json.dumps(self._describe(state, digest), indent=1))
        except (EdgewardError, SafetensorError) as error:
            last = self._newest()
            kept = f"that of step {last.name} is still there" if last else "there is none before it"
            raise EdgewardError(
                f"the state of the training after step {state.step} could not be written to {out}: "
                f"{error.__cause__ or error}; {kept}. Make room, and go on with --resume."
            ) from error
        for other in self.folder.iterdir():
            if other != out:
                shutil.rmtree(other)

    def _describe(self, state: State, digest: str) -> dict[str, object]:
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "step": state.step,
            "losses": state.losses,
            "history": state.history,
            "best_epoch": state.best_epoch,
            "scaler": state.scaler,
            "sha256": digest,
        }

    def load(self) -> State | None:
        """The last state, or None when there is none.

        Raises:
            CheckpointError: it is damaged, or of another training.
        """
        path = self._newest()
        if path is None:
            return None
        try:
            found = msgspec.convert(json.loads((path / STATE).read_bytes()), type=_StateFile)
            if found.fingerprint != self.fingerprint:
                raise CheckpointError(
                    f"{path} is the state of another training: its options, data, pretrained weights, teacher, "
                    "libraries, device, threads or number of processes differ. Give the same ones, or remove "
                    f"{self.folder} to start from the beginning."
                )
            if store.sha256_file(path / TENSORS) != found.sha256:
                raise ValueError(f"the sha256 of {TENSORS} differs")
            tensors = _nested(load_file(path / TENSORS))
        except (OSError, ValueError, msgspec.ValidationError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Remove {self.folder} to start from the beginning."
            ) from error
        return State(found.step, found.losses, found.history, found.best_epoch, found.scaler, tensors)

    def _newest(self) -> Path | None:
        states = self.folder.glob("[0-9]*") if self.folder.is_dir() else ()
        return max(states, key=lambda path: int(path.name), default=None)


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{kind}:{name}": tensor.detach().cpu().contiguous()
        for kind, named in tensors.items()
        for name, tensor in named.items()
    }


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    nested: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        nested.setdefault(kind, {})[name] = tensor
    return nested
