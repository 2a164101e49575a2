"""What a build was asked for reaches the engine core, through config.pbtxt."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from pageflight.backend.engine import START_TIMEOUT_S, core_spec, supervision
from pageflight.backend.settings import ModelSettings
from pageflight.core.config import SchedulerConfig
from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight_build.instances import parse_instances
from pageflight_build.options import ServingOptions
from pageflight_build.record import EngineRecord, ModelRecord
from pageflight_build.repository import deployments
from pageflight_build.triton_config import model_configs

SERVING = ServingOptions(
    deterministic=True,
    kv_memory=3 << 20,
    max_num_seqs=5,
    max_num_tokens=6,
    max_queue_size=7,
    max_queue_tokens=8,
    scheduling_policy="fair",
    ageing_s=9.5,
    tenants="/somewhere/tenants.json",
    kv_admission="reserve",
    gpu_memory_utilization=0.625,
    kv_watermark=0.25,
    target_inter_token_ms=42.5,
    threads=3,
    tensor_parallel=4,
    pipeline_parallel=3,
    launcher="external",
    nodes=2,
    rank_port=4000,
    rank_wait_s=7.5,
    ray_address="10.0.0.1:6379",
    prefix_cache=False,
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "engine" / "1" / "artifacts"
    folder.mkdir(parents=True)
    EngineManifest(
        name="x", family="llama", lowering="openvino", dtype="fp32", kv_dtype="fp32", block_size=32, max_model_len=77,
        vocab_size=8, model={}, fingerprint={}, files=(),
    ).write(folder)  # fmt: skip
    return tmp_path


def settings(
    repository: Path,
    serving: ServingOptions = SERVING,
    *,
    instance: str = "engine_0_0",
    gpu: int | None = None,
    **edited: str,
) -> ModelSettings:
    """As Triton tells them to the stub of `instance`, on a GPU or not; `edited` parameters were changed by hand."""
    engines = (EngineRecord(folder="1/artifacts", inputs=""),) * len(parse_instances(serving.instances))
    record = ModelRecord(
        name="x",
        checkpoint="c",
        engines=engines,
        serving=serving,
        default=True,
    )
    config = model_configs(deployments([record])["x"])["engine"]
    for name, value in edited.items():
        config.parameters[name].string_value = value
    arguments: dict[str, Any] = {
        "model_name": "engine",
        "model_version": "1",
        "model_repository": str(repository / "engine"),
        "model_instance_name": instance,
        "model_instance_kind": "CPU" if gpu is None else "GPU",
        "model_instance_device_id": str(gpu or 0),
        "model_config": json_format.MessageToJson(config, preserving_proto_field_name=True),
    }
    assert json.loads(arguments["model_config"])["parameters"]
    return ModelSettings.read(arguments)


def test_every_setting_of_the_scheduler_reaches_the_core(repository: Path) -> None:
    """An option was parsed, written into config.pbtxt, and read by nobody."""
    spec = core_spec(settings(repository))
    scheduler, default = spec.config.scheduler, SchedulerConfig()
    assert scheduler == SERVING.scheduler(max_model_len=77)
    resolved_later = {"token_tile", "tenants", "replay_rows"}
    for item in fields(SchedulerConfig):
        same = getattr(scheduler, item.name) == getattr(default, item.name)
        assert same == (item.name in resolved_later), item.name
    assert spec.tenants_file == "/somewhere/tenants.json"
    assert spec.config.kv.memory_bytes == 3 << 20 and not spec.config.kv.prefix_cache and spec.config.num_threads == 3
    assert spec.config.tensor_parallel == 4 and spec.config.pipeline_parallel == 3
    assert spec.config.launcher == "external" and spec.config.num_nodes == 2
    assert spec.config.rank_port == 4000 and spec.config.rank_wait_s == 7.5
    assert spec.config.ray_address == "10.0.0.1:6379"


def test_a_tenants_file_named_by_hand_is_looked_for_in_the_repository(repository: Path) -> None:
    assert core_spec(settings(repository, tenants="t.json")).tenants_file == str(repository / "t.json")
    assert core_spec(settings(repository, replace(SERVING, tenants=""))).tenants_file == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("scheduling_policy", "lottery", "scheduling_policy='lottery': supported are fcfs, priority, fair"),
        ("kv_admission", "", "kv_admission='': supported are forecast, optimistic, reserve"),
        ("ageing_s", "soon", "ageing_s='soon' is not a number"),
        ("kv_watermark", "1.5", "kv_watermark=1.5"),
        ("gpu_memory_utilization", "1.5", "gpu_memory_utilization=1.5"),
        ("max_queue_tokens", "-1", "max_queue_tokens=-1"),
    ],
)
def test_a_setting_that_was_edited_wrongly_is_named(repository: Path, name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        core_spec(settings(repository, **{name: value}))
    assert words in str(caught.value) and str(caught.value).count("config.pbtxt of engine") == 1


def test_a_core_has_as_long_to_start_as_its_server_waits_for_it(repository: Path) -> None:
    """The server waited half an hour for a large engine, and its supervisor killed the core after ten minutes."""
    config = supervision(settings(repository, hang_limit_s="77"))
    assert config.start_timeout_s == START_TIMEOUT_S and config.hang_limit_s == 77


def test_each_instance_learns_its_own_devices(repository: Path) -> None:
    """Triton calls an instance by its group's name and a number in it: every one took itself for the first."""
    instances = "gpu1; gpu2,3; cpu:0-1 kv_memory=7; cpu:2 tensor_parallel=2 pipeline_parallel=3"
    serving = replace(SERVING, threads=0, tensor_parallel=1, pipeline_parallel=1, instances=instances)
    names = [("gpu1_0", 1), ("gpu2_3_0", None), ("cpu0-1_0", None), ("cpu2_0", None)]
    found = [settings(repository, serving, instance=name, gpu=gpu) for name, gpu in names]
    assert [one.instance for one in found] == [0, 1, 2, 3] and {one.num_instances for one in found} == {4}
    specs = [core_spec(one) for one in found]
    assert [str(spec.devices) for spec in specs] == ["gpu1", "gpu2,3", "cpu:0-1", "cpu:2"]
    assert [spec.num_instances for spec in specs] == [1, 1, 2, 2], "memory of the machine is shared by two"
    assert [spec.config.num_threads for spec in specs] == [0, 0, 2, 1]
    assert [spec.config.tensor_parallel for spec in specs] == [1, 2, 1, 2], "every GPU of a set is a rank"
    assert [spec.config.pipeline_parallel for spec in specs] == [1, 1, 1, 3]
    assert [spec.config.kv.memory_bytes for spec in specs] == [3 << 20, 3 << 20, 7, 3 << 20]


