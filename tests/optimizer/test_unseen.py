"""What a trial can't see: other parameters, other phases, other weights, outputs that are no distribution."""

from __future__ import annotations

import queue
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_watched_models import EVERY, Net, batch, train
from torch import Tensor, nn

from extraopt import ExtraAdam
from extraopt.trust import UNWATCHED


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def told(seen: list[warnings.WarningMessage], words: str) -> int:
    return sum(words in str(w.message) for w in seen)


# --- other parameters -------------------------------------------------------------------------------------------------


def distance(beside: str) -> float:
    """How far a critic goes that is trained beside a policy, whose outputs say nothing of it."""
    torch.manual_seed(1)
    critic, policy = nn.Linear(8, 1), Net()
    own: dict[str, Any] = {"params": [*critic.parameters()]}
    if beside == "nothing":
        optimizer = ExtraAdam([own], lr=1e-3, extra_watch=False)
    elif beside == "one group":
        optimizer = ExtraAdam([*policy.parameters(), *own["params"]], lr=1e-3)
    else:
        optimizer = ExtraAdam([{"params": [*policy.parameters()], "lr": 1e-6}, own], lr=1e-3)
    if beside == "within it":
        optimizer.param_groups[1]["extra_steps"] = 20
        policy.critic = critic
    if beside != "nothing":
        optimizer.watch(policy)
    x, y = batch()
    for _ in range(6 * EVERY):
        optimizer.zero_grad()
        loss = (critic(x) - 20).square().mean() + 1e-6 * nn.functional.cross_entropy(policy(x).logits, y)
        loss.backward()
        optimizer.step()
    assert optimizer.last_jump and (optimizer.last_jump.length > 20) == (beside != "nothing")
    return float(critic.bias.detach())


