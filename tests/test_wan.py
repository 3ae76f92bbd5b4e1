"""Full scale in small: every real component class with random weights, from files.

Also through the training command.
"""

import copy
import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen2VLModel

from streamr1_ref.cli.generate import WanVideoConfig, generate, score
from streamr1_ref.cli.prepare import download_command, embed_command
from streamr1_ref.cli.train import train, with_method
from streamr1_ref.cli.wan_run import WanTrainConfig
from streamr1_ref.reward import AXES
from streamr1_ref.training.presets import PRESETS
from streamr1_ref.transformer import WanTransformer
from streamr1_ref.utils.files import load_tensors, save_tensors
from streamr1_ref.utils.video import read_mp4
from streamr1_ref.wan.build import SMALL, random_codec, random_reward, random_text, wan_models
from streamr1_ref.wan.text import PromptFile, UMT5Text, word_tokenizer
from streamr1_ref.wan.video_reward import (
    OWN_WORDING,
    REWARD_TOKENS,
    load_video_reward,
    merge_lora,
    with_checkpoint,
)

SIZE = replace(SMALL.net, text_len=512)
SPECIALS = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """What a person would have downloaded, small."""
    folder = tmp_path_factory.mktemp("downloads")
    torch.manual_seed(0)
    words = "a red fox runs over snow".split()
    random_text(SMALL).model.save_pretrained(folder / "base" / "text_encoder")
    word_tokenizer(words).save_pretrained(folder / "base" / "tokenizer")
    random_codec(SMALL).vae.save_pretrained(folder / "base" / "vae")
    for name in ("student", "teacher"):
        save_tensors(folder / f"{name}.safetensors", WanTransformer(SIZE).state_dict())
    judge, qwen = word_tokenizer(words, SPECIALS), random_reward(SMALL).model
    judge.save_pretrained(folder / "qwen")
    qwen.save_pretrained(folder / "qwen")
    qwen.resize_token_embeddings(len(judge) + len(REWARD_TOKENS))
    checkpoint = folder / "reward" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    weights = {"rm_head.weight": torch.randn(3, 32)}
    for name, tensor in qwen.state_dict().items():
        weights[re.sub("^language_model", "model", name)] = tensor.clone()
    torch.save(weights, checkpoint / "model.pth")
    inference = {f"{axis}_mean": 0.1 for axis in AXES} | {f"{axis}_std": 2.0 for axis in AXES}
    config = json.dumps({"inference_config": inference})
    (folder / "reward" / "model_config.json").write_text(config)
    (folder / "template.txt").write_text(OWN_WORDING.replace("\n", " "))
    (folder / "prompts.txt").write_text("a red fox\na fox runs over snow\n")
    return folder


def wan_run(folder, out, **changes):
    preset = PRESETS["wan-1.3b"]
    quick = {"frames": 3, "micro_batches": 1, "exit_group": 1, "critic_steps": 1}
    small = replace(preset.distillation, **quick, student_lr=1e-4, critic_lr=1e-4)
    settings = vars(preset) | {"max_steps": 2, "save_every": 1, "distillation": small} | changes
    return WanTrainConfig(
        **{
            **paths(folder),
            "reward_size": (28, 56),
            "resolution": (32, 48),
            "student_size": None,
            "head_dim": 24,
            "text_cache": str(out / "text"),
            "out": str(out / "run"),
            **settings,
        }
    )


def paths(folder):
    return {
        "data": str(folder / "prompts.txt"),
        "student": str(folder / "student.safetensors"),
        "teacher": str(folder / "teacher.safetensors"),
        "base": str(folder / "base"),
        "reward": str(folder / "reward"),
        "reward_base": str(folder / "qwen"),
        "template": str(folder / "template.txt"),
    }


