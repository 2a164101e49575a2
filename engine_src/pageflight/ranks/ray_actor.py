"""What runs in a process of Ray's on a rank's machine."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

from pageflight.ranks.local_launcher import worker_environment


class RankActor:
    """Has a rank's GPU, if it has any, and runs the rank as a process that dies with this one."""

    def gpu(self) -> str:
        """As Ray names it."""
        import ray

        (only,) = ray.get_gpu_ids()
        return str(only)

    def run(self, command: tuple[str, ...], environment: dict[str, str]) -> int:
        """Run `python -m COMMAND` to its end: its return code. It sees the GPU that Ray gave to this process."""
        with suppress(PermissionError):  # Ray starts its processes at nice 15, and all ranks wait for the slowest
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        process = subprocess.Popen(
            [sys.executable, "-m", *command, f"--parent-pid={os.getpid()}"],
            stdin=subprocess.DEVNULL,
            env={**worker_environment(), **environment},
        )
        return process.wait()
