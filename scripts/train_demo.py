#!/usr/bin/env python3
"""Trains the demo checkpoint: a small Llama that completes Python, from the sources of the standard library.

    python scripts/train_demo.py --output build/demo_checkpoint

Needs the `dev` extras (torch, transformers) and no GPU: about a quarter of an hour on two cores. The same Python, torch
and processor give the same checkpoint; the model card says which were used.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_files
from demo_model import DemoLlama
from stdlib_corpus import (
    ASSISTANT,
    BOS,
    EOS,
    SYSTEM,
    USER,
    SourceFile,
    chat_samples,
    read_stdlib,
    render_chat,
    split_at_definitions,
    train_tokenizer,
)

# B windows, T positions
Windows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The architecture."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 640
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def as_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with windows of one length."""

    share: float  # of all steps
    window: int  # tokens
    num_windows: int  # in every step


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How it is trained. Small batches of short windows teach most for their cost; the last see the full context."""

    num_steps: int = 1700
    phases: tuple[Phase, ...] = (
        Phase(share=0.65, window=128, num_windows=16),
        Phase(share=0.29, window=256, num_windows=16),
        Phase(share=0.06, window=1024, num_windows=4),
    )
    matrix_lr: float = 6e-3  # Muon, scaled to AdamW's step size
    other_lr: float = 4e-3  # AdamW: embeddings and norms
    final_lr_share: float = 0.02
    warmup_share: float = 0.04
    weight_decay: float = 0.05
    definition_chance: float = 0.3  # a document begins at a top-level definition
    seed: int = 20

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        end = 0.0
        for phase in self.phases:
            end += phase.share * self.num_steps
            if step < round(end):
                return phase
        return self.phases[-1]

    @property
    def num_tokens(self) -> int:
        """Seen in all steps together."""
        phases = [self.phase(step) for step in range(self.num_steps)]
        return sum(phase.window * phase.num_windows for phase in phases)

    def lr_share(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr_share`."""
        warmup = max(1, round(self.num_steps * self.warmup_share))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))


def epoch_tokens(files: list[SourceFile], tokenizer: Tokenizer, recipe: Recipe, epoch: int) -> npt.NDArray[np.int32]:
    """One pass over the corpus, shuffled: every file, cut at other definitions each time, and every chat sample."""
    rng = random.Random(recipe.seed * 1000 + epoch)
    texts: list[str] = []
    for file in files:
        texts += split_at_definitions(file.text, rng, recipe.definition_chance)
        texts += [render_chat(question, answer) for question, answer in chat_samples(file.text)]
    rng.shuffle(texts)
    eos = tokenizer.token_to_id(EOS)
    parts = [np.array([*encoding.ids, eos], np.int32) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(parts)


def batches(files: list[SourceFile], tokenizer: Tokenizer, recipe: Recipe) -> Iterator[tuple[int, Windows]]:
    """(step, windows [B, T + 1]); a new pass over the corpus begins when the last is used up or a phase ends."""
    step, epoch = 0, 0
    while step < recipe.num_steps:
        phase = recipe.phase(step)
        stream = epoch_tokens(files, tokenizer, recipe, epoch)
        count = (len(stream) - 1) // phase.window
        starts = np.random.default_rng(recipe.seed * 1000 + epoch).permutation(count) * phase.window
        for first in range(0, count - phase.num_windows + 1, phase.num_windows):
            if step == recipe.num_steps or recipe.phase(step) != phase:
                break
            index = starts[first : first + phase.num_windows, None] + np.arange(phase.window + 1)
            yield step, stream[index]
            step += 1
        epoch += 1


def make_optimizers(model: DemoLlama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the embeddings and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    model: DemoLlama,
    files: list[SourceFile],
    tokenizer: Tokenizer,
    recipe: Recipe,
    report: Callable[[int, float], None],
) -> None:
    """Trains in place; `report` gets the step and the smoothed loss (nats per token) after every step."""
    optimizers = make_optimizers(model, recipe)
    base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    smoothed = math.log(model.model.embed_tokens.num_embeddings)
    for step, windows in batches(files, tokenizer, recipe):
        ids_BT = torch.from_numpy(windows).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids_BT[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * recipe.lr_share(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed += (float(loss.detach()) - smoothed) * max(0.02, 1 / (step + 1))
        report(step, smoothed)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("build/demo_checkpoint"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; fewer for a quick look.")] = Recipe().num_steps,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy size, for trying the pipeline.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = Recipe().seed,
    max_files: Annotated[
        int | None, typer.Option(min=1, help="Use only so many files, to train on and to hold out.")
    ] = None,
) -> None:
    """Train the demo checkpoint on the Python standard library's sources."""
    console = Console()
    shape, recipe = Shape(), Recipe(num_steps=steps, seed=seed)
    if tiny:
        shape = Shape(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=128,
            max_position_embeddings=128,
        )
        phases = (Phase(share=0.5, window=64, num_windows=16), Phase(share=0.5, window=128, num_windows=8))
        recipe = Recipe(num_steps=steps, seed=seed, phases=phases)
    started_s = time.process_time()

    corpus = read_stdlib()
    files = [file for file in corpus if not file.is_held_out][:max_files]
    held_out = [file for file in corpus if file.is_held_out][:max_files]
    console.print(
        f"corpus: {len(files)} files, {sum(len(f.text) for f in files) / 1e6:.1f} MB; held out: {len(held_out)} files"
    )
    with console.status("training the tokenizer"):
        tokenizer = train_tokenizer(
            [file.text for file in files],
            vocab_size=shape.vocab_size,
            special_tokens=[BOS, EOS, SYSTEM, USER, ASSISTANT],
            add_bos=True,
        )
    torch.manual_seed(recipe.seed)
    model = DemoLlama(shape.as_config())
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    columns = (
        TextColumn("[bold]training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("training", total=recipe.num_steps, loss=float("nan"))

        def report(step: int, loss: float) -> None:
            progress.update(task, advance=1, loss=loss)
            if (step + 1) % 100 == 0:
                progress.console.print(f"step {step + 1}: loss {loss:.3f}")

        train(model, files, tokenizer, recipe, report)
    processor_s = time.process_time() - started_s
    with console.status("writing the checkpoint and measuring its perplexity"):
        perplexity = demo_files.write(
            output,
            model=model,
            config=shape.as_config(),
            tokenizer=tokenizer,
            held_out=held_out,
            training=demo_files.Training(
                num_steps=recipe.num_steps,
                num_tokens=recipe.num_tokens,
                num_files=len(files),
                num_bytes=sum(len(file.text.encode()) for file in files),
                processor_minutes=processor_s / 60,
                num_threads=torch.get_num_threads(),
                seed=recipe.seed,
            ),
        )
    console.print(f"{output}: held-out perplexity {perplexity}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
