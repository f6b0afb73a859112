"""What stands around a model's forward pass: each is watched, and left as it was, or refused with a reason.

A model is found by its first training forward pass, its inputs are remembered in the last step of a cycle, and it is
run on them again within `step`, in eval mode.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import random
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from helpers import assert_same
from test_trust import Passes, batch, llama
from torch import Tensor, nn

from extraopt import ExtraAdam, JumpReport
from extraopt.positions import Positions
from extraopt.wrap import Extra

EVERY = 3
OPEN: dict[str, Any] = {"lr": 1e-3, "extra_every": EVERY, "extra_gate": None, "extra_fall": 0.3}


def observed(model: nn.Module) -> dict[str, Any]:
    """All of a model, and around it, that a look at its outputs might change, but for the weights."""
    return {
        "rng": torch.get_rng_state(),
        "other rng": (random.getstate(), str(numpy.random.get_state())),
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "same buffers": [id(b) for b in model.buffers()],
        "modes": {name: module.training for name, module in model.named_modules()},
        "grads": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "asks": [p.requires_grad for p in model.parameters()],
        "grad mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }


def loss_of(output: Any) -> Tensor:
    return output["loss"] if isinstance(output, dict) else output.loss


def train(
    model: Any, optimizer: Any, inputs: Callable[[int], dict[str, Any]] = batch, steps: int = 3 * EVERY,
    loss: Callable[[Any], Tensor] = loss_of, first: int = 0, forward: Any = nullcontext, around: Any = nullcontext,
) -> list[JumpReport]:  # fmt: skip
    """A plain loop; what the ends of cycles did. Each step leaves as it was all that it should."""
    reports = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        with around():
            with forward():
                output = model(**inputs(step))
            loss(output).backward()
            before, last = observed(model), optimizer.last_jump
            optimizer.step()
            assert_same(observed(model), before)
        if optimizer.last_jump is not last:
            reports.append(optimizer.last_jump)
    return reports


def looked_at(logits: Tensor, rows: Tensor) -> Tensor:
    return logits[rows]


def seen_by(optimizer: ExtraAdam, model: nn.Module, *arguments: Any, **named: Any) -> Tensor:
    """The logits that a trial looks at, of these inputs."""
    watch = optimizer._trust.watch
    watch.armed = True
    model(*arguments, **named)
    with watch.undisturbed():
        return looked_at(*watch.run(watch.positions()))


def watched(reports: list[JumpReport], jumps: int = 3) -> None:
    assert len(reports) == jumps
    for report in reports:
        assert report.length > 0 and 0 < report.kl <= 0.02 and 0 < report.fall <= 0.3, report


@pytest.fixture(autouse=True)
def warnings_fail() -> Iterator[None]:
    """And no optimizer of an earlier test still looks for its model."""
    torch.nn.modules.module._global_forward_pre_hooks.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="extraopt")
        yield


# --- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicitly", [False, True], ids=["found", "given"])
def test_a_plain_loop(explicitly: bool) -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if explicitly:
        optimizer.watch(model)
    watched(train(model, optimizer))


def test_another_optimizer_within_extra() -> None:
    model = llama()
    optimizer = Extra(torch.optim.SGD(model.parameters(), lr=0.01), extra_every=EVERY, extra_gate=None, extra_fall=0.3)
    watched(train(model, optimizer))


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_around_the_forward_pass() -> None:
    """Its weights are float32: outputs that were computed in another dtype than in training are others."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    dtypes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append((output.dtype, module.training)))
    watched(train(model, optimizer, forward=bfloat16))
    assert set(dtypes) == {(torch.bfloat16, True), (torch.bfloat16, False)}


def test_autocast_within_the_forward_pass() -> None:
    """As accelerate has it, which replaces the `forward` of the instance."""
    model = llama()
    forward = model.forward

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with bfloat16():
            return forward(*args, **kwargs)

    autocast_forward.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = autocast_forward
    dtypes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("where", ["around the step", "in the forward pass, too"])
def test_a_step_within_autocast_sees_no_change(where: str) -> None:
    """Autocast keeps its casts of the weights: each length would give the outputs of the first, and a KL of 0."""
    model = llama()
    forward = bfloat16 if where != "around the step" else nullcontext
    watched(train(model, ExtraAdam(model.parameters(), **OPEN), forward=forward, around=bfloat16))


@pytest.mark.parametrize("last", ["labels", "none of them valid"])
def test_accumulated_gradients(last: str) -> None:
    """The last micro-batch is looked at; where it has no valid label, one before it."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    for step in range(2 * EVERY):
        optimizer.zero_grad()
        for micro in range(3):
            inputs = batch(3 * step + micro)
            if micro == 2 and last != "labels":
                inputs["labels"] = torch.full_like(inputs["labels"], -100)
            output = model(**inputs)
            (output.loss if micro < 2 or last == "labels" else output.logits.sum() * 0).backward()
        if step % EVERY == 2:
            named = optimizer._trust.watch._captured.named
            assert_same(named, batch(3 * step + (2 if last == "labels" else 1)))
        optimizer.step()
    assert 0 < optimizer.last_jump.kl <= 0.02


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))


def test_a_loop_that_trains_in_eval_mode() -> None:
    model = llama().eval()
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))
    assert not model.training


def test_generation_and_evaluation_between_training_passes() -> None:
    """Without gradients, in train mode and in eval mode, before the first training pass and after the last one."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)

    def elsewhere() -> None:
        with torch.no_grad():
            model.generate(batch(7)["input_ids"], max_new_tokens=2, do_sample=True)
            model.eval()(**batch(8))
            model.train()(input_ids=batch(9)["input_ids"][:, :2])

    for step in range(3 * EVERY):
        elsewhere()
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        elsewhere()
        if step % EVERY == 2:
            assert_same(optimizer._trust.watch._captured.named, batch(step))
        before = observed(model)
        optimizer.step()
        assert_same(observed(model), before)
    assert 0 < optimizer.last_jump.kl <= 0.02


def test_a_closure_that_runs_the_model_within_the_step() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    for step in range(3 * EVERY):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = model(**batch(step)).loss
            loss.backward()
            return loss  # type: ignore[no-any-return]

        optimizer.step(closure)
    assert 0 < optimizer.last_jump.kl <= 0.02


