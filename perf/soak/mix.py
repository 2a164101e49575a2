"""The load: which requests there are and how often each kind comes, all drawn from one seed."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import replace

from perf.soak.errand import Ask, Ending, Errand, Fault, Option, Target, Via
from perf.soak.faults import faults
from perf.soak.vocabulary import Vocabulary

NUM_KNOWN = 36
"""Asks that are answered once undisturbed, and compared from then on."""
_SHARE_KNOWN, _SHARE_BAD, _SHARE_LEAVING, _SHARE_BURST = 0.6, 0.1, 0.2, 0.04
_NUM_PREFIXES = 3


class Mix:
    """Draws errands. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, *, max_model_len: int, vocab_size: int, max_queue_size: int, seed: int):
        self._vocabulary, self._len, self._max_queue_size = vocabulary, max_model_len, max_queue_size
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._prefixes = [vocabulary.text(self._chance, max_model_len // 4) for _ in range(_NUM_PREFIXES)]
        self.faults = faults(max_model_len, vocab_size)
        self.known = [self._known_ask(number) for number in range(NUM_KNOWN)]

    def first_round(self) -> list[Errand]:
        """Every known ask, to be answered undisturbed."""
        return [self._errand(ask, self._streaming_target(ask), Via.GRPC) for ask in self.known]

    def draw(self) -> Errand:
        with self._lock:
            chance = self._chance
            if chance.random() < _SHARE_BAD:
                return self._bad(chance.choice(self.faults))
            if chance.random() < _SHARE_BURST:
                return self._errand(self._burst(), Target.TEXT, Via.GRPC)
            ask = chance.choice(self.known) if chance.random() < _SHARE_KNOWN else self._ask(chance)
            return self._sent_somehow(ask)

    def _sent_somehow(self, ask: Ask) -> Errand:
        chance = self._chance
        if isinstance(ask.prompt, tuple):
            errand = self._errand(ask, Target.ENGINE, Via.GRPC)
            endings = [Ending.CANCEL, Ending.STOP, Ending.DISCONNECT]
        else:
            via = chance.choice([Via.GRPC, Via.GRPC, Via.SSE, Via.HTTP])
            targets = [Target.TEXT, Target.ENSEMBLE]
            targets = [Target.UNARY, Target.TEXT] if via is Via.HTTP else targets
            if ask.num_sequences > 1 and via is not Via.HTTP:
                targets = [Target.TEXT]  # an ensemble does not tell its sequences apart over HTTP
            errand = self._errand(ask, chance.choice(targets), via)
            endings = [Ending.DISCONNECT] if via is not Via.GRPC else [Ending.CANCEL, Ending.DISCONNECT]
        if chance.random() < _SHARE_LEAVING:
            after = 0 if errand.via is Via.HTTP else chance.randrange(0, 12)
            return replace(errand, ending=chance.choice(endings), after=after)
        return errand

    def _errand(self, ask: Ask, target: Target, via: Via) -> Errand:
        return Errand(number=next(self._numbers), via=via, target=target, ask=ask)

    def _bad(self, fault: Fault) -> Errand:
        nothing = Ask(prompt="", max_tokens=1)
        return Errand(number=next(self._numbers), via=fault.via, target=fault.target, ask=nothing, fault=fault)

    @staticmethod
    def _streaming_target(ask: Ask) -> Target:
        return Target.ENGINE if isinstance(ask.prompt, tuple) else Target.TEXT

    # ---- asks

    def _known_ask(self, number: int) -> Ask:
        """Greedy, or random with a seed: determined in every case."""
        ask = self._ask(self._chance)
        options = {name: value for name, value in ask.options if name != "timeout_ms"}
        if float(options.get("temperature", 0.0)) > 0:  # type: ignore[arg-type]
            options["seed"] = number
        return replace(ask, options=tuple(sorted(options.items())))

    def _ask(self, chance: random.Random) -> Ask:
        length = self._len
        kind = chance.choice(["short", "short", "long prompt", "long answer", "shared", "shared", "ids"])
        if kind == "ids":
            prompt = self._vocabulary.ids(chance, chance.randrange(4, length // 4))
            return Ask(prompt=prompt, max_tokens=chance.randrange(8, length // 8), options=self._options(chance))
        num_prompt, num_output = chance.randrange(4, 24), chance.randrange(8, 48)
        if kind == "long prompt":
            num_prompt = chance.randrange(length // 3, length // 2)
        elif kind == "long answer":
            num_output = chance.randrange(length // 5, length // 3)
        text = self._vocabulary.text(chance, num_prompt)
        if kind == "shared":
            text = chance.choice(self._prefixes) + " " + text
        options = dict(self._options(chance))
        if chance.random() < 0.12:
            options["num_return_sequences"] = chance.randrange(2, 5)
        return Ask(prompt=text, max_tokens=num_output, options=tuple(sorted(options.items())))

    def _options(self, chance: random.Random) -> tuple[tuple[str, Option], ...]:
        options: dict[str, Option] = {}
        if chance.random() < 0.5:
            options["ignore_eos"] = True
        if chance.random() < 0.3:
            options |= {"temperature": 0.8, "seed": chance.getrandbits(32)}
            if chance.random() < 0.5:
                options |= {"top_k": 40, "top_p": 0.95}
        for share, name, value in (
            (0.15, "repetition_penalty", 1.1),
            (0.1, "frequency_penalty", 0.2),
            (0.1, "return_log_probs", True),
            (0.15, "priority", chance.randrange(-2, 3)),
            (0.15, "tenant", chance.choice(["red", "blue"])),
            (0.1, "cache_salt", chance.choice(["salt", "pepper"])),
            (0.1, "kv_retention_priority", chance.choice([10, 90])),
            (0.05, "min_tokens", 4),
            (0.05, "timeout_ms", chance.choice([30, 300, 3000])),
        ):
            if chance.random() < share:
                options[name] = value
        if chance.random() < 0.2:
            options["stop_words"] = tuple(chance.sample(["return", "\n\n", "self", "data", ")"], 2))
        return tuple(sorted(options.items()))

    def _burst(self) -> Ask:
        """Two of these at once do not fit into the queue."""
        num_sequences = max(2, self._max_queue_size * 3 // 4)
        options = {"ignore_eos": True, "num_return_sequences": num_sequences, "temperature": 1.0}
        return Ask(prompt="burst", max_tokens=self._len // 16, options=tuple(sorted(options.items())))
