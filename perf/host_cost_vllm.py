"""vLLM's V1 scheduler alone, for `host_cost.py`; runs under an interpreter that has vLLM.

    PYTHON perf/host_cost_vllm.py NUM_RUNNING PROMPT_LEN NUM_STEPS BLOCK_SIZE

Prefix cache on, random ids, pure decode steps with invented sampled ids. Prints one line of JSON: the median of
`schedule()` + `update_from_output()` in microseconds.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

VOCAB_SIZE = 8_000
MAX_LEN = 8_192
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LEN,
    "torch_dtype": "bfloat16",
}


def make_scheduler(model: str, num_running: int, num_blocks: int, block_size: int) -> Scheduler:
    model_config = ModelConfig(model=model, dtype="bfloat16", seed=0, max_model_len=MAX_LEN, skip_tokenizer_init=True)
    scheduler_config = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=MAX_LEN,
        max_model_len=MAX_LEN,
        is_encoder_decoder=False,
        enable_chunked_prefill=True,
        async_scheduling=False,
    )
    cache_config = CacheConfig(block_size=block_size, enable_prefix_caching=True, prefix_caching_hash_algo="sha256")
    cache_config.num_gpu_blocks = num_blocks
    config = VllmConfig(model_config=model_config, scheduler_config=scheduler_config, cache_config=cache_config)
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    return Scheduler(
        vllm_config=config,
        kv_cache_config=groups,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        log_stats=True,
    )


def main() -> int:
    num_running, prompt_len, num_steps, block_size = map(int, sys.argv[1:5])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE))
        num_blocks = num_running * ((prompt_len + num_steps) // block_size + 8) + 1
        scheduler = make_scheduler(folder, num_running, num_blocks, block_size)
    numbers = random.Random(5)
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(block_size, hash_function)
    requests = []
    for index in range(num_running):
        sampling = SamplingParams(max_tokens=100_000, ignore_eos=True, temperature=0.0)
        ids = numbers.choices(range(10, VOCAB_SIZE), k=prompt_len)
        requests.append(
            Request(
                request_id=f"request-{index}",
                prompt_token_ids=ids,
                sampling_params=sampling,
                pooling_params=None,
                block_hasher=hasher,
            )
        )
        scheduler.add_request(requests[-1])

    def turn() -> tuple[float, int]:
        begin_s = time.perf_counter()
        scheduled = scheduler.schedule()
        scheduled_s = time.perf_counter()
        names = list(scheduled.num_scheduled_tokens)
        sampled = [
            [numbers.randrange(10, VOCAB_SIZE)] if scheduler.requests[name].num_computed_tokens >= prompt_len else []
            for name in names
        ]
        output = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        )
        made_s = time.perf_counter()
        scheduler.update_from_output(scheduled, output)
        return scheduled_s - begin_s + time.perf_counter() - made_s, scheduled.total_num_scheduled_tokens

    while any(request.num_computed_tokens < prompt_len for request in requests):
        turn()
    gc.collect()
    gc.freeze()
    times = []
    for _ in range(num_steps):
        seconds, num_tokens = turn()
        assert num_tokens == num_running, f"{num_tokens} tokens scheduled for {num_running} sequences"
        times.append(1e6 * seconds)
    print(json.dumps({"median_us": statistics.median(times), "mean_us": statistics.fmean(times)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
