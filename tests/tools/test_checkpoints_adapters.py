"""Adapters extrapolated by the algebra of their own config, against PEFT's `merge_and_unload` in float64."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _checkpoint_models import make
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="needs peft: pip install 'extraopt[hf]'")

from extraopt.tools.checkpoints import CheckpointError, extrapolate  # noqa: E402

ALPHA = 2.0
LINEAR = ["q_proj", "up_proj", "down_proj"]


class Convolutions(torch.nn.Module):
    """PEFT adapts convolutions, also those in groups; no language model of transformers holds one worth adapting."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv2d(4, 8, 3)
        self.two = torch.nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


BD = {"nblocks": 2, "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "up_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "plain": ("llama", lambda: {}),
    "rank-stabilised": ("llama", lambda: {"use_rslora": True}),
    "patterns": ("llama", lambda: {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}}),
    "of convolutions": ("convolutions", lambda: {"target_modules": ["one"], "task_type": None}),
    "of transposed layers": ("gpt2", lambda: {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "of embeddings": ("llama", lambda: {"target_modules": ["embed_tokens", "q_proj"]}),
    "with biases": ("gpt2", lambda: {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "with whole modules": ("llama", lambda: {"modules_to_save": ["lm_head"]}),
    "with tokens": ("llama", lambda: {"trainable_token_indices": [3, 5]}),
    "block-diagonal": ("llama", lambda: {"use_bdlora": peft.tuners.lora.BdLoraConfig(**BD)}),
    "with a diagonal": ("llama", lambda: {"kasa_config": peft.tuners.lora.config.KasaConfig()}),
    "packed by expert": ("mixtral", lambda: {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "packed by expert alone": ("mixtral", lambda: {"target_modules": [], "target_parameters": EXPERTS[:1]}),
    "of replicated layers": ("llama", lambda: {"layer_replication": [[0, 2], [1, 2]]}),
    "activated": ("llama", lambda: {"alora_invocation_tokens": [5]}),
}


def base(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return (Convolutions() if architecture == "convolutions" else make(architecture)).double()


def pair(tmp: Path, kind: str, moves: Callable[[str], bool]) -> tuple[Path, Path]:
    """Two checkpoints of an adapter, between which the tensors moved whose names `moves` takes."""
    architecture, options = KINDS[kind]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options()
    model = peft.get_peft_model(base(architecture), peft.LoraConfig(**settings)).double()
    random = torch.Generator().manual_seed(1)
    for folder in ("a", "b"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and (folder == "a" or moves(name)):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
        model.save_pretrained(tmp / folder)
    return tmp / "a", tmp / "b"


def merged(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("alora_invocation_tokens"):  # PEFT merges no such adapter; at its tokens it is a plain one
        folder = folder.parent / f"{folder.name}-plain"
        if not folder.exists():
            folder.mkdir()
            save_file(load_file(folder.parent / folder.name.removesuffix("-plain") / "adapter_model.safetensors"),
                      folder / "adapter_model.safetensors")  # fmt: skip
            (folder / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": None}))
    model = peft.PeftModel.from_pretrained(base(KINDS[kind][0]), folder, autocast_adapter_dtype=False).double()
    if (folder / "adapter_model.safetensors").exists():
        state = load_file(folder / "adapter_model.safetensors")
        assert all(value.dtype == torch.float64 for value in state.values())
    return {name: tensor.detach().clone() for name, tensor in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_the_adapters_rank_are_met_exactly(kind: str, tmp_path: Path):
    """Where one factor does not move, the sum of updates has no higher rank than one update."""
    a, b = pair(tmp_path, kind, lambda name: "lora_A" not in name and "embedding_B" not in name)
    report = extrapolate([a, b], tmp_path / "out", alpha=ALPHA)
    assert report.lora is not None and report.lora.pairs > 0 and report.lora.truncation < 1e-9
    start, end, new = (merged(kind, folder) for folder in (a, b, tmp_path / "out"))
    moved = 0
    for name in new:
        target = (1 + ALPHA) * end[name] - ALPHA * start[name]
        torch.testing.assert_close(new[name], target, rtol=1e-8, atol=1e-8, msg=name)
        moved += not torch.equal(start[name], end[name])
    assert moved


OF_SEVERAL = ("patterns", "with biases", "with tokens", "with whole modules", "of replicated layers")
ONE_SCALE = [kind for kind in KINDS if kind not in OF_SEVERAL]  # where all that moves is updates of one scale


@pytest.mark.parametrize("kind", ONE_SCALE)
@pytest.mark.parametrize("mode", ["product", "factors"])
def test_what_is_missed_is_as_long_as_the_report_says(kind: str, mode: Any, tmp_path: Path):
    a, b = pair(tmp_path, kind, lambda name: True)
    report = extrapolate([a, b], tmp_path / "out", alpha=ALPHA, lora=mode)
    start, end, new = (merged(kind, folder) for folder in (a, b, tmp_path / "out"))
    jump = missed = 0.0
    for name in new:
        target = (1 + ALPHA) * end[name] - ALPHA * start[name]
        jump += (target - end[name]).square().sum().item()
        missed += (target - new[name]).square().sum().item()
    said = report.lora.truncation if mode == "product" else report.lora.cross_term
    assert said == pytest.approx((missed / jump) ** 0.5, rel=1e-6)
    assert report.lora.truncation <= report.lora.cross_term
    if mode == "product":
        assert 0 < report.lora.truncation < 1


@pytest.mark.parametrize("start", ["pissa", "mica", "olora", "orthogonal"])
def test_updates_of_other_starts_are_met_too(start: str, tmp_path: Path):
    """PiSSA and OLoRA take the start out of the base's weights. PEFT makes these starts in float32 only."""
    settings: dict[str, Any] = {"r": 4, "target_modules": LINEAR, "init_lora_weights": start}
    model = peft.get_peft_model(base("llama").float(), peft.LoraConfig(**settings))
    still = "lora_B" if start == "mica" else "lora_A"
    folders = [tmp_path / name for name in ("a", "b", "out")]
    for folder in folders[:2]:
        model.save_pretrained(folder)
        for name, parameter in model.named_parameters():
            if "lora_" in name and still not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    extrapolate(folders[:2], folders[2], alpha=ALPHA)
    plain = base("llama").float()
    first, last, new = (
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).merge_and_unload().state_dict()
        for folder in folders
    )
    for name in new:
        torch.testing.assert_close(new[name], (1 + ALPHA) * last[name] - ALPHA * first[name], rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(first[name], last[name]) for name in new)


def test_a_convolution_in_groups_is_taken_group_by_group(tmp_path: Path):
    """PEFT merges no such adapter, but what it computes is linear in the update."""
    KINDS["groups"] = ("convolutions", lambda: {"target_modules": ["two"], "task_type": None})
    a, b = pair(tmp_path, "groups", lambda name: "lora_A" not in name)
    del KINDS["groups"]
    extrapolate([a, b], tmp_path / "out", alpha=ALPHA)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    start, end, new = (
        peft.PeftModel.from_pretrained(base("convolutions"), folder, autocast_adapter_dtype=False)(x)
        for folder in (a, b, tmp_path / "out")
    )
    torch.testing.assert_close(new, (1 + ALPHA) * end - ALPHA * start)


def test_dora_extrapolates_direction_and_magnitude(tmp_path: Path):
    KINDS["dora"] = ("llama", lambda: {"use_dora": True, "target_modules": ["q_proj"]})
    a, b = pair(tmp_path, "dora", lambda name: "lora_A" not in name)
    extrapolate([a, b], tmp_path / "out", alpha=ALPHA)
    start, end, new = (load_file(f / "adapter_model.safetensors") for f in (a, b, tmp_path / "out"))
    plain = base("llama").state_dict()
    out = merged("dora", tmp_path / "out")
    del KINDS["dora"]
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        update = [s[f"{stem}B.weight"] @ s[f"{stem}A.weight"] for s in (start, end)]
        direction = plain[name] + 2 * ((1 + ALPHA) * update[1] - ALPHA * update[0])
        sizes = [s[f"{stem}magnitude_vector"] for s in (start, end)]
        size = (1 + ALPHA) * sizes[1] - ALPHA * sizes[0]
        torch.testing.assert_close(out[name], size[:, None] * direction / direction.norm(dim=1, keepdim=True))


def edit(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


UNKNOWN: dict[str, dict[str, object]] = {
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "monteclora_config": {"monteclora_config": {"num_samples": 2}},
    "use_something_new": {"use_something_new": True},
    "new_config": {"new_config": {"x": 1}},
    "rank_pattern": {"target_parameters": EXPERTS, "rank_pattern": {"q_proj": 2}},
    "kasa_config": {"kasa_config": {"beta": 1e-4}},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_makes_another_update_of_the_factors_is_refused_in_one_line(what: str, tmp_path: Path):
    a, b = pair(tmp_path, "plain", lambda name: True)
    for folder in (a, b):
        edit(folder, **UNKNOWN[what])
    with pytest.raises(CheckpointError, match=f"{what}.*--lora factors"):
        extrapolate([a, b], tmp_path / "out", alpha=1)
    assert not (tmp_path / "out").exists()
    report = extrapolate([a, b], tmp_path / "out", alpha=1, lora="factors")
    assert any("one by one" in note for note in report.notes) and report.lora is None


def test_tensors_that_are_no_known_part_of_an_update_are_refused(tmp_path: Path):
    a, b = pair(tmp_path, "plain", lambda name: True)
    for folder in (a, b):
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
        name = (
            next(iter(state)).replace("lora_A.weight", "lora_sampler.std").replace("lora_B.weight", "lora_sampler.std")
        )
        save_file({**state, name: torch.ones(4)}, file)
    with pytest.raises(CheckpointError, match="lora_sampler"):
        extrapolate([a, b], tmp_path / "out", alpha=1)


@pytest.mark.parametrize(
    "key, value",
    [
        ("target_parameters", EXPERTS), ("use_bdlora", BD), ("kasa_config", {"beta": 1.0}), ("lora_bias", True),
        ("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("use_qalora", True), ("r", 8),
    ],
)  # fmt: skip
def test_adapters_whose_configs_make_different_updates_are_refused(key: str, value: object, tmp_path: Path):
    a, b = pair(tmp_path, "plain", lambda name: True)
    edit(a, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key}.*mixed families"):
        extrapolate([a, b], tmp_path / "out", alpha=1)


OTHERS = sorted(str(kind.value) for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING if str(kind.value) != "LORA")


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_kind_of_adapter_is_refused_or_taken_tensor_by_tensor(kind: str, tmp_path: Path):
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    takes = inspect.signature(config).parameters
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2, "total_step": 9}
    settings |= {"feedforward_modules": [], "num_virtual_tokens": 2, "init_weights": False, "token_indices": [3]}
    try:
        with torch.random.fork_rng():
            config = config(**{name: value for name, value in settings.items() if name in takes})
            model = peft.get_peft_model(copy.deepcopy(base("llama")), config)
            for folder in ("a", "b"):
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data += 0.1 * torch.randn_like(parameter)
                model.save_pretrained(tmp_path / folder)
    except Exception:  # what such a model is too small for: then the config alone must be enough
        for folder in (tmp_path / "a", tmp_path / "b"):
            folder.mkdir(exist_ok=True)
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2}))
            save_file(
                {"x.some_A": torch.randn(2, 4), "x.some_B": torch.randn(4, 2)}, folder / "adapter_model.safetensors"
            )
    folders = [tmp_path / name for name in ("a", "b")]
    with pytest.raises(CheckpointError, match=f"{kind} adapter.*--lora factors"):
        extrapolate(folders, tmp_path / "out", alpha=1)
    assert not (tmp_path / "out").exists()
    report = extrapolate(folders, tmp_path / "out", alpha=1, lora="factors")
    assert report.lora is None and any("one by one" in note for note in report.notes)
    start, end, new = (load_file(folder / "adapter_model.safetensors") for folder in (*folders, tmp_path / "out"))
    for name, tensor in new.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 2 * end[name] - start[name])