def test_arguments_that_only_a_loss_needs() -> None:
    """As trainers pass them, and TRL's `fused_lm_head`, with which its models return no logits."""
    model = llama()
    forward, seen = model.forward, []

    def patched(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        seen.append({"fused_lm_head": fused_lm_head, **kwargs})
        output = forward(*args, **kwargs)
        if fused_lm_head:
            output.logits = None
        return output

    patched.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = patched
    extra = {"num_items_in_batch": torch.tensor(12), "fused_lm_head": True, "use_cache": False}
    watched(train(model, ExtraAdam(model.parameters(), **OPEN), lambda step: {**batch(step), **extra}))
    again = [kwargs for kwargs in seen if not kwargs["fused_lm_head"]]
    assert len(again) >= 6 and not any({"labels", "num_items_in_batch"} & set(kwargs) for kwargs in again)
    assert not any(kwargs["use_cache"] for kwargs in again)


class NoLogits:
    """What takes their place where there are labels: whoever touches it is told how to have them."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError("set UNSLOTH_RETURN_LOGITS")


@pytest.mark.parametrize("stays", [False, True], ids=["put back by the loss", "left on"])
def test_hidden_states_by_the_name_of_logits_are_compared(stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """unsloth's contract: by a flag `.logits` are hidden states, for its own loss; indices to keep are not heard of."""
    model = llama(vocabulary=24)
    forward, flag = model.forward, "UNSLOTH_RETURN_HIDDEN_STATES"
    monkeypatch.setenv(flag, "0")

    def patched(input_ids: Tensor, labels: Any = None, logits_to_keep: Any = 0, **named: Any) -> Any:
        output = forward(input_ids, labels=labels, output_hidden_states=True, **named)
        if os.environ[flag] == "1":
            output.logits = output.hidden_states[-1]
        elif labels is not None:
            output.logits = NoLogits()
        return output

    patched.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = patched
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-4})

    def inputs(step: int) -> dict[str, Any]:
        os.environ[flag] = "1"
        return {"input_ids": batch(step)["input_ids"]}

    def loss(output: Any) -> Tensor:
        logits = model.lm_head(output.logits)
        os.environ[flag] = "01"[stays]
        return -logits.log_softmax(-1)[..., 3].mean()  # type: ignore[no-any-return]

    if stays:
        with pytest.warns(RuntimeWarning, match=r"columns, which are no distribution .*watch\(model, logits"):
            reports = train(model, optimizer, inputs, loss=loss)
        assert [report.length for report in reports] == [20] * 3
    else:
        watched(train(model, optimizer, inputs, loss=loss))
        assert seen_by(optimizer, model, **batch(0)).shape[-1] == model.config.vocab_size


def test_hooks_of_the_user_fire_and_forwards_are_counted() -> None:
    model = llama()
    passes = Passes(model)
    after: list[bool] = []
    model.register_forward_hook(lambda module, *_: after.append(module.training))
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))
    assert passes.count == len(after) and after.count(True) == 3 * EVERY and after.count(False) >= 6


# --- compiled models -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_recompiles() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A language model of few parts, whose graph has no breaks."""

    def __init__(self, inner: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 12)
        self.body = inner(nn.Sequential(nn.Linear(12, 24), nn.Dropout(0.3), nn.Tanh(), nn.Linear(24, 12)))
        self.head = nn.Linear(12, 16)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(self.embed(input_ids)))
        made = {"logits": logits}
        if labels is not None:
            made["loss"] = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return made


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model(no_recompiles: None, fullgraph: bool) -> None:
    model = torch.compile(Net(), backend="eager", fullgraph=fullgraph)
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))


def test_a_model_that_is_given_before_it_is_compiled(no_recompiles: None) -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    optimizer.watch(model)
    watched(train(compiled(model), optimizer))


@pytest.mark.parametrize("explicitly", [False, True], ids=["found", "given"])
def test_a_model_that_is_compiled_in_place(no_recompiles: None, explicitly: bool) -> None:
    model = compiled_in_place(Net())
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if explicitly:
        optimizer.watch(model)
    watched(train(model, optimizer))


@pytest.mark.parametrize("how", [compiled, compiled_in_place])
def test_a_part_that_is_compiled(no_recompiles: None, how: Callable[[nn.Module], nn.Module]) -> None:
    model = Net(how)
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))


def test_a_step_that_is_compiled(no_recompiles: None) -> None:
    torch._dynamo.config.error_on_recompile = False  # AdamW's own step, by the learning rate
    model = Net()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3 * EVERY):
        optimizer.zero_grad()
        model(**batch(i))["loss"].backward()
        step()
    assert 0 < optimizer.last_jump.kl <= 0.02


# --- kinds of models -------------------------------------------------------------------------------------------------


def adapter(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))


