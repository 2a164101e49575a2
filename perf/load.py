"""Runs a plan of workloads against a running Triton and writes one line of JSON for each.

    python -m perf.load --model engine --vocab-size 32000 --label pageflight-bf16
    python -m perf.load --model NAME --tokenizer CHECKPOINT/tokenizer.json --plan 'uniq:8:32:128:64 uniq:32:96:128:64'

A model that takes `input_ids` is asked with token ids, so that prompt lengths are exact; one that takes `text_input`
with text, decoded from random ids by the given tokenizer. Ends with status 1 if any answer had another length than
asked for: figures of shorter answers are not comparable.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from perf import figures
from perf.wire import Model, Stream, WireError, prompts_as_text
from perf.workload import DEFAULT_PLAN, WARM_UP_PLAN, WARM_UP_SEED, Workload


def run(
    address: str, model: Model, workload: Workload, *, vocab_size: int, seed: int, tokenizer: str
) -> figures.Record:
    """Drives one workload over one new stream. Raises WireError as `Stream.drive` does."""
    prompts = workload.prompts(vocab_size, seed)
    asked: Iterable[str | list[int]] = prompts_as_text(prompts, tokenizer) if model.takes_text else prompts
    requests = [model.request(number, prompt, workload.num_output) for number, prompt in enumerate(asked)]
    with Stream(address) as stream:
        cpu_s, started_s = time.process_time(), time.perf_counter()
        answers = stream.drive(requests, workload.concurrency)
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return figures.summarise(workload, answers, wall_s=wall_s, cpu_s=cpu_s, seed=seed)


def warm_up(address: str, model: Model, *, vocab_size: int, seed: int, tokenizer: str) -> None:
    """Short rounds that nothing is kept of."""
    for number, item in enumerate(WARM_UP_PLAN):
        run(
            address,
            model,
            Workload.parse(item),
            vocab_size=vocab_size,
            seed=WARM_UP_SEED + seed * len(WARM_UP_PLAN) + number,
            tokenizer=tokenizer,
        )


def find_model(address: str, name: str, *, tokenizer: str, timeout_s: float) -> Model:
    """Raises WireError if the server or the model does not answer in time, or a tokenizer is needed and missing."""
    with Stream(address) as stream:
        model = Model.ask(stream.channel, name, timeout_s=timeout_s)
    if model.takes_text and not tokenizer:
        raise WireError(f"model {name} takes text: give --tokenizer CHECKPOINT/tokenizer.json")
    return model


def main(
    model: Annotated[str, typer.Option(help="The Triton model to ask.")],
    vocab_size: Annotated[int, typer.Option(min=3, help="Token ids are drawn from 2 to this number minus 1.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of Triton's gRPC endpoint.")] = "localhost:8001",
    plan: Annotated[str, typer.Option(help="kind:concurrency:requests:prompt:output …")] = " ".join(DEFAULT_PLAN),
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, for a model that takes text.")] = "",
    label: Annotated[str, typer.Option(help="What to call this server in the figures.")] = "pageflight",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of the whole plan.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Every run of every item draws prompts of its own from it.")] = 1,
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for the server.")] = 300.0,
    out: Annotated[Path, typer.Option(help="The file that lines are appended to.")] = Path("perf/results/load.jsonl"),
) -> None:
    """Measure a running server."""
    try:
        workloads = [Workload.parse(item) for item in plan.split()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--plan") from None
    all_ok = True
    try:
        triton = find_model(address, model, tokenizer=tokenizer, timeout_s=wait_s)
        warm_up(address, triton, vocab_size=vocab_size, seed=seed, tokenizer=tokenizer)
        for turn in range(repeat):
            for number, workload in enumerate(workloads):
                turn_seed = (seed + turn) * 100 + number
                record = run(address, triton, workload, vocab_size=vocab_size, seed=turn_seed, tokenizer=tokenizer)
                record = {"label": label, "model": model, **record, **figures.machine()}
                print(json.dumps(record), flush=True)
                figures.append(out, record)
                all_ok = all_ok and record["out_ok"] and (triton.takes_text or record["in_ok"])
    except WireError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if not all_ok:
        typer.echo("error: answers or prompts did not have the lengths asked for (out_ok, in_ok)", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
