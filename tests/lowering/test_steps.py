"""How a compiled model behaves between start and wait."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pageflight.core.errors import ConfigError


def test_waiting_leaves_the_interpreter_to_other_threads(workshop, random_ids):
    """A wait that keeps the interpreter lock stalls every other thread of the process for a whole step."""
    driver = workshop.driver("quantisable", "openvino")
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    model, wait, during = driver.model, driver.model.wait, []

    def counting_wait():
        before = counted[0]
        logits = wait()
        during.append(counted[0] - before)
        return logits

    thread = threading.Thread(target=count)
    thread.start()
    model.wait = counting_wait
    try:
        driver.step({name: random_ids(500, i) for i, name in enumerate("abc")})
    finally:
        del model.wait
        stop.set()
        thread.join()
    assert during[0] > 1000


def test_copying_several_blocks_at_once_copies_each(workshop, random_ids, lowering):
    """Copies of one step are independent of each other."""
    driver = workshop.driver("gqa", lowering)
    driver.step({"a": random_ids(40, 1), "b": random_ids(50, 2)})
    for name in "ab":
        driver.tables[name + "2"] = [driver.free.pop() for _ in driver.tables[name]]
        driver.tokens[name + "2"], driver.past[name + "2"] = list(driver.tokens[name]), driver.past[name]
    sources = np.array(driver.tables["a"] + driver.tables["b"], np.int32)
    driver.model.copy_blocks(sources, np.array(driver.tables["a2"] + driver.tables["b2"], np.int32))
    logits = driver.step({"a": [5], "a2": [5], "b": [6], "b2": [6]})
    np.testing.assert_allclose(logits["a"], logits["a2"], atol=1e-5)
    np.testing.assert_allclose(logits["b"], logits["b2"], atol=1e-5)
    assert np.abs(logits["a"] - logits["b"]).max() > 0.1


@pytest.mark.parametrize("kv_dtype", ["fp32", "u8"])
def test_blocks_come_back_from_the_host_as_they_went(workshop, random_ids, lowering, kv_dtype):
    """Blocks that were overwritten on the device meanwhile: whatever is not copied, a layer or a scale, shows."""
    driver = workshop.driver("gqa", lowering, kv_dtype=kv_dtype)
    driver.step({"a": random_ids(75, 1), "b": random_ids(40, 2)})
    blocks = np.array(driver.tables["a"] + driver.tables["b"], np.int32)
    slots = np.array([4, 2, 5, 0, 1], np.int32)[: blocks.size]
    driver.model.copy_out(blocks, slots)
    expected = driver.step({"a": [5], "b": [6]})
    driver.forget()
    driver.step({"c": random_ids(75, 3), "d": random_ids(40, 4), "e": random_ids(75, 5)})
    other = [driver.free.pop() for _ in blocks]
    driver.model.copy_in(slots, np.array(other, np.int32))
    driver.tables["a"], driver.tables["b"] = other[:3], other[3:]
    for name, length, seed in (("a", 75, 1), ("b", 40, 2)):
        driver.tokens[name], driver.past[name] = random_ids(length, seed), length
    logits = driver.step({"a": [5], "b": [6]})
    for name in "ab":
        np.testing.assert_array_equal(logits[name], expected[name])


def test_a_block_counts_its_bytes(workshop, lowering):
    """Capacity is computed from this number: K and V, all layers, scales included."""
    model = workshop.driver("gqa", lowering).model
    assert model.kv_bytes_per_block == 2 * 3 * 2 * 32 * 16 * 4
    assert model.block_size == 32


def test_more_blocks_than_memory_are_refused(workshop, lowering):
    """The process died instead of naming the number."""
    from pageflight.lowering import registry

    target = registry.get(lowering)
    model = target.load(workshop.engine("gqa", target, "fp32", "fp32"), num_threads=1)
    with pytest.raises(ConfigError, match="blocks"):
        model.allocate(1 << 40)
    model.close()


def test_contexts_that_grow_seldom_raise_the_plugins_bound(workshop, random_ids):
    """Every block by which the longest context grew had the attention of all layers compiled anew: 125 times for a
    prompt of 4,000 tokens. Where the bound is higher than the context, loops would run for nothing."""
    driver = workshop.driver("gqa", "openvino")
    bounds = []

    def step(name, ids):
        driver.step({name: ids})
        bounds.append(int(driver.model._request.get_tensor("max_context_len").data))
        assert bounds[-1] >= driver.past[name]

    step("a", random_ids(40, 1))
    while driver.past["a"] < 440:
        step("a", random_ids(10, driver.past["a"]))
    raised = [new for at, new in enumerate(bounds) if new > max(bounds[:at], default=0) and new != 40 + 10 * at]
    assert len(raised) <= 6 and max(bounds, default=0) < 1.5 * driver.past["a"] + 32
    step("b", random_ids(8, 2))
    assert bounds[-1] == 8
