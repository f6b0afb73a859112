"""The trust region: the longest jump whose change of the model's outputs stays within limits, found by trying."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from .positions import Positions, Unusable
from .watch import Watch, sharded

TRIALS = 3
MARGIN = 0.95  # of the length that the last trial's fit proposes
GROWTH = 2.0  # of the last length, up to which the next is looked for
OPEN = 0.25  # gate from which on a length may grow
SHORTEST = 0.5  # of the way of a cycle's real steps: shorter jumps are left out
COUNTED = 1.0  # how much of a cycle's real steps counts towards the limits
PLAUSIBLE = 0.001  # probability of a token from which on its fall counts
UNWATCHED = 20.0  # steps: the longest jump where no model can be watched; the first search starts from twice of it
CHUNK_BYTES = 1 << 23  # of float32 logits that are compared at a time


@dataclass(frozen=True)
class Length:
    """How far to jump, and what is known of it.

    Attributes:
        steps: h; 0 is no jump.
        known: the length that the next search starts from twice of; 0 where none was found.
        kl, fall: by how much the cycle changed the outputs, its real steps counted in; NaN where nothing was measured.
    """

    steps: float
    known: float
    kl: float = math.nan
    fall: float = math.nan


@dataclass(frozen=True)
class Limits:
    """N, and how far a cycle, real steps and jump, may change the outputs: mean KL and mean fall, see `Outputs`."""

    steps: float
    kl: float
    fall: float


@dataclass(frozen=True)
class Reach:
    """How far the real steps of a cycle went the way that its jump goes on, and how far gates are open.

    Sums over the tensors that may jump, so that ranks which hold different ones can add theirs up.

    Attributes:
        along: <D, u>; u = g V / k is what one step of the jump adds to the weights.
        step_sq: <u, u>.
        gated_sq, drift_sq: ||g V||^2 and ||V||^2.
        open: tensors whose gate is not shut.
    """

    along: float
    step_sq: float
    gated_sq: float
    drift_sq: float
    open: float

    @property
    def real(self) -> float:
        """The length of a jump that would go as far, in steps; k where gates are open on a clean path."""
        return max(self.along, 0.0) / self.step_sq if self.step_sq > 0 else 0.0

    @property
    def gate(self) -> float:
        """How far the gates are open, 0 to 1."""
        return math.sqrt(self.gated_sq / self.drift_sq) if self.drift_sq > 0 else 0.0


def search(
    measure: Callable[[float], tuple[float, float]], known: float, limits: Limits, real: float, gate: float
) -> Length:
    """The longest of a few lengths by which the cycle changes the outputs by no more than the limits.

    The limits are those of a whole cycle, since only its real steps sample, and can correct, what has changed: these
    went as far as a jump of `real` steps. KL grows about as the square of a way and the fall in proportion to it, which
    makes a cycle's change of the measured one of its jump; from that each trial proposes the next. None is taken that
    was not itself measured, and none shorter than half of `real`, or of `UNWATCHED` where that is less: so little is
    not worth its risk, and rounding, which is as large at a short length as at a long one, would count many times.

    The search starts from twice the length known, and at least from `real` or `UNWATCHED`. Lengths grow cycle by cycle
    where gates are open, and fall back towards `UNWATCHED` where they are shut: there any length is within the limits,
    and would be too long when they open.

    Args:
        measure: moves the weights to a length and says how far the outputs are from those at 0: mean KL, mean fall; not
            finite where the model failed, which ends the search.
        known: what the last search found, >= 0.
        limits: none of them is exceeded.
        real: as in `Reach`, >= 0.
        gate: how far the gates of what jumps are open, 0 to 1.
    """
    real *= COUNTED
    start = min(max(real, 1.0), UNWATCHED, limits.steps)
    shortest = SHORTEST * start
    tried = min(max(GROWTH * known, start), limits.steps)
    for _ in range(TRIALS):
        kl, fall = measure(tried)
        cycle = 1 + real / tried
        kl, fall = kl * cycle * cycle, fall * cycle
        used = max(math.sqrt(max(kl, 0.0) / limits.kl), fall / limits.fall)
        if not all(map(math.isfinite, (kl, fall, used))):
            break
        if used <= 1:
            most = limits.steps if gate >= OPEN else max(known / GROWTH, UNWATCHED)
            return Length(tried, min(tried, most), kl, fall)
        if tried == shortest:
            break
        tried = max(MARGIN * (tried + real) / used - real, shortest)
    return Length(0.0, 0.0)


class Outputs:
    """How far a model's distributions are from those that it had when this was made.

    - KL: KL(p_before || p_now), exact over the vocabulary, in float32.
    - fall: the largest fall of a log-probability from before to now among the tokens that were plausible before, with a
      probability of `PLAUSIBLE` or more. KL hardly sees what is seldom said, and what is no longer sampled is lost for
      good.

    Each is a mean over all positions, and over those at which two tokens or more were plausible; the larger counts.
    Where the policy has a choice a mean over all hides what happens, and where it has none a jump can still ruin it.
    """

    def __init__(self, logits: Tensor, rows: Tensor) -> None:
        self._before = [chunk.float().log_softmax(-1) for chunk in _chunks(logits, rows)]
        self._shape = logits.shape, rows.shape
        self.changed = False  # whether any log-probability was another one, however unlikely its token

    def compare(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Sums of KL, of fall and of positions, over all of them and over those with a choice: float64 [6], CPU.

        Args:
            logits: [P, V].
            rows: which of them are looked at, int64 [R].
        """
        if (logits.shape, rows.shape) != self._shape:
            raise Unusable(f"it returned logits of another shape than before: {logits.shape}, {self._shape[0]}")
        sums = torch.zeros(2, 3, dtype=torch.float64, device=logits.device)
        for chunk, before in zip(_chunks(logits, rows), self._before):
            lost, plausible = before - chunk.float().log_softmax(-1), before >= math.log(PLAUSIBLE)
            self.changed = self.changed or bool(lost.nan_to_num().any())
            p = before.exp()
            kl = torch.where(p == 0, 0.0, p * lost).sum(-1)  # a logit of -inf is no change
            fall = torch.where(plausible, lost, 0.0).amax(-1).clamp(min=0)
            each = torch.stack([kl, fall, torch.ones_like(kl)], 1).double()
            sums += torch.stack([each.sum(0), each[plausible.sum(-1) >= 2].sum(0)])
        return sums.flatten().cpu()


