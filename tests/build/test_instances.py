"""`--instances`: which devices each engine instance has, what differs in it, and what Triton is told of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageflight.cli.inspect_repository import engine_named, find_engines
from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.core.placement import Placement, parse_placements, placements_text
from pageflight_build.instances import instances_text, parse_instances
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.placing import placements_of, utilizations_of
from pageflight_build.recipe import BuildResult, build, engines_of
from pageflight_build.record import EngineRecord, ModelRecord
from pageflight_build.triton_config import Deployment, model_configs

from .conftest import write_checkpoint

NUMBERS = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True).map(lambda found: tuple(sorted(found)))
DEVICES = st.one_of(
    st.builds(DeviceSet, st.just("gpu"), NUMBERS),
    st.builds(DeviceSet, st.just("cpu"), NUMBERS),
    st.just(DeviceSet("cpu")),
)


@given(devices=DEVICES)
def test_a_set_of_devices_is_read_as_it_is_written(devices: DeviceSet) -> None:
    assert DeviceSet.parse(str(devices)) == devices
    assert re.fullmatch(r"[a-z0-9_-]+", devices.name), "it becomes an instance's name in Triton"


@given(
    placements=st.lists(
        st.builds(
            lambda devices, is_stated, num_stages, utilization, memory: Placement(
                devices=devices,
                engine_dir="engine/1/artifacts-00ff",
                gpu_memory_utilization=utilization,
                kv_memory=memory,
                tensor_parallel=max(1, len(devices.numbers)) if is_stated else None,
                pipeline_parallel=num_stages,
            ),
            DEVICES,
            st.booleans(),
            st.sampled_from((None, 1)),
            st.none() | st.floats(0.01, 1.0),
            st.none() | st.integers(0, 1 << 40),
        ),
        max_size=4,
    )
)
def test_a_placement_in_config_pbtxt_is_read_as_it_is_written(placements: list[Placement]) -> None:
    assert parse_placements("placement", placements_text(placements)) == tuple(placements)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("3", "3"),
        ("gpu0; gpu1;gpu:3,2 tensor_parallel=2", "gpu0; gpu1; gpu2,3 tensor_parallel=2"),
        ("cpu:0-1,2 engine=openvino  dtype=int8;cpu:4", "cpu:0-2 engine=openvino dtype=int8; cpu:4"),
        ("gpu2,3; cpu tensor_parallel=2", "gpu2,3; cpu tensor_parallel=2"),
        (
            "gpu0-3 pipeline_parallel=2 tensor_parallel=2; cpu pipeline_parallel=3",
            "gpu0,1,2,3 tensor_parallel=2 pipeline_parallel=2; cpu pipeline_parallel=3",
        ),
        ("cpu; cpu kv_memory=2GiB", "cpu; cpu kv_memory=2147483648"),
        (
            "gpu0 gpu_memory_utilization=0.4; gpu0 gpu_memory_utilization=0.5",
            "gpu0 gpu_memory_utilization=0.4; gpu0 gpu_memory_utilization=0.5",
        ),
    ],
)
def test_instances_have_one_way_to_be_written(text: str, canonical: str) -> None:
    """The same request spelt otherwise built everything again."""
    found = parse_instances(text)
    assert instances_text(found) == canonical and parse_instances(canonical) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "instances=0: must be at least 1"),
        ("65", "at most 64"),
        ("gpu0; tpu1", "item 2 'tpu1': 'tpu1' is no set of devices; write gpu0, gpu2,3, cpu, cpu:0-3"),
        ("gpu", "item 1 'gpu': 'gpu' is no set of devices"),
        ("cpu0", "'cpu0' is no set of devices"),
        ("gpu0;", "item 2 ''"),
        ("gpu1,1", "names a device twice"),
        ("cpu:3-1", "3-1 must rise"),
        ("gpu0 dtpye=fp8", "'dtpye=fp8' is not understood; allowed are engine=, dtype="),
        ("gpu0 max_model_len=7", "'max_model_len=7' is not understood"),
        ("gpu0 dtype=fp8 dtype=bf16", "dtype= stands twice"),
        ("gpu0 group_size=big", "group_size='big' is not a whole number"),
        ("gpu0 gpu_memory_utilization=1.5", "gpu_memory_utilization=1.5: must be above 0 and at most 1"),
        ("cpu gpu_memory_utilization=0.5", "gpu_memory_utilization= is of GPUs"),
        ("gpu0; gpu0", "'gpu0' and 'gpu0' share a GPU: give both their part"),
        ("gpu0,1 tensor_parallel=2; gpu1", "share a GPU"),
        ("cpu:0-2; cpu:2,3", "'cpu:0-2' and 'cpu:2-3' share cores"),
        ("cpu; cpu:1", "share cores"),
        ("gpu2,3 tensor_parallel=3", "item 1 'gpu2,3 tensor_parallel=3': gpu2,3: tensor_parallel=3, but the set has 2"),
        (
            "gpu0-3 tensor_parallel=2 pipeline_parallel=1",
            "gpu0,1,2,3: tensor_parallel=2, but the set has 4 GPUs; they must be as many",
        ),
        (
            "gpu0-3 tensor_parallel=4 pipeline_parallel=2",
            "gpu0,1,2,3: tensor_parallel=4 times pipeline_parallel=2, but the set has 4 GPUs",
        ),
        ("gpu0-2 pipeline_parallel=2", "gpu0,1,2: pipeline_parallel=2, but the set has 3 GPUs"),
        ("cpu pipeline_parallel=0", "pipeline_parallel=0: must be at least 1"),
        ("cpu tensor_parallel=0", "tensor_parallel=0: must be at least 1"),
        ("gpu2 tensor_parallel=2", "tensor_parallel=2, but the set has 1 GPU"),
    ],
)
def test_an_item_that_cannot_work_is_named(text: str, says: str) -> None:
    """A typing error in the second item was found by the server, after the engines were built."""
    with pytest.raises(ConfigError) as caught:
        ServingOptions(instances=text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu0 engine=openvino", "engine='openvino' does not run on gpus"),
        ("cpu:0 engine=tensorrt", "engine='tensorrt' does not run on cpus"),
        ("gpu0 engine=tensorrt dtype=fp4", "dtype='fp4': supported are"),
        ("gpu0 engine=torch flavor=full", "flavor='full': only engine tensorrt has it"),
    ],
)
def test_an_engine_that_cannot_run_on_its_devices_is_refused(text: str, says: str) -> None:
    (instance,) = parse_instances(text)
    with pytest.raises(ConfigError) as caught:
        instance.engine_options(EngineOptions(engine="torch"))
    assert says in str(caught.value) and text in str(caught.value)


def test_what_only_tensorrt_has_does_not_follow_to_another_engine() -> None:
    """`--engine tensorrt --flavor full --instances "gpu0; cpu engine=openvino"` was refused for its flavor."""
    base = EngineOptions(engine="tensorrt", flavor="full", dtype="bf16")
    first, second = parse_instances("gpu0 dtype=fp8; cpu engine=openvino")
    assert first.engine_options(base) == EngineOptions(engine="tensorrt", flavor="full", dtype="fp8")
    assert second.engine_options(base) == EngineOptions(engine="openvino", dtype="bf16")


def model(name: str, instances: str, utilization: float = 0.9, *, engine: str = "", **options: Any) -> ModelRecord:
    serving = ServingOptions(instances=instances, gpu_memory_utilization=utilization, **options)
    engines = tuple(EngineRecord(folder="1/artifacts", inputs="", engine=engine) for _ in parse_instances(instances))
    return ModelRecord(name=name, checkpoint="", engines=engines, serving=serving, default=False)


def test_instances_that_name_a_gpu_share_its_memory() -> None:
    """Two models on one GPU each took nine tenths of it: the second did not start."""
    found = placements_of(
        [
            model("a", "gpu0; gpu1"),
            model("b", "gpu0 gpu_memory_utilization=0.3; gpu2"),
            model("c", "gpu0; cpu:0", utilization=0.8),
            model("d", "2"),
        ]
    )
    shares = {name: [placement.gpu_memory_utilization for placement in placed] for name, placed in found.items()}
    assert shares == {"a": [0.25, None], "b": [0.3, None], "c": [0.25, None], "d": []}


def test_models_that_find_the_same_gpu_share_its_memory() -> None:
    """Two models built without --instances each claimed nine tenths of the only GPU: which one started was luck."""
    torch = model("a", "1", engine="torch")
    assert utilizations_of([torch, model("b", "1", engine="tensorrt")]) == {"a": 0.45, "b": 0.45}
    unequal = utilizations_of([torch, model("b", "2", 0.3, engine="torch")])
    assert unequal == {"a": 0.675, "b": 0.225}, "in the proportion that was asked for"
    ranks = [model("a", "1", engine="torch", tensor_parallel=2), model("b", "gpu1"), model("c", "gpu2")]
    assert utilizations_of(ranks) == {"a": 0.45, "b": 0.9, "c": 0.9}
    placed = placements_of(ranks)
    assert [placed[name][0].gpu_memory_utilization for name in "bc"] == [0.45, None]


def test_a_model_on_several_machines_has_gpus_of_each() -> None:
    """Two machines of two GPUs: all four were taken from the first, and a model on its third was refused."""
    cut = {"engine": "torch", "tensor_parallel": 2, "pipeline_parallel": 2, "launcher": "external", "nodes": 2}
    beside = model("b", "gpu2 gpu_memory_utilization=0.9")
    assert utilizations_of([model("a", "1", **cut), beside]) == {"a": 0.9, "b": 0.9}
    assert utilizations_of([model("a", "1", **cut), model("b", "1", engine="torch")]) == {"a": 0.45, "b": 0.45}


def test_gpus_that_ray_chooses_are_not_taken_from_this_machine() -> None:
    """A model beside one of Ray's had half of a GPU, and Ray's half of every card of the cluster."""
    far = model("a", "1", engine="torch", tensor_parallel=2, launcher="ray")
    assert utilizations_of([far, model("b", "gpu0"), model("c", "gpu1")]) == {"a": 0.9, "b": 0.9, "c": 0.9}
    assert placements_of([far, model("b", "gpu0")])["b"][0].gpu_memory_utilization is None


def test_a_second_model_that_machines_join_is_refused() -> None:
    """It was built, and `join` and `node` then found two."""
    cut = {"engine": "torch", "tensor_parallel": 2, "launcher": "external"}
    others = [model("c", "1"), model("d", "1", engine="torch", tensor_parallel=2)]
    placements_of([model("a", "1", **cut), *others])
    with pytest.raises(ConfigError, match=r"launcher='external': a and b would both be joined"):
        placements_of([model("a", "1", **cut), *others, model("b", "1", **cut, rank_port=29601)])


@pytest.mark.parametrize("launcher", ["external", "ray"])
@pytest.mark.parametrize("devices", ["cpu:0-1", "cpu", "gpu0,1"])
def test_devices_of_one_machine_are_not_those_of_others(tmp_path: Path, launcher: str, devices: str) -> None:
    """The first machine's ranks were held to its cores, those of the others were not."""
    serving = ServingOptions(instances=devices, launcher=launcher, tensor_parallel=2)
    engine = EngineOptions(engine="torch")
    options = BuildOptions(checkpoint=tmp_path, repository=tmp_path, name="m", engine=engine, serving=serving)
    with pytest.raises(ConfigError, match=f"instances={devices}: launcher {launcher} uses each machine's"):
        engines_of(options)


