"""The arithmetic of `pageflight plan`, against published figures and against itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer.main

from pageflight.cli.main import app
from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight_build.plan.cards import GIB, KNOWN, Card, Cards, parse_cards
from pageflight_build.plan.ceilings import ceilings_of
from pageflight_build.plan.demand import Demand, check_context, default_kv_dtype, resolved_group_size
from pageflight_build.plan.fit import Fit, fit
from pageflight_build.plan.layouts import Layout, layout_of, layouts, rank_config, shares_out
from pageflight_build.plan.planner import Plan, fewest, make_plan
from pageflight_build.plan.report import as_json, size_json
from pageflight_build.plan.rule import plan_by_size, published_rule_bytes
from pageflight_build.plan.shares import Holder, kv_bytes_per_block, pass_bytes, shares_of, stored_bytes
from pageflight_build.plan.words import build_command, sentences, size_sentences, verdict

LLAMA_8B = DecoderConfig(
    family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, max_positions=131072, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28672)
SMALL_VOCABULARY = replace(LLAMA_8B, vocab_size=1000, num_heads=12, num_kv_heads=2, hidden_size=1536, num_layers=3)


def demand(**changes: object) -> Demand:
    return replace(Demand(context=8192), **changes)  # type: ignore[arg-type]


def plan_of(config: DecoderConfig, asked: Demand, count: int, card: str) -> tuple[Plan, Fit]:
    plan = make_plan(config, asked, Cards(count=count, card=KNOWN[card]))
    assert plan.given is not None
    return plan, plan.given


def test_the_published_rule_says_168_gb_for_70_billion_parameters_of_16_bits() -> None:
    assert published_rule_bytes(70e9, 16) == pytest.approx(168e9)
    assert published_rule_bytes(70e9, 4) == pytest.approx(42e9)


def test_the_plan_of_a_70b_is_within_a_tenth_of_the_published_rule() -> None:
    """The rule leaves a fifth of the weights for K/V and the rest: for 8 sequences of 8,192 tokens that is about it."""
    plan = make_plan(LLAMA_70B, demand(concurrency=8), None)
    assert plan.weight_bytes + plan.kv_bytes == pytest.approx(plan.rule_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("config", "num_parameters", "kv_bytes"), [(LLAMA_8B, 8_029_995_008, 131_072), (LLAMA_70B, 70_552_387_584, 327_680)]
)
def test_published_sizes_of_llama_3_1(config: DecoderConfig, num_parameters: int, kv_bytes: int) -> None:
    """8.03 B and 70.6 B parameters, 128 and 320 KiB of K/V a token: anything else, and a term is missing."""
    plan = make_plan(config, demand(), None)
    assert config.num_parameters == num_parameters and plan.kv_bytes_per_token == kv_bytes
    norms = (2 * config.num_layers + 1) * config.hidden_size * 4
    assert plan.weight_bytes == 2 * num_parameters + norms
    assert kv_bytes_per_block(config, "fp8", config.num_layers, Holder()) == 32 * kv_bytes // 2


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_together_hold_the_model_and_their_own_norms(size: int) -> None:
    """Every rank was given a whole vocabulary, then none."""
    (share,) = shares_of(LLAMA_70B, demand(), Layout(tensor_parallel=size), Holder())
    norms = (2 * LLAMA_70B.num_layers + 1) * LLAMA_70B.hidden_size * 2
    assert size * (share.weight_bytes - norms) == 2 * LLAMA_70B.num_parameters
    assert size * share.block_bytes == 32 * 327_680
    assert share.read_bytes == share.weight_bytes - 2 * LLAMA_70B.vocab_size * LLAMA_70B.hidden_size // size


@pytest.mark.parametrize(("size", "heads"), [(2, 1), (3, 2), (4, 1), (6, 1), (12, 1)])
def test_kv_heads_are_replicated_beyond_their_number(size: int, heads: int) -> None:
    """Twelve ranks and two K/V heads: a sixth of a head each was planned. Ranks of 4 queries may need both heads."""
    rank = rank_config(SMALL_VOCABULARY, size, 1)
    assert (rank.num_kv_heads, rank.num_heads) == (heads, 12 // size)
    (share,) = shares_of(SMALL_VOCABULARY, demand(), Layout(tensor_parallel=size), Holder())
    assert share.block_bytes == kv_bytes_per_block(replace(SMALL_VOCABULARY, num_kv_heads=heads), "bf16", 3, Holder())


def test_a_rank_of_an_uneven_split_holds_the_larger_part() -> None:
    """14336 features in groups of 128 are 112 groups: of 5 ranks some have 23 and none 22.4."""
    config = replace(LLAMA_8B, num_heads=40, num_kv_heads=8, hidden_size=5120)
    assert rank_config(config, 5, 128).intermediate_size == 23 * 128
    assert shares_out(config, 5, 128)


@pytest.mark.parametrize(("change", "size"), [({}, 3), ({"intermediate_size": 7}, 8), ({"vocab_size": 3}, 4)])
def test_no_layout_has_ranks_that_the_engine_refuses(change: dict[str, int], size: int) -> None:
    """A plan for three cards was three ranks of 32 heads; and the build refused it."""
    config = replace(LLAMA_8B, **change)  # type: ignore[arg-type]
    assert not shares_out(config, size, 1)
    layout = layout_of(config, 1, size)
    assert layout is None or layout.tensor_parallel < size
    assert all(each.tensor_parallel != size for each in layouts(config, 1))


def test_groups_that_a_rank_cuts_are_smaller_there() -> None:
    """48 features of a head, in groups of 128: eight ranks have 192 query features each, that is groups of 64."""
    config = replace(LLAMA_8B, head_dim=48)
    grouped = demand(dtype="int4", group_size=128)
    (share,) = shares_of(config, grouped, Layout(tensor_parallel=8), Holder())
    (whole,) = shares_of(config, grouped, Layout(), Holder())
    assert whole.weight_bytes / 8 < share.weight_bytes < whole.weight_bytes / 7


def test_stages_hold_all_layers_once() -> None:
    """As the engine cuts them: the fullest stage has less than a layer more than an even share."""
    layer = 2 * (LLAMA_70B.num_parameters - 2 * LLAMA_70B.vocab_size * LLAMA_70B.hidden_size) // LLAMA_70B.num_layers
    for stages in range(1, 9):
        layout = Layout(tensor_parallel=8, pipeline=stages)
        shares = shares_of(LLAMA_70B, demand(), layout, Holder())
        norms = (2 * LLAMA_70B.num_layers + 1) * LLAMA_70B.hidden_size * 2
        assert 8 * (sum(share.weight_bytes for share in shares) - norms) == 2 * LLAMA_70B.num_parameters
        assert sum(share.block_bytes for share in shares) == 32 * 327_680 // 8
        weights = [share.weight_bytes for share in shares]
        assert max(weights) - sum(weights) / stages < layer / 8


def test_a_tied_head_is_held_by_the_first_stage_and_the_last() -> None:
    """The embedding was counted on the first stage only, and the head's rows were read from nowhere."""
    tied = replace(LLAMA_8B, tied_head=True)
    table = 2 * tied.vocab_size * tied.hidden_size
    whole = shares_of(tied, demand(), Layout(), Holder())[0]
    first, last = shares_of(tied, demand(), Layout(pipeline=2), Holder())
    assert first.weight_bytes + last.weight_bytes == whole.weight_bytes + table
    assert whole.read_bytes == whole.weight_bytes and last.read_bytes == last.weight_bytes
    separate = shares_of(tied, demand(dtype="int8"), Layout(), Holder())[0]  # its head is int8, its table bf16
    assert separate.weight_bytes - separate.read_bytes == table


