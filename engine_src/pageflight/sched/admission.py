"""What the scheduler refuses at once, with the option, its value and its limit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import InvalidArgument, PromptTooLong
from pageflight.core.request import MAX_PRIORITY, Request
from pageflight.kv.capacity import blocks_for


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """What a request must fit into, whatever else is running."""

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    max_sequences: int
    """Of one request; what could wait in the queue at once."""

    @property
    def max_sequence_len(self) -> int:
        """Prompt and output tokens of one sequence. The last output token is never fed back, so needs no K/V."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def admit(self, request: Request) -> NDArray[np.int32]:
        """The request's prompt and output ids as one int32 array, or InvalidArgument / PromptTooLong."""
        sampling = request.sampling
        if not request.prompt_ids:
            raise InvalidArgument("prompt", "", "must have at least one token")
        if sampling.max_tokens < 1:
            raise InvalidArgument("max_tokens", sampling.max_tokens, "must be at least 1")
        if not 0 <= sampling.min_tokens <= sampling.max_tokens:
            raise InvalidArgument("min_tokens", sampling.min_tokens, f"must be 0 to max_tokens={sampling.max_tokens}")
        if not 1 <= sampling.n <= self.max_sequences:
            raise InvalidArgument("n", sampling.n, f"must be 1 to max_queue_size={self.max_sequences}")
        if sampling.n > 1 and request.output_ids:
            raise InvalidArgument("n", sampling.n, "a sequence with output already is taken over alone, with n=1")
        if not -(1 << 31) <= request.priority < 1 << 31:
            raise InvalidArgument("priority", request.priority, "must fit 32 bits")
        if request.handle < 0 or request.handle + sampling.n > 1 << 63:
            raise InvalidArgument("handle", request.handle, "must be from 0 and fit 63 bits")
        if request.deadline_s is not None and request.deadline_s != request.deadline_s:
            raise InvalidArgument("timeout_ms", request.deadline_s, "must be a number")
        retention = request.kv_retention_priority
        if retention is not None and not 0 <= retention <= MAX_PRIORITY:
            raise InvalidArgument("kv_retention_priority", retention, f"must be 0 to {MAX_PRIORITY}")
        self._check_length(len(request.prompt_ids), sampling.max_tokens)
        if len(request.output_ids) > sampling.max_tokens:
            raise InvalidArgument("output_ids", len(request.output_ids), f"at most max_tokens={sampling.max_tokens}")
        for stop_id in sampling.stop_token_ids:
            if not 0 <= stop_id < self.vocab_size:
                raise InvalidArgument("stop_token_ids", stop_id, f"must be 0 to {self.vocab_size - 1}")
        return self._checked_ids(request.prompt_ids + request.output_ids)

    @staticmethod
    def end_of_output(request: Request) -> str | None:
        """Why a sequence that is taken over with `output_ids` has ended already, or None if it has not."""
        output_ids, sampling = request.output_ids, request.sampling
        if output_ids and output_ids[-1] in sampling.stop_token_ids and len(output_ids) > sampling.min_tokens:
            return "stop"
        return "length" if len(output_ids) >= sampling.max_tokens else None

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        limit = self.max_sequence_len
        name = "max_model_len" if limit == self.max_model_len else "the K/V cache"
        if num_prompt >= limit:
            raise PromptTooLong("prompt", f"{num_prompt} tokens", f"at most {limit - 1} leave room to answer in {name}")
        if num_prompt + max_tokens > limit:
            raise PromptTooLong(
                "max_tokens",
                max_tokens,
                f"at most {limit - num_prompt} after {num_prompt} prompt tokens: {name} holds {limit}",
            )
        needed = blocks_for(num_prompt + max_tokens - 1, self.block_size)
        assert needed <= self.num_blocks

    def _checked_ids(self, ids: tuple[int, ...]) -> NDArray[np.int32]:
        wide = np.array(ids)
        if wide.dtype.kind != "i" or wide.ndim != 1:  # floats, text, numbers beyond 64 bits
            bad = next((i for i in ids if type(i) is not int or i < 0 or i >= self.vocab_size), ids[0])
            raise InvalidArgument("prompt", bad, f"token ids must be whole numbers from 0 to {self.vocab_size - 1}")
        outside = (wide < 0) | (wide >= self.vocab_size)
        if outside.any():
            raise InvalidArgument("prompt", int(wide[outside][0]), f"token ids must be 0 to {self.vocab_size - 1}")
        tokens = wide.astype(np.int32)
        tokens.flags.writeable = False  # plans and forked sequences share it
        return tokens