@pytest.mark.parametrize(
    "models",
    [
        [model("a", "2", engine="torch")],
        [model("a", "1", 0.6, engine="torch"), model("b", "1", 0.4, engine="torch")],
        [model("a", "1", engine="torch"), model("b", "1", engine="openvino"), model("c", "cpu:0")],
        [model("a", "1", 0.5, engine="torch"), model("b", "gpu0 gpu_memory_utilization=0.5")],
    ],
)
def test_what_fits_a_gpu_stays_as_it_was_asked_for(models: list[ModelRecord]) -> None:
    """Whoever had given two models their parts would have found them halved."""
    assert utilizations_of(models) == {one.name: one.serving.gpu_memory_utilization for one in models}


def test_a_model_that_finds_a_gpu_on_which_nothing_is_left_is_refused() -> None:
    """It would have started, or not, with what the other one happened not to use."""
    full = model("a", "gpu0 gpu_memory_utilization=0.95")
    with pytest.raises(ConfigError, match=r"gpu0 of a, b: gpu_memory_utilization=0\.95 of it is promised already"):
        utilizations_of([full, model("b", "1", engine="torch")])


def test_a_second_model_changes_what_the_first_is_told() -> None:
    """Shares were worked out for the model that was built, and the other's file said what it had been."""
    from pageflight_build.repository import deployments

    both = deployments([model("a", "1", engine="torch"), model("b", "1", engine="torch")])
    told = [model_configs(one)[f"{name}_engine"].parameters["gpu_memory_utilization"] for name, one in both.items()]
    assert [parameter.string_value for parameter in told] == ["0.45", "0.45"]