@pytest.mark.parametrize(
    ("num_cards", "layout"), [(1, (1, 1)), (2, (2, 1)), (8, (8, 1)), (16, (8, 2)), (6, (2, 3)), (7, (1, 7))]
)
def test_heads_are_divided_inside_a_machine_and_layers_across(num_cards: int, layout: tuple[int, int]) -> None:
    found = layout_of(LLAMA_8B, 1, num_cards)
    assert found is not None and (found.tensor_parallel, found.pipeline) == layout


@pytest.mark.parametrize(
    ("machines", "cards", "layout"),
    [(2, 8, (8, 2)), (4, 4, (4, 4)), (2, 6, (2, 6)), (1, 8, (8, 1)), (3, 1, (1, 3)), (2, 16, (16, 2)), (2, 3, (1, 6))],
)
def test_ranks_of_a_layer_are_on_one_machine(machines: int, cards: int, layout: tuple[int, int]) -> None:
    """Twelve cards on two machines were three stages of four: the second would have been on both."""
    found = layout_of(LLAMA_8B, 1, machines * cards, machines)
    assert found == Layout(tensor_parallel=layout[0], pipeline=layout[1], nodes=machines)


@pytest.mark.parametrize(("cards", "nodes"), [(8, 1), (12, 3), (16, 2), (24, 3), (20, 5)])
def test_machines_that_nobody_counted_are_the_fewest_with_whole_stages(cards: int, nodes: int) -> None:
    found = layout_of(LLAMA_8B, 1, cards)
    assert found is not None and found.nodes == nodes
    assert found.pipeline % nodes == 0 and found.num_cards // nodes <= 8