def test_ranks_of_all_instances_do_not_fit_a_set_of_another_size(repository: Path) -> None:
    """`tensor_parallel` 4 in config.pbtxt, and a GPU alone: three ranks had none."""
    serving = replace(SERVING, tensor_parallel=4, pipeline_parallel=1, instances="gpu1")
    with pytest.raises(ConfigError, match="gpu1: tensor_parallel=4, but the set has 1 GPU"):
        core_spec(settings(repository, serving, instance="gpu1_0", gpu=1))


@pytest.mark.parametrize(
    ("words", "default", "expected"),
    [
        ("", (1, 1), (4, 1)),
        ("", (1, 2), (2, 2)),
        ("", (2, 2), (2, 2)),
        ("", (1, 4), (1, 4)),
        (" tensor_parallel=1", (4, 4), (1, 4)),
        (" pipeline_parallel=2", (1, 1), (2, 2)),
        (" pipeline_parallel=1", (1, 2), (4, 1)),
        (" tensor_parallel=2 pipeline_parallel=2", (8, 1), (2, 2)),
    ],
)
def test_gpus_of_a_set_are_shared_out_among_its_stages(
    repository: Path, words: str, default: tuple[int, int], expected: tuple[int, int]
) -> None:
    """What an item does not say is the model's; without anybody's word, all GPUs that a stage can have are its."""
    serving = replace(SERVING, tensor_parallel=default[0], pipeline_parallel=default[1], instances=f"gpu0,1,2,3{words}")
    config = core_spec(settings(repository, serving, instance="gpu0_1_2_3_0")).config
    assert (config.tensor_parallel, config.pipeline_parallel) == expected


def test_instances_that_share_a_gpu_get_their_parts_of_it(repository: Path) -> None:
    serving = replace(
        SERVING,
        tensor_parallel=1,
        pipeline_parallel=1,
        instances="gpu0 gpu_memory_utilization=0.25; gpu0 gpu_memory_utilization=0.5; gpu1",
    )
    parts = [
        core_spec(settings(repository, serving, instance=name, gpu=gpu)).config.kv.gpu_memory_utilization
        for name, gpu in [("gpu0_0", 0), ("gpu0_1_0", 0), ("gpu1_0", 1)]
    ]
    assert parts == [0.25, 0.5, SERVING.gpu_memory_utilization]


def test_where_triton_places_an_instance_is_where_its_core_runs(repository: Path) -> None:
    """`gpus: [0]` was edited into `gpus: [5]`, and the core went to GPU 0 nevertheless."""
    serving = replace(SERVING, tensor_parallel=1, pipeline_parallel=1, instances="gpu0")
    spec = core_spec(settings(repository, serving, instance="gpu0_0", gpu=5))
    assert spec.devices == DeviceSet("gpu", (5,))


def test_a_placement_for_other_instances_is_refused(repository: Path) -> None:
    serving = replace(SERVING, instances="cpu:0; cpu:1")
    edited = settings(repository, serving, instance="cpu0_0", placement="cpu:0 engine_dir=x")
    with pytest.raises(ConfigError, match="placement has 1 items, but there are 2 instances"):
        core_spec(edited)
    with pytest.raises(ConfigError, match="no single instance_group of cpu0, cpu1"):
        settings(repository, serving, instance="cpu7_0")
