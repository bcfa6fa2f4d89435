"""Small runners for the tests of the engine: what they do to a unit is in its entries."""

import os
import signal
import time
from pathlib import Path

from bundle.errors import DataError
from score.units import Counts, UnitReport


class Runner:
    """Appends its process and the unit to a file of the folder, so that tests see who did what, and in which order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, units):
        for unit in units:
            with (self.folder / unit.name).open("a") as file:
                file.write(f"{os.getpid()}\n")
            tries = len((self.folder / unit.name).read_text().split())
            for order in unit.entries:
                match order:
                    case "die once" if tries == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "refuse":
                        raise DataError(f"{unit.name} cannot be read.")
                    case "break":
                        raise ZeroDivisionError("a fault of ours")
                    case "hang":
                        self._hang(unit)
            counts = Counts(rows_in=unit.rows, rows_ok=unit.rows - 1, rows_bad=1, drift={"nulls:text": (1,)})
            yield UnitReport(unit=unit.name, counts=counts, seconds={"read": 1.0, "run": 2.0}, bytes=10)

    def _hang(self, unit):
        try:
            (self.folder / f"{unit.name}.hangs").touch()
            (self.folder / "hangs").touch()
            time.sleep(60)
        finally:
            (self.folder / f"{unit.name}.closed").touch()
