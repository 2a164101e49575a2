"""What is asked of a server: closed loops of requests with exact lengths, reproducible from a seed.

Standard library only, so that drivers of other engines can use it inside their own environments.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

DEFAULT_PLAN = (
    "uniq:1:8:128:64",
    "uniq:8:32:128:64",
    "uniq:32:96:128:64",
    "shared:8:32:512+32:32",
    "shared:32:32:512+32:32",
)
# Two short rounds before anything is measured: lazy initialisation, page faults, first compilations.
WARM_UP_PLAN = ("uniq:4:8:64:8", "uniq:8:8:128:8", "uniq:4:8:64:8", "uniq:8:8:128:8")
WARM_UP_SEED = 7_000_000


class Kind(str, Enum):
    """`uniq` prompts share nothing; `shared` prompts begin with the same tokens."""

    uniq = "uniq"
    shared = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`concurrency` clients, each of which sends its next request when its last one is answered.

    Written as kind:concurrency:requests:prompt:output, for instance `uniq:8:32:128:64` or `shared:8:32:512+32:32`.
    """

    kind: Kind
    concurrency: int
    num_requests: int
    num_shared: int  # tokens that all prompts begin with
    num_own: int  # tokens of each prompt that no other has
    num_output: int

    def __post_init__(self) -> None:
        if min(self.concurrency, self.num_requests, self.num_own, self.num_output) < 1 or self.num_shared < 0:
            raise ValueError(f"{self}: every number must be at least 1")

    @classmethod
    def parse(cls, item: str) -> Workload:
        """Raises ValueError with the expected form."""
        try:
            name, concurrency, num_requests, prompt, num_output = item.split(":")
            kind = Kind(name)
            shared, own = prompt.split("+") if kind is Kind.shared else ("0", prompt)
            return cls(
                kind=kind,
                concurrency=int(concurrency),
                num_requests=int(num_requests),
                num_shared=int(shared),
                num_own=int(own),
                num_output=int(num_output),
            )
        except ValueError as error:
            raise ValueError(
                f"{item!r} is not kind:concurrency:requests:prompt:output "
                f"such as uniq:8:32:128:64 or shared:8:32:512+32:32 ({error})"
            ) from None

    @property
    def prompt(self) -> str:
        """The prompt's length, as written in a plan."""
        return f"{self.num_shared}+{self.num_own}" if self.kind is Kind.shared else str(self.num_own)

    @property
    def num_prompt(self) -> int:
        """Tokens of each prompt."""
        return self.num_shared + self.num_own

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.concurrency}:{self.num_requests}:{self.prompt}:{self.num_output}"

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids (never 0 and 1, the special tokens) for every request; the same for the same seed."""
        rng = random.Random(seed)
        head = [rng.randrange(2, vocab_size) for _ in range(self.num_shared)]
        return [head + [rng.randrange(2, vocab_size) for _ in range(self.num_own)] for _ in range(self.num_requests)]