@pytest.mark.parametrize("watch", ["found", "the adapter's model", "the model within"])
@pytest.mark.parametrize("calls", [True, False], ids=["now", "until 0.20"])
def test_an_adapter(watch: str, calls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT until 0.20 passes over the hooks of the model within: one warning, where that is what is watched."""
    model = adapter(target_modules=["q_proj", "v_proj"])
    if not calls:
        tuner = next(kind for kind in type(model.base_model).__mro__ if kind.__name__ == "BaseTuner")
        monkeypatch.setattr(tuner, "forward", lambda self, *args, **named: self.model.forward(*args, **named))
    optimizer = ExtraAdam([p for p in model.parameters() if p.requires_grad], **{**OPEN, "lr": 1e-2})
    if watch != "found":
        optimizer.watch(model if watch == "the adapter's model" else model.base_model.model)
    base = {n: p.clone() for n, p in model.state_dict().items() if "lora" not in n}
    seen = calls or watch != "the model within"
    with nullcontext() if seen else pytest.warns(RuntimeWarning, match="extraopt.*watch"):
        reports = train(model, optimizer)
    assert [r.kl > 0 for r in reports[1:]] == [seen] * 2
    assert_same({n: p for n, p in model.state_dict().items() if "lora" not in n}, base)


def gpt_neox() -> Any:
    """PEFT finds that its forward takes `logits_to_keep`, as it does not of llama's."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=16, pad_token_id=0, **sizes))


@pytest.mark.parametrize("base", [llama, gpt_neox])
def test_virtual_tokens_of_prompt_tuning(base: Callable[[], Any]) -> None:
    """They come before the tokens, and the logits are so much longer. A prompt was looked at for a completion."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    optimizer = ExtraAdam([p for p in model.parameters() if p.requires_grad], **{**OPEN, "lr": 0.1})
    watched(train(model, optimizer)[1:], 2)
    optimizer._trust.watch.armed = True
    model(**batch(0))
    with optimizer._trust.watch.undisturbed():
        rows = looked_at(*optimizer._trust.watch.run(optimizer._trust.watch.positions()))
    with torch.no_grad():
        logits = model.eval()(**batch(0)).logits[:, 3:-1]
    torch.testing.assert_close(rows, logits[batch(0)["labels"][:, 1:] != -100])


def packed(step: int) -> dict[str, Any]:
    """Rows one after the other, told apart by their positions alone, which a model heeds where it keeps no cache."""
    ids = batch(step)["input_ids"].reshape(1, -1)
    positions = torch.arange(8).repeat(1, 2)
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": None, "use_cache": False}


def left_padded(step: int) -> dict[str, Any]:
    ids, mask = batch(step)["input_ids"], torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("inputs", [packed, left_padded])
def test_rows_that_are_packed_or_padded(inputs: Callable[[int], dict[str, Any]]) -> None:
    """Without labels: positions that the mask shows, whose next token it shows too."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)

    def loss(output: Any) -> Tensor:
        return output.logits.logsumexp(-1).mean() + output.logits[..., 3].mean()

    watched(train(model, optimizer, inputs, loss=loss))
    rows = seen_by(optimizer, model, **inputs(0))
    with torch.no_grad():
        logits = model.eval()(**inputs(0)).logits
    if inputs is packed:
        wanted = logits[0, :-1][packed(0)["labels"][0, 1:] != -100]
    else:  # the first token that is shown is a prediction, too
        wanted = torch.cat([logits[0, 4:7], logits[1, :7]])
    torch.testing.assert_close(rows, wanted)


LAST = torch.arange(8) > 3
# what training asks for, and the positions that this is
KEPT: dict[str, tuple[Any, Tensor]] = {
    "the last ones": (4, LAST),
    "a tensor of how many": (torch.tensor(4), LAST),
    "more than there are": (100, torch.ones(8, dtype=torch.bool)),
    "slice": (slice(-4, None), LAST),
    "list": ([3, 4, 6], torch.tensor([0, 0, 0, 1, 1, 0, 1, 0]).bool()),
    "indices": (torch.tensor([3, 4, -2]), torch.tensor([0, 0, 0, 1, 1, 0, 1, 0]).bool()),
    "indices by row": (
        torch.tensor([[1, 2], [5, 6]]),
        torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]]).bool(),
    ),
    "bool": (LAST, LAST),
    "bool by row": (torch.arange(16).view(2, 8) % 3 == 0, torch.arange(16).view(2, 8) % 3 == 0),
}


class Calls(nn.Module):
    """A wrapper that passes on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, **named: Any) -> Any:
        return self.inner(**named)


def asked_for(output: Any) -> Tensor:
    return output.logits.logsumexp(-1).mean() + output.logits[..., 3].mean()


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return getattr(model, "inner", model).eval()(input_ids=inputs["input_ids"]).logits


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("make", [llama, Calls], ids=["cut by the model", "within another"])
def test_training_that_asks_for_some_logits_only_is_guarded_by_these(keep: str, make: Callable[[], Any]) -> None:
    """As older TRL calls a model; of these positions those that are no prediction do not count."""
    asked, positions = KEPT[keep]
    model = make()
    optimizer = ExtraAdam(model.parameters(), **OPEN)

    def inputs(step: int) -> dict[str, Any]:
        ids = batch(step)["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": asked}

    watched(train(model, optimizer, inputs, loss=asked_for))
    rows = seen_by(optimizer, model, **inputs(0))
    torch.testing.assert_close(rows, logits_of(model, inputs(0))[:, :-1][positions.expand(2, 8)[:, :-1]])


@pytest.mark.parametrize("keep", [1, torch.tensor([7])], ids=["one", "its index"])
def test_training_on_what_comes_after_the_sequence_is_guarded_there(keep: Any) -> None:
    """As where the next token is the class. Nothing jumped, and nothing was said."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)

    def inputs(step: int) -> dict[str, Any]:
        return {"input_ids": batch(step)["input_ids"], "logits_to_keep": keep}

    watched(train(model, optimizer, inputs, loss=asked_for))
    torch.testing.assert_close(seen_by(optimizer, model, **inputs(0)), logits_of(model, inputs(0))[:, -1])