def test_the_command_of_a_plan_is_one_of_the_build() -> None:
    """Cards on two machines: what was to be typed said nothing of the second one."""
    asked = demand(dtype="int4", kv_dtype="fp8", group_size=128, concurrency=4, max_num_tokens=2048)
    cards = parse_cards("2x8xH100-80", cpu=lambda: KNOWN["L4-24"])
    plan = make_plan(LLAMA_70B, asked, cards)
    assert plan.given is not None
    command = build_command(asked, plan.given)
    assert command == (
        "pageflight build CHECKPOINT --engine torch --dtype int4 --kv-dtype fp8 --group-size 128 --max-model-len 8192"
        " --tensor-parallel 8 --pipeline-parallel 2 --nodes 2 --launcher external"
    )
    assert f"Build it with: {command}" in sentences(plan)
    assert "16 × H100-80 on 2 machines hold it" in verdict(plan, plan.given)
    asked = demand(max_num_seqs=64, max_num_tokens=512, gpu_memory_utilization=0.8)
    _, given = plan_of(LLAMA_70B, asked, 4, "H100-80")
    command = build_command(asked, given)
    assert command is not None and command.endswith(
        "--tensor-parallel 4 --max-num-seqs 64 --max-num-tokens 512 --gpu-memory-utilization 0.8"
    )
    known = {name for each in typer.main.get_command(app).commands["build"].params for name in each.opts}  # type: ignore[attr-defined]
    assert {word for word in command.split() if word.startswith("--")} <= known
    assert build_command(demand(), plan_of(LLAMA_8B, demand(), 1, "H100-80")[1]) is None
    assert build_command(demand(), plan_of(LLAMA_70B, demand(), 2, "L4-24")[1]) is None, "they do not hold it"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus=37xL4-24: 32 heads and 32 layers"):
        make_plan(LLAMA_8B, demand(), Cards(count=37, card=KNOWN["L4-24"]))


