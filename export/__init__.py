"""Checkpoint -> bundle."""

import bundle.session  # noqa: F401 - switches telemetry off before anything imports onnxruntime
