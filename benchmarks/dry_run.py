"""Presets of grpo_llm.py without their model and data: random weights of the same architecture, a few made-up rows.

    python benchmarks/grpo_llm.py --preset paper --dry-run

Takes the path of a real run through loading, prompts, rewards, trainer and optimizers, in seconds on a CPU and without
a network, so that a slip costs no hours of a GPU. What it can't try: the names on the hub, memory, and vLLM, whose
options are only checked by TRL's configuration.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Tied as theirs are; config and model class are those that the hub's config.json names.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2", {"tie_word_embeddings": True}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("Qwen2", {"tie_word_embeddings": False}),
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# the columns of the data sets that presets name, and an answer as theirs look
COLUMNS: dict[str, dict[str, str]] = {
    "openai/gsm8k": {"question": "What is {a} plus {b}?", "answer": "It is {a} + {b}.\n#### {c}"},
    "agentica-org/DeepScaleR-Preview-Dataset": {
        "problem": "Compute ${a} + {b}$.", "answer": "{c}", "solution": "The sum is $\\boxed{{{c}}}$."
    },
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = 12  # two cycles, of five steps or, where two learn from the same completions, of six: the second may jump


def tiny_model(name: str, folder: Path) -> None:
    """A folder that `from_pretrained` loads: a few thousand random weights, a tokenizer of single bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT
    )
    family, more = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(fast), eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, **SIZES, **more
    )
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def tiny(preset: Any, folder: Path) -> Any:
    """The preset with stand-ins for model and data, small batches and short completions; the rest is as it was."""
    tiny_model(preset.model, folder / "model")
    tasks = {}
    for task, (options, tokens, chat) in preset.tasks.items():
        place = folder / task.replace("/", "-")
        place.mkdir(parents=True)
        rows = [{"a": a, "b": b, "c": a + b} for a in range(2, 8) for b in range(2, 8)]
        lines = [{column: text.format(**row) for column, text in COLUMNS[task].items()} for row in rows]
        (place / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks[str(place)] = (options, min(tokens, 8), chat)
    return replace(
        preset, model=str(folder / "model"), tasks=tasks, steps=STEPS, prompts=4, group=2,
        micro_batch=min(preset.micro_batch, 4),
    )  # fmt: skip