def test_the_fewest_cards_hold_it_and_one_fewer_does_not() -> None:
    """What is called the fewest must be it: with half as many the same demand misses."""
    for name in ("L4-24", "A100-80", "H100-94"):
        best = fewest(LLAMA_70B, demand(concurrency=4), KNOWN[name])
        assert best is not None and best.holds and best.layout.tensor_parallel > 1
        half = Layout(tensor_parallel=best.layout.tensor_parallel // 2)
        assert not fit(LLAMA_70B, demand(concurrency=4), KNOWN[name], half).holds


def test_what_is_said_to_fit_does_and_one_more_does_not() -> None:
    """The largest concurrency that a plan names must itself be planned to hold."""
    _, given = plan_of(LLAMA_70B, demand(), 2, "H100-94")
    most = given.max_concurrency
    assert most > 1
    assert fit(LLAMA_70B, demand(concurrency=most), given.card, given.layout).holds
    assert not fit(LLAMA_70B, demand(concurrency=most + 1), given.card, given.layout).holds


def test_memory_adds_up_to_the_card() -> None:
    """A component that is in no sum is found when the first request runs out of memory."""
    _, given = plan_of(LLAMA_70B, demand(concurrency=8), 2, "H100-94")
    parts = given.weight_bytes + given.table_bytes + given.pass_bytes + given.reserved_bytes + given.outside_bytes
    parts += given.rows_bytes
    assert parts + given.kv_room_bytes == given.card.memory_bytes
    assert given.kv_bytes + given.head_room_bytes == given.kv_room_bytes


def test_ceilings_are_bytes_by_bandwidth_and_operations_by_rate() -> None:
    """By hand: all weights but the embedding, and the K/V of every sequence, once a step."""
    card = Card(name="x", kind="gpu", memory_bytes=GIB, bandwidth_bytes_s=1e12, bf16_flops_s=1e14)
    shares = shares_of(LLAMA_8B, demand(), Layout(), Holder())
    top = ceilings_of(card, shares, demand(concurrency=16))
    read = 2 * (LLAMA_8B.num_parameters - 128256 * 4096) + (2 * 32 + 1) * 4096 * 2
    assert top.decode_alone_tokens_s == pytest.approx(1e12 / (read + 8192 * 131072))
    assert top.decode_tokens_s == pytest.approx(16 * 1e12 / (read + 16 * 8192 * 131072))
    assert (top.decode_bound, top.prefill_bound) == ("memory", "compute")
    per_token = 2 * (LLAMA_8B.num_parameters - 2 * 128256 * 4096) + 2 * 32 * 4096 * 8192
    assert top.prefill_tokens_s == pytest.approx(1e14 / per_token)
    slow = replace(card, bf16_flops_s=1e12)
    assert ceilings_of(slow, shares, demand(concurrency=16)).decode_bound == "compute"
    assert ceilings_of(replace(card, bandwidth_bytes_s=None), shares, demand()).decode_tokens_s is None
    assert ceilings_of(card, shares, demand(dtype="fp32", kv_dtype="fp32")).prefill_tokens_s is None


def test_stages_help_many_sequences_and_not_one() -> None:
    """Two stages promised one sequence twice the speed: it waits for both, one after the other."""
    card = KNOWN["H100-80"]
    one, two = (
        ceilings_of(card, shares_of(LLAMA_8B, demand(concurrency=64), Layout(pipeline=count), Holder()),
                    demand(concurrency=64, context=128))
        for count in (1, 2)
    )  # fmt: skip
    assert one.decode_alone_tokens_s is not None and one.decode_tokens_s is not None
    assert two.decode_alone_tokens_s == pytest.approx(one.decode_alone_tokens_s, rel=0.01)
    assert two.decode_tokens_s is not None and two.decode_tokens_s == pytest.approx(one.decode_tokens_s, rel=0.2)


def test_fp8_needs_a_card_that_has_it() -> None:
    """An A100 was recommended for FP8, and the engine refused to start on it."""
    plan, given = plan_of(LLAMA_8B, demand(dtype="fp8"), 1, "A100-80")
    assert not plan.holds and given.head_room_bytes > 0
    assert "fp8 needs compute capability 8.9, A100-80 has 8.0" in verdict(plan, given)
    assert plan.fits == () and not any(one.card.capability == 80 for one in make_plan(
        LLAMA_8B, demand(dtype="fp8"), None).fits)  # fmt: skip


def test_a_slice_works_alone() -> None:
    """Seven slices of 10 GiB are no card of 70: they do not reach each other's memory."""
    plan, given = plan_of(LLAMA_8B, demand(), 7, "H100-80/1g.10gb")
    assert given.layout == Layout() and not plan.holds
    assert any("A slice reaches no other slice" in line for line in sentences(plan))


def test_what_does_not_hold_says_by_how_much_and_what_would() -> None:
    plan, given = plan_of(LLAMA_70B, demand(), 1, "H100-94")
    assert not plan.holds and given.head_room_bytes < 0
    missing = f"{-given.head_room_bytes / GIB:,.1f} GiB"
    assert verdict(plan, given) == f"H100-94 does not hold it: it misses {missing}."
    text = " ".join(sentences(plan))
    assert "2 × H100-94 would hold it (tensor parallel 2)" in text and "In fp8, with weights of" in text
    assert set(plan.instead) == {"fp8", "int8", "int4"} and all(one.holds for one in plan.instead.values())
    fewer, given = plan_of(LLAMA_8B, demand(concurrency=100), 1, "H100-80")
    assert f"{given.max_concurrency} sequences of 8,192 tokens would fit." in sentences(fewer)
    shorter, given = plan_of(LLAMA_8B, demand(context=131072), 1, "L4-24")
    assert f"1 sequence of {given.cache_tokens:,} tokens would fit." in sentences(shorter)
    assert plan_of(LLAMA_8B, demand(context=given.cache_tokens), 1, "L4-24")[0].holds
    huge = replace(LLAMA_70B, num_layers=80 * 128)
    nothing = make_plan(huge, demand(), Cards(count=1, card=KNOWN["A10-24"]))
    assert "Nothing near would do on these cards" in sentences(nothing)[-1] and not nothing.holds
    assert "No card of the table holds it" in sentences(make_plan(huge, demand(), None))[-1]


def test_more_cards_than_needed_are_said_to_be() -> None:
    plan, _ = plan_of(LLAMA_8B, demand(concurrency=4), 4, "H100-80")
    assert any("H100-80 would do" in line and "further instances" in line for line in sentences(plan))


def test_integer_weights_bring_their_scales() -> None:
    """int4 is not a quarter of bf16: the embedding and head stay bf16, and 128 inputs share four bytes."""
    group = resolved_group_size(LLAMA_8B, "int4", 0)
    tables = 2 * 2 * 128256 * 4096
    matrices = LLAMA_8B.num_parameters - 2 * 128256 * 4096
    norms = (2 * 32 + 1) * 4096 * 4
    assert group == 128
    assert stored_bytes(LLAMA_8B, "int4", group) == matrices // 2 + matrices // 128 * 4 + tables + norms
    with pytest.raises(ConfigError, match="group_size=64"):
        resolved_group_size(LLAMA_8B, "fp8", 64)


def test_copies_of_a_cpu_are_counted() -> None:
    """OpenVINO packs the MLP's last float32 matrix twice; the plan was a third short."""
    plain, both = (
        shares_of(LLAMA_8B, demand(dtype="fp32"), Layout(), Holder(is_gpu=False, keeps_both_forms=keeps))[0]
        for keeps in (False, True)
    )
    assert plain.weight_bytes == stored_bytes(LLAMA_8B, "fp32", 0)
    assert both.weight_bytes == plain.weight_bytes + 32 * 4096 * 14336 * 4


def test_a_longer_step_takes_a_larger_pass() -> None:
    small, large = (pass_bytes(LLAMA_8B, tokens, 16, 32, 2) for tokens in (1024, 2048))
    assert large == 2 * small


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context": 0}, "context=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": 300}, "max_num_seqs=256"),
        ({"max_num_tokens": 0}, "max_num_tokens=0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"dtype": "fp4"}, "dtype='fp4'"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4'"),
    ],
)
def test_demands_out_of_range_are_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        demand(**changes)


