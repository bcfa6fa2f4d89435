"""Everything that edgeward itself can say went wrong.

EdgewardError                exit code 1
├── BadInput                 one example or tensor cannot be used as it came
├── DataError                a dataset cannot be used: missing, empty, wrong columns, too few examples
├── ModelError               a pretrained model or ONNX graph cannot be loaded, run or exported
├── TrainingDiverged         the loss became NaN or infinite
├── CheckpointError          a checkpoint cannot be read
├── BundleError              a bundle cannot be read or started
│   ├── BundleDamaged        a file is missing, unlisted, or not the one the manifest names
│   ├── BundleUnsupported    another format version, or beyond a limit of the format
│   └── SelfTestFailed       this device does not reproduce the golden examples
├── OutputExists             something already stands where the result would go
├── DeviceUnavailable        the device that was asked for is not there
├── MissingExtra             an optional dependency is not installed
└── GateFailed               exit code 3: the accuracy did not survive; nothing was written
"""


class EdgewardError(Exception):
    """An error with one clear message: what happened, the values, what is left behind, what to try."""

    exit_code = 1


class BadInput(EdgewardError):
    """One example or tensor cannot be used as it came."""


class DataError(EdgewardError):
    """A dataset cannot be used."""


class ModelError(EdgewardError):
    """A pretrained model or an ONNX graph cannot be loaded, run or exported."""


class TrainingDiverged(EdgewardError):
    """The loss became NaN or infinite."""


class CheckpointError(EdgewardError):
    """A checkpoint cannot be read."""


class BundleError(EdgewardError):
    """A bundle cannot be read or started."""


class BundleDamaged(BundleError):
    """A file of the bundle is missing, unlisted, or not the one that the manifest names."""


class BundleUnsupported(BundleError):
    """The bundle has another format version, or is beyond a limit of the format."""


class SelfTestFailed(BundleError):
    """This device does not reproduce the bundle's golden examples."""


class OutputExists(EdgewardError):
    """Something already stands where the result would go."""


class DeviceUnavailable(EdgewardError):
    """The device that was asked for is not there."""


class MissingExtra(EdgewardError):
    """An optional dependency is not installed."""


class GateFailed(EdgewardError):
    """The accuracy, or the parity, did not survive; no bundle was written."""

    exit_code = 3
