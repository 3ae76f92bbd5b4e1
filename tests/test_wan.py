"""Full scale in small: every real component class with random weights, from files, through the training command."""
import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel, UMT5Config, UMT5EncoderModel

from streamr1_ref import cli
from streamr1_ref.conventions import load_tensors, read_mp4, save_tensors
from streamr1_ref.train import PRESETS
from streamr1_ref.transformer import WanConfig, WanTransformer
from streamr1_ref.wan import OWN_WORDING, REWARD_TOKENS, PromptFile, load_video_reward, wan_models

SIZE = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=512, freq_dim=32, latent_size=(4, 6))
SPECIALS = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")


def tokenizer(words, specials=()):
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *specials, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if specials:
        made.add_special_tokens({"additional_special_tokens": list(specials)})
    return made


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """What a person would have downloaded, small."""
    folder = tmp_path_factory.mktemp("downloads")
    torch.manual_seed(0)
    words = "a red fox runs over snow".split()
    UMT5EncoderModel(UMT5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).save_pretrained(folder / "base" / "text_encoder")
    tokenizer(words).save_pretrained(folder / "base" / "tokenizer")
    AutoencoderKLWan(base_dim=8, decoder_base_dim=8, z_dim=16, num_res_blocks=1).save_pretrained(folder / "base" / "vae")
    for name in ("student", "teacher"):
        save_tensors(folder / f"{name}.safetensors", WanTransformer(SIZE).state_dict())
    judge = tokenizer(words, SPECIALS)
    judge.save_pretrained(folder / "qwen")
    config = Qwen2VLConfig(text_config=dict(vocab_size=len(judge), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=1),
                           vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
                           video_token_id=judge.convert_tokens_to_ids("<|video_pad|>"), image_token_id=2, vision_start_token_id=judge.convert_tokens_to_ids("<|vision_start|>"))
    qwen = Qwen2VLModel(config)
    qwen.save_pretrained(folder / "qwen")
    qwen.resize_token_embeddings(len(judge) + len(REWARD_TOKENS))
    checkpoint = folder / "reward" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    weights = {f"model.{n.removeprefix('language_model.')}" if n.startswith("language_model.") else n: t.clone() for n, t in qwen.state_dict().items()}
    torch.save(weights | {"rm_head.weight": torch.randn(3, 32)}, checkpoint / "model.pth")
    inference = {f"{axis}_{kind}": value for axis in ("VQ", "MQ", "TA") for kind, value in (("mean", 0.1), ("std", 2.0))}
    (folder / "reward" / "model_config.json").write_text(json.dumps({"inference_config": inference}))
    (folder / "template.txt").write_text(OWN_WORDING.replace("\n", " "))
    (folder / "prompts.txt").write_text("a red fox\na fox runs over snow\n")
    return folder


def wan_run(folder, out, **changes):
    preset = PRESETS["wan-1.3b"]
    small = replace(preset.distillation, frames=3, micro_batches=1, exit_group=1, critic_steps=1, student_lr=1e-4, critic_lr=1e-4)
    settings = vars(preset) | {"steps": 2, "save_every": 1, "distillation": small} | changes
    return cli.WanRun(**settings, data=str(folder / "prompts.txt"), student=str(folder / "student.safetensors"), teacher=str(folder / "teacher.safetensors"),
                      base=str(folder / "base"), reward=str(folder / "reward"), reward_base=str(folder / "qwen"), template=str(folder / "template.txt"),
                      text_cache=str(out / "text"), latent_size=(4, 6), head_dim=24, out=str(out / "run"))


def test_the_command_trains_with_every_real_component(downloads, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_video_reward", lambda *args: resized(load_video_reward(*args)))
    cli.train(wan_run(downloads, tmp_path))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and not any("skipped" in r for r in records)
    assert all(math.isfinite(r[name]) for r in records for name in ("loss", "critic", "VQ", "MQ", "TA", "norm", "weight"))
    trained, start = load_tensors(tmp_path / "run" / "student.safetensors")[0], load_tensors(downloads / "student.safetensors")[0]
    assert trained.keys() == start.keys() and any(not torch.equal(trained[n], start[n]) for n in start)
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 3          # two prompts and the empty one
    cli.train(wan_run(downloads, tmp_path, steps=3, resume=True))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3


def resized(reward):
    reward.size = (28, 56)                    # the published 336 x 588 would be most of the test's time
    return reward.float()


def test_missing_files_are_named_before_any_work(downloads, tmp_path):
    for change, says in (("data", "absent"), ("student", "absent"), ("base", "text_encoder, tokenizer, vae"), ("reward", "checkpoint-N")):
        run = replace(wan_run(downloads, tmp_path), **{change: str(tmp_path / "absent")})
        with pytest.raises((OSError, ValueError), match=says):
            cli.train(run)
    assert not (tmp_path / "run").exists()


def test_video_reward_from_files(downloads):
    reward = resized(load_video_reward(downloads / "reward", downloads / "qwen", downloads / "template.txt"))
    clips = torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = reward(clips, ["a red fox", "a fox runs over snow"])
    sum(r.sum() for r in scores.values()).backward()
    assert set(scores) == {"VQ", "MQ", "TA"} and clips.grad.abs().sum() > 0
    alone = reward(clips[1:], ["a fox runs over snow"])
    assert all(torch.allclose(alone[a], scores[a][1:], atol=1e-4) for a in scores)
    with pytest.warns(UserWarning, match="our own wording"):
        load_video_reward(downloads / "reward", downloads / "qwen")


def test_models_that_do_not_fit_each_other(downloads, tmp_path):
    save_tensors(tmp_path / "other.safetensors", WanTransformer(replace(SIZE, text_dim=64)).state_dict())
    with pytest.raises(ValueError, match="teacher: expected the student's latents and text"):
        wan_models(downloads / "student.safetensors", tmp_path / "other.safetensors", downloads / "base", None, "cpu", head_dim=24)


def test_prompt_files_are_not_read_whole(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt number {i} {'x' * 200}\n" for i in range(20_000)))
    lines = PromptFile(path)
    assert len(lines) == 20_000 and lines[12_345].startswith("prompt number 12345 ")
    assert lines.places.itemsize * len(lines) < path.stat().st_size / 20


def test_the_command_generates_from_a_checkpoint(downloads, tmp_path, capsys):
    cli.generate(prompts=str(downloads / "prompts.txt"), seconds=0.5, out=str(tmp_path), checkpoint=str(downloads / "student.safetensors"),
                 base=str(downloads / "base"), latent_size=(4, 6), head_dim=24, text_cache=str(tmp_path / "text"))
    made = json.loads((tmp_path / "videos.json").read_text())
    assert [m["prompt"] for m in made] == ["a red fox", "a fox runs over snow"]
    clip, fps = read_mp4(tmp_path / made[1]["file"])
    assert clip.shape == (8, 3, 32, 48) and fps == 16


def test_processes_share_the_prompts(downloads, tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        cli.generate("tiny", ("a red 3 moving left", "a cyan 0 moving up", "a blue 7 moving down"), seconds=0.2, out=str(tmp_path))
    assert [[m["file"] for m in json.loads((tmp_path / f"videos-{r}.json").read_text())] for r in (0, 1)] == [["000.mp4", "002.mp4"], ["001.mp4"]]