@pytest.mark.parametrize("rows", [2, 1])
def test_labels_that_are_cut_to_the_logits_asked_for_belong_to_these(rows: int) -> None:
    """As ms-swift trains: a number of the last ones, or bool of one row. Positions of the prompt were looked at."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    keep: Any = 5 if rows == 2 else torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1]).bool()
    of = torch.arange(12)[-5:] if rows == 2 else torch.arange(12)[keep]

    def inputs(step: int) -> dict[str, Any]:
        ids = batch(step, rows, 12)["input_ids"]
        return {"input_ids": ids, "labels": ids[:, of], "logits_to_keep": keep}

    watched(train(model, optimizer, inputs))
    rows_seen = seen_by(optimizer, model, **inputs(0))
    torch.testing.assert_close(rows_seen, logits_of(model, inputs(0))[:, of[:-1]].flatten(0, 1))


def test_an_encoder_decoder_whose_labels_are_padded_in_all_rows() -> None:
    """It makes a loss of them again, of as many logits: cut ones failed in each trial."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {**SMALL, **ENCODER, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"]}
    config = T5GemmaConfig(
        encoder=sizes, decoder={**sizes, "cross_attention_hidden_size": 16}, vocab_size=16, dropout_rate=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = T5GemmaForConditionalGeneration(config)

    def inputs(step: int) -> dict[str, Any]:
        made = seq2seq(step)
        made["labels"][:, -2:] = -100
        return made

    watched(train(model, ExtraAdam(model.parameters(), **OPEN), inputs))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_of_training_is_not_lengthened(name: str) -> None:
    """Each trial would attend to what the ones before it wrote."""
    from transformers import DynamicCache

    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    caches = [DynamicCache() for _ in range(EVERY)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="extraopt: a cycle ended without a forward pass")
        train(model, optimizer, lambda step: batch(step) | {name: caches[step], "use_cache": True}, EVERY)
    assert [cache.get_seq_length() for cache in caches] == [8] * EVERY


def test_a_model_that_needs_labels_is_given_them() -> None:
    class Needs(Calls):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    model = Needs()
    watched(train(model, ExtraAdam(model.parameters(), **OPEN)))


def test_a_mask_that_is_given_by_its_place_counts() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    ids, mask = batch(0)["input_ids"], torch.ones(2, 8, dtype=torch.long)
    mask[:, 5:] = 0
    rows = seen_by(optimizer, model, ids, mask)
    with torch.no_grad():
        logits = model.eval()(ids, mask).logits
    torch.testing.assert_close(rows, logits[:, :4].flatten(0, 1))


def test_another_method_in_place_of_forward_is_refused_in_words() -> None:
    """Lightning's DDP puts `training_step` there for one call; the forward that came after could not be called."""

    class Lit(Calls):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        def training_step(self, **named: Any) -> Any:
            return self.inner(**named)

    model = Lit()
    optimizer = ExtraAdam(model.parameters(), **OPEN)

    def step(**inputs: Any) -> Any:
        model.forward = model.training_step
        try:
            return model(**inputs)
        finally:
            del model.forward

    with pytest.warns(RuntimeWarning, match="another method was called in place of Lit's forward, as by Lightning"):
        for i in range(EVERY):
            optimizer.zero_grad()
            step(**batch(i)).loss.backward()
            optimizer.step()
    assert optimizer.last_jump.length == 20
    optimizer.watch(model.inner)
    for i in range(2 * EVERY):
        optimizer.zero_grad()
        step(**batch(i)).loss.backward()
        optimizer.step()
    assert 0 < optimizer.last_jump.kl <= 0.02


def test_a_model_of_ones_own_with_a_configuration_that_says_nothing() -> None:
    """It predicts the next token, as causal language models do, and is no encoder-decoder."""
    model = Hidden()
    model.forward = lambda input_ids, labels=None: SimpleNamespace(logits=model.head(model.embed(input_ids)))
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    inputs = batch(0)
    inputs["labels"][:, :3] = -100
    rows = seen_by(optimizer, model, **inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(rows, logits[:, :-1][inputs["labels"][:, 1:] != -100])


@pytest.mark.parametrize("room", [1, 5, 100], ids="{} positions".format)
@pytest.mark.parametrize("cuts", [True, False], ids=["cut by the model", "cut from its logits"])
def test_many_positions_are_looked_at_with_too_few_bytes(
    room: int, cuts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fixed stride, so many of both rows as there is room for."""
    model = llama()
    if not cuts:
        model.forward = lambda input_ids, labels=None: type(model).forward(model, input_ids, labels=labels)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    inputs = {key: x.repeat(1, 3)[:, :21] for key, x in batch(0).items()}
    model(**inputs)
    watch = optimizer._trust.watch
    monkeypatch.setattr(sys.modules[type(watch.positions()).__module__], "LOGITS_BYTES", room * 2 * 16 * 4)
    with watch.undisturbed():
        rows = looked_at(*watch.run(watch.positions()))
    stride = {1: 20, 5: 4, 100: 1}[room]
    with torch.no_grad():
        logits, valid = model.eval()(**inputs).logits[:, :-1:stride], (inputs["labels"] != -100)[:, 1::stride]
    torch.testing.assert_close(rows, logits[valid])
    assert 0 < len(rows) <= 2 * room


@pytest.mark.parametrize("given", [False, True], ids=["a model of unknown width", "by a function"])
def test_logits_of_any_model_are_bounded(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fixed stride, as where the model cuts them: the first ones alone would say nothing of later tokens."""
    model = Calls()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if given:
        optimizer.watch(model, logits=lambda output: output.logits)
    monkeypatch.setattr(sys.modules[Positions.__module__], "LOGITS_BYTES", 4 * 4 * 16)
    rows = seen_by(optimizer, model, **batch(0))
    logits = logits_of(model, batch(0))
    every = logits.flatten(0, 1) if given else logits[:, :-1][batch(0)["labels"][:, 1:] != -100]
    torch.testing.assert_close(rows, every[:: -(-len(every) // 4)])
    assert 1 < len(rows) <= 4


def test_labels_without_values_stop_no_forward_pass() -> None:
    """Those of fake tensors can't be looked at; the second call of a step looked whether any is valid."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    optimizer.watch(model)
    model(**batch(0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = model(**{key: mode.from_tensor(x) for key, x in batch(0).items()})
    assert output.logits.shape == (2, 8, 16)


def images(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}


def speech(step: int) -> dict[str, Any]:
    """Labels of 2 and 3 tokens to 7 frames."""
    torch.manual_seed(step)
    return {"input_values": torch.randn(2, 80), "labels": torch.tensor([[3, 5, -100], [4, 3, 7]])}


def seq2seq(step: int) -> dict[str, Any]:
    return batch(step) | {"attention_mask": torch.ones(2, 8, dtype=torch.long)}


def masked(step: int) -> dict[str, Any]:
    return batch(step) | {"attention_mask": torch.ones(2, 8, dtype=torch.long)}


def classes(step: int) -> dict[str, Any]:
    return {"input_ids": batch(step)["input_ids"], "labels": torch.tensor([0, 2])}


SMALL: dict[str, Any] = {"vocab_size": 16, "pad_token_id": 0}
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
SPEECH = {
    "conv_dim": [8], "conv_kernel": [20], "conv_stride": [10], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 1, "apply_spec_augment": False,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**SMALL, **ENCODER, "num_labels": 3}, classes),
    "encoder-decoder": ("T5ForConditionalGeneration", "T5Config", {**SMALL, **T5}, seq2seq),
    "masked": ("BertForMaskedLM", "BertConfig", {**SMALL, **ENCODER}, masked),
    "classifier of tokens": (
        "BertForTokenClassification", "BertConfig", {**SMALL, **ENCODER, "num_labels": 16}, masked,
    ),
    "images": (
        "ViTForImageClassification", "ViTConfig", {**ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 3},
        images,
    ),
    "speech": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**SMALL, **ENCODER, **SPEECH}, speech),
    "batch norm": ("ResNetForImageClassification", "ResNetConfig", RESNET, images),
}  # fmt: skip


def built(kind: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name, config, options, inputs = KINDS[kind]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)), inputs


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds(kind: str) -> None:
    model, inputs = built(kind)
    watched(train(model, ExtraAdam(model.parameters(), **OPEN), inputs))


@pytest.mark.parametrize("kind", ["encoder-decoder", "masked", "classifier of tokens"])
def test_labels_that_lie_beside_their_logits_are_shifted(kind: str) -> None:
    model, inputs = built(kind)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    model(**inputs(0))
    watch = optimizer._trust.watch
    with watch.undisturbed():
        rows = looked_at(*watch.run(watch.positions()))
    with torch.no_grad():
        wanted = model.eval()(**inputs(0)).logits[inputs(0)["labels"] != -100]
    torch.testing.assert_close(rows, wanted)


def test_frames_of_speech_are_looked_at_where_its_labels_would_lie() -> None:
    """Labels of CTC lie along nothing that the model is given: all frames count, not as many as there are labels."""
    model, inputs = built("speech")
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer, inputs)
    rows = seen_by(optimizer, model, **inputs(0))
    with torch.no_grad():
        torch.testing.assert_close(rows, model.eval()(inputs(0)["input_values"]).logits.flatten(0, 1))


@pytest.mark.parametrize("mask", [False, True])
def test_a_decoder_is_taken_for_as_long_as_its_encoder(mask: bool) -> None:
    """Without labels: its own tokens count, where its own mask shows them."""
    model, _ = built("encoder-decoder")

    def inputs(step: int) -> dict[str, Any]:
        made = {"input_ids": batch(step)["input_ids"], "decoder_input_ids": batch(step, width=5)["input_ids"]}
        shown = torch.tensor([[1] * 3 + [0] * 2, [1] * 5])
        return {**made, "attention_mask": torch.ones(2, 8), **({"decoder_attention_mask": shown} if mask else {})}

    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 3e-4})
    watched(train(model, optimizer, inputs, loss=lambda output: -output.logits.log_softmax(-1)[..., 3].mean()))
    rows = seen_by(optimizer, model, **inputs(0))
    with torch.no_grad():
        logits = model.eval()(**inputs(0)).logits
    torch.testing.assert_close(rows, torch.cat([logits[0, :3], logits[1]]) if mask else logits.flatten(0, 1))


def test_a_cache_is_lengthened_by_looking_at_it() -> None:
    """That a user gives: such a pass is no one to look at."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    cache = pytest.importorskip("transformers", reason="transformers is not installed").DynamicCache(
        config=model.config
    )
    with pytest.warns(RuntimeWarning, match="without a forward pass"):
        for step in range(EVERY):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            if step == EVERY - 1:
                optimizer._trust.watch.release()
                model(**batch(step), past_key_values=cache)
            optimizer.step()
    assert cache.get_seq_length() == 8


def test_a_batch_norm_that_is_frozen_is_thawed() -> None:
    """By `train()` of the whole model: its running mean would move from then on."""
    model, inputs = built("batch norm")
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][:2]
    for module in frozen:
        module.eval()
    before = [module.running_mean.clone() for module in frozen]
    watched(train(model, ExtraAdam(model.parameters(), **OPEN), inputs))
    assert not any(module.training for module in frozen)
    assert_same([module.running_mean for module in frozen], before)


class Counts(nn.Module):
    """Logits, and buffers that each pass writes, replaces or makes anew, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, 12), nn.Linear(12, 16)
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3), persistent=False)
        self.register_buffer("noisy", torch.zeros(()))

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.written += 1
        self.replaced = self.replaced + 1
        self.noisy.copy_(torch.rand(()))
        return SimpleNamespace(logits=self.head(self.embed(input_ids) + 0.1 * torch.randn(12)))


def test_a_model_that_counts_its_passes_and_draws_noise() -> None:
    """Experts are balanced by such counters. The same noise is drawn at each length: else it would be taken for KL."""
    model = Counts()
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-5})

    def loss(output: Any) -> Tensor:
        return -output.logits.log_softmax(-1)[..., 3].mean()

    watched(train(model, optimizer, loss=loss))
    assert model.written.tolist() == [3 * EVERY] * 3 == model.replaced.tolist()
    assert optimizer.last_jump.kl < 1e-4


class Carries(Counts):
    """Keeps things from one call for the next, draws from all dice, and is trained by a method named train."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.losses: list[Tensor] = []
        self.calls: dict[str, int] = {}
        self.seen: set[int] = set()

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embed(input_ids)
        x = x + (0 if self.state is None else 0.5 * self.state) + 0.1 * random.random() + 0.1 * numpy.random.rand()
        self.state = x.detach()
        self.losses.append(x.square().mean())
        self.calls["forward"] = self.calls.get("forward", 0) + 1
        self.seen.add(len(self.losses))
        if not self.training:
            self.made = True
        return SimpleNamespace(logits=self.head(x))


def test_what_a_model_keeps_from_call_to_call_is_that_of_a_trial() -> None:
    """A recurrent state, losses to be added up, counts: training went on from the trial's. Trials differed by them."""
    model = Carries()
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-5})
    for step in range(3 * EVERY):
        optimizer.zero_grad()
        output = model(**batch(step))
        (-output.logits.log_softmax(-1)[..., 3].mean()).backward()
        state, losses, value = model.state, model.losses, model.losses[-1]
        optimizer.step()
        assert model.state is state and model.losses is losses and not hasattr(model, "made")
        assert len(losses) == step + 1 == model.calls["forward"] == len(model.seen) and losses[-1] is value
    assert 0 < optimizer.last_jump.kl < 1e-4 and optimizer.last_jump.length > 0


def test_a_module_whose_own_train_is_a_loop_ends_the_run() -> None:
    class Loop(Counts):
        def train(self, data: Any) -> Any:  # type: ignore[override]
            return train(self, optimizer, data, loss=lambda o: -o.logits.log_softmax(-1)[..., 3].mean())

    model = Loop()
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-4})
    watched(model.train(batch))


