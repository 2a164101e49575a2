"""Lowerings: what turns the decoder definition into something that runs."""

import sys

# OpenVINO reports its own import to its vendor where this package is present; it takes an ImportError for "absent".
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
