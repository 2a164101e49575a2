"""How much may wait: in requests and prompt tokens, of all and of one tenant."""

from __future__ import annotations

from pageflight.core.config import SchedulerConfig
from pageflight.core.errors import PromptTooLong, QueueFull
from pageflight.core.request import Request
from pageflight.kv.capacity import blocks_for
from pageflight.sched.batch import Batch
from pageflight.sched.tenants import Tenant


class QueueLimits:
    """Refuses what would wait beyond a limit. Sequences that a free row awaits do not count as waiting."""

    def __init__(self, config: SchedulerConfig, batch: Batch) -> None:
        self._config, self._batch = config, batch

    def check(self, request: Request, tenant: Tenant) -> None:
        """Raises PromptTooLong for what the tenant's K/V budget can never hold, QueueFull for what may be tried later.

        What another core has accepted already is not refused: like all that was accepted, it is still served.
        """
        if request.is_taken_over:
            return
        self._check_budget(request, tenant)
        count = request.sampling.n
        num_queued = len(self._batch.open) - self._batch.rows.num_rows  # if all rows were taken
        if num_queued + count > self._config.max_queue_size:
            raise self._full(max(0, num_queued), self._config.max_queue_size)
        if self._num_beyond_rows(tenant) + count > tenant.max_waiting:
            raise self._full(max(0, self._num_beyond_rows(tenant)), tenant.max_waiting, tenant=tenant.name)
        waiting, limit = self._batch.waiting, self._config.max_queue_tokens
        if limit and len(waiting) and waiting.num_tokens + len(request.prompt_ids) > limit:
            raise self._full(len(waiting), limit, unit="tokens")

    def _check_budget(self, request: Request, tenant: Tenant) -> None:
        size, num_prompt = self._batch.space.block_size, len(request.prompt_ids)
        if blocks_for(num_prompt + request.sampling.max_tokens - 1, size) > tenant.max_blocks:
            raise PromptTooLong(
                "max_tokens",
                request.sampling.max_tokens,
                f"prompt and answer hold at most {tenant.max_blocks * size + 1} tokens in the K/V share of tenant "
                f"{tenant.name!r}; the prompt has {num_prompt}",
            )

    def _num_beyond_rows(self, tenant: Tenant) -> int:
        """Sequences of `tenant` without a row, less the rows that it may have as soon as a step is planned."""
        rows = self._batch.rows
        num_mine = tenant.num_open - tenant.num_running
        num_others = len(self._batch.open) - rows.num_held - num_mine
        return num_mine - min(max(0, rows.num_free - num_others), tenant.max_running - tenant.num_running)

    def _full(self, length: int, limit: int, *, unit: str = "requests", tenant: str | None = None) -> QueueFull:
        waiting = self._batch.waiting
        return QueueFull(
            length,
            limit,
            unit=unit,
            num_tokens=waiting.num_tokens,
            wait_s=self._batch.drain_rate.wait_s(waiting.num_tokens),
            tenant=tenant,
        )
