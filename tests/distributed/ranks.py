"""Real ranks over gloo, two unless told otherwise, kept alive between tests: they run functions of a module by name."""

import datetime
import importlib
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

import torch

WORLD = 2


def _serve(rank: int, world: int, store: str, calls: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    while (call := calls.get()) is not None:
        module, name, args = call
        try:
            answer = getattr(importlib.import_module(module), name)(rank, *args)
            answers.put((rank, None, answer))
        except BaseException:
            answers.put((rank, traceback.format_exc(), None))
    torch.distributed.destroy_process_group()


class Ranks:
    """`run` calls a function on all ranks as f(rank, *args) and returns what they returned."""

    def __init__(self, store: str, world: int = WORLD) -> None:
        context = multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.calls = [context.Queue() for _ in range(world)]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, store, self.calls[rank], self.answers), daemon=True)
            for rank in range(world)
        ]
        os.environ["OMP_NUM_THREADS"] = "1"
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 0) -> list[Any]:
        timeout = timeout or 60 * len(self.processes)
        for calls in self.calls:
            # pytest may import tests/x.py as tests.x, which no other process knows
            calls.put((function.__module__.rpartition(".")[2], function.__name__, args))
        results: list[Any] = [None] * len(self.processes)
        try:
            for _ in self.processes:
                rank, error, answer = self.answers.get(timeout=timeout)
                if error is not None:
                    self.close()  # the other rank may wait for this one in a collective
                    raise AssertionError(f"rank {rank}:\n{error}")
                results[rank] = answer
        except queue.Empty:
            self.close()
            raise AssertionError(f"no answer in {timeout} s") from None
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for calls in self.calls:
            calls.put(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