def test_a_batch_of_a_class_of_ones_own_ends_the_run() -> None:
    class Batch(dict):
        def __init__(self, samples: Any) -> None:
            super().__init__(input_ids=torch.stack([sample.ids for sample in samples]))

    class Takes(Counts):
        def forward(self, made: Any) -> SimpleNamespace:  # type: ignore[override]
            return super().forward(**made)

    model = Takes()
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-4})

    def inputs(step: int) -> dict[str, Any]:
        return {"made": Batch([SimpleNamespace(ids=row) for row in batch(step)["input_ids"]])}

    watched(train(model, optimizer, inputs, loss=lambda o: -o.logits.log_softmax(-1)[..., 3].mean()))


def test_flex_attention_makes_a_matrix_of_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does where nothing may be compiled: of long rows the memory is not there, and no trial would succeed."""
    stances, set_stance = [], torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda of: stances.append(of) or set_stance(of))  # type: ignore[func-returns-value]
    for attention, stance in ("sdpa", "force_eager"), ("flex_attention", "default"):
        model = Counts()
        model.config = SimpleNamespace(_attn_implementation=attention)
        optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-4})
        train(model, optimizer, loss=lambda o: -o.logits.log_softmax(-1)[..., 3].mean())
        assert set(stances) == {stance}
        stances.clear()


class Both(nn.Module):
    """Logits that two matrices make alike."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(16, 16)) for _ in range(count))

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=sum(part[ids] for part in self.parts))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_of_several_optimizers_of_a_model_takes_the_whole_trust_region(count: int) -> None:
    """Muon for matrices and AdamW for the rest, or one for each parameter: KL grew as the square of their number."""
    model = Both(4)
    parameters = list(model.parameters())
    optimizers = [ExtraAdam(parameters[i::count], lr=2e-3, extra_fall=math.inf) for i in range(count)]
    ids, jumped = torch.arange(16).view(2, 8), 0
    for step in range(1, 31):
        if step % 5 == 1:
            with torch.no_grad():
                before = model(ids).logits.log_softmax(-1)
        nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), (ids * 3 % 16).flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 5 == 0:
            with torch.no_grad():
                lost = before - model(ids).logits.log_softmax(-1)
            assert float((before.exp() * lost).sum(-1).mean()) <= 0.021
            jumped += all(optimizer.last_jump.length > 0 for optimizer in optimizers)
    assert jumped == 5


