"""Every pair of features: the answer is the one that a plain computation gives, or the pair is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from reference import Reference
from scenes import Outcome, Prompts, play
from stack import Stack, running_stack
from table import document

from features import FEATURES, Feature, is_same_choice, refusal
from models import BLOCK_SIZE, TextModel, WholePrompts, load, make_checkpoint, make_engine, shown_ids
from pageflight.loop.recorder import read_entries
from pageflight.loop.recording import Header
from pageflight.loop.replay import replay
from pageflight.lowering.base import CompiledModel
from pageflight.text.tokenizer import Tokenizer

PAIRS = [pair for pair in combinations(FEATURES, 2) if not is_same_choice(*pair)]
TRIES = 3
"""Of pairs with a cancellation, which has to win a race against the answer's end."""


class Kitchen:
    """Stacks by what they are made of, kept for the next pair that needs the same; and their references."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpoint = make_checkpoint(folder / "checkpoint")
        self._tokenizer = Tokenizer.load(self._checkpoint)
        self._stacks: dict[object, Stack] = {}
        self._references: dict[tuple[str, str], Reference] = {}
        self._open = ExitStack()
        self._dirs: dict[tuple[str, str], Path] = {}

    def stack(self, pair: tuple[Feature, ...]) -> Stack:
        settings = {name: value for feature in pair for name, value in feature.settings.items()}
        scenes = frozenset().union(*(feature.scenes for feature in pair))
        dtypes = self._dtypes(pair)
        parameters = {name: value for feature in pair for name, value in feature.parameters.items()}
        key = (dtypes, repr(sorted({**settings, **parameters}.items())), "record" in scenes)
        if key not in self._stacks:
            recordings = None
            if "record" in scenes:
                recordings = self._folder / f"recordings{len(self._stacks)}"
                recordings.mkdir()
            loader = self._loader(dtypes, is_deterministic="deterministic" in settings)
            made = running_stack(self._engine_dir(dtypes), loader, settings, parameters, recordings)
            self._stacks[key] = self._open.enter_context(made)
        return self._stacks[key]

    def reference(self, pair: tuple[Feature, ...]) -> Reference:
        dtypes = self._dtypes(pair)
        if dtypes not in self._references:
            if dtypes[0]:
                alone = WholePrompts(load(self._engine_dir(dtypes)))
                self._references[dtypes] = Reference(alone, self._tokenizer, margin=0.5, slip=0.03)
            else:
                self._references[dtypes] = Reference(TextModel(self._tokenizer), self._tokenizer)
        return self._references[dtypes]

    def prompts(self, pair: tuple[Feature, ...]) -> Prompts:
        """Of the toy model, which has short blocks, shorter ones."""
        longer = 1 if not self._dtypes(pair)[0] else 33
        chance = np.random.default_rng(4)
        printable = np.flatnonzero(shown_ids(self._tokenizer))

        def some(length: int) -> tuple[int, ...]:
            return tuple(chance.choice(printable, length).tolist())

        main = some(12 + longer)
        return Prompts(main, (some(5), some(9)), (some(15 + longer), some(14 + longer), some(13 + longer)))

    def close(self) -> None:
        self._open.close()

    @property
    def recordings(self) -> list[Path]:
        return sorted(self._folder.glob("recordings*/*.rec"))

    @staticmethod
    def _dtypes(pair: tuple[Feature, ...]) -> tuple[str, str]:
        return next((feature.dtypes for feature in pair if feature.dtypes[0]), ("", ""))

    def _engine_dir(self, dtypes: tuple[str, str]) -> Path:
        """The toy model uses an engine directory for its manifest and tokenizer."""
        made = dtypes if dtypes[0] else ("fp32", "default")
        if made not in self._dirs:
            self._dirs[made] = make_engine(self._checkpoint, self._folder / "-".join(made), *made)
        return self._dirs[made]

    def _loader(self, dtypes: tuple[str, str], *, is_deterministic: bool) -> Callable[[], CompiledModel]:
        if dtypes[0]:
            return lambda: load(self._engine_dir(dtypes), is_deterministic=is_deterministic)
        return lambda: TextModel(self._tokenizer)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    made = Kitchen(tmp_path_factory.mktemp("features"))
    yield made
    made.close()


def run(pair: tuple[Feature, ...], kitchen: Kitchen) -> Outcome:
    is_race = any("cancel" in feature.scenes for feature in pair)
    for _ in range(TRIES if is_race else 1):
        outcome = play(pair, kitchen.stack(pair), kitchen.prompts(pair), kitchen.reference(pair))
        if outcome.got.errors or not is_race:
            break
    assert bool(outcome.got.errors) == any({"cancel", "deadline"} & feature.scenes for feature in pair)
    return outcome


def ids(pair: tuple[Feature, ...]) -> str:
    return " + ".join(feature.name for feature in pair)


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_a_pair_of_features_works_or_is_refused(pair: tuple[Feature, Feature], kitchen: Kitchen) -> None:
    """Log probabilities went missing when an answer was preempted; a penalty forgot its counts on replay."""
    expected = refusal(*pair)
    if not expected:
        run(pair, kitchen)
        return
    stack = kitchen.stack(pair)
    options = {"request_output_len": 4, "end_id": 5} if expected.startswith("ignore_eos") else {}
    for feature in pair:
        options |= feature.options
    sender = stack.ask(kitchen.prompts(pair).main, options, frozenset())
    assert sender.is_over.wait(10) and len(sender.responses) == 1
    error = sender.responses[0].error
    assert error is not None and error.code == "INVALID_ARG", error
    assert error.message.startswith((expected, pair[1].refused or expected)), error


WITHOUT_TRACE = {
    "priority",
    "tenant",
    "cache salt",
    "retention priority",
    "optimistic admission",
    "quotas of tenants",
    "results independent of company",
    "policy fair",
    "policy fcfs",
    "full-length reservation",
    "bounded inter-token time",
    "bf16",
    "int8",
    "u8 cache",
}
"""They change what a request costs, or when it runs, but nothing that can be seen from here."""

SHOWS_WITH = {"special tokens shown": "no end", "budget of responses": "streaming"}

TRACES: dict[str, Callable[[Outcome, Outcome], bool]] = {
    "streaming": lambda plain, it: it.got.num_responses > plain.got.num_responses == 1,
    "several answers": lambda plain, it: len(it.got.ids) == 3,
    "prompt in the answer": lambda plain, it: (
        it.got.text[0].endswith(plain.got.text[0]) and it.got.text != plain.got.text
    ),
    "special tokens shown": lambda plain, it: "<|end|>" in it.got.text[0],
    "log probabilities": lambda plain, it: len(it.got.log_probs[0]) == len(it.got.ids[0]),
    "times and cache use": lambda plain, it: "first_token_time_ns" in it.got.finals[0],
    "budget of responses": lambda plain, it: 1 < it.got.num_responses < len(it.got.ids[0]),
    "deadline": lambda plain, it: "timeout_ms" in it.got.errors[0][1],
    "cancellation": lambda plain, it: "cancelled" in it.got.errors[0][1],
    "prefix cache": lambda plain, it: it.counted["cached_tokens"] >= 2 * BLOCK_SIZE,
    "one prefill for a shared prefix": lambda plain, it: it.counted["cached_tokens"] >= 2 * BLOCK_SIZE,
    "chunked prefill": lambda plain, it: it.counted["partial_chunks"] > plain.counted["partial_chunks"] == 0,
    "preemption": lambda plain, it: it.counted["preemptions"] > 0,
    "host memory as second level": lambda plain, it: it.counted["swaps_in"] > 0,
    "replay after the core's death": lambda plain, it: it.num_cores == 1 and it.counted["recomputed_tokens"] > 0,
    "recording, invariants checked": lambda plain, it: True,  # see the test of the recordings
}


@pytest.mark.parametrize("feature", [f for f in FEATURES if not f.refused], ids=lambda feature: feature.name)
def test_a_feature_alone_has_the_effect_it_is_for(feature: Feature, kitchen: Kitchen) -> None:
    """A matrix of options that nobody reads would be all green."""
    also = tuple(f for f in FEATURES if f.name == SHOWS_WITH.get(feature.name))
    plain, it = run((), kitchen), run((feature, *also), kitchen)
    if feature.name in TRACES:
        assert TRACES[feature.name](plain, it)
    elif feature.name not in WITHOUT_TRACE:
        assert (it.expected.ids, it.expected.text) != (plain.expected.ids, plain.expected.text)
        assert it.got.text[0] == it.expected.text


def test_what_was_recorded_meanwhile_replays(kitchen: Kitchen) -> None:
    """Every feature beside the recorder: its pairs above have written these."""
    run(tuple(f for f in FEATURES if "record" in f.scenes), kitchen)
    kitchen.close()
    assert kitchen.recordings
    for path in kitchen.recordings:
        entries = read_entries(path)
        header = next(entries)
        assert isinstance(header, Header)
        assert replay(header, entries, check=True).difference is None


def test_the_documented_matrix_is_this_one() -> None:
    """A table that is kept by hand tells what once was so. scripts/docs writes it."""
    path = Path(__file__).parents[2] / "docs" / "features.md"
    assert path.read_text(encoding="utf-8") == document()