def test_a_context_beyond_the_model_is_refused() -> None:
    assert check_context(LLAMA_8B, 0) == 131072
    with pytest.raises(ConfigError, match="context=131073: the model was made for 131072"):
        check_context(LLAMA_8B, 131073)


def test_k_v_is_in_the_type_of_the_activations() -> None:
    assert [default_kv_dtype(dtype) for dtype in ("fp32", "fp16", "bf16", "fp8", "int4")] == [
        "fp32", "fp16", "bf16", "bf16", "bf16",
    ]  # fmt: skip


def test_a_size_alone_is_planned_by_the_rule() -> None:
    """Without shapes a K/V figure would be made up: there is none, and that is said."""
    plan = plan_by_size(70e9, "bf16", None, 0.9)
    assert plan.rule_bytes == pytest.approx(168e9) and plan.weight_bytes == 140_000_000_000
    found = {one.card.name: one.num_cards for one in plan.fits}
    assert (found["H100-94"], found["H100-80"], found["B200-180"]) == (2, 4, 1)
    assert any("no figure for K/V" in line for line in size_sentences(plan))
    one = plan_by_size(70e9, "bf16", Cards(count=1, card=KNOWN["H100-94"]), 0.9)
    assert not one.holds and "2 × H100-94" in size_sentences(one)[-1]
    assert "kv_bytes" not in json.dumps(size_json(one))
    for size in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="parameters="):
            plan_by_size(size, "bf16", None, 0.9)
    with pytest.raises(ConfigError, match="dtype='fp4'"):
        plan_by_size(1e9, "fp4", None, 0.9)


def test_everything_is_in_the_json(tmp_path: Path) -> None:
    """Scripts read it: keys stay, and units are in their names."""
    plan, given = plan_of(LLAMA_70B, demand(concurrency=8), 2, "H100-94")
    data = json.loads(json.dumps(as_json(plan)))
    assert set(data) == {
        "model", "demand", "weight_bytes", "kv_bytes_per_token", "kv_block_tokens", "kv_bytes", "published_rule_bytes",
        "holds", "given", "fewest", "instead", "build_command", "sentences",
    }  # fmt: skip
    assert data["holds"] is True and data["given"]["num_cards"] == 2 and data["fewest"][0]["num_cards"] == 2
    assert data["given"]["num_blocks"] == given.num_blocks and data["given"]["cache_tokens"] == given.num_blocks * 32
    assert data["given"]["ceilings"]["decode_bound"] == "memory" and data["sentences"] == sentences(plan)
    assert data["published_rule_bytes"] == round(70_552_387_584 * 2.4)