def _means(sums: Sequence[float]) -> tuple[float, float]:
    """KL and fall of the sums of `Outputs.compare`; NaN where there was no position."""
    kl, fall, count, *with_choice = sums
    if not count:
        return math.nan, math.nan
    means = [(kl / count, fall / count)] + [(with_choice[0] / n, with_choice[1] / n) for n in with_choice[2:] if n]
    worst = [max(values) if all(map(math.isfinite, values)) else math.nan for values in zip(*means)]
    return max(worst[0], 0.0), worst[1]  # rounding may make a KL of 0 negative


def _chunks(logits: Tensor, rows: Tensor) -> Iterator[Tensor]:
    return (logits[some] for some in torch.split(rows, max(1, CHUNK_BYTES // (4 * logits.shape[-1]))))


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
        reach: Reach,
        params: Sequence[Tensor],
        known: float,
        limits: Limits,
        phases: int = 1,
    ) -> Length | None:
        """The longest jump within the limits; None where nothing may jump, here or on another rank.

        Where several optimizers move parameters of one model, the limits hold for all of their jumps together.

        Args:
            move: writes the weights of a length, any number of times; called for those that are tried.
            reach: of what is moved, on this rank.
            params: those of the optimizer, on this rank.
            known: what the last search found, >= 0.
            limits: none of them is exceeded.
            phases: in how many phases of their cycles the optimizer's parameters are: each has a jump in every k steps.
                0: there are no inputs for a trial, and the jump is no longer than the last one, nor than 20 steps.
        """
        unwatched = Length(min(UNWATCHED, limits.steps), known)
        unmeasured = Length(min(unwatched.steps, known), known)
        if not reach.open and not _distributed():
            return None
        if self.quietly:
            return unwatched
        try:
            if self.watch.joining:
                raise Unusable("within join() of DistributedDataParallel ranks end at different steps")
            own = self.watch.computes_with(params)
            blind = self.watch.refused or (None if any(own) else self._not_found())
            try:
                if self.process_group is None and self.watch.partial:
                    raise Unusable(
                        "the optimizer has only some of the parameters that DistributedDataParallel trains, and each "
                        "rank may have others, as under ZeroRedundancyOptimizer: where all ranks have the same ones, "
                        "say so by watch(model, process_group=...)"
                    )
                ranks = Ranks(self.watch, params, self.process_group)
            except Unusable as reason:
                if not reach.open:
                    return None
                raise Unusable(blind or reason) from None
            missing, unusable, size, phases_of_all, *of_all = ranks.sum(
                not (phases and self.watch.captured), blind is not None, 1, phases, *astuple(reach)
            )
            if not Reach(*of_all).open:
                return None
            if unusable:
                raise Unusable(blind or "another rank that trains it has no model that can be watched")
            if missing:
                if phases:
                    self._warn(
                        "inputs",
                        f"a cycle ended without a forward pass of {type(self.watch.model).__name__} in its last step, "
                        f"with gradients and tensors among its arguments, so that the jump was not longer than "
                        f"{unmeasured.steps:g} steps, without a trust region. Where another module is called for "
                        "training, tell the optimizer by watch(model).",
                    )
                return unmeasured
            many = phases_of_all / size
            share = self.watch.sharers() * many  # KL grows as the square of what all of them move together
            limits = Limits(limits.steps, limits.kl / share**2, limits.fall / share)
            length = self._search(move, Reach(*of_all), ranks, known, limits)
            if many > 1:
                self._warn(
                    "phases",
                    f"parameters are in {many:g} phases of their cycles, as where some were unfrozen in mid-run or had "
                    "no gradient in some steps: each has a part of the limits. reset_anchor() puts all into one.",
                )
            if not all(own):
                self._warn(
                    "others",
                    f"some of the optimizer's parameters are not in {type(self.watch.model).__name__}, whose outputs "
                    f"say nothing of them: these jump at most {UNWATCHED:g} steps.",
                )
            return length
        except Unusable as reason:
            self._warn(
                str(reason),
                f"jumps are at most {unwatched.steps:g} steps long, without a trust region: {reason}. "
                "extra_watch=False says that this is intended.",
            )
            return unwatched
        finally:
            self.watch.release()

    def _search(
        self, move: Callable[[float], None], reach: Reach, ranks: Ranks, known: float, limits: Limits
    ) -> Length:
        watch, positions, outputs = self.watch, list[Positions](), list[Outputs]()
        assert watch.model is not None
        failures: list[Exception] = []
        finite, seen = True, True
        together = bool(sharded(watch.model))  # its forward pass waits for that of the other ranks

        def attempt(length: float) -> Tensor:
            """The sums of `Outputs.compare`; NaN where the model failed."""
            move(length)
            sums = torch.zeros(6, dtype=torch.float64, device="cpu")
            if failures:
                return sums.fill_(math.nan)
            try:
                if not positions:
                    positions.append(watch.positions())
                logits, rows = watch.run(positions[0])
                if not outputs:
                    outputs.append(Outputs(logits, rows))
                else:
                    sums = outputs[0].compare(logits, rows)
            except Exception as error:
                move(0.0)
                if together:
                    watch.refused = str(error) if isinstance(error, Unusable) else None
                    raise
                failures.append(error.with_traceback(None))  # its frames hold what the model has computed
                sums.fill_(math.nan)
            return sums

        def measure(length: float) -> tuple[float, float]:
            nonlocal finite, seen
            sums = ranks.sum(*attempt(length).tolist())
            finite, seen = all(map(math.isfinite, sums)), sums[2] != 0
            return _means(sums)

        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(watch.undisturbed())
                except Exception as failure:  # no memory for a copy of its buffers
                    if together:
                        raise
                    failures.append(failure.with_traceback(None))
                attempt(0.0)
                length = search(measure, known, limits, reach.real, reach.gate)
        except BaseException:
            move(0.0)
            raise
        reasons = [str(error) for error in failures if isinstance(error, Unusable)]
        if not length.steps and ranks.sum(bool(reasons))[0]:
            watch.refused = reasons[0] if reasons else "of another rank's model no logits could be had"
            raise Unusable(watch.refused)
        if not seen:  # as where a batch has no labels: nothing was found out
            return Length(0.0, known)
        if length.steps and length.kl == length.fall == 0 and not ranks.sum(any(of.changed for of in outputs))[0]:
            length = Length(min(length.steps, UNWATCHED), known)
            self._warn(
                "unchanged",
                f"a trial changed nothing in the outputs of {type(watch.model).__name__}, so that the jump was no "
                f"longer than {length.steps:g} steps: does it compute with other weights than those that are trained?",
            )
        for error in failures:
            self._warn("failed", f"a jump was left out, since the model failed on its last inputs: {error!r}")
        if not finite and not failures:
            self._warn("failed", "a jump was left out, since outputs of the model, on some rank, are not finite")
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


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Ranks:
    """The ranks that jump together, so that all take one decision.

    Raises:
        Unusable: torch.distributed runs, and which of its ranks train this model is not known.
    """

    def __init__(self, watch: Watch, params: Sequence[Any], process_group: Any) -> None:
        self._groups: list[Any] = []
        self._device: torch.device = next((p.device for p in params), torch.device("cpu"))
        if not _distributed():
            return
        meshes = [p.device_mesh for p in params if hasattr(p, "device_mesh")]
        mesh = max(meshes, key=lambda mesh: int(mesh.ndim), default=None)  # some parameters may lie on a part of it
        if process_group is not None or watch.group is not None:
            self._groups = [process_group if process_group is not None else watch.group]
        elif mesh is not None:
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
            self._device = torch.device(mesh.device_type)  # not where weights are offloaded to
        elif torch.distributed.get_world_size() > 1:
            raise Unusable(
                "torch.distributed runs, and which of its ranks train this model is not known: give "
                "watch(model, process_group=...)"
            )

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks; at least three are returned."""
        numbers = torch.tensor([*map(float, values), *[0.0] * (3 - len(values))], dtype=torch.float64, device="cpu")
        if self._groups:
            numbers = numbers.to(self._device)
            for group in self._groups:
                torch.distributed.all_reduce(numbers, group=group)
        return numbers.tolist()
