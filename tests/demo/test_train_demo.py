import subprocess
import sys
from pathlib import Path

import pytest
from demo_files import Perplexity, measure_perplexity, read_sample

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "build" / "demo_checkpoint"


def front_matter(folder: Path) -> dict[str, str]:
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_a_few_steps_write_a_whole_checkpoint_whose_card_is_true(tmp_path: Path) -> None:
    """Weights written under names that only the trainer knew; a card with figures of another run."""
    command = [sys.executable, str(ROOT / "scripts" / "train_demo.py"), "--tiny", "--steps", "4", "--max-files", "4"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sample = [file.text for file in read_sample(tmp_path)]
    measured = measure_perplexity(tmp_path, sample, window=128)
    assert f"{measured.per_token:.4f}" == front_matter(tmp_path)["sample_perplexity"]
    assert 2 < measured.per_token < 512  # better than guessing among 512 tokens, even after four steps


def test_the_committed_checkpoint_keeps_the_promise_of_its_card() -> None:
    """The card's perplexity is what quantised weights are judged by: it must be that of the files beside it."""
    sample = [file.text for file in read_sample(DEMO)]
    assert sum(len(text.encode()) for text in sample) > 50_000
    measured = measure_perplexity(DEMO, sample, window=1024)
    card = front_matter(DEMO)
    assert measured.per_token == pytest.approx(float(card["sample_perplexity"]), rel=1e-3)
    assert measured.per_byte == pytest.approx(float(card["sample_perplexity_per_byte"]), rel=1e-3)


def test_the_committed_checkpoint_is_small_and_complete() -> None:
    """It is in every clone, and the first thing that anyone serves."""
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert sum(sizes.values()) <= 12_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sizes.keys()
    assert {"generation_config.json", "README.md"} <= sizes.keys()


def test_the_committed_checkpoint_ends_a_function_in_valid_python() -> None:
    """A model that never says </s> fills max_tokens in every demonstration."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO)
    prompt = "def read_file(path):\n"
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=200)[0].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert ids[-1] == tokenizer.eos_token_id, text
    compile(text, "completion", "exec")


def test_the_chat_template_reaches_the_tokenizer() -> None:
    """transformers 5 writes templates to a file of their own, where older readers do not look."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": "user", "content": "Write a Python function add: Adds two numbers."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>\nWrite a Python function add: Adds two numbers.\n<|assistant|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [ids[0], ids[1]] == [0, tokenizer.convert_tokens_to_ids("<|user|>")]


def test_perplexity_per_byte_is_that_of_all_bytes() -> None:
    """exp of nats per token and of nats per byte are different numbers, easily mistaken for each other."""
    perplexity = Perplexity(nll=200.0, num_tokens=100, num_bytes=400)
    assert perplexity.per_token == pytest.approx(7.389056)
    assert perplexity.per_byte == pytest.approx(1.648721)
