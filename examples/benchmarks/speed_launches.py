"""Numbers of kernels that a GPU runs and of waits of the host, by JAX's profiler.

The names in a trace are those of XLA (`cupti_collector.cc`). Each device has a plane with
one line per stream, which holds kernels and copies. Calls of the driver are in the planes
of the host.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


# Prefixes of the names of stream events that are not kernels.
_NO_KERNEL = "Memcpy", "Memset", "Memory", "Unified", "Overhead", "Synchronization"


class Launches(NamedTuple):
    """Counts of one run, `None` if the trace has no stream of a GPU."""

    kernels: int | None = None
    synchronisations: int | None = None


def count(data: Any) -> Launches:
    """The launches in a `ProfileData`."""
    streams, host = [], []
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream #"):
                streams += [event.name for event in line.events]
            elif plane.name.startswith("/host:"):
                host += [event.name for event in line.events]
    if not streams:
        return Launches()
    kernels = sum(not name.startswith(_NO_KERNEL) for name in streams)
    return Launches(kernels, sum("StreamSynchronize" in name for name in host))


def launches(run: Callable[[], Any]) -> Launches:
    """The launches of one `run`, which has to wait for its result; `None` with old versions
    of JAX, which cannot read traces."""
    data_type = getattr(jax.profiler, "ProfileData", None)
    if data_type is None:
        return Launches()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return count(data_type.from_file(str(path)))


_EXAMPLE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #13(Compute,MemcpyD2H)"
    events { metadata_id: 1 } events { metadata_id: 1 } events { metadata_id: 2 } }
  lines { name: "XLA Ops" events { metadata_id: 1 } }
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2H" } }
}
planes {
  name: "/host:CPU"
  lines { name: "Host Threads/1" events { metadata_id: 1 } events { metadata_id: 2 } }
  event_metadata { key: 1 value { id: 1 name: "cuStreamSynchronize" } }
  event_metadata { key: 2 value { id: 2 name: "cuLaunchKernel" } }
}
"""


def check() -> None:
    """Check `count` on a trace written by hand, as there may be no GPU to trace."""
    data_type = getattr(jax.profiler, "ProfileData", None)
    if data_type is not None:
        serialized = data_type.text_proto_to_serialized_xspace(_EXAMPLE)
        counted = count(data_type.from_serialized_xspace(serialized))
        assert counted == Launches(kernels=2, synchronisations=1), counted