@pytest.mark.parametrize(
    "instances",
    [
        "gpu0 gpu_memory_utilization=0.6; gpu0 gpu_memory_utilization=0.5",
        "gpu0 gpu_memory_utilization=0.5; gpu0 gpu_memory_utilization=0.45",  # the other model gets nothing
    ],
)
def test_a_gpu_is_not_promised_more_than_once(instances: str) -> None:
    with pytest.raises(ConfigError, match=r"gpu0 of a.*promised already"):
        placements_of([model("a", instances), *([model("b", "gpu0")] if "0.45" in instances else [])])


def test_triton_is_told_of_one_group_for_each_instance() -> None:
    placements = tuple(
        Placement(devices=DeviceSet.parse(text), engine_dir="1/artifacts", tensor_parallel=degree)
        for text, degree in [("gpu1", None), ("gpu2,3", 2), ("cpu:0-3", None), ("gpu1", None)]
    )
    configs = model_configs(Deployment(name="m", instances=4, placements=placements))
    groups = configs["engine"].instance_group
    kinds = [type(group).Kind.Name(group.kind) for group in groups]
    assert kinds == ["KIND_GPU", "KIND_MODEL", "KIND_CPU", "KIND_GPU"]
    assert [list(group.gpus) for group in groups] == [[1], [], [], [1]]
    assert [group.name for group in groups] == ["gpu1", "gpu2_3", "cpu0-3", "gpu1_3"]
    assert all(group.count == 1 for group in groups)
    resources = [[resource.name for resource in group.rate_limiter.resources] for group in groups]
    assert resources == [["gpu1"], ["gpu2", "gpu3"], ["cpu0", "cpu1", "cpu2", "cpu3"], ["gpu1"]]
    placed = configs["engine"].parameters["placement"].string_value
    assert placed.startswith(
        "gpu1 engine_dir=engine/1/artifacts; gpu2,3 engine_dir=engine/1/artifacts tensor_parallel=2;"
    )
    for name in ("m", "m_unary"):
        (group,) = configs[name].instance_group
        assert group.count == 4 and group.kind == group.KIND_CPU
        assert configs[name].parameters["engine_instances"].string_value == "4"


