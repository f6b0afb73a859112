"""The trust region: the longest jump whose change of the model's outputs stays within limits, found by trying."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .positions import Unusable
from .watch import Watch, sharded

TRIALS = 3
MARGIN = 0.95  # of the length that the last trial's fit proposes
GROWTH = 2.0  # of the last length, up to which the next is looked for
OPEN = 0.25  # gate from which on a length may grow: where gates are shut any length changes nothing, and says nothing
LEAST = 1.0  # step: no search starts from less
PLAUSIBLE = 0.01  # probability of a token from which on its fall counts
UNWATCHED = 20.0  # steps: the longest jump where no model can be watched; the first search starts from twice of it
CHUNK_BYTES = 1 << 25  # of float32 logits that are compared at a time


@dataclass(frozen=True)
class Length:
    """How far to jump, and what is known of it.

    Attributes:
        steps: h; 0 is no jump.
        known: the length that the next search starts from twice of.
        kl, fall: what was measured at h, NaN where nothing was.
    """

    steps: float
    known: float
    kl: float = math.nan
    fall: float = math.nan


@dataclass(frozen=True)
class Limits:
    """N, and how far the outputs may change: mean KL and mean fall, see :class:`Outputs`."""

    steps: float
    kl: float
    fall: float


def search(measure: Callable[[float], tuple[float, float]], known: float, limits: Limits, gate: float) -> Length:
    """The longest of a few lengths at which the outputs stay within the limits.

    It starts from twice the length known, and the next one from more than that only where gates were open. KL grows
    about as the square of a length and the fall in proportion to it: from that each trial proposes the next, and none
    is taken that was not itself measured. Where none is within, the next search starts from half of the last one tried.

    Args:
        measure: moves the weights to a length and says how far the outputs are from those at 0: mean KL, mean fall; not
            finite where the model failed, which ends the search.
        known: what the last search found, > 0.
        limits: none of them is exceeded.
        gate: how far the gates of what jumps are open, 0 to 1.
    """
    proposed = min(GROWTH * known, limits.steps)
    for _ in range(TRIALS):
        tried = proposed
        kl, fall = measure(tried)
        used = max(math.sqrt(max(kl, 0.0) / limits.kl), fall / limits.fall)
        if not all(map(math.isfinite, (kl, fall, used))):
            break
        if used <= 1:
            longest = tried if gate >= OPEN else min(tried, known)
            return Length(tried, max(longest, LEAST / 2), kl, fall)
        proposed = MARGIN * tried / used
    return Length(0.0, max(tried / 2, LEAST) / 2)


class Outputs:
    """How far a model's distributions are from those that it had when this was made.

    Only positions count at which two tokens or more have a probability of `PLAUSIBLE`: where the policy has no choice
    nothing can change, and a mean over such positions would hide what happens at the others.

    - KL: KL(p_before || p_now), exact over the vocabulary, in float32.
    - fall: the largest fall of a log-probability from before to now among the tokens that were plausible before. KL
      hardly sees what is seldom said, and what is no longer sampled is lost for good.
    """

    def __init__(self, logits: Tensor) -> None:
        self._kept: list[Tensor] = []  # for each chunk: which of its rows count
        self._before: list[Tensor] = []  # their log-probabilities
        for chunk in _chunks(logits):
            before = chunk.float().log_softmax(-1)
            counts = ((before >= math.log(PLAUSIBLE)).sum(-1) >= 2) | before[:, 0].isnan()  # then all of its row is
            self._kept.append(counts.nonzero().flatten())
            self._before.append(before[self._kept[-1]])
        self._shape = logits.shape

    def compare(self, logits: Tensor) -> Tensor:
        """Sums over the positions that count, of KL and fall, and their number: float64 [3] on the CPU."""
        if logits.shape != self._shape:
            raise Unusable(f"it returned logits of another shape than before: {logits.shape}, {self._shape}")
        sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
        for chunk, kept, before in zip(_chunks(logits), self._kept, self._before):
            lost = before - chunk[kept].float().log_softmax(-1)
            p = before.exp()
            kl = torch.where(p == 0, 0.0, p * lost).sum(-1)  # a logit of -inf is no change
            fall = torch.where(before >= math.log(PLAUSIBLE), lost, 0.0).amax(-1).clamp(min=0)
            sums += torch.stack([kl.sum(), fall.sum(), torch.tensor(len(kept), device=sums.device)]).double()
        return sums.cpu()


def _chunks(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, max(1, CHUNK_BYTES // (4 * logits.shape[-1])))


class TrustRegion:
    """Chooses the length of an optimizer's jumps by what they change in the outputs of its model."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.process_group: Any = None
        self.quietly = False  # nothing is to be watched, and nobody to be told so
        self._warned: set[str] = set()

    def choose(
        self,
        move: Callable[[float], None],
        gate: float,
        params: Sequence[Tensor],
        known: float,
        limits: Limits,
        most: bool,
    ) -> Length:
        """Move the weights to the longest jump within the limits.

        Args:
            move: writes the weights of a length, any number of times.
            gate: how far the gates of what is moved are open, 0 to 1.
            params: those of the optimizer, on this rank.
            known: what the last search found, > 0.
            limits: none of them is exceeded.
            most: whether most of the parameters jump: else it takes the length known at most, without a search.
        """
        length = self._choose(move, gate, params, known, limits, most)
        move(length.steps)
        return length

    def _choose(
        self,
        move: Callable[[float], None],
        gate: float,
        params: Sequence[Tensor],
        known: float,
        limits: Limits,
        most: bool,
    ) -> Length:
        unwatched = Length(min(UNWATCHED, limits.steps), known)
        if self.quietly:
            return unwatched
        try:
            blind = self.watch.refused or (None if self.watch.holds(params) else self._not_found())
            try:
                ranks = Ranks(self.watch, params, self.process_group)
            except Unusable as reason:
                raise Unusable(blind or reason) from None
            missing, unusable, _ = ranks.sum(not (most and self.watch.captured), blind is not None)
            if unusable:
                raise Unusable(blind or "another rank that trains it has no model that can be watched")
            if missing:
                if most:
                    self._warn(
                        "inputs",
                        f"a cycle ended without a forward pass of {type(self.watch.model).__name__} in its last step, "
                        "with gradients and tensors among its arguments, so that the jump was as long as the last one "
                        "at most. Where another module is called for training, tell the optimizer by watch(model).",
                    )
                return Length(min(known, limits.steps), known)
            return self._search(move, gate, ranks, known, limits)
        except Unusable as reason:
            self._warn(
                str(reason),
                f"jumps are at most {unwatched.steps:g} steps long, without a trust region: {reason}. "
                "extra_watch=False says that this is intended.",
            )
            return unwatched
        finally:
            self.watch.release()

    def _search(self, move: Callable[[float], None], gate: float, ranks: Ranks, known: float, limits: Limits) -> Length:
        watch, outputs = self.watch, list[Outputs]()
        assert watch.model is not None
        failures: list[Exception] = []
        finite = True
        together = bool(sharded(watch.model))  # its forward pass waits for that of the other ranks

        def attempt(length: float) -> Tensor:
            """The sums of `Outputs.compare`; NaN where the model failed."""
            move(length)
            sums = torch.zeros(3, dtype=torch.float64)
            if failures:
                return sums.fill_(math.nan)
            try:
                logits = watch.run(positions)
                if not outputs:
                    outputs.append(Outputs(logits))
                else:
                    sums = outputs[0].compare(logits)
            except Exception as error:
                move(0.0)
                if together:
                    watch.refused = str(error) if isinstance(error, Unusable) else None
                    raise
                failures.append(error)
                sums.fill_(math.nan)
            return sums

        def measure(length: float) -> tuple[float, float]:
            nonlocal finite
            kl, fall, count = ranks.sum(*attempt(length).tolist())
            finite &= math.isfinite(kl + fall)
            return (max(kl / count, 0.0), fall / count) if count else (0.0, 0.0)  # rounding may make a KL of 0 negative

        try:
            with watch.undisturbed():
                positions = watch.positions()
                attempt(0.0)
                length = search(measure, known, limits, gate)
        except BaseException:
            move(0.0)
            raise
        reasons = [str(error) for error in failures if isinstance(error, Unusable)]
        if not length.steps and ranks.sum(bool(reasons))[0]:
            watch.refused = reasons[0] if reasons else "of another rank's model no logits could be had"
            raise Unusable(watch.refused)
        for error in failures:
            self._warn("failed", f"a jump was left out, since the model failed on its last inputs: {error!r}")
        if not finite and not failures:
            self._warn(
                "failed", "a jump was left out, since outputs of the model, here or on another rank, are not finite"
            )
        return length

    def _not_found(self) -> str:
        model = self.watch.model
        return (
            "no module with most of these parameters was called for training"
            if model is None
            else f"{type(model).__name__} has none of these parameters"
        ) + (
            ". DeepSpeed, Megatron and apex step copies of the weights, which no model computes with; of other models "
            "tell the optimizer, by watch(model)"
        )

    def _warn(self, of: str, text: str) -> None:
        if of not in self._warned:
            self._warned.add(of)
            warnings.warn(f"extraopt: {text}", RuntimeWarning, stacklevel=4)


class Ranks:
    """The ranks that jump together, so that all take one decision.

    Raises:
        Unusable: torch.distributed runs, and which of its ranks train this model is not known.
    """

    def __init__(self, watch: Watch, params: Sequence[Any], process_group: Any) -> None:
        self._groups: list[Any] = []
        self._device: torch.device = next((p.device for p in params), torch.device("cpu"))
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        mesh = next((p.device_mesh for p in params if hasattr(p, "device_mesh")), None)
        if process_group is not None or watch.group is not None:
            self._groups = [process_group if process_group is not None else watch.group]
        elif mesh is not None:
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        elif torch.distributed.get_world_size() > 1:
            raise Unusable(
                "torch.distributed runs, and which of its ranks train this model is not known: give "
                "watch(model, process_group=...)"
            )

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks; at least three are returned."""
        numbers = torch.tensor([*map(float, values), *[0.0] * (3 - len(values))], dtype=torch.float64)
        if self._groups:
            numbers = numbers.to(self._device)
            for group in self._groups:
                torch.distributed.all_reduce(numbers, group=group)
        return numbers.tolist()