@pytest.mark.parametrize("beside", ["one group", "two groups", "within it"])
def test_a_critic_of_the_same_optimizer_jumps_as_far_as_the_policy_may(beside: str) -> None:
    """It does not: it goes as far as one alone. Within the watched model it is for its group to say so."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert distance(beside) <= distance("nothing") * 1.001 and UNWATCHED == 20
    words = "parameters are not in Net, whose outputs say nothing of them"
    assert told(seen, words) == (beside != "within it")


# --- other phases -----------------------------------------------------------------------------------------------------


def change(late: int, realign: bool = False, beside: bool = False) -> tuple[float, list[str]]:
    """The largest KL of the outputs over any cycle, and what was said; the body is unfrozen after `late` steps."""
    model, other = Net(), nn.Parameter(torch.ones(3))
    optimizer = ExtraAdam(model.parameters(), lr=2e-4)
    if beside:
        optimizer.add_param_group({"params": [other], "extra_steps": 0, "extra_every": 1})
    x, y = batch()
    outputs = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(20 * EVERY):
            for p in model.body.parameters():
                p.requires_grad_(step >= late)
            if realign and step == late:
                optimizer.reset_anchor()
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x).logits, y) + other.sum()).backward()
            optimizer.step()
            outputs.append(model(x).logits.detach().log_softmax(-1))
    pairs = zip(outputs[4 * EVERY :], outputs[5 * EVERY :])
    return max(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in pairs), [str(w.message) for w in seen]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a group that never jumps"])
def test_layers_that_are_unfrozen_in_mid_run_take_the_limits_once_more(beside: bool) -> None:
    kl, said = change(late=3, beside=beside)
    assert 0.002 < kl <= 0.021 and sum("2 phases of their cycles" in words for words in said) == 1


def test_reset_anchor_puts_all_phases_into_one() -> None:
    kl, said = change(late=3, realign=True)
    assert 0.005 < kl <= 0.021 and said == []


# --- other weights ----------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_compute_with_the_trained_weights_in_a_trial_seems_unchanged_by_any_jump() -> None:
    """As where another adapter was made active between the backward pass and the step."""

    class Switched(Net):
        def __init__(self) -> None:
            super().__init__()
            self.reference = Net().requires_grad_(False)
            self.active = True

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if self.active else self.reference(x)

    model = Switched()
    optimizer = ExtraAdam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x, y = batch()
    lengths = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8 * EVERY):
            model.active = True
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).logits, y).backward()
            model.active = False
            optimizer.step()
            lengths.append(optimizer.last_jump.length if optimizer.last_jump else 0.0)
    assert max(lengths) == UNWATCHED and told(seen, "a trial changed nothing in the outputs of Switched") == 1


def test_a_policy_that_is_sure_of_all_its_answers_seems_unchanged() -> None:
    """Nothing plausible falls, and KL is 0: what is too unlikely to count has changed all the same."""

    class Sure(Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x).logits
            return SimpleNamespace(logits=logits + 60 * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 5))

    model = Sure()
    optimizer = ExtraAdam(model.parameters(), lr=1e-4)
    x, _ = batch()
    lengths = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8 * EVERY):
            optimizer.zero_grad()
            model(x).logits[:, 1:].square().mean().backward()
            optimizer.step()
            lengths.append(optimizer.last_jump.length if optimizer.last_jump else 0.0)
    assert max(lengths) > UNWATCHED and told(seen, "changed nothing") == 0


# --- no distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_outputs_that_are_no_distribution_are_measured_by_a_softmax(problem: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    optimizer = ExtraAdam(model.parameters(), lr=1e-4)
    ids, y = torch.randint(1, 50, (8, 6)), torch.rand(8, 3).round() + (problem == "regression") * 0.5
    if problem == "regression":
        config.problem_type = problem  # for one column alone it is found by itself
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(4 * EVERY):
            optimizer.zero_grad()
            model(input_ids=ids, labels=y).loss.backward()
            optimizer.step()
    assert optimizer.last_jump and 0 < optimizer.last_jump.length <= UNWATCHED
    assert told(seen, f"no distribution, by its config's problem_type={problem!r}") == 1


def test_a_batch_that_is_given_as_one_argument_has_its_padding_measured() -> None:
    class Whole(Net):
        def forward(self, given: dict[str, Tensor]) -> Any:
            hidden = self.body(nn.functional.one_hot(given["input_ids"], 8).float())
            return SimpleNamespace(logits=self.head(hidden))

    model = Whole()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 8, (4, 6))
    labels = torch.where(torch.arange(6) < 2, ids % 5, -100).expand(4, 6)
    optimizer.watch(model)
    loss = nn.functional.cross_entropy(model({"input_ids": ids, "labels": labels}).logits.transpose(1, 2), labels)
    loss.backward()
    with optimizer._trust.watch.undisturbed():
        _, rows = optimizer._trust.watch.run(optimizer._trust.watch.positions())
    assert rows.tolist() == [0, 6, 12, 18]  # logits at 0 belong to the label at 1; all others have none


# --- what trials change -----------------------------------------------------------------------------------------------


class State:
    """A recurrent state as an object of its own."""

    def __init__(self) -> None:
        self.h, self.total, self.calls, self.log = torch.zeros(32, 16), torch.zeros(()), 0, [0]


@pytest.mark.parametrize("where", ["argument", "attribute"])
def test_a_state_that_lies_in_an_object_goes_on_from_trials(where: str) -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.state = nn.GRUCell(8, 16), State() if where == "attribute" else None

        def forward(self, x: Tensor, state: State | None = None) -> Any:
            state = state or self.state
            assert state is not None
            h = self.cell(x, state.h)
            state.h, state.calls = h.detach(), state.calls + 1
            state.total += 1
            state.log.append(state.calls)
            return SimpleNamespace(logits=self.head(h))

    model, given = Recurrent(), State()
    optimizer = ExtraAdam([*model.cell.parameters(), *model.head.parameters()], lr=1e-3)
    x, y = batch()
    for step in range(3 * EVERY):
        optimizer.zero_grad()
        output = model(x, given) if where == "argument" else model(x)
        nn.functional.cross_entropy(output.logits, y).backward()
        state = model.state or given
        before = state.h.clone()
        optimizer.step()
        assert (
            torch.equal(state.h, before)
            and state.calls == int(state.total) == step + 1
            and state.log == [*range(step + 2)]
        )
    assert optimizer.last_jump and optimizer.last_jump.kl > 0


def test_what_another_thread_puts_into_a_queue_of_the_model_within_a_trial_is_lost() -> None:
    class Fed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.inbox: queue.Queue[int] = queue.Queue()

        def forward(self, x: Tensor) -> Any:
            if not torch.is_grad_enabled():
                self.inbox.put(0)  # as another thread may at any time
            return super().forward(x)

    model = Fed()
    reports = train(model, ExtraAdam(model.parameters(), lr=1e-3), 3 * EVERY)
    assert reports[-1].kl > 0 and model.inbox.qsize() >= 4


def test_inputs_of_a_transform_that_has_ended_fail_every_trial() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    optimizer.watch(model)
    x, y = batch()

    def loss(params: dict[str, Tensor], one: Tensor, of: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, one[None]).logits, of[None])

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3 * EVERY):
            params = {name: p.detach() for name, p in model.named_parameters()}
            each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
            for name, p in model.named_parameters():
                p.grad = each[name].mean(0)
            optimizer.step()
    assert told(seen, "without a forward pass of Net") == 1 and told(seen, "failed") == 0
    assert optimizer.last_jump and optimizer.last_jump.length <= UNWATCHED


def test_the_training_of_a_model_without_any_of_these_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = train(model := Net(), ExtraAdam(model.parameters(), lr=1e-3), 4 * EVERY)
    assert reports[-1].kl > 0
