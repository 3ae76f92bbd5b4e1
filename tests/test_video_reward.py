"""VideoReward against the published code's numbers on a small random model.

Also its memory, and whatever must be refused.
"""

import copy
import json
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import videoreward_golden as gold
from conftest import relative_error
from transformers import Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from streamr1_ref.reward import AXES
from streamr1_ref.saliency import pixel_saliency
from streamr1_ref.utils.files import load_tensors, save_tensors
from streamr1_ref.wan import video_reward as module
from streamr1_ref.wan.build import SMALL, Sizes, random_reward
from streamr1_ref.wan.video_reward import (
    OWN_WORDING,
    REWARD_TOKENS,
    RewardInput,
    VideoReward,
    check_question,
    frame_size,
    frames_kept,
    in_chat,
    load_video_reward,
    offline_scores,
    prepare_frames,
    question,
    to_eight_bits,
    video_patches,
    vision_tower,
    with_checkpoint,
)

TRAIN = gold.names("train_[a-z]")
VQ, MQ, TA = REWARD_TOKENS


@pytest.fixture(scope="module")
def reward():
    return gold.reward()


def pixels(tensors):
    return tensors["pixels_u8"][None].float() / 255


# The published numbers


@pytest.mark.parametrize("name", TRAIN)
def test_golden_videoreward_text_and_tokens(reward, name):
    tensors, info = gold.load(name)
    place = "<|vision_start|><|video_pad|><|vision_end|>"
    assert (
        reward.question.text.replace("{video}", place).replace("{prompt}", info["prompt"])
        == info["text"]
    )
    ids, mask = reward.tokens([info["prompt"]], int(tensors["grid_thw"].prod()) // 4)
    assert torch.equal(ids, tensors["input_ids"]) and torch.equal(mask, tensors["attention_mask"])


@pytest.mark.parametrize("name", TRAIN)
def test_golden_videoreward_patches(name):
    tensors, info = gold.load(name)
    patches, grid = video_patches(pixels(tensors), tuple(info["size"]))
    assert (
        torch.equal(patches, tensors["patches"]) and grid.tolist() == tensors["grid_thw"].tolist()
    )


@pytest.mark.parametrize("name", TRAIN)
def test_golden_videoreward_positions_states_and_scores(reward, name):
    tensors, info = gold.load(name)
    seen = []
    rotary = reward.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[-1]), with_kwargs=True
    )
    ids, _ = reward.tokens([info["prompt"]], int(tensors["grid_thw"].prod()) // 4)
    with torch.no_grad():
        hidden = reward.hidden_states(
            *reward.to_patches(pixels(tensors)), ids, reward.question.video_id
        )
        scores = reward(pixels(tensors), [info["prompt"]])
    hook.remove()
    assert torch.equal(seen[0].expand(3, 1, -1), tensors["position_ids"])
    at = hidden[:, reward.question.places(ids)[0]]
    assert (at - tensors["hidden_at_rewards"]).abs().max() < 1e-5
    assert (gold.raw(reward, scores) - tensors["raw"]).abs().max() < 1e-5
    normalised = torch.cat([scores[axis] for axis in AXES])
    assert (normalised - tensors["normalised"]).abs().max() < 1e-5
    assert abs(normalised.mean() - tensors["overall"].squeeze()) < 1e-5


@pytest.mark.parametrize("name", gold.names("train_[a-z]_grads"))
def test_golden_videoreward_gradients_at_patches(reward, name):
    tensors, info = gold.load(name.removesuffix("_grads"))
    patches, grid = reward.to_patches(pixels(tensors))
    scores = gold.raw(
        reward, reward.score_patches(patches.requires_grad_(), grid, [info["prompt"]])
    )[0]
    for i, expected in enumerate(gold.load(name)[0]["grad_patches"]):
        (gradient,) = torch.autograd.grad(scores[i], patches, retain_graph=True)
        assert relative_error(gradient, expected) < 3e-5


@pytest.mark.parametrize("name", gold.names("train_[a-z]_derived"))
def test_golden_videoreward_gradients_at_pixels(reward, name):
    tensors, info = gold.load(name.removesuffix("_derived"))
    leaf = pixels(tensors).requires_grad_()
    (gradient,) = torch.autograd.grad(gold.raw(reward, reward(leaf, [info["prompt"]])).sum(), leaf)
    assert relative_error(gradient[0], gold.load(name)[0]["grad_pixels_sum"]) < 3e-5


def test_golden_videoreward_batch_is_padded(reward):
    batch, prompts = gold.load("train_batch")[0], gold.load("model")[1]["prompts"]
    clips = [gold.load(name)[0] for name in ("train_a", "train_b")]
    counts = (batch["grid_thw"].prod(1) // 4).tolist()
    ids, mask = reward.tokens(prompts, counts)
    assert torch.equal(ids, batch["input_ids"]) and torch.equal(mask, batch["attention_mask"])
    patches = torch.cat([reward.to_patches(pixels(clip))[0] for clip in clips])
    with torch.no_grad():
        hidden = reward.hidden_states(patches, batch["grid_thw"], ids, reward.question.video_id)
        scores = reward.score_patches(patches, batch["grid_thw"], prompts)
    at = torch.stack([h[p] for h, p in zip(hidden, reward.question.places(ids))])
    assert (at - batch["hidden_at_rewards"]).abs().max() < 1e-5
    assert (gold.raw(reward, scores) - batch["raw"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", gold.names("offline_[a-z]"))
def test_golden_videoreward_offline_scores_of_files(reward, name):
    tensors, info = gold.load(name)
    frames = tensors["frames_u8"][None].float() / 255
    limits = {key: info[key] for key in ("fps", "max_pixels", "min_pixels")}
    kept = frames_kept(frames.shape[1], info["video_fps"], info["fps"])
    size = frame_size(*frames.shape[-2:], info["max_pixels"], info["min_pixels"])
    patches, grid = video_patches(frames[:, kept], size, how=RewardInput(eight_bits="round"))
    assert torch.equal(patches, tensors["patches"]) and torch.equal(grid, tensors["grid_thw"])
    ids, _ = reward.tokens([info["prompt"]], int(grid.prod()) // 4)
    assert torch.equal(ids, tensors["input_ids"])
    scores, record = offline_scores(reward, frames, info["video_fps"], [info["prompt"]], **limits)
    assert (gold.raw(reward, scores) - tensors["raw"]).abs().max() < 1e-5
    assert (torch.cat([scores[axis] for axis in AXES]) - tensors["normalised"]).abs().max() < 1e-5
    assert (
        record["eight_bits"] == "round"
        and record["size"] == list(size)
        and str(len(kept)) in record["frames"]
    )


def test_golden_videoreward_sampling_rules():
    rules = json.loads(gold.find("sampling.json").read_text())
    for key, n in rules["frames_kept"]["table"].items():
        total, fps = key.split("@")
        assert len(frames_kept(int(total), float(fps))) == n, key
        assert (
            frames_kept(int(total), float(fps))
            == torch.linspace(0, int(total) - 1, n).round().long().tolist()
        )
    for key, size in rules["size"]["table"].items():
        assert list(frame_size(*map(int, key.split("x")))) == size, key


# Errata, each on the published numbers


def test_golden_videoreward_vq_and_mq_do_not_see_the_prompt(reward):
    tensors, prompts = gold.load("train_a")[0], gold.load("model")[1]["prompts"]
    with torch.no_grad():
        own, other = (gold.raw(reward, reward(pixels(tensors), [prompt]))[0] for prompt in prompts)
    quoted = re.search(r"\[(.*)\]", gold.load("train_batch")[1]["vq_mq_do_not_see_the_prompt"])[1]
    assert (other - torch.tensor([float(x) for x in quoted.split(",")])).abs().max() < 1e-5
    assert (own - other)[:2].abs().max() < 1e-6 and (own - other)[2].abs() > 1e-2
    with pytest.warns(UserWarning, match="VQ and MQ depend on the prompt"):
        front = gold.reward(
            template="{video} {prompt} "
            + gold.wording().removeprefix("{video}").replace("{prompt}", "")
        )
    with torch.no_grad():
        own, other = (gold.raw(front, front(pixels(tensors), [prompt]))[0] for prompt in prompts)
    assert (own - other)[:2].abs().min() > 1e-3


def test_golden_videoreward_positions_are_one_dimensional(reward):
    tensors, info = gold.load("train_a")
    ids, model = tensors["input_ids"], copy.deepcopy(reward.model)
    settings = {
        "pixel_values_videos": tensors["patches"],
        "video_grid_thw": tensors["grid_thw"],
        "use_cache": False,
    }
    scores = {}
    for name, extra in (
        ("1-D", {"position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1)}),
        ("multi-axis", {"mm_token_type_ids": 2 * (ids == reward.question.video_id).int()}),
    ):
        with torch.no_grad():
            scores[name] = reward.at_tokens(
                ids, model(input_ids=ids, **settings, **extra).last_hidden_state
            )
    assert (
        scores["1-D"] - tensors["raw"]
    ).abs().max() < 1e-5  # the library itself, told the positions
    assert (scores["multi-axis"] - tensors["raw"]).abs().max() > 0.5


def test_golden_videoreward_odd_frame_is_dropped(reward):
    tensors, info = gold.load("train_a")
    assert tensors["pixels_u8"].shape[0] % 2 == 1
    repeating = gold.reward(reward_input=RewardInput(odd_frame="repeat"))
    with torch.no_grad():
        dropped, repeated = (
            gold.raw(m, m(pixels(tensors), [info["prompt"]])) for m in (reward, repeating)
        )
        shorter = gold.raw(reward, reward(pixels(tensors)[:, :-1], [info["prompt"]]))
    assert torch.equal(dropped, shorter) and (repeated - tensors["raw"]).abs().max() > 1e-2
    assert (
        repeating.to_patches(pixels(tensors))[1][0, 0]
        == reward.to_patches(pixels(tensors))[1][0, 0] + 1
    )


def test_golden_videoreward_clamp_and_255_times_the_pixels():
    tensors, info = gold.load("train_a")
    size, free = tuple(info["size"]), RewardInput(clamp=False, eight_bits="none")
    plain = prepare_frames(pixels(tensors), size, free)
    share = ((plain < 0) | (plain > 1)).float().mean().item()
    assert abs(share - info["overshoot_share"]) < 1e-3  # as the published resize overshoots
    assert prepare_frames(pixels(tensors), size).aminmax() == (0, 1)
    loud = prepare_frames(
        255 * (2 * pixels(tensors) - 1), size, free
    )  # what Reward Forcing hands over
    assert ((loud < 0) | (loud > 1)).float().mean() > 0.9 and loud.abs().max() > 200


def test_golden_videoreward_eight_bits_have_no_gradient_in_the_published_code(reward):
    tensors, info = gold.load("train_b")
    leaf = pixels(tensors).requires_grad_()
    rounded = (255 * leaf.clamp(0, 1)).floor() / 255  # as a picture library casts
    scores = reward(rounded, [info["prompt"]])
    assert (
        sum(
            torch.autograd.grad(r.sum(), leaf, retain_graph=True)[0].abs().max()
            for r in scores.values()
        )
        == 0
    )
    ours = reward(leaf, [info["prompt"]])
    assert all(torch.equal(ours[a], scores[a]) for a in AXES)
    assert torch.autograd.grad(ours["VQ"].sum(), leaf)[0].abs().max() > 0


def test_golden_videoreward_overall_is_a_mean_in_training_and_a_sum_offline():
    train, offline = gold.load("train_a")[0], gold.load("offline_a")[0]
    assert torch.allclose(train["normalised"].mean(), train["overall"].squeeze(), atol=1e-6)
    assert torch.allclose(offline["normalised"].sum(), offline["overall"].squeeze(), atol=1e-6)
    assert (offline["normalised"].mean() - offline["overall"].squeeze()).abs() > 0.1
    assert gold.reward().record()["overall"] == "mean"


def test_videoreward_the_published_processor_resizes_small_frames_again(reward):
    frame = (torch.rand(28, 84, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    grid = Qwen2VLImageProcessorPil(**limits)(frame, return_tensors="pt")["image_grid_thw"][
        0
    ].tolist()
    assert grid != [1, 2, 6]  # 28 x 84 pixels would be 2 x 6 patches
    small = VideoReward(*gold.network(), gold.tokenizer(), gold.wording(), *gold.scales(), (28, 84))
    assert small.record()["resized_again"] and not reward.record()["resized_again"]
    assert small.to_patches(torch.rand(1, 2, 3, 28, 84))[1].tolist() == [[1, 2, 6]]  # ours does not


# Input


def test_videoreward_input_is_validated_and_recorded(reward):
    assert RewardInput() == RewardInput("drop", True, "floor")
    for wrong, says in (
        ({"odd_frame": "keep"}, "odd_frame: expected one of 'drop', 'repeat', got 'keep'"),
        ({"clamp": 2}, "clamp: expected one of True, False, got 2"),
        ({"eight_bits": "ceil"}, "eight_bits: expected one of .*, got 'ceil'"),
        ({"clamp": False}, "clamp: expected True with eight_bits='floor'"),
    ):
        with pytest.raises(ValueError, match=says):
            RewardInput(**wrong)
    record = reward.record()
    assert json.loads(json.dumps(record)) == record
    assert {
        k: record[k]
        for k in (
            "odd_frame",
            "clamp",
            "eight_bits",
            "size",
            "dtype",
            "head_dtype",
            "chat",
            "own_wording",
        )
    } == {
        "odd_frame": "drop",
        "clamp": True,
        "eight_bits": "floor",
        "size": [56, 84],
        "dtype": "float32",
        "head_dtype": "float32",
        "chat": True,
        "own_wording": False,
    }
    other = gold.reward(
        template=OWN_WORDING, reward_input=RewardInput("repeat", False, "none")
    ).record()
    assert (
        other["own_wording"]
        and other["question"] != record["question"]
        and other["odd_frame"] == "repeat"
    )


def test_videoreward_straight_through():
    x = torch.linspace(0, 1, 100, requires_grad=True)
    for rounding in ("floor", "round", "none"):
        weights = torch.rand(100, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((weights * to_eight_bits(x, rounding)).sum(), x)
        assert torch.equal(gradient, weights)


def test_videoreward_bad_pixels_and_sizes(reward):
    with pytest.raises(ValueError, match="pixels: expected at least 2 frames"):
        reward(torch.rand(1, 1, 3, 56, 84), ["a"])
    with pytest.raises(ValueError, match="pixels: expected B=1"):
        reward(torch.rand(2, 2, 3, 56, 84), ["a"])
    with pytest.raises(TypeError, match="pixels: expected a floating-point tensor"):
        reward(torch.zeros(1, 2, 3, 56, 84, dtype=torch.uint8), ["a"])
    for size in ((30, 28), (0, 28), (28,)):
        with pytest.raises(ValueError, match="size: expected height and width in multiples of 28"):
            VideoReward(*gold.network(), gold.tokenizer(), gold.wording(), *gold.scales(), size)
    for mean, std in (
        ([0.0] * 2, [1.0] * 3),
        ([0.0] * 3, [1.0, 0.0, 1.0]),
        ([math.nan] * 3, [1.0] * 3),
    ):
        with pytest.raises(ValueError, match="mean, std: expected three finite numbers"):
            VideoReward(*gold.network(), gold.tokenizer(), gold.wording(), mean, std, (56, 84))


# The question

BAD_TEMPLATES = {
    "no video": f"{VQ} {MQ} {{prompt}} {TA}",
    "no prompt": f"{{video}} {VQ} {MQ} {TA}",
    "no TA": f"{{video}} {VQ} {MQ} {{prompt}}",
    "VQ twice": f"{{video}} {VQ} {VQ} {MQ} {{prompt}} {TA}",
    "order": f"{{video}} {MQ} {VQ} {{prompt}} {TA}",
    "video last": f"{VQ} {MQ} {{prompt}} {TA} {{video}}",
    "prompt last": f"{{video}} {VQ} {MQ} {TA} {{prompt}}",
    "empty": "",
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_videoreward_bad_templates_are_refused_before_any_weights(
    kind, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "read_weights", lambda *a: pytest.fail("weights were read"))
    monkeypatch.setattr(
        Qwen2VLModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were read")
    )
    path = tmp_path / "bad.txt"
    path.write_text(BAD_TEMPLATES[kind])
    with pytest.raises(ValueError, match=r"template: expected .*\{video\}.*bad.txt, got"):
        load_video_reward(*checkpoint, path)
    with pytest.raises(ValueError, match="template: expected"):
        check_question(BAD_TEMPLATES[kind])


def test_videoreward_templates_in_other_ways_bad(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="template: expected a text file .*absent.txt does not exist"
    ):
        question(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="template: expected a text file in UTF-8, .*latin.txt"):
        question(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="tokenizer: expected a chat template"):
        in_chat(gold.wording(), gold.tokenizer(chat=False))
    with pytest.raises(ValueError, match=r"template: expected \{video\} first"):
        in_chat("Look " + gold.wording(), gold.tokenizer())


def test_videoreward_own_wording_is_in_the_published_order_and_inside_the_chat_template(reward):
    own = in_chat(OWN_WORDING, gold.tokenizer())
    parts = (
        "<|im_start|>system",
        "<|im_end|>",
        "<|im_start|>user",
        "{video}",
        VQ,
        MQ,
        "{prompt}",
        TA,
        "<|im_start|>assistant\n",
    )
    places = [own.index(part) for part in parts]
    assert places == sorted(places) and own.endswith("<|im_start|>assistant\n")
    assert in_chat(own, gold.tokenizer()) == own  # turns of its own: left alone


@pytest.mark.parametrize(
    "token",
    [
        "<|VQ_reward|>",
        "<|TA_reward|>",
        "<|video_pad|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ],
)
def test_videoreward_prompts_with_special_tokens_are_refused_by_name(reward, token):
    with pytest.raises(
        ValueError, match=r"prompts: a prompt must not contain " + re.escape(token) + ", got 'a fox"
    ):
        reward(torch.rand(1, 2, 3, 56, 84), [f"a fox {token} runs"])
    assert (
        reward.tokens(["{video} {prompt}"], 4)[0].eq(reward.question.video_id).sum() == 4
    )  # braces are only text


# Network and memory


class Calls:
    """Counts calls of F.scaled_dot_product_attention while it is patched in."""

    def __init__(self, monkeypatch, attention=F.scaled_dot_product_attention):
        self.n, self.attention = 0, attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", self)

    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.attention(*args, **kwargs)


@pytest.mark.parametrize("clips", [1, 2])
def test_videoreward_vision_attention_is_one_call_a_layer(reward, clips, monkeypatch):
    visual, (tensors, _) = reward.model.visual, gold.load("train_a")
    patches, grid = tensors["patches"].repeat(clips, 1), tensors["grid_thw"].repeat(clips, 1)
    with torch.no_grad():
        calls = Calls(monkeypatch)
        theirs = visual(patches, grid_thw=grid).pooler_output
        assert calls.n == len(visual.blocks) * int(grid[:, 0].sum())
        calls.n = 0
        ours = vision_tower(visual, patches, grid)
    assert calls.n == len(visual.blocks)
    assert (ours - theirs).abs().max() < 1e-6 * max(1, theirs.abs().max())


@pytest.mark.parametrize("recompute, calls", [(True, 4), (False, 1)])
def test_videoreward_layers_are_recomputed_in_eval_mode(recompute, calls):
    model = gold.reward(recompute=recompute).eval()
    tensors, info = gold.load("train_b")
    counts = {}
    for name, layer in (
        *enumerate(model.model.language_model.layers),
        *((f"v{i}", b) for i, b in enumerate(model.model.visual.blocks)),
    ):
        layer.mlp.register_forward_pre_hook(
            lambda *_, name=name: counts.__setitem__(name, counts.get(name, 0) + 1)
        )
    rewards, maps = pixel_saliency(model, pixels(tensors), [info["prompt"]])
    assert (
        set(counts.values()) == {calls} and len(counts) == 4
    )  # one forward pass, three backward passes
    assert (gold.raw(model, rewards) - tensors["raw"]).abs().max() < 1e-5
    assert not model.training and not model.model.visual.training


def test_videoreward_random_one_recomputes_too():
    model, counts = random_reward(SMALL), []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: counts.append("reader")
    )
    model.model.visual.blocks[0].mlp.register_forward_pre_hook(lambda *_: counts.append("vision"))
    pixel_saliency(model.eval(), torch.rand(1, 5, 3, 28, 56), ["a red fox"])
    assert counts.count("reader") == counts.count("vision") == 4


def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The kernel that a GPU takes; the meta device's keeps all attention weights."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q, k, v, 0.0, is_causal, scale=scale)[0]


@pytest.mark.slow
@pytest.mark.parametrize("recompute, least, most", [(True, 3, 6), (False, 50, 80)])
def test_videoreward_saved_bytes_at_true_size(recompute, least, most, monkeypatch):
    """81 frames of 480 x 832 through the 2B model in bfloat16, without any value."""
    model = random_reward(Sizes(), "meta", torch.bfloat16)
    model.recompute = recompute
    model.eval()
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x  # held, so that no address comes twice
        return x

    calls = Calls(monkeypatch, flash)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores = model(
            torch.empty(1, 81, 3, 480, 832, device="meta", requires_grad=True), ["a red fox"]
        )
    saved = sum(x.untyped_storage().nbytes() for x in kept.values()) / 2**30
    assert least < saved < most, saved
    assert calls.n == 32 + 28 and scores["VQ"].shape == (1,)


def test_videoreward_rotary_frequencies_stay_exact_in_bfloat16():
    rounded = copy.deepcopy(gold.network()[0]).to(torch.bfloat16)
    assert rounded.language_model.rotary_emb.inv_freq.dtype == torch.bfloat16  # what a cast does
    exact = (
        gold.network()[0].language_model.rotary_emb.inv_freq,
        gold.network()[0].visual.rotary_pos_emb.inv_freq,
    )
    for model in (
        VideoReward(
            rounded, gold.network()[1], gold.tokenizer(), gold.wording(), *gold.scales(), (56, 84)
        ),
        gold.reward().to(torch.bfloat16),
        random_reward(SMALL, dtype=torch.bfloat16),
    ):
        parts = model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb
        assert all(part.inv_freq.dtype == torch.float32 for part in parts)
        assert model.model.dtype == torch.bfloat16
        if model.size == (56, 84):
            assert all(torch.equal(part.inv_freq, expected) for part, expected in zip(parts, exact))


# Checkpoints


@pytest.fixture(scope="module")
def peft_names():
    return gold.load("checkpoint")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, peft_names):
    """(reward folder, base folder) as a person would have downloaded them.

    The checkpoint is a model.pth with peft names.
    """
    root = tmp_path_factory.mktemp("reward")
    base = Qwen2VLModel(gold.config())
    plain = {
        module.our_name(n): t
        for n, t in peft_names[0].items()
        if not re.search("lora_|lm_head|rm_head", n)
    }
    base.load_state_dict(plain)
    base.save_pretrained(root / "qwen")
    gold.tokenizer().save_pretrained(root / "qwen")
    write(root / "reward", peft_names[1]["model_config"], {"model.pth": peft_names[0]})
    return root / "reward", root / "qwen"


def write(folder, config, files):
    place = folder / "checkpoint-7"
    place.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        (save_tensors if name.endswith("safetensors") else lambda path, x: torch.save(x, path))(
            place / name, tensors
        )
    return folder


def layout(kind, peft_names):
    tensors = peft_names[0]
    if kind == "merged":
        return {"model.pth": {n.removeprefix("w."): t for n, t in gold.load("model")[0].items()}}
    if kind == "peft":
        return {"model.pth": dict(tensors)}
    return {
        "adapter_model.safetensors": {
            n.replace(".default.", "."): t for n, t in tensors.items() if ".lora_" in n
        },
        "non_lora_state_dict.pth": {
            n: t for n, t in tensors.items() if re.search("visual|rm_head|embed_tokens", n)
        },
    }


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text(gold.wording())
    return path


@pytest.mark.parametrize("kind", ["split", "merged", "peft"])
def test_golden_videoreward_all_published_layouts_load(
    kind, checkpoint, peft_names, template, tmp_path
):
    folder = write(tmp_path / "reward", peft_names[1]["model_config"], layout(kind, peft_names))
    model = load_video_reward(folder, checkpoint[1], template, torch.float32, (56, 84))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    for name in TRAIN:
        tensors, info = gold.load(name)
        with torch.no_grad():
            scores = model(pixels(tensors), [info["prompt"]])
        assert (gold.raw(model, scores) - tensors["raw"]).abs().max() < 1e-5


def test_videoreward_chat_template_in_a_file_of_its_own(checkpoint, template, tmp_path):
    base = tmp_path / "qwen"
    Qwen2VLModel.from_pretrained(checkpoint[1]).save_pretrained(base)
    gold.tokenizer(chat=False).save_pretrained(base)
    with pytest.raises(ValueError, match="tokenizer: expected a chat template"):
        load_video_reward(checkpoint[0], base, template)
    (base / "chat_template.json").write_text(
        json.dumps({"chat_template": gold.load("model")[1]["chat_template"]})
    )
    assert load_video_reward(
        checkpoint[0], base, template, torch.float32, (56, 84)
    ).question.text.startswith("<|im_start|>system")


FC, UP = "visual.blocks.0.mlp.fc1.weight", "base_model.model.model.layers.1.mlp.up_proj"
drop = lambda name: lambda x: x.pop(name)
change = lambda name, f: lambda x: x.update({name: f(x[name])})
DAMAGE = {
    "missing": (
        "merged",
        "model.pth",
        drop(FC),
        "1 tensors are missing in .*checkpoint-7, such as visual.blocks.0.mlp.fc1",
    ),
    "no head": ("merged", "model.pth", drop("rm_head.weight"), "such as rm_head.weight"),
    "unexpected": (
        "merged",
        "model.pth",
        lambda x: x.update(nonsense=torch.ones(1)),
        "1 tensors of .*model.pth have no place .*nonsense",
    ),
    "shape": (
        "merged",
        "model.pth",
        change(FC, lambda t: t[:3]),
        "model.pth: visual.blocks.0.mlp.fc1.weight: expected shape .*, got",
    ),
    "one row": (
        "merged",
        "model.pth",
        change("rm_head.weight", lambda t: t[:1]),
        r"rm_head.weight: expected shape \[3, 64\], got \[1, 64\]",
    ),
    "NaN": (
        "merged",
        "model.pth",
        change(FC, lambda t: t * math.nan),
        "model.pth: .*fc1.weight: expected finite values",
    ),
    "inf": (
        "merged",
        "model.pth",
        change("model.norm.weight", lambda t: t * math.inf),
        "model.norm.weight: expected finite values",
    ),
    "int": (
        "merged",
        "model.pth",
        change(FC, lambda t: t.long()),
        "expected floating-point numbers, got torch.int64",
    ),
    "bool": (
        "merged",
        "model.pth",
        change(FC, lambda t: t > 0),
        "expected floating-point numbers, got torch.bool",
    ),
    "complex": (
        "merged",
        "model.pth",
        change(FC, lambda t: t.cfloat()),
        "expected floating-point numbers, got torch.complex64",
    ),
    "float8": (
        "merged",
        "model.pth",
        change(FC, lambda t: t.to(torch.float8_e4m3fn)),
        "got torch.float8_e4m3fn",
    ),
    "no tensor": (
        "merged",
        "model.pth",
        change(FC, lambda t: 3),
        "expected floating-point numbers, got int",
    ),
    "peft half": (
        "peft",
        "model.pth",
        drop(f"{UP}.lora_A.default.weight"),
        "such as language_model.layers.1.mlp.up_proj.lora_A.weight",
    ),
    "peft base": (
        "peft",
        "model.pth",
        drop(f"{UP}.base_layer.weight"),
        "such as language_model.layers.1.mlp.up_proj.weight",
    ),
    "peft NaN": (
        "peft",
        "model.pth",
        change(f"{UP}.lora_B.default.weight", lambda t: t * math.nan),
        "lora_B.default.weight: expected finite",
    ),
    "split half": (
        "split",
        "adapter_model.safetensors",
        drop(f"{UP}.lora_B.weight"),
        "mlp.up_proj.lora_B.weight",
    ),
    "split rank": (
        "split",
        "adapter_model.safetensors",
        change(f"{UP}.lora_A.weight", lambda t: t[:2].clone()),
        "checkpoint: .*expected .* got",
    ),
    "split embedding": (
        "split",
        "non_lora_state_dict.pth",
        drop("base_model.model.model.embed_tokens.weight"),
        "embed_tokens.weight",
    ),
    "split vision": (
        "split",
        "non_lora_state_dict.pth",
        drop(f"base_model.model.{FC}"),
        "such as visual.blocks.0.mlp.fc1",
    ),
    "split head": (
        "split",
        "non_lora_state_dict.pth",
        drop("base_model.model.rm_head.weight"),
        "such as rm_head.weight",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_videoreward_damaged_checkpoints_are_refused_and_named(kind, peft_names, tmp_path):
    shape, file, damage, says = DAMAGE[kind]
    files = layout(shape, peft_names)
    damage(files[file])
    folder = write(tmp_path, peft_names[1]["model_config"], files)
    model, head = Qwen2VLModel(gold.config()), torch.nn.Linear(64, 3, bias=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        with_checkpoint(
            model, head, folder / "checkpoint-7", peft_names[1]["model_config"]["peft_lora_config"]
        )
    assert all(
        torch.equal(t, before[n]) for n, t in model.state_dict().items()
    )  # and nothing was put in


def test_videoreward_checkpoints_without_files_or_settings(
    checkpoint, peft_names, template, tmp_path
):
    config = peft_names[1]["model_config"]
    loads = lambda folder, **k: load_video_reward(
        folder, checkpoint[1], template, torch.float32, (56, 84), **k
    )
    with pytest.raises(FileNotFoundError, match="expected a checkpoint-N in"):
        loads(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match="checkpoint: expected model.pth, or .*missing: adapter_model.safetensors, non_lora",
    ):
        loads(write(tmp_path / "none", config, {}))
    files = layout("split", peft_names)
    with pytest.raises(FileNotFoundError, match="missing: non_lora_state_dict.pth"):
        loads(
            write(
                tmp_path / "half",
                config,
                {"adapter_model.safetensors": files["adapter_model.safetensors"]},
            )
        )
    for lora in (
        {},
        {"lora_r": 4},
        {"lora_r": "4", "lora_alpha": 8},
        {"lora_r": 4, "lora_alpha": 0},
    ):
        with pytest.raises(
            ValueError,
            match="model_config.json: expected positive numbers for lora_r and lora_alpha",
        ):
            loads(
                write(
                    tmp_path / "lora",
                    config | {"peft_lora_config": lora},
                    layout("peft", peft_names),
                )
            )
    with pytest.raises(ValueError, match="model_config.json: expected a finite number for TA_std"):
        loads(
            write(
                tmp_path / "std",
                config | {"inference_config": config["inference_config"] | {"TA_std": 0}},
                {},
            )
        )
    folder = write(tmp_path / "list", config, {"model.pth": [1, 2]})
    with pytest.raises(ValueError, match="path: expected tensors by name in .*model.pth, got list"):
        loads(folder)
    (folder / "model_config.json").write_text("{")
    with pytest.raises(ValueError, match="model_config.json: .* is no JSON"):
        loads(folder)
    (folder / "checkpoint-7" / "model.pth").write_bytes(b"garbage")
    write(folder, config, {})
    with pytest.raises(ValueError, match="model.pth .*is damaged"):
        loads(folder)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**9),
        ("vocab_size", -1),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", None),
        ("num_hidden_layers", True),
    ],
)
def test_videoreward_sizes_in_the_base_are_not_believed(
    name, value, checkpoint, template, tmp_path
):
    gold.tokenizer().save_pretrained(tmp_path)
    config = json.loads((checkpoint[1] / "config.json").read_text())
    config["text_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"base: expected {name} of 1 to .*config.json, got"):
        load_video_reward(checkpoint[0], tmp_path, template)


def test_videoreward_damaged_bases_are_named(checkpoint, tmp_path):
    base = tmp_path / "qwen"
    Qwen2VLModel.from_pretrained(checkpoint[1]).save_pretrained(base)
    weights, name = load_tensors(base / "model.safetensors")[0], "visual.merger.ln_q.bias"
    for damaged, says in (
        (
            {n: t for n, t in weights.items() if n != name},
            f"base: 1 tensors are missing in .*qwen, such as .*{name}",
        ),
        (
            weights | {name: weights[name] * math.nan},
            f"base: expected finite values in .*qwen, {name} has others",
        ),
        (weights | {name: weights[name][:3].clone()}, "base: expected a Qwen2-VL in .*qwen"),
    ):
        save_tensors(base / "model.safetensors", damaged, {"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=says):
                module.load_base(base, 68)
    (base / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="base: expected a Qwen2-VL in .*qwen"):
        module.load_base(base, 68)


@pytest.mark.parametrize("scale, shift", [(2, -1), (255, 0)])
def test_videoreward_pixels_of_another_range_are_refused(reward, scale, shift):
    frames = torch.rand(1, 4, 3, 56, 84, generator=torch.Generator().manual_seed(0)) * scale + shift
    for call in (lambda: reward(frames, ["a"]), lambda: offline_scores(reward, frames, 2.0, ["a"])):
        with pytest.raises(ValueError, match=r"pixels: expected values in \[0,1\], got"):
            call()
    reward(frames.clamp(-0.1, 1.1), ["a"])  # a resize may overshoot