def test_each_distinct_engine_is_built_once_and_kept(tmp_path: Path) -> None:
    """fp32 on one set of cores, bf16 on two others: two engines for three instances; asked for in another order, and
    with one more, only that one is made."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    repository = tmp_path / "repo"

    def built(instances: str) -> BuildResult:
        return build(
            BuildOptions(
                checkpoint=checkpoint,
                repository=repository,
                name="x",
                engine=EngineOptions(dtype="fp32"),
                serving=ServingOptions(instances=instances),
            )
        )

    def engines() -> dict[str, tuple[str, int]]:
        """By placement: precision and the file of the weights."""
        text = (repository / "engine" / "config.pbtxt").read_text()
        placed = re.search(r'key: "placement"\s+value {\s+string_value: "([^"]*)"', text)
        assert placed is not None
        found = {}
        for placement in parse_placements("placement", placed[1]):
            folder = repository / placement.engine_dir
            found[str(placement.devices)] = (
                EngineManifest.read(folder).dtype,
                (folder / "model.safetensors").stat().st_ino,
            )
        return found

    first = built("cpu:0; cpu:1 dtype=bf16; cpu:2-3 dtype=bf16")
    before = engines()
    assert [dtype for dtype, _ in before.values()] == ["fp32", "bf16", "bf16"]
    assert first.manifest.dtype == "fp32" and before["cpu:1"] == before["cpu:2-3"]
    assert built("cpu:0; cpu:1 dtype=bf16; cpu:2-3 dtype=bf16").reused
    built("cpu:1 dtype=bf16; cpu:0; cpu:2 dtype=int8")
    after = engines()
    assert after["cpu:0"] == before["cpu:0"] and after["cpu:1"] == before["cpu:1"]
    assert after["cpu:2"][0] == "int8"
    assert len(find_engines(repository)) == 3
    assert engine_named(repository, None) == repository / "engine" / "1" / "artifacts"
