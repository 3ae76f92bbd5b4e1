"""Full scale in small: every real component class with random weights, from files, through the training command."""

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

from streamr1_ref.cli import main as cli
from streamr1_ref.training.presets import PRESETS
from streamr1_ref.transformer import WanTransformer
from streamr1_ref.utils.files import load_tensors, save_tensors
from streamr1_ref.utils.video import read_mp4
from streamr1_ref.wan.build import SMALL, random_codec, random_reward, random_text
from streamr1_ref.wan.checkpoints import PromptFile, UMT5Text, wan_models, word_tokenizer
from streamr1_ref.wan.video_reward import (
    OWN_WORDING,
    REWARD_TOKENS,
    load_video_reward,
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
    weights = {
        f"model.{n.removeprefix('language_model.')}"
        if n.startswith("language_model.")
        else n: t.clone()
        for n, t in qwen.state_dict().items()
    }
    torch.save(weights | {"rm_head.weight": torch.randn(3, 32)}, checkpoint / "model.pth")
    inference = {
        f"{axis}_{kind}": value
        for axis in ("VQ", "MQ", "TA")
        for kind, value in (("mean", 0.1), ("std", 2.0))
    }
    (folder / "reward" / "model_config.json").write_text(
        json.dumps({"inference_config": inference})
    )
    (folder / "template.txt").write_text(OWN_WORDING.replace("\n", " "))
    (folder / "prompts.txt").write_text("a red fox\na fox runs over snow\n")
    return folder


def wan_run(folder, out, **changes):
    preset = PRESETS["wan-1.3b"]
    small = replace(
        preset.distillation,
        frames=3,
        micro_batches=1,
        exit_group=1,
        critic_steps=1,
        student_lr=1e-4,
        critic_lr=1e-4,
    )
    settings = vars(preset) | {"steps": 2, "save_every": 1, "distillation": small} | changes
    return cli.WanRun(
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


def test_the_command_trains_with_every_real_component(downloads, tmp_path):
    cli.train(wan_run(downloads, tmp_path))
    records = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records] == [1, 2] and not any("skipped" in r for r in records)
    assert all(
        math.isfinite(r[name])
        for r in records
        for name in ("loss", "critic", "VQ", "MQ", "TA", "norm", "weight")
    )
    trained, start = (
        load_tensors(tmp_path / "run" / "student.safetensors")[0],
        load_tensors(downloads / "student.safetensors")[0],
    )
    assert trained.keys() == start.keys() and any(
        not torch.equal(trained[n], start[n]) for n in start
    )
    assert (
        len(list((tmp_path / "text").rglob("*.safetensors"))) == 3
    )  # two prompts and the empty one
    cli.train(wan_run(downloads, tmp_path, steps=3, resume=True))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3


def test_processes_mixed_precision_recomputing_and_offloading(downloads, tmp_path):
    """The command as on a node with two GPUs: FSDP, bfloat16, activation checkpointing, teacher and text encoder on the CPU."""
    given = {
        **paths(downloads),
        "reward-size": "28 56",
        "resolution": "32 48",
        "head-dim": 24,
        "student-size": "None",
        "dtype": "bfloat16",
        "steps": 1,
        "save-every": 1,
        "out": tmp_path / "run",
        "distillation.frames": 3,
        "distillation.micro-batches": 2,
        "distillation.exit-group": 2,
        "distillation.critic-steps": 1,
    }
    flags = [
        part
        for name, value in given.items()
        for part in (f"--{name.replace('_', '-')}", *str(value).split())
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "streamr1_ref.cli.main",
            "train",
            "wan-1.3b",
            *flags,
            "--offload",
            "teacher",
            "text encoder",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert "skipped" not in record and all(
        math.isfinite(record[name]) for name in ("loss", "critic", "VQ", "MQ", "TA", "norm")
    )
    trained, start = (
        load_tensors(tmp_path / "run" / "student.safetensors")[0],
        load_tensors(downloads / "student.safetensors")[0],
    )
    assert {t.dtype for t in trained.values()} == {torch.float32} and any(
        not torch.equal(trained[n], start[n]) for n in start
    )
    assert (
        len(list((tmp_path / "run" / "text").rglob("*.safetensors"))) == 3
    )  # an offloaded text encoder has a cache


def test_missing_files_are_named_all_at_once_before_any_work(downloads, tmp_path):
    run = replace(
        wan_run(downloads, tmp_path),
        student="weights/ode-init/ode.pt",
        base=str(tmp_path / "absent"),
        reward="weights/video-reward",
    )
    with pytest.raises(
        FileNotFoundError,
        match="these are missing:\n  student: .*download ode-init.*\n  base: .*absent\n  reward: .*download video-reward",
    ):
        cli.train(run)
    for change, says in (
        ("base", "text_encoder, tokenizer, vae"),
        ("reward", "model_config.json|checkpoint-N"),
    ):
        with pytest.raises((OSError, ValueError), match=says):
            cli.train(replace(wan_run(downloads, tmp_path), **{change: str(tmp_path)}))
    assert not (tmp_path / "run").exists()


def test_wrong_sizes_are_refused(downloads, tmp_path):
    with pytest.raises(
        ValueError,
        match="expected the weights of Wan2.1 1.3B, .*student.safetensors holds those of a network of width 48 with 2 layers",
    ):
        cli.train(wan_run(downloads, tmp_path, student_size="1.3B"))
    with pytest.raises(
        ValueError,
        match=r"resolution: expected height and width in multiples of 16, such as 480 832, got \(30, 48\)",
    ):
        cli.train(wan_run(downloads, tmp_path, resolution=(30, 48)))


def test_too_little_gpu_memory_is_refused_with_the_plans_figures(downloads, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "gpu_memory", lambda: 1e5)
    with pytest.raises(
        ValueError,
        match="on GPUs start it with torchrun, also on one: torchrun --standalone --nproc-per-node 1",
    ):
        cli.train(wan_run(downloads, tmp_path))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        ValueError,
        match="gpus: one layer at work in phase .* needs .*, a GPU has 0.0 GiB; more GPUs do not help",
    ):
        cli.train(wan_run(downloads, tmp_path))
    monkeypatch.setattr(cli, "gpu_memory", lambda: 14 * 2**30)
    says = "gpus: expected .* GiB of memory on each of 1 in phase .*text encoder .*, there are 14.0 GiB; it fits with --text-cache"
    with pytest.raises(ValueError, match=says):
        cli.train(wan_run(downloads, tmp_path))
    assert not (tmp_path / "run").exists()


def test_too_little_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(OSError, match="out: expected 57200 MB free for .*, there are 1000 MB"):
        cli.download_command(("wan-14b",), str(tmp_path / "weights"), str(tmp_path))


def test_prompts_of_more_than_512_tokens(downloads, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("a red fox\n" + "fox " * 600 + "\n")
    with pytest.raises(
        ValueError, match="prompts: expected at most 512 tokens, got 601 in 'fox fox"
    ):
        cli.generate(
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
    """Qwen2-VL with a reward head, its parts named as in the transformers release that VideoAlign was tuned with."""

    def __init__(self, qwen):
        super().__init__()
        self.model, self.visual, self.rm_head = (
            qwen.language_model,
            qwen.visual,
            torch.nn.Linear(32, 3, bias=False),
        )


def test_an_adapter_as_peft_saves_it_is_merged_as_peft_merges_it(downloads, tmp_path):
    torch.manual_seed(3)
    base = Qwen2VLModel.from_pretrained(downloads / "qwen")
    base.resize_token_embeddings(
        len(PreTrainedTokenizerFast.from_pretrained(downloads / "qwen")) + len(REWARD_TOKENS)
    )
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(
        OldLayout(copy.deepcopy(base)), LoraConfig(r=4, lora_alpha=8, target_modules=linear)
    )
    for name, p in tuned.named_parameters():
        p.data.add_(
            torch.randn_like(p)
            * 0.1
            * ("lora" in name or "visual" in name or "rm_head" in name or "embed_tokens" in name)
        )
    folder = tmp_path / "reward" / "checkpoint-11352"
    tuned.save_pretrained(folder)
    assert any(
        name.endswith("layers.0.self_attn.q_proj.lora_A.weight")
        for name in load_tensors(folder / "adapter_model.safetensors")[0]
    )
    rest = {
        n: p.detach().clone()
        for n, p in tuned.named_parameters()
        if "lora_" not in n and any(part in n for part in ("visual", "rm_head", "embed_tokens"))
    }
    torch.save(rest, folder / "non_lora_state_dict.pth")
    ours, head = with_checkpoint(
        base, torch.nn.Linear(32, 3, bias=False), folder, {"lora_alpha": 8, "lora_r": 4}
    )
    theirs = tuned.merge_and_unload()
    expected = {f"language_model.{n}": t for n, t in theirs.model.state_dict().items()} | {
        f"visual.{n}": t for n, t in theirs.visual.state_dict().items()
    }
    assert ours.state_dict().keys() == expected.keys() and torch.equal(
        head.weight, theirs.rm_head.weight
    )
    assert max((t - expected[n]).abs().max() for n, t in ours.state_dict().items()) < 1e-6


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
    return cli.WanVideo(
        **{
            "checkpoint": str(folder / "student.safetensors"),
            "base": str(folder / "base"),
            "size": None,
            "resolution": (32, 48),
            "head_dim": 24,
            **changes,
        }
    )


def test_the_command_generates_from_a_checkpoint(downloads, tmp_path):
    cli.generate(
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
    assert {name: made[0][name] for name in ("seed", "frames", "steps", "dtype")} == {
        "seed": 0,
        "frames": 8,
        "steps": [1000, 750, 500, 250],
        "dtype": "float32",
    }
    assert json.loads((tmp_path / "prompts.json").read_text()) == {
        m["file"]: m["prompt"] for m in made
    }
    clip, fps = read_mp4(tmp_path / made[1]["file"])
    assert (
        clip.shape == (8, 3, 32, 48)
        and fps == 16
        and not torch.equal(clip, read_mp4(tmp_path / made[0]["file"])[0])
    )
    cli.score(
        str(tmp_path),
        str(downloads / "reward"),
        str(downloads / "qwen"),
        str(downloads / "template.txt"),
        (28, 56),
    )
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [r["file"] for r in rows] == [m["file"] for m in made] and all(
        math.isfinite(float(r["overall"])) for r in rows
    )
    seen = {
        name: rows[0][f"input_{name}"]
        for name in ("odd_frame", "clamp", "eight_bits", "own_wording", "chat")
    }
    assert seen == {
        "odd_frame": "drop",
        "clamp": "True",
        "eight_bits": "floor",
        "own_wording": "False",
        "chat": "False",
    }
    cli.score(
        str(tmp_path),
        str(downloads / "reward"),
        str(downloads / "qwen"),
        str(downloads / "template.txt"),
        sampling="offline",
        out=str(tmp_path / "offline.csv"),
    )
    offline = list(csv.DictReader((tmp_path / "offline.csv").open()))
    assert offline[0]["input_eight_bits"] == "round" and offline[0]["input_frames"].endswith(
        "of 8, 2 a second"
    )


def test_a_released_checkpoint_generates_what_its_average_does(downloads, tmp_path):
    """generator_ema behind wrappers of FSDP, checkpointing and the model class, beside other networks: the published layout."""
    weights = load_tensors(downloads / "student.safetensors")[0]
    torch.save(
        {
            "generator": {f"model.{n}": t + 1 for n, t in weights.items()},
            "step": 3,
            "generator_ema": {
                "model._fsdp_wrapped_module."
                + re.sub(r"^(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module.", n): t
                for n, t in weights.items()
            },
        },
        tmp_path / "model.pt",
    )
    plain, released = (
        wan_video(downloads, checkpoint=str(path)).load()
        for path in (downloads / "student.safetensors", tmp_path / "model.pt")
    )
    for name, weight in plain.sampler.net.state_dict().items():
        assert torch.equal(weight, released.sampler.net.state_dict()[name])
    assert torch.allclose(
        plain("a red fox", 0.3), released("a red fox", 0.3), atol=1e-5
    )  # where a file is mapped in memory decides the last bit


def test_compiled_layers_stream_the_same_video(downloads):
    plain, compiled = (wan_video(downloads, compile=parts).load() for parts in ((), ("network",)))
    expected, made = (
        pipe("a red fox", 2.0, seed=3) for pipe in (plain, compiled)
    )  # five blocks: all visible lengths, and the first eviction
    assert (expected - made).abs().max() < 1e-4 and made.shape[1] == 32


def test_processes_share_the_prompts(downloads, tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        cli.generate(
            "tiny",
            ("a red 3 moving left", "a cyan 0 moving up", "a blue 7 moving down"),
            seconds=0.2,
            out=str(tmp_path),
        )
    assert [
        [m["file"] for m in json.loads((tmp_path / f"videos-{r}.json").read_text())] for r in (0, 1)
    ] == [["000.mp4", "002.mp4"], ["001.mp4"]]


def test_the_critic_has_a_size_of_its_own(downloads, tmp_path):
    """A critic of 1.3B beside a teacher of 14B could not be said: the critic was always a copy of the teacher."""
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
    models = cli.with_method(run).models()
    assert [net.cfg.dim for net in (models.student, models.teacher, models.critic)] == [48, 96, 48]
    start = load_tensors(downloads / "teacher.safetensors")[0]
    assert all(torch.equal(p, start[name]) for name, p in models.critic.named_parameters())
    cli.train(run)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    with pytest.raises(
        ValueError,
        match="expected the weights of Wan2.1 1.3B, .*teacher.safetensors holds those of a network",
    ):
        cli.train(
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


def test_plain_dmd_needs_no_reward_model_on_disk(downloads, tmp_path):
    cli.train(
        wan_run(
            downloads,
            tmp_path,
            method="DMD",
            reward="nowhere",
            reward_base="nowhere",
            template=None,
        )
    )
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert math.isfinite(record["loss"]) and "VQ" not in record
    with pytest.raises(
        FileNotFoundError, match="these are missing:\n  reward: nowhere\n  reward_base: nowhere"
    ):
        cli.train(
            wan_run(
                downloads, tmp_path / "2", method="Re-DMD", reward="nowhere", reward_base="nowhere"
            )
        )


def test_embeddings_made_beforehand_replace_the_text_encoder(
    downloads, tmp_path, monkeypatch, capsys
):
    cache, settings = (
        tmp_path / "text",
        {"data": str(downloads / "prompts.txt"), "base": str(downloads / "base")},
    )
    cli.embed_command("wan-1.3b", str(cache), **settings, steps=1)
    assert (
        len(list(cache.rglob("*.safetensors"))) == 3
        and "wrote 3 embeddings" in capsys.readouterr().out
    )
    sizes = sum(p.stat().st_size for p in cache.rglob("*.safetensors"))
    victim = sorted(cache.rglob("*.safetensors"))[0]
    victim.unlink()  # interrupted before the last one
    cli.embed_command("wan-1.3b", str(cache), **settings, steps=1)
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
    cli.train(
        wan_run(downloads, tmp_path, method="DMD", text_cache=str(cache), distillation=negative)
    )
    assert "3 of 3 embeddings are in" in capsys.readouterr().err
    with pytest.raises(OSError, match="out: expected .* free for .*text2"):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        cli.embed_command("wan-1.3b", str(tmp_path / "text2"), **settings, steps=1)


class Encoder(torch.nn.Module):
    """As much of a text encoder as can run on the meta device."""

    def __init__(self):
        super().__init__()
        self.config, self.words = SimpleNamespace(d_model=8), torch.nn.Embedding(64, 8)

    def forward(self, ids, mask):
        self.seen_on = self.words.weight.device.type
        return SimpleNamespace(last_hidden_state=self.words(ids))


def test_an_offloaded_text_encoder_is_never_carried_back():
    """It used to move to the device for every prompt and back. Here the device is meta: copies go there, the weights stay."""
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
    monkeypatch.setattr(cli.WanRun, "models", lambda self: pytest.fail("models were loaded"))
    with pytest.raises(
        ValueError,
        match="distillation.negative_prompt: prompts: expected at most 512 tokens, got 601",
    ):
        cli.train(run)


def test_weights_with_nan_are_refused_before_training_and_before_video(downloads, tmp_path):
    """They used to load in silence."""
    weights = load_tensors(downloads / "student.safetensors")[0]
    weights["head.head.bias"][0] = math.nan
    save_tensors(tmp_path / "nan.safetensors", weights)
    with pytest.raises(
        ValueError,
        match="path: expected finite weights in .*nan.safetensors, head.head.bias has others",
    ):
        cli.train(
            wan_run(downloads, tmp_path, student=str(tmp_path / "nan.safetensors"), method="DMD")
        )
    with pytest.raises(
        ValueError,
        match="path: expected finite weights in .*nan.safetensors, head.head.bias has others",
    ):
        wan_video(downloads, checkpoint=str(tmp_path / "nan.safetensors")).load()