def test_an_optimizer_that_was_replaced_takes_a_share_of_the_trust_region() -> None:
    """Kept by a notebook or a trainer, of the same parameters: it moves nothing beside the new one."""
    model = llama()
    before = ExtraAdam(model.parameters(), **OPEN)
    watched(train(model, before))
    after = ExtraAdam(model.parameters(), **OPEN)
    watched(train(model, after, first=99))
    assert after._trust.watch.sharers() == before._trust.watch.sharers() == 1
    other = ExtraAdam([nn.Parameter(torch.zeros(3))], **OPEN)
    other.watch(model)
    assert after._trust.watch.sharers() == 2
    other.unwatch()
    assert after._trust.watch.sharers() == 1


@pytest.mark.parametrize("output", ["tuple", "tensor", "dict"])
def test_outputs_of_the_users_own(output: str) -> None:
    class Own(Counts):
        def forward(self, input_ids: Tensor, **named: Any) -> Any:
            logits = super().forward(input_ids).logits
            return {"tuple": (None, logits), "tensor": logits, "dict": {"scores": logits}}[output]

    make: Callable[[Any], Tensor] = {
        "tuple": lambda o: o[1], "tensor": lambda o: o, "dict": lambda o: o["scores"],
    }[output]  # fmt: skip
    model = Own()
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 1e-4})
    optimizer.watch(model, logits=make)
    watched(train(model, optimizer, loss=lambda o: -make(o).log_softmax(-1)[..., 3].mean()))


# --- what can't be watched -------------------------------------------------------------------------------------------


class Bare(nn.Sequential):
    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return super().forward(input_ids)


def bare() -> nn.Module:
    torch.manual_seed(0)
    return Bare(nn.Embedding(16, 12), nn.Linear(12, 16))


class Segments(Bare):
    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=super().forward(input_ids)[:, :, None])


class Hidden(nn.Module):
    """Hidden states by the name of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.embed, self.head = nn.Embedding(16, 12), nn.Linear(12, 16)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.embed(input_ids))


class OneNumber(Bare):
    """For each sample, or for each token, of which more than one would be taken for a distribution over them."""

    def __init__(self, *parts: nn.Module, tokens: bool) -> None:
        super().__init__(*parts)
        self.tokens = tokens

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = super().forward(input_ids)[..., 0]
        return SimpleNamespace(logits=logits if self.tokens else logits.mean(1))


def regression() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    options = {**SMALL, **ENCODER, "num_labels": 1}
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**options))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bare tensors": (bare, r"no `.logits`: give watch\(model, logits"),
    "regression": (regression, r"have 1 columns, which are no distribution.*watch\(model, logits"),
    "a number a sample": (
        lambda: OneNumber(*bare(), tokens=False),
        r"one number for each sample .*watch\(model, logits",
    ),
    "a number a token": (lambda: OneNumber(*bare(), tokens=True), r"one number for each sample or token.*watch\(model"),
    "segments": (lambda: Segments(*bare()), r"have 4 dimensions.*watch\(model, logits"),
    "hidden states": (Hidden, r"have 12 columns, which are no distribution .*\(16\).*watch\(model, logits"),
    "DataParallel": (lambda: nn.DataParallel(llama()), r"throw-away copies of it: use DistributedDataParallel"),
}


def some_loss(output: Any) -> Tensor:
    return getattr(output, "logits", output).float().square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("explicitly", [False, True], ids=["found", "given"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_watched_trains_without_a_word(kind: str, explicitly: bool) -> None:
    """One warning, with the reason and what to do; jumps are short. Another process finds it out as this one did."""
    make, reason = REFUSED[kind]
    model = make()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if explicitly:
        optimizer.watch(model)

    def inputs(step: int) -> dict[str, Any]:
        return {"input_ids": batch(step)["input_ids"]}

    with pytest.warns(RuntimeWarning, match=reason) as seen:
        reports = train(model, optimizer, inputs, loss=some_loss)
    assert len([w for w in seen if "extraopt" in str(w.message)]) == 1
    passes = Passes(model)
    reports += train(model, optimizer, inputs, loss=some_loss)
    assert passes.count == 3 * EVERY, "it is run no more"
    assert [report.length for report in reports] == [20] * 6


@pytest.mark.parametrize("kind", REFUSED)
def test_a_warning_that_nobody_can_turn_off(kind: str) -> None:
    model = REFUSED[kind][0]()
    optimizer = ExtraAdam(model.parameters(), **OPEN, extra_watch=False)
    reports = train(model, optimizer, lambda step: {"input_ids": batch(step)["input_ids"]}, loss=some_loss)
    assert [report.length for report in reports] == [20] * 3


def test_weights_that_no_model_computes_with() -> None:
    """Master copies, as DeepSpeed, Megatron and apex step them."""
    model = llama()
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = ExtraAdam(masters, **OPEN)
    with pytest.warns(
        RuntimeWarning, match=r"no module with most of these parameters.*DeepSpeed.*watch\(model\)"
    ) as seen:
        for step in range(3 * EVERY):
            model.zero_grad()
            model(**batch(step)).loss.backward()
            for p, master in zip(model.parameters(), masters):
                master.grad = p.grad
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters):
                    p.copy_(master)
    assert len(seen) == 1 and optimizer.last_jump.length == 20


@pytest.mark.parametrize("called", [False, True])
def test_a_model_that_is_given_but_has_none_of_the_weights(called: bool) -> None:
    """Its outputs would never change, and each jump would be within the limits."""
    model, other = llama(), llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    optimizer.watch(other)
    if called:
        model.register_forward_hook(lambda *_: other(**batch(0)) and None)
    with pytest.warns(RuntimeWarning, match="LlamaForCausalLM has none of these parameters. DeepSpeed") as seen:
        reports = train(model, optimizer)
    assert len(seen) == 1 and [r.length for r in reports] == [20] * 3 and all(math.isnan(r.kl) for r in reports)


def test_a_model_that_is_given_but_never_called_is_told_of() -> None:
    """Where the inputs are missing no longer jump is tried than the last one, and a warning says so once."""
    model = llama()
    around = nn.ModuleList([model])
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    optimizer.watch(around)
    with pytest.warns(RuntimeWarning, match="without a forward pass of ModuleList in its last step") as seen:
        reports = train(model, optimizer)
    assert len(seen) == 1 and [r.length for r in reports] == [20] * 3 and all(math.isnan(r.kl) for r in reports)


def test_arguments_that_are_modules_or_no_tensors_at_all() -> None:
    """As wrappers redirect calls through themselves: such inputs can't be given to the model again."""

    class Redirected(Counts):
        def forward(self, what: Any, input_ids: Tensor) -> Any:
            return super().forward(input_ids)

    model = Redirected()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    with pytest.warns(RuntimeWarning, match="without a forward pass of Redirected"):
        for step in range(EVERY):
            optimizer.zero_grad()
            some_loss(model(model.head, batch(step)["input_ids"])).backward()
            optimizer.step()