def records_of(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def check_trained(folder, downloads):
    """The student of a run, which has the tensors of the one it began with, and other values."""
    trained = load_tensors(folder / "student.safetensors")[0]
    start = load_tensors(downloads / "student.safetensors")[0]
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    return trained


def embeddings_in(folder):
    return len(list(folder.rglob("*.safetensors")))


@pytest.mark.slow
def test_the_command_trains_with_every_real_component(downloads, tmp_path):
    train(wan_run(downloads, tmp_path))
    records = records_of(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2] and not any("skipped" in r for r in records)
    for record in records:
        for name in ("loss", "critic", *AXES, "norm", "weight"):
            assert math.isfinite(record[name])
    check_trained(tmp_path / "run", downloads)
    assert embeddings_in(tmp_path / "text") == 3  # two prompts and the empty one
    train(wan_run(downloads, tmp_path, max_steps=3, resume=True))
    assert len(records_of(tmp_path / "run")) == 3


@pytest.mark.slow
def test_processes_mixed_precision_recomputing_and_offloading(downloads, tmp_path):
    """The command as on a node with two GPUs.

    With FSDP, bfloat16, activation checkpointing, teacher and text encoder on the CPU.
    """
    given = {
        **paths(downloads),
        "reward-size": "28 56",
        "resolution": "32 48",
        "head-dim": 24,
        "student-size": "None",
        "dtype": "bfloat16",
        "max-steps": 1,
        "save-every": 1,
        "out": tmp_path / "run",
        "distillation.frames": 3,
        "distillation.micro-batches": 2,
        "distillation.exit-group": 2,
        "distillation.critic-steps": 1,
    }
    flags = ["--offload", "teacher", "text encoder"]
    for name, value in given.items():
        flags += [f"--{name.replace('_', '-')}", *str(value).split()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "streamr1_ref.cli.main", "train", "wan-1.3b"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    settings = {"capture_output": True, "text": True, "timeout": 300, "env": env}
    done = subprocess.run([*launcher, *flags], **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = records_of(tmp_path / "run")
    assert "skipped" not in record
    assert all(math.isfinite(record[name]) for name in ("loss", "critic", *AXES, "norm"))
    trained = check_trained(tmp_path / "run", downloads)
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert embeddings_in(tmp_path / "run" / "text") == 3  # an offloaded text encoder has a cache


def test_missing_files_are_named_all_at_once_before_any_work(downloads, tmp_path):
    run = replace(
        wan_run(downloads, tmp_path),
        student="weights/ode-init/ode.pt",
        base=str(tmp_path / "absent"),
        reward="weights/video-reward",
    )
    with pytest.raises(
        FileNotFoundError,
        match="these are missing:\n  student: .*download ode-init.*\n  base: .*absent\n"
        "  reward: .*download video-reward",
    ):
        train(run)
    for change, says in (
        ("base", "text_encoder, tokenizer, vae"),
        ("reward", "model_config.json|checkpoint-N"),
    ):
        with pytest.raises((OSError, ValueError), match=says):
            train(replace(wan_run(downloads, tmp_path), **{change: str(tmp_path)}))
    assert not (tmp_path / "run").exists()


def test_wrong_sizes_are_refused(downloads, tmp_path):
    with pytest.raises(
        ValueError,
        match="expected the weights of Wan2.1 1.3B, .*student.safetensors holds those of a network "
        "of width 48 with 2 layers",
    ):
        train(wan_run(downloads, tmp_path, student_size="1.3B"))
    with pytest.raises(
        ValueError,
        match=r"resolution: expected height and width in multiples of 16, .*, got \(30, 48\)",
    ):
        train(wan_run(downloads, tmp_path, resolution=(30, 48)))


@pytest.mark.slow
def test_too_little_gpu_memory_is_refused_with_the_plans_figures(downloads, tmp_path, monkeypatch):
    monkeypatch.setattr("streamr1_ref.cli.wan_run.gpu_memory", lambda: 1e5)
    with pytest.raises(
        ValueError,
        match="on GPUs start it with torchrun, also on one: torchrun --standalone --nproc-per",
    ):
        train(wan_run(downloads, tmp_path))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        ValueError,
        match="gpus: one layer at work in phase .* needs .*, a GPU has 0.0 GiB; more GPUs do not",
    ):
        train(wan_run(downloads, tmp_path))
    monkeypatch.setattr("streamr1_ref.cli.wan_run.gpu_memory", lambda: 14 * 2**30)
    says = (
        "gpus: expected .* GiB of memory on each of 1 in phase .*text encoder .*, there are 14.0 "
        "GiB; it fits with --text-cache"
    )
    with pytest.raises(ValueError, match=says):
        train(wan_run(downloads, tmp_path))
    assert not (tmp_path / "run").exists()


def test_too_little_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(OSError, match="out: expected 57200 MB free for .*, there are 1000 MB"):
        download_command(("wan-14b",), str(tmp_path / "weights"), str(tmp_path))


def test_prompts_of_more_than_512_tokens(downloads, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("a red fox\n" + "fox " * 600 + "\n")
    with pytest.raises(
        ValueError, match="prompts: expected at most 512 tokens, got 601 in 'fox fox"
    ):
        generate(
            "wan-1.3b", prompts=str(long), out=str(tmp_path / "videos"), wan=wan_video(downloads)
        )
    assert not list((tmp_path / "videos").glob("*.mp4"))  # before the first video was made
    text = wan_models(
        downloads / "student.safetensors",
        downloads / "teacher.safetensors",
        downloads / "base",
        None,
        "cpu",
        head_dim=24,
    ).text
    assert text(["fox " * 600]).shape == (1, 512, 32)  # training cuts it, as the published one does


def test_video_reward_from_files(downloads):
    reward = load_video_reward(
        downloads / "reward",
        downloads / "qwen",
        downloads / "template.txt",
        torch.float32,
        (28, 56),
    )
    clips = torch.rand(
        2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    scores = reward(clips, ["a red fox", "a fox runs over snow"])
    sum(r.sum() for r in scores.values()).backward()
    assert set(scores) == {"VQ", "MQ", "TA"} and clips.grad.abs().sum() > 0
    alone = reward(clips[1:], ["a fox runs over snow"])
    assert all(torch.allclose(alone[a], scores[a][1:], atol=1e-4) for a in scores)
    with pytest.warns(UserWarning, match="our own wording"):
        load_video_reward(downloads / "reward", downloads / "qwen")


class OldLayout(torch.nn.Module):
    """Qwen2-VL with a reward head.

    Its parts are named as in the transformers release that VideoAlign was tuned with.
    """

    def __init__(self, qwen):
        super().__init__()
        self.model, self.visual = qwen.language_model, qwen.visual
        self.rm_head = torch.nn.Linear(32, 3, bias=False)


def merged_by_hand(state, pairs, alpha, rank):
    """The state dict `state` with W + alpha / rank B A for each pair: what peft's merging is."""
    merged = dict(state)
    for name in {name.rsplit(".lora_", 1)[0] for name in pairs}:
        first, second = pairs[f"{name}.lora_A.weight"], pairs[f"{name}.lora_B.weight"]
        merged[f"{name}.weight"] = state[f"{name}.weight"] + alpha / rank * second @ first
    return merged


def largest_difference(state, expected):
    """The largest difference of two state dicts' tensors; NaN is a failure at once."""
    assert state.keys() == expected.keys()
    differences = torch.stack([(t - expected[n]).abs().max() for n, t in state.items()])
    assert differences.isfinite().all()  # Python's max would pass over a NaN
    return differences.max().item()


def test_lora_pairs_are_merged_as_the_formula_says(downloads):
    base, rank = Qwen2VLModel.from_pretrained(downloads / "qwen"), 4
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    generator, pairs = torch.Generator().manual_seed(4), {}
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            out, width = tensor.shape
            stem = name.removesuffix("weight")
            pairs[f"{stem}lora_A.weight"] = torch.randn(rank, width, generator=generator)
            pairs[f"{stem}lora_B.weight"] = torch.randn(out, rank, generator=generator)
    assert pairs
    merged = merge_lora(base, pairs, alpha=8, rank=rank)
    assert merged is base
    assert largest_difference(merged.state_dict(), merged_by_hand(state, pairs, 8, rank)) < 1e-6


def test_an_adapter_as_peft_saves_it_is_merged_as_peft_merges_it(downloads, tmp_path):
    torch.manual_seed(3)
    base = Qwen2VLModel.from_pretrained(downloads / "qwen")
    base.resize_token_embeddings(
        len(PreTrainedTokenizerFast.from_pretrained(downloads / "qwen")) + len(REWARD_TOKENS)
    )
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=linear)
    tuned = get_peft_model(OldLayout(copy.deepcopy(base)), settings)
    changed = re.compile("lora|visual|rm_head|embed_tokens")
    for name, p in tuned.named_parameters():
        p.data.add_(0.1 * torch.randn_like(p) * bool(changed.search(name)))
    folder = tmp_path / "reward" / "checkpoint-11352"
    tuned.save_pretrained(folder)
    saved = load_tensors(folder / "adapter_model.safetensors")[0]
    assert any(name.endswith("layers.0.self_attn.q_proj.lora_A.weight") for name in saved)
    rest = {}
    for name, p in tuned.named_parameters():
        if "lora_" not in name and re.search("visual|rm_head|embed_tokens", name):
            rest[name] = p.detach().clone()
    torch.save(rest, folder / "non_lora_state_dict.pth")
    head = torch.nn.Linear(32, 3, bias=False)
    ours, head = with_checkpoint(base, head, folder, {"lora_alpha": 8, "lora_r": 4})
    theirs = tuned.merge_and_unload()
    expected = {f"language_model.{n}": t for n, t in theirs.model.state_dict().items()}
    expected |= {f"visual.{n}": t for n, t in theirs.visual.state_dict().items()}
    assert torch.equal(head.weight, theirs.rm_head.weight)
    assert largest_difference(ours.state_dict(), expected) < 1e-6


def test_models_that_do_not_fit_each_other(downloads, tmp_path):
    save_tensors(
        tmp_path / "other.safetensors", WanTransformer(replace(SIZE, text_dim=64)).state_dict()
    )
    with pytest.raises(ValueError, match="teacher: expected the student's latents and text"):
        wan_models(
            downloads / "student.safetensors",
            tmp_path / "other.safetensors",
            downloads / "base",
            None,
            "cpu",
            head_dim=24,
        )


def test_prompt_files_are_not_read_whole(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt number {i} {'x' * 200}\n" for i in range(20_000)))
    lines = PromptFile(path)
    assert len(lines) == 20_000 and lines[12_345].startswith("prompt number 12345 ")
    assert lines.places.itemsize * len(lines) < path.stat().st_size / 20


def wan_video(folder, **changes):
    return WanVideoConfig(
        **{
            "checkpoint": str(folder / "student.safetensors"),
            "base": str(folder / "base"),
            "size": None,
            "resolution": (32, 48),
            "head_dim": 24,
            **changes,
        }
    )


@pytest.mark.slow
def test_the_command_generates_from_a_checkpoint(downloads, tmp_path):
    generate(
        "wan-1.3b",
        prompts=str(downloads / "prompts.txt"),
        seconds=0.5,
        samples=2,
        vbench=True,
        out=str(tmp_path),
        wan=wan_video(downloads, text_cache=str(tmp_path / "text")),
    )
    made = json.loads((tmp_path / "videos.json").read_text())
    assert [m["file"] for m in made] == [
        f"{p}-{k}.mp4" for p in ("a red fox", "a fox runs over snow") for k in (0, 1)
    ]
    noted = {"seed": 0, "frames": 8, "steps": [1000, 750, 500, 250], "dtype": "float32"}
    assert {name: made[0][name] for name in noted} == noted
    by_file = {m["file"]: m["prompt"] for m in made}
    assert json.loads((tmp_path / "prompts.json").read_text()) == by_file
    (first, _), (clip, fps) = (read_mp4(tmp_path / m["file"]) for m in made[:2])
    assert clip.shape == (8, 3, 32, 48) and fps == 16 and not torch.equal(clip, first)
    files = [str(downloads / name) for name in ("reward", "qwen", "template.txt")]
    score(str(tmp_path), *files, (28, 56))
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["file"] for row in rows] == list(by_file)
    assert all(math.isfinite(float(row["overall"])) for row in rows)
    seen = {"odd_frame": "drop", "clamp": "True", "eight_bits": "floor"}
    seen |= {"own_wording": "False", "chat": "False"}
    assert {name: rows[0][f"input_{name}"] for name in seen} == seen
    score(str(tmp_path), *files, sampling="offline", out=str(tmp_path / "offline.csv"))
    offline = list(csv.DictReader((tmp_path / "offline.csv").open()))
    assert offline[0]["input_eight_bits"] == "round"
    assert offline[0]["input_frames"].endswith("of 8, 2 a second")


@pytest.mark.slow
def test_a_released_checkpoint_generates_what_its_ema_does(downloads, tmp_path):
    """generator_ema behind wrappers, beside other networks: the published layout.

    The wrappers are those of FSDP, checkpointing and the model class.
    """
    weights = load_tensors(downloads / "student.safetensors")[0]
    trained, ema = {f"model.{name}": t + 1 for name, t in weights.items()}, {}
    for name, tensor in weights.items():
        inside = re.sub(r"^(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module.", name)
        ema[f"model._fsdp_wrapped_module.{inside}"] = tensor
    file = tmp_path / "model.pt"
    torch.save({"generator": trained, "step": 3, "generator_ema": ema}, file)
    plain = wan_video(downloads).load()
    released = wan_video(downloads, checkpoint=str(file)).load()
    for name, weight in plain.sampler.net.state_dict().items():
        assert torch.equal(weight, released.sampler.net.state_dict()[name])
    # where a file is mapped in memory decides the last bit
    assert torch.allclose(plain("a red fox", 0.3), released("a red fox", 0.3), atol=1e-5)


@pytest.mark.slow
def test_compiled_layers_stream_the_same_video(downloads):
    plain, compiled = (wan_video(downloads, compile=parts).load() for parts in ((), ("network",)))
    # five blocks: all visible lengths, and the first eviction
    expected, made = (pipe("a red fox", 2.0, seed=3) for pipe in (plain, compiled))
    assert (expected - made).abs().max() < 1e-4 and made.shape[1] == 32


@pytest.mark.slow
def test_processes_share_the_prompts(downloads, tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        prompts = ("a red 3 moving left", "a cyan 0 moving up", "a blue 7 moving down")
        generate("tiny", prompts, seconds=0.2, out=str(tmp_path))
    for rank, files in enumerate((["000.mp4", "002.mp4"], ["001.mp4"])):
        made = json.loads((tmp_path / f"videos-{rank}.json").read_text())
        assert [m["file"] for m in made] == files


@pytest.mark.slow
def test_the_critic_has_a_size_of_its_own(downloads, tmp_path):
    """A critic of 1.3B beside a teacher of 14B: the critic was always a copy of the teacher."""
    save_tensors(
        tmp_path / "large.safetensors",
        WanTransformer(replace(SIZE, dim=96, num_heads=4)).state_dict(),
    )
    run = wan_run(
        downloads,
        tmp_path,
        teacher=str(tmp_path / "large.safetensors"),
        critic=str(downloads / "teacher.safetensors"),
        method="DMD",
    )
    models = with_method(run).models()
    assert [net.cfg.dim for net in (models.student, models.teacher, models.critic)] == [48, 96, 48]
    start = load_tensors(downloads / "teacher.safetensors")[0]
    assert all(torch.equal(p, start[name]) for name, p in models.critic.named_parameters())
    train(run)
    assert len(records_of(tmp_path / "run")) == 2
    with pytest.raises(
        ValueError,
        match="expected the weights of Wan2.1 1.3B, .*teacher.safetensors holds those of a network",
    ):
        train(
            wan_run(
                downloads,
                tmp_path,
                critic=str(downloads / "teacher.safetensors"),
                critic_size="1.3B",
                method="DMD",
            )
        )


def test_a_frozen_teacher_is_kept_in_the_dtype_of_computing(downloads):
    models = wan_models(
        downloads / "student.safetensors",
        downloads / "teacher.safetensors",
        downloads / "base",
        None,
        "cpu",
        torch.bfloat16,
        head_dim=24,
    )
    dtypes = [
        {p.dtype for p in net.parameters()}
        for net in (models.student, models.critic, models.teacher)
    ]
    assert dtypes == [{torch.float32}, {torch.float32}, {torch.bfloat16}]


@pytest.mark.slow
def test_plain_dmd_needs_no_reward_model_on_disk(downloads, tmp_path):
    train(
        wan_run(
            downloads,
            tmp_path,
            method="DMD",
            reward="nowhere",
            reward_base="nowhere",
            template=None,
        )
    )
    record = records_of(tmp_path / "run")[0]
    assert math.isfinite(record["loss"]) and "VQ" not in record
    with pytest.raises(
        FileNotFoundError, match="these are missing:\n  reward: nowhere\n  reward_base: nowhere"
    ):
        train(
            wan_run(
                downloads, tmp_path / "2", method="Re-DMD", reward="nowhere", reward_base="nowhere"
            )
        )


@pytest.mark.slow
def test_embeddings_made_beforehand_replace_the_text_encoder(
    downloads, tmp_path, monkeypatch, capsys
):
    cache = tmp_path / "text"
    settings = {"data": str(downloads / "prompts.txt"), "base": str(downloads / "base")}
    embed_command("wan-1.3b", str(cache), **settings, steps=1)
    assert embeddings_in(cache) == 3 and "wrote 3 embeddings" in capsys.readouterr().out
    sizes = sum(p.stat().st_size for p in cache.rglob("*.safetensors"))
    victim = sorted(cache.rglob("*.safetensors"))[0]
    victim.unlink()  # interrupted before the last one
    embed_command("wan-1.3b", str(cache), **settings, steps=1)
    said = capsys.readouterr().out
    assert "2 of 3 embeddings are in" in said and "wrote 1 embeddings" in said and victim.exists()
    assert sum(p.stat().st_size for p in cache.rglob("*.safetensors")) == sizes
    monkeypatch.setattr(
        "transformers.UMT5EncoderModel.from_pretrained",
        lambda *a, **k: pytest.fail("the encoder was loaded"),
    )
    negative = replace(
        wan_run(downloads, tmp_path).distillation,
        negative_prompt=PRESETS["wan-1.3b"].distillation.negative_prompt,
    )
    train(wan_run(downloads, tmp_path, method="DMD", text_cache=str(cache), distillation=negative))
    assert "3 of 3 embeddings are in" in capsys.readouterr().err
    with pytest.raises(OSError, match="out: expected .* free for .*text2"):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        embed_command("wan-1.3b", str(tmp_path / "text2"), **settings, steps=1)


class Encoder(torch.nn.Module):
    """As much of a text encoder as can run on the meta device."""

    def __init__(self):
        super().__init__()
        self.config, self.words = SimpleNamespace(d_model=8), torch.nn.Embedding(64, 8)

    def forward(self, ids, mask):
        self.seen_on = self.words.weight.device.type
        return SimpleNamespace(last_hidden_state=self.words(ids))


def test_an_offloaded_text_encoder_is_never_carried_back():
    """It used to move to the device for every prompt and back.

    Here the device is meta: copies go there, the weights stay.
    """
    text = UMT5Text(Encoder(), word_tokenizer(["a", "fox"]), length=16, device="meta")
    before = text.model.words.weight.data_ptr()
    assert text.encode(["a fox"]).device.type == "meta" and text.model.seen_on == "meta"
    assert (
        text.model.words.weight.device.type == "cpu"
        and text.model.words.weight.data_ptr() == before
    )


def test_a_negative_prompt_that_is_too_long_is_refused_before_anything_is_loaded(
    downloads, tmp_path, monkeypatch
):
    run = wan_run(downloads, tmp_path)
    run = replace(run, distillation=replace(run.distillation, negative_prompt="fox " * 600))
    monkeypatch.setattr(WanTrainConfig, "models", lambda self: pytest.fail("models were loaded"))
    with pytest.raises(
        ValueError,
        match="distillation.negative_prompt: prompts: expected at most 512 tokens, got 601",
    ):
        train(run)


def test_weights_with_nan_are_refused_before_training_and_before_video(downloads, tmp_path):
    """They used to load in silence."""
    weights = load_tensors(downloads / "student.safetensors")[0]
    weights["head.head.bias"][0] = math.nan
    save_tensors(tmp_path / "nan.safetensors", weights)
    with pytest.raises(
        ValueError,
        match="path: expected finite weights in .*nan.safetensors, head.head.bias has others",
    ):
        train(wan_run(downloads, tmp_path, student=str(tmp_path / "nan.safetensors"), method="DMD"))
    with pytest.raises(
        ValueError,
        match="path: expected finite weights in .*nan.safetensors, head.head.bias has others",
    ):
        wan_video(downloads, checkpoint=str(tmp_path / "nan.safetensors")).load()


@pytest.mark.slow
def test_modules_are_imported_without_the_libraries_that_only_calls_need():
    script = """
import sys
from streamr1_ref.wan import checkpoints, download, text, vae, video_reward
heavy = {"diffusers", "transformers", "peft", "huggingface_hub", "IPython", "ipywidgets"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