def test_unwatch_leaves_a_hook_or_warns() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer)
    assert len(model._forward_pre_hooks) == 1
    optimizer.unwatch()
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    passes = Passes(model)
    reports = train(model, optimizer)
    assert passes.count == 3 * EVERY and [r.length for r in reports] == [20] * 3
    optimizer.watch()
    watched(train(model, optimizer, first=99)[1:], 2)


# --- trials that fail ------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Does something else in eval mode, from a given pass on."""

    def __init__(self, what: Any, since: int) -> None:
        super().__init__()
        self.inner, self.what = llama(), what
        self.passes: Any = lambda: None  # what lies in an attribute, or in an object of a class, would be put back
        self.passes.left = since

    def forward(self, **named: Any) -> Any:
        output = self.inner(**named)
        if not self.training and not torch.is_grad_enabled():
            self.passes.left -= 1
            if self.passes.left < 0 and isinstance(self.what, Exception):
                raise self.what
            if self.passes.left < 0:
                output.logits = output.logits * self.what
        return output


@pytest.mark.parametrize("since", [0, 1], ids=["before the jump", "at the trial"])
@pytest.mark.parametrize(
    "what", [RuntimeError("no"), torch.OutOfMemoryError("no"), KeyError("no"), math.nan, math.inf], ids=repr
)
def test_a_trial_that_fails_moves_the_weights_or_ends_the_run(what: Any, since: int) -> None:
    """No jump is made, one warning tells, and once the model works again it is watched as before."""
    model = Failing(what, since)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    twin = llama()
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    with pytest.warns(RuntimeWarning, match="extraopt: a jump was left out, since") as seen:
        reports = train(model, optimizer)
    for step in range(3 * EVERY):
        adamw.zero_grad()
        twin(**batch(step)).loss.backward()
        adamw.step()
    assert len(seen) == 1 and [r.length for r in reports] == [0, 0, 0]
    assert_same(list(model.parameters()), list(twin.parameters()))
    model.passes.left = 1 << 30
    watched(train(model, optimizer))


def test_a_trial_that_fails_keeps_what_it_has_computed() -> None:
    """Out of memory, by its traceback: the training step after it ran out, too."""
    kept: list[Any] = []

    class Fails(Counts):
        def forward(self, input_ids: Tensor, **named: Any) -> SimpleNamespace:
            output = super().forward(input_ids)
            if not torch.is_grad_enabled():
                kept.append(weakref.ref(output.logits))
                raise torch.OutOfMemoryError("no")
            return output

    model = Fails()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(RuntimeWarning, match="extraopt: a jump was left out, since"):
            train(model, optimizer, loss=lambda o: o.logits.square().mean())
    finally:
        gc.enable()
    assert len(kept) >= 3 and not any(of() is not None for of in kept)


def test_buffers_that_memory_has_no_room_for_twice_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the packed weights of a quantized base are: nothing jumps, and a warning says so."""
    model = llama()
    model.register_buffer("packed", torch.zeros(5, dtype=torch.int32))
    clone = Tensor.clone

    def short(t: Tensor, **options: Any) -> Tensor:
        if t.shape == (5,):
            raise torch.OutOfMemoryError("no")
        return clone(t, **options)

    optimizer = ExtraAdam(model.parameters(), **OPEN)
    monkeypatch.setattr(Tensor, "clone", short)
    with pytest.warns(RuntimeWarning, match="extraopt: a jump was left out, since.*OutOfMemory") as seen:
        for step in range(3 * EVERY):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            optimizer.step()
    assert len(seen) == 1 and optimizer.last_jump.length == 0
    monkeypatch.setattr(Tensor, "clone", clone)
    watched(train(model, optimizer))


def test_an_interrupt_within_a_trial_leaves_the_weights_of_a_jump() -> None:
    model = Failing(math.nan, 1 << 30)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer, steps=EVERY - 1)
    optimizer.zero_grad()
    model(**batch(2)).loss.backward()
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    adamw.load_state_dict({**adamw.state_dict(), "state": copy.deepcopy(optimizer.state_dict()["state"])})
    for p, q in zip(model.parameters(), twin.parameters()):
        q.grad = p.grad.clone()
    adamw.step()

    def interrupt(module: nn.Module, *_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    before = observed(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    assert_same(observed(model), before)
    assert_same(list(model.parameters()), list(twin.parameters()))


# --- copies and lifetimes --------------------------------------------------------------------------------------------


def test_a_copy_of_the_model_feeds_the_optimizer_of_the_first() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer, steps=EVERY - 1)
    copies = [copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module]
    for one in copies:
        one(**batch(50)).loss.backward()
        (hook,) = one._forward_pre_hooks.values()
        assert not hasattr(hook, "act")
    assert not optimizer._trust.watch.captured
    watched(train(model, optimizer, first=EVERY - 1))
    file = io.BytesIO()
    torch.save(copies[0], file)
    assert b"extraopt" not in file.getvalue()
    ours = ExtraAdam(copies[0].parameters(), **OPEN)
    watched(train(copies[0], ours))


def test_a_copy_of_the_optimizer_watches_the_model_of_the_first() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer, steps=EVERY + 1)
    both = copy.deepcopy({"model": model, "optimizer": optimizer})
    reports = [train(m, o, first=EVERY + 1, steps=5) for m, o in ((model, optimizer), both.values())]
    assert repr(reports[0]) == repr(reports[1])
    watched(reports[0], 2)
    assert_same(list(model.parameters()), list(both["model"].parameters()))


def test_a_saved_model_needs_this_package(tmp_path: Path) -> None:
    """As a whole, which some do: in a process that cannot import it."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer)
    torch.save(model, tmp_path / "model.pt")
    torch.save(batch(0), tmp_path / "batch.pt")
    with torch.no_grad():
        torch.save(model(**batch(0)).logits, tmp_path / "logits.pt")
    code = """
import sys
sys.modules["extraopt"] = None
import torch
model, batch, logits = (torch.load(n + ".pt", weights_only=False) for n in ("model", "batch", "logits"))
assert torch.equal(model(**batch).logits, logits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"extraopt" not in (tmp_path / "model.pt").read_bytes()


@pytest.mark.parametrize("kind", ["plain", "never called", "compiled in place", "compiled"])
def test_a_model_and_its_optimizer_are_kept_alive(kind: str) -> None:
    torch._dynamo.reset()
    model: Any = Net() if "compiled" in kind else llama()
    called = compiled(model) if kind == "compiled" else model
    if kind == "compiled in place":
        model.compile(backend="eager")
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if kind != "never called":
        train(called, optimizer)
    gone = [weakref.ref(x) for x in (model, optimizer, optimizer._trust.watch, next(model.parameters()))]
    del model, called, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    torch.nn.Identity()(1)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_an_optimizers_hooks_are_gone_after_the_next_call_without_it() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    train(model, optimizer)
    del optimizer
    gc.collect()
    model(**batch(0))
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    second = ExtraAdam(model.parameters(), **OPEN)
    watched(train(model, second))


@pytest.mark.parametrize("found", [False, True], ids=["of a model not found", "of the model that compiles"])
def test_an_optimizer_may_be_collected_while_a_model_compiles(found: bool) -> None:
    """Dynamo guards on the hooks that it saw, and fails where the garbage collector has one removed meanwhile."""
    torch._dynamo.reset()
    model = Net()
    optimizers = [ExtraAdam((model if found else Net()).parameters(), **OPEN)]
    if found:
        optimizers[0].watch(model)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        optimizers.clear()
        gc.collect()
        return graph.forward

    model.compile(backend=backend)
    model(**batch(0))
    assert not optimizers
    model(**batch(0))


def test_inputs_outlive_the_step_that_looks_at_them() -> None:
    """A batch of images may be large. They are kept in the last step of a cycle alone, and no longer than it."""

    class Holder: ...

    holders: list[weakref.ref[Holder]] = []

    def inputs(step: int) -> dict[str, Any]:
        holder = Holder()
        holders.append(weakref.ref(holder))
        return {"input_ids": batch(step)["input_ids"], "holder": holder}

    model = Counts()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    for step in range(2 * EVERY):
        optimizer.zero_grad()
        some_loss(model(**inputs(step))).backward()
        kept = holders[-1]() is not None
        assert kept == (step in (0, EVERY - 1, 2 * EVERY - 1)), "the first one may be of a run that was resumed"
        optimizer.step()
        assert not any(ref() for ref in holders)


# --- many families ---------------------------------------------------------------------------------------------------

DECODER = {
    **SMALL,
    **ENCODER,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {**SMALL, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
PICTURES = {**ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: DECODER for name in (
        "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "StableLm", "Olmo", "Olmo2",
        "Granite", "Starcoder2", "SmolLM3", "Glm", "Nemotron", "GPTNeoX", "Persimmon",
    )},
    **{name: EXPERTS for name in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "PhiMoE", "GraniteMoe")},
    **{name: GPT for name in ("GPT2", "GPTBigCode")},
    **{name: {**GPT, "rotary_dim": 8} for name in ("GPTJ", "CodeGen")},
    "Cohere": {**DECODER, "logit_scale": 1.0},
    "Helium": {**DECODER, "head_dim": 8},
    "Opt": {**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "Bloom": {**SMALL, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "Falcon": {**SMALL, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "Mamba": {**SMALL, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    **{name: PICTURES for name in ("ViT", "DeiT", "Dinov2", "BeiT")},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3, "patch_size": 2},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8, "num_labels": 3},
}  # fmt: skip


def family(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kinds = {c.lower(): c for c in dir(transformers)}
    for task, inputs in (("forcausallm", batch), ("lmheadmodel", batch), ("forimageclassification", images)):
        if name.lower() + task in kinds and name.lower() + "config" in kinds:
            config = getattr(transformers, kinds[name.lower() + "config"])(**FAMILIES[name])
            torch.manual_seed(0)
            return getattr(transformers, kinds[name.lower() + task])(config), inputs
    pytest.skip(f"this transformers has no {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_models(name: str) -> None:
    model, inputs = family(name)
    if name.startswith(("Qwen2Moe", "Qwen3Moe", "Mixtral", "Olmoe")):
        base = inputs
        inputs = lambda step: {**base(step), "output_router_logits": True}  # noqa: E731
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "lr": 3e-4})
    watched(train(model, optimizer, inputs))
